"""Atomics and fences: the instructions by which threads agree without a barrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import formats, memory
from .accesses import (
    Array,
    LaunchRunner,
    Target,
    address_reader,
    builds,
    extend,
    require_written,
    space_of,
    targets,
)
from .arithmetic import packed, unsupported
from .formats import RAW
from .parser import TYPE_BYTES, Instruction, Sink
from .threads import reader

if TYPE_CHECKING:
    from .machine import Launch

_UPDATE: dict[str, Callable[..., Array]] = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda _, new: new, "min": np.minimum, "max": np.maximum,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}  # fmt: skip


@builds("atom", "red")
def _atomic(ins: Instruction) -> LaunchRunner:
    space, type_ = space_of(ins), ins.type
    name = next((m for m in ins.modifiers if m in _UPDATE), None)
    if name is None or ins.vector_length > 1:
        raise unsupported(ins)
    update, size = _UPDATE[name], TYPE_BYTES[type_]
    if type_.endswith("x2"):
        update = packed(update, type_.removesuffix("x2"))
    returns = ins.opcode == "atom"
    address = address_reader(ins, ins.operands[1 if returns else 0])
    sources = [reader(ins, operand, type_) for operand in ins.operands[2 if returns else 1 :]]

    def run(launch: Launch, active: Array | None) -> None:
        lanes = launch.threads.indices(active)
        values = [launch.threads.everywhere(source(launch.threads))[lanes] for source in sources]
        for target in targets(launch, ins, address(launch), lanes, size, space):
            mine = [value[target.picked] for value in values]
            old = _read_modify_write(launch, ins, target, update, mine, type_)
            destination = ins.operands[0]
            if returns and not isinstance(destination, Sink):
                launch.threads.set_lanes(destination.index, extend(old, type_, destination), target.lanes)

    return run


def _read_modify_write(
    launch: Launch,
    ins: Instruction,
    target: Target,
    update: Callable[..., Array],
    values: list[Array],
    type_: str,
) -> Array:
    """Apply an atomic lane after lane, in the schedule's order; returns the bits each lane found."""
    size = TYPE_BYTES[type_]
    launch.polls += 1
    launch.counters.access(launch, ins, target, size, "store")
    if launch.checks.initialised:
        require_written(launch, ins, target, size)
    if launch.races:
        launch.races.access(ins, target, size, None, strong=True)
        launch.races.access(ins, target, size, np.zeros((len(target.lanes), size), np.uint8), strong=True)
    cells = memory.rows(target.memory, size).reshape(-1)
    index, old = target.offsets // size, np.empty(len(target.lanes), RAW[size])
    order = launch.lane_order(len(index))
    if launch.races:
        launch.races.synchronise(ins, target, order)
    unique = len(np.unique(index)) == len(index)
    for chosen in [slice(None)] if unique else order:
        found = cells[index[chosen]]
        new = formats.encode(update(formats.decode(found, type_), *(v[chosen] for v in values)), type_)
        old[chosen] = found
        if np.any(new != found):
            launch.progress += 1
        cells[index[chosen]] = new
    return old


@builds("membar", "fence")
def _fence(ins: Instruction) -> LaunchRunner:
    if "proxy" in ins.modifiers:
        raise unsupported(ins)

    def run(launch: Launch, active: Array | None) -> None:
        if launch.races:
            launch.races.fence(active)

    return run
