"""Execute loads and stores: resolve, check, count and then carry out every access.

A runner receives the launch (`machine.Launch`), which owns the memories, the counters and the race detector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import memory
from .formats import RAW, VALUE
from .instructions import Runner, builds, unsupported
from .memory import IN_FLIGHT, WRITTEN, Region
from .parser import TYPE_BYTES, Address, Instruction, Operand, Register, Sink, Symbol, Vector
from .threads import (
    LOCAL_WINDOW,
    RANK_SHIFT,
    SHARED_WINDOW,
    WARP,
    Array,
    Mask,
    bits_reader,
    extend,
    symbol_address,
    writer,
)

if TYPE_CHECKING:
    from .machine import Launch

SPACES = ("param", "global", "shared", "local", "const")
ORDER = "volatile relaxed acquire release acq_rel"
SCOPED = f"{ORDER} weak cta cluster gpu sys global shared shared::cta shared::cluster local const v2 v4 v8"
CACHE = "ca cg cs lu cv wb wt nc"


@dataclass
class Target:
    """The destination of some lanes of an access: a region and the lanes' byte offsets in it.

    `picked` are the indices of these lanes among all lanes of the access.
    """

    region: Region
    lanes: Array
    offsets: Array
    picked: Array | slice = field(default_factory=lambda: slice(None))

    def part(self, chosen: Array) -> Target:
        return Target(self.region, self.lanes[chosen], self.offsets[chosen])


def space_of(ins: Instruction) -> str:
    return next((m.split("::")[0] for m in ins.modifiers if m.split("::")[0] in SPACES), "generic")


def is_strong(ins: Instruction) -> bool:
    """Tell whether an access is strong: together with another strong one to the same address it is no race."""
    return ins.opcode in ("atom", "red") or not set(ORDER.split()).isdisjoint(ins.modifiers)


def address_reader(ins: Instruction, operand: Operand) -> Callable[[Launch], Array]:
    """Return a function of the launch that gives the addresses as int64, one for each lane or a scalar."""
    if not isinstance(operand, Address):
        raise unsupported(ins)
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        read = bits_reader(ins, base, base.bytes)
        return lambda launch: read(launch.threads).astype(np.int64) + offset
    if isinstance(base, Symbol):
        return lambda launch: np.int64(symbol_address(launch.threads, base.name, ins) + offset)
    return lambda _: np.int64(base.value + offset)


# -------------------------------------------------------------------- destinations of accesses


def targets(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int, space: str) -> list[Target]:
    """Resolve the addresses of some lanes to regions; fail if one is out of bounds or misaligned."""
    addresses = launch.threads.everywhere(addresses)[lanes]
    if space == "generic":
        kinds = (addresses >= SHARED_WINDOW).astype(int) + (addresses >= LOCAL_WINDOW)
        first = int(kinds[0])
        if (kinds != first).any():
            raise unsupported(ins)  # one access to several spaces
        space = ("global", "shared", "local")[first]
        addresses = addresses - (0, SHARED_WINDOW, LOCAL_WINDOW)[first]
    misaligned = (addresses & (size - 1)) != 0
    if misaligned.any():
        at = int(np.flatnonzero(misaligned)[0])
        launch.fail("misaligned", f"{size}-byte {space} access at address {addresses[at]:#x}", ins, int(lanes[at]))
    if space == "shared":
        return [_shared_target(launch, ins, addresses, lanes, size)]
    if space == "local":
        limit = launch.kernel.local_bytes
        _require_inside(launch, ins, launch.local, limit, addresses, lanes, size, (addresses + size > limit))
        return [Target(launch.local, lanes, lanes * launch.local_stride + addresses)]
    return _global_targets(launch, ins, addresses, lanes, size)


def _global_targets(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int) -> list[Target]:
    found = []
    for picked, allocation in launch.memory.locate(addresses):
        mine, at = lanes[picked], addresses[picked]
        if allocation is None:
            launch.fail("out of bounds", f"global access at {int(at[0]):#x}, no array is passed", ins, int(mine[0]))
        offsets = at - allocation.address
        outside = np.ones(len(offsets), bool)
        for low, high in allocation.extents:
            outside &= (offsets < low) | (offsets + size > high)
        low, high = allocation.extents[0][0], allocation.extents[-1][1]
        _require_inside(launch, ins, allocation, high - low, offsets - low, mine, size, outside)
        found.append(Target(allocation, mine, offsets, picked))
    return found


def _shared_target(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int) -> Target:
    rank, offsets = addresses >> RANK_SHIFT, addresses & ((1 << RANK_SHIFT) - 1)
    cluster, limit = launch.shape.cluster, launch.shape.shared_bytes
    outside = (offsets + size > limit) | (rank < 0) | (rank > cluster)
    _require_inside(launch, ins, launch.shared, limit, offsets, lanes, size, outside)
    own = launch.threads.slot[lanes]
    slot = np.where(rank > 0, own // cluster * cluster + rank - 1, own)
    if cluster > 1:
        launch.barriers.note_remote_access(ins, lanes, own, slot)
    return Target(launch.shared, lanes, slot * launch.shared_stride + offsets)


def _require_inside(
    launch: Launch, ins: Instruction, region: Region, limit: int, offsets: Array, lanes: Array, size: int,
    outside: Array,
) -> None:  # fmt: skip
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        message = f"{int(outside.sum())} lanes access {size} bytes of {region.name} ({limit} bytes), the first at byte"
        launch.fail("out of bounds", f"{message} {int(offsets[first])}", ins, int(lanes[first]))


def require_written(launch: Launch, ins: Instruction, target: Target, size: int) -> None:
    state = target.region.state
    if state is None or not launch.checks.initialised:
        return
    states = memory.gather(state, target.offsets, size)
    if (states == WRITTEN).all():
        return
    wrong = (states != WRITTEN).any(1)
    first = int(np.flatnonzero(wrong)[0])
    at = int(target.offsets[first])
    if target.region.space == "shared":
        at %= launch.shared_stride
    place = f"{int(wrong.sum())} lanes read {target.region.name}, the first at byte {at}"
    if (states[first] == IN_FLIGHT).any():
        launch.fail("copy in flight", f"{place}, before its cp.async was waited for", ins, int(target.lanes[first]))
    launch.fail("uninitialised read", f"{place}, which nobody has written", ins, int(target.lanes[first]))


# -------------------------------------------------------------------- loads and stores


def load_bytes(launch: Launch, ins: Instruction, target: Target, size: int) -> Array:
    launch.counters.access(launch, ins, target, size, "load")
    require_written(launch, ins, target, size)
    if launch.races:
        launch.races.load(ins, target, size)
    return memory.gather(target.region.memory, target.offsets, size)


def store_bytes(launch: Launch, ins: Instruction, target: Target, data: Array) -> None:
    region, size = target.region, data.shape[1]
    launch.counters.access(launch, ins, target, size, "store")
    if launch.races:
        launch.races.store(ins, target, size, data)
    memory.scatter(region.memory, target.offsets, data)
    launch.progress += 1
    if region.state is not None:
        memory.scatter(region.state, target.offsets, np.full_like(data, WRITTEN))
    if (np.diff(target.offsets) > 0).all():
        return
    different = (memory.gather(region.memory, target.offsets, size) != data).any(1)
    if different.any():
        _report_conflict(launch, ins, target, int(np.flatnonzero(different)[0]))


def _report_conflict(launch: Launch, ins: Instruction, target: Target, loser: int) -> None:
    """Fail because several lanes of one instruction stored different values to one address."""
    winner = int(np.flatnonzero(target.offsets == target.offsets[loser])[-1])
    lane, other = int(target.lanes[loser]), int(target.lanes[winner])
    check = "conflicting stores" if lane // WARP == other // WARP else "data race"
    message = f"another value goes to the same address of {target.region.name} from {launch.threads.name(other)}"
    launch.fail(check, message, ins, lane)


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@builds("ld ldu", f"{SCOPED} {CACHE} param")
def _load(ins: Instruction) -> Runner:
    space = space_of(ins)
    if space == "param":
        return _load_parameter(ins)
    type_, count, strong = ins.type, ins.vector_length, is_strong(ins)
    element = RAW[TYPE_BYTES[type_]]
    size = count * element().itemsize
    destinations, address = _items(ins.operands[0]), address_reader(ins, ins.operands[1])

    def run(launch: Launch, active: Mask) -> None:
        lanes = launch.threads.indices(active)
        launch.polls += strong
        for target in targets(launch, ins, address(launch), lanes, size, space):
            data = load_bytes(launch, ins, target, size)
            if strong and launch.races:
                launch.races.synchronise(ins, target)
            columns = np.ascontiguousarray(np.ascontiguousarray(data).view(element).reshape(-1, count).T)
            for destination, column in zip(destinations, columns, strict=True):
                if not isinstance(destination, Sink):
                    launch.threads.set_lanes(destination.index, extend(column, type_, destination), target.lanes)

    return run


def _load_parameter(ins: Instruction) -> Runner:
    type_, source = ins.type, ins.operands[1]
    element = RAW[TYPE_BYTES[type_]]
    size = element().itemsize
    name = source.base.name  # computed addresses are not modelled
    raw = type_ if type_[0] in "su" else f"b{8 * size}"
    writes = [writer(ins, item, raw) for item in _items(ins.operands[0])]

    def run(launch: Launch, active: Mask) -> None:
        start = launch.parameter_offset(name, ins) + source.offset
        for position, write in enumerate(writes):
            data = launch.parameters[start + position * size : start + (position + 1) * size]
            write(launch.threads, data.copy().view(VALUE[raw])[0], active)

    return run


@builds("st", f"{SCOPED} {CACHE}")
def _store(ins: Instruction) -> Runner:
    space, count, strong = space_of(ins), ins.vector_length, is_strong(ins)
    element = TYPE_BYTES[ins.type]
    address = address_reader(ins, ins.operands[0])
    sources = [bits_reader(ins, item, element) for item in _items(ins.operands[1])]

    def run(launch: Launch, active: Mask) -> None:
        lanes = launch.threads.indices(active)
        values = np.empty((len(lanes), count), RAW[element])
        for column, source in enumerate(sources):
            value = source(launch.threads)
            values[:, column] = value[lanes] if np.ndim(value) and active is not None else value
        data = values.view(np.uint8)
        for target in targets(launch, ins, address(launch), lanes, element * count, space):
            store_bytes(launch, ins, target, data[target.picked])
            if strong and launch.races:
                launch.races.synchronise(ins, target)

    return run
