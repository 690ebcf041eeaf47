"""Execute atomics and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import formats, memory
from .accesses import SCOPED, Target, address_reader, require_written, space_of, targets
from .arithmetic import packed
from .formats import RAW
from .instructions import Runner, builds, unsupported
from .parser import TYPE_BYTES, Instruction, Sink
from .threads import Array, Mask, extend, reader

if TYPE_CHECKING:
    from .machine import Launch

_UPDATE: dict[str, Callable[..., Array]] = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda _, new: new, "min": np.minimum, "max": np.maximum,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}  # fmt: skip


@builds("atom red", f"{SCOPED} {' '.join(_UPDATE)} noftz")
def _atomic(ins: Instruction) -> Runner:
    space, type_ = space_of(ins), ins.type
    name = next(m for m in ins.modifiers if m in _UPDATE)
    if ins.vector_length > 1:
        raise unsupported(ins)
    size = TYPE_BYTES[type_]
    update = packed(_UPDATE[name], type_.removesuffix("x2")) if type_.endswith("x2") else _UPDATE[name]
    returns = ins.opcode == "atom"
    address, destination = address_reader(ins, ins.operands[returns]), ins.operands[0]
    count = 2 if name == "cas" else 1  # a cache policy may follow
    sources = [reader(ins, operand, type_) for operand in ins.operands[1 + returns : 1 + returns + count]]

    def run(launch: Launch, active: Mask) -> None:
        lanes = launch.threads.indices(active)
        values = [launch.threads.everywhere(source(launch.threads))[lanes] for source in sources]
        for target in targets(launch, ins, address(launch), lanes, size, space):
            launch.polls += 1
            launch.counters.access(launch, ins, target, size, "store")
            require_written(launch, ins, target, size)
            if launch.races:
                launch.races.load(ins, target, size)
                launch.races.store(ins, target, size, None)
            old = _update(launch, ins, target, update, [value[target.picked] for value in values])
            if returns and not isinstance(destination, Sink):
                launch.threads.set_lanes(destination.index, extend(old, type_, destination), target.lanes)

    return run


def _update(
    launch: Launch, ins: Instruction, target: Target, update: Callable[..., Array], values: list[Array]
) -> Array:
    """Read, modify and write lane after lane, in the schedule's order; return the bits that each lane has read."""
    type_, size = ins.type, TYPE_BYTES[ins.type]
    cells = memory.rows(target.region.memory, size).reshape(-1)
    index, old = target.offsets // size, np.empty(len(target.lanes), RAW[size])
    order = range(len(index)) if launch.rng is None else launch.rng.permutation(len(index)).tolist()
    if launch.races:
        launch.races.synchronise(ins, target, order)
    unique = len(np.unique(index)) == len(index)
    for chosen in [slice(None)] if unique else order:
        found = cells[index[chosen]]
        new = formats.encode(update(formats.decode(found, type_), *(v[chosen] for v in values)), type_)
        old[chosen], cells[index[chosen]] = found, new
        if np.any(new != found):
            launch.progress += 1
    return old


@builds("membar fence", "gl cta sys cluster gpu acq_rel sc acquire release")
def _fence(ins: Instruction) -> Runner:
    narrow = "cta" in ins.modifiers

    def run(launch: Launch, active: Mask) -> None:
        if launch.races:
            launch.races.fence(active, narrow)

    return run
