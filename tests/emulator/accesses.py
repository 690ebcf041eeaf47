"""Loads and stores: every access is checked, counted and then carried out.

A runner receives the launch (`machine.Launch`), which owns the memories, the counters and the race detector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import formats, memory
from .arithmetic import unsupported
from .errors import EmulatorError
from .formats import RAW
from .memory import IN_FLIGHT, WRITTEN
from .parser import TYPE_BYTES, Address, Instruction, Operand, Register, Sink, Symbol, Vector
from .threads import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW, WARP, bits_reader, symbol_address

if TYPE_CHECKING:
    from .machine import Launch

Array = np.ndarray
LaunchRunner = Callable[["Launch", "Array | None"], None]
BUILDERS: dict[str, Callable[[Instruction], LaunchRunner]] = {}
SPACES = ("param", "global", "shared", "local", "const")
STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel"}


@dataclass
class Target:
    """Where the lanes of one access go: a piece of memory, their offsets in it, and who they are."""

    lanes: Array
    offsets: Array
    memory: Array
    state: Array | None
    name: str
    space: str
    picked: Array | slice
    shadow_key: int


def space_of(ins: Instruction) -> str:
    return next((m.split("::")[0] for m in ins.modifiers if m.split("::")[0] in SPACES), "generic")


def address_reader(ins: Instruction, operand: Operand) -> Callable[[Launch], Array]:
    """Addresses as int64, one per lane or a scalar."""
    if not isinstance(operand, Address):
        raise EmulatorError("syntax", f"expected an address in {ins.where()}")
    offset = operand.offset
    if isinstance(operand.base, Register):
        read = bits_reader(ins, operand.base, operand.base.bytes)
        return lambda launch: read(launch.threads).astype(np.int64) + offset
    if isinstance(operand.base, Symbol):
        name = operand.base.name
        return lambda launch: np.int64(symbol_address(launch.threads, name, ins) + offset)
    constant = np.int64(operand.base.value + offset)
    return lambda _: constant


def targets(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int, space: str) -> list[Target]:
    """Check bounds and alignment, and resolve addresses to pieces of memory."""
    addresses = launch.threads.everywhere(addresses)[lanes]
    if space == "generic":
        kinds = np.where(addresses >= LOCAL_WINDOW, 2, np.where(addresses >= SHARED_WINDOW, 1, 0))
        first = int(kinds[0])
        if (kinds != first).any():
            raise unsupported(ins, "one generic access to several state spaces")
        space = ("global", "shared", "local")[first]
        addresses = addresses - (0, SHARED_WINDOW, LOCAL_WINDOW)[first]
    misaligned = (addresses & (size - 1)) != 0
    if misaligned.any():
        lane = int(lanes[np.flatnonzero(misaligned)[0]])
        address = int(addresses[misaligned][0])
        launch.fail("misaligned", f"{size}-byte {space} access at address {address:#x}", ins, lane)
    if space == "shared":
        return [_shared_target(launch, ins, addresses, lanes, size)]
    if space == "local":
        return [_local_target(launch, ins, addresses, lanes, size)]
    return _global_targets(launch, ins, addresses, lanes, size)


def _global_targets(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int) -> list[Target]:
    found = []
    for picked, allocation in launch.memory.locate(addresses):
        mine, at = lanes[picked], addresses[picked]
        if allocation is None:
            launch.fail("out of bounds", f"global access at {int(at[0]):#x}, no array is passed", ins, int(mine[0]))
        offsets = at - allocation.address
        inside = np.zeros(len(offsets), bool)
        for low, high in allocation.extents:
            inside |= (offsets >= low) & (offsets + size <= high)
        if not inside.all():
            bad = np.flatnonzero(~inside)
            low, high = allocation.extents[0][0], allocation.extents[-1][1]
            launch.fail(
                "out of bounds",
                f"{len(bad)} lanes access {size} bytes of {allocation.name} ({high - low} bytes), "
                f"the first at byte {int(offsets[bad[0]]) - low}",
                ins, int(mine[bad[0]]),
            )  # fmt: skip
        found.append(
            Target(mine, offsets, allocation.memory, allocation.state, allocation.name, "global", picked,
                   allocation.address)
        )  # fmt: skip
    return found


def _shared_target(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int) -> Target:
    rank, offsets = addresses >> RANK_SHIFT, addresses & ((1 << RANK_SHIFT) - 1)
    cluster, limit = launch.shape.cluster, launch.shape.shared_bytes
    bad = (offsets + size > limit) | (rank < 0) | (rank > cluster)
    if bad.any():
        lane = int(np.flatnonzero(bad)[0])
        launch.fail(
            "out of bounds",
            f"{int(bad.sum())} lanes access {size} bytes of shared memory ({limit} bytes), "
            f"the first at byte {int(offsets[lane])}",
            ins, int(lanes[lane]),
        )  # fmt: skip
    own = launch.threads.slot[lanes]
    slot = np.where(rank > 0, own // cluster * cluster + rank - 1, own)
    if cluster > 1:
        launch.barriers.note_remote_access(ins, lanes, own, slot)
    return Target(lanes, slot * launch.shared_stride + offsets, launch.shared, launch.shared_state,
                  "shared memory", "shared", slice(None), -1)  # fmt: skip


def _local_target(launch: Launch, ins: Instruction, addresses: Array, lanes: Array, size: int) -> Target:
    local = launch.threads.local
    bad = (addresses < 0) | (addresses + size > local.shape[1])
    if bad.any():
        lane = int(np.flatnonzero(bad)[0])
        launch.fail("out of bounds", f"local access at byte {int(addresses[lane])}", ins, int(lanes[lane]))
    return Target(lanes, lanes * local.shape[1] + addresses, local.reshape(-1), None, "local memory", "local",
                  slice(None), -2)  # fmt: skip


def require_written(launch: Launch, ins: Instruction, target: Target, size: int) -> None:
    if target.state is None:
        return
    states = memory.gather(target.state, target.offsets, size)
    wrong = (states != WRITTEN).any(1)
    if not wrong.any():
        return
    first = int(np.flatnonzero(wrong)[0])
    at = int(target.offsets[first])
    if target.space == "shared":
        at %= launch.shared_stride
    place = f"{int(wrong.sum())} lanes read {target.name}, the first at byte {at}"
    if (states[first] == IN_FLIGHT).any():
        launch.fail("copy in flight", f"{place}, before its cp.async was waited for", ins, int(target.lanes[first]))
    launch.fail("uninitialised read", f"{place}, which nobody has written", ins, int(target.lanes[first]))


def load_bytes(launch: Launch, ins: Instruction, target: Target, size: int, strong: bool = False) -> Array:
    launch.counters.access(launch, ins, target, size, "load")
    if launch.checks.initialised:
        require_written(launch, ins, target, size)
    if launch.races and target.space != "local":
        launch.races.access(ins, target, size, None, strong)
    return memory.gather(target.memory, target.offsets, size)


def store_bytes(launch: Launch, ins: Instruction, target: Target, data: Array, strong: bool = False) -> None:
    size = data.shape[1]
    launch.counters.access(launch, ins, target, size, "store")
    if launch.races and target.space != "local":
        launch.races.access(ins, target, size, data, strong)
    memory.scatter(target.memory, target.offsets, data)
    launch.progress += 1
    if target.state is not None:
        memory.scatter(target.state, target.offsets, np.full_like(data, WRITTEN))
    kept = memory.gather(target.memory, target.offsets, size)
    different = (kept != data).any(1)
    if different.any():
        _report_conflict(launch, ins, target, int(np.flatnonzero(different)[0]))


def _report_conflict(launch: Launch, ins: Instruction, target: Target, loser: int) -> None:
    """Several lanes stored different values to one address in one step."""
    winner = int(np.flatnonzero(target.offsets == target.offsets[loser])[-1])
    lane, other = int(target.lanes[loser]), int(target.lanes[winner])
    check = "conflicting stores" if lane // WARP == other // WARP else "data race"
    message = f"another value goes to the same address of {target.name} from {launch.threads.name(other)}"
    launch.fail(check, message, ins, lane)


def _columns(data: Array, element: int, count: int) -> Array:
    """(lanes, size) bytes -> (count, lanes) unsigned elements."""
    return np.ascontiguousarray(np.ascontiguousarray(data).view(RAW[element]).reshape(-1, count).T)


def builds(*opcodes: str) -> Callable[[Callable], Callable]:
    def register(function: Callable[[Instruction], LaunchRunner]) -> Callable[[Instruction], LaunchRunner]:
        BUILDERS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def extend(bits: Array, type_: str, register: Register) -> Array:
    """Loaded bits -> bits of the (possibly wider) destination register."""
    if bits.dtype.itemsize == register.bytes:
        return bits
    if type_.startswith("s"):
        return bits.view(formats.VALUE[type_]).astype(f"i{register.bytes}").view(RAW[register.bytes])
    return bits.astype(RAW[register.bytes])


@builds("ld", "ldu")
def _load(ins: Instruction) -> LaunchRunner:
    space = space_of(ins)
    if space == "param":
        return _load_parameter(ins)
    type_, count = ins.type, ins.vector_length
    element = TYPE_BYTES[type_]
    destinations, address = _items(ins.operands[0]), address_reader(ins, ins.operands[1])
    strong = bool(STRONG & set(ins.modifiers))

    def run(launch: Launch, active: Array | None) -> None:
        lanes = launch.threads.indices(active)
        launch.polls += strong
        for target in targets(launch, ins, address(launch), lanes, element * count, space):
            data = load_bytes(launch, ins, target, element * count, strong)
            if strong and launch.races:
                launch.races.synchronise(ins, target)
            for destination, column in zip(destinations, _columns(data, element, count), strict=True):
                if isinstance(destination, Sink):
                    continue
                bits = extend(column, type_, destination)
                if len(target.lanes) == launch.threads.count:
                    launch.threads.set_raw(destination.index, bits, None)
                else:
                    launch.threads.set_lanes(destination.index, bits, target.lanes)

    return run


def _load_parameter(ins: Instruction) -> LaunchRunner:
    type_ = ins.type
    size, source = TYPE_BYTES[type_], ins.operands[1]
    if not isinstance(source.base, Symbol):
        raise unsupported(ins, "a computed parameter address")

    def run(launch: Launch, active: Array | None) -> None:
        start = launch.parameter_offset(source.base.name, ins) + source.offset
        for position, destination in enumerate(_items(ins.operands[0])):
            data = launch.parameters[start + position * size : start + (position + 1) * size]
            bits = extend(data.copy().view(RAW[size])[0], type_, destination)
            launch.threads.set_raw(destination.index, bits, active)

    return run


@builds("st")
def _store(ins: Instruction) -> LaunchRunner:
    space, count = space_of(ins), ins.vector_length
    element = TYPE_BYTES[ins.type]
    address = address_reader(ins, ins.operands[0])
    sources = [bits_reader(ins, item, element) for item in _items(ins.operands[1])]
    strong = bool(STRONG & set(ins.modifiers))

    def run(launch: Launch, active: Array | None) -> None:
        lanes = launch.threads.indices(active)
        values = np.empty((len(lanes), count), RAW[element])
        for column, source in enumerate(sources):
            value = source(launch.threads)
            values[:, column] = value[lanes] if np.ndim(value) and active is not None else value
        data = values.view(np.uint8)
        for target in targets(launch, ins, address(launch), lanes, element * count, space):
            if strong and launch.races:
                launch.races.synchronise(ins, target)
            store_bytes(launch, ins, target, data[target.picked], strong)

    return run
