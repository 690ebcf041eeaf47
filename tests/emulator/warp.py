"""Instructions through which the lanes of a warp exchange values: shuffles, votes, matches and reductions.

The scheduler runs them only once every living lane their mask names has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import unsupported
from .parser import Immediate, Instruction, Operand, Vector
from .threads import WARP, Mask, bits_reader, predicate_reader, reader, writer

if TYPE_CHECKING:
    from .machine import Launch

Array = np.ndarray
LaunchRunner = Callable[["Launch", Mask], None]


def ballot(lanes: Array) -> Array:
    """One word per warp from one truth value per lane."""
    return np.packbits(lanes.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32).reshape(-1)


def per_lane(words: Array) -> Array:
    return np.repeat(words, WARP)


def mask_operand(ins: Instruction) -> Operand:
    """The member mask of a .sync instruction."""
    return Immediate(-1) if ins.opcode == "activemask" else ins.operands[-1]


def is_warp_synchronous(ins: Instruction) -> bool:
    if ins.opcode in ("shfl", "vote", "match", "redux", "elect"):
        if "sync" not in ins.modifiers:
            raise unsupported(ins, "a warp instruction without .sync")
        return True
    return ins.opcode in ("bar", "barrier") and ins.modifiers[0] == "warp"


def _everywhere(launch: Launch, value: Array) -> Array:
    return np.ascontiguousarray(launch.threads.everywhere(value))


def _active(launch: Launch, active: Mask) -> Array:
    return launch.threads.exists if active is None else active


def _shuffle(ins: Instruction) -> LaunchRunner:
    mode = ins.modifiers[1]
    if mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(ins)
    first, second = ins.operands[0], None
    if isinstance(first, Vector):
        first, second = first.items
    write = writer(ins, first, "b32")
    write_valid = writer(ins, second, "pred") if second is not None else None
    value, amount, clamp, mask = (bits_reader(ins, operand, 4) for operand in ins.operands[1:5])

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        lane = threads.lane
        b = (threads.everywhere(amount(threads)) & 31).astype(np.int64)
        c = threads.everywhere(clamp(threads)).astype(np.int64)
        segment = (c >> 8) & 31
        lowest = lane & segment
        highest = lowest | (c & 31 & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, lane)
        taking = _active(launch, active)
        position = np.arange(threads.count) - lane + source
        members = threads.everywhere(mask(threads))
        absent = taking & (~taking[position] | ((members >> source.astype(np.uint32)) & 1 == 0))
        if absent.any():
            reading = int(np.flatnonzero(absent)[0])
            launch.fail(
                "absent lane",
                f"the shuffle reads lane {int(source[reading])}, which takes no part",
                ins,
                reading,
            )
        write(threads, _everywhere(launch, value(threads))[position], active)
        if write_valid:
            write_valid(threads, valid, active)

    return run


def _vote(ins: Instruction) -> LaunchRunner:
    mode = ins.modifiers[1]
    if mode not in ("ballot", "any", "all", "uni"):
        raise unsupported(ins)
    write = writer(ins, ins.operands[0], "b32" if mode == "ballot" else "pred")
    predicate, members = predicate_reader(ins.operands[1]), bits_reader(ins, ins.operands[2], 4)

    def run(launch: Launch, active: Mask) -> None:
        threads, taking = launch.threads, _active(launch, active)
        mask = members(threads)
        truth = threads.everywhere(predicate(threads))
        true, false = (per_lane(ballot(np.ascontiguousarray(taking & t))) & mask for t in (truth, ~truth))
        results = {"ballot": true, "any": true != 0, "all": false == 0, "uni": (true == 0) | (false == 0)}
        write(threads, results[mode], active)

    return run


def _active_mask(ins: Instruction) -> LaunchRunner:
    write = writer(ins, ins.operands[0], "b32")
    return lambda launch, active: write(launch.threads, per_lane(ballot(_active(launch, active))), active)


def _reduce(ins: Instruction) -> LaunchRunner:
    name = ins.modifiers[1]
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    if name not in functions or ins.type == "f32":
        raise unsupported(ins)
    write, read = writer(ins, ins.operands[0], ins.type), reader(ins, ins.operands[1], ins.type)
    members = bits_reader(ins, ins.operands[2], 4)

    def run(launch: Launch, active: Mask) -> None:
        threads, taking = launch.threads, _active(launch, active)
        values, masks = _everywhere(launch, read(threads)), threads.everywhere(members(threads))
        result = np.zeros_like(values)
        for lanes in _groups(np.flatnonzero(taking), masks):
            result[lanes] = functions[name].reduce(values[lanes])
        write(threads, result, active)

    return run


def _groups(lanes: Array, masks: Array) -> list[Array]:
    """Lanes that work together: of one warp, under one mask."""
    keys = (lanes // WARP << 32) | masks[lanes]
    return [lanes[keys == key] for key in np.unique(keys)]


def _match(ins: Instruction) -> LaunchRunner:
    if "any" not in ins.modifiers:
        raise unsupported(ins)
    size = int(ins.type[1:]) // 8
    write, read = writer(ins, ins.operands[0], "b32"), bits_reader(ins, ins.operands[1], size)
    members = bits_reader(ins, ins.operands[2], 4)

    def run(launch: Launch, active: Mask) -> None:
        threads, taking = launch.threads, _active(launch, active)
        values, masks = _everywhere(launch, read(threads)), threads.everywhere(members(threads))
        result = np.zeros(threads.count, np.uint32)
        for lanes in _groups(np.flatnonzero(taking), masks):
            equal = values[lanes][:, None] == values[lanes]
            result[lanes] = (equal.astype(np.uint64) << (lanes % WARP).astype(np.uint64)).sum(1)
        write(threads, result, active)

    return run


def _elect(ins: Instruction) -> LaunchRunner:
    write, chosen = (
        writer(ins, ins.operands[0].items[0], "b32"),
        writer(ins, ins.operands[0].items[1], "pred"),
    )

    def run(launch: Launch, active: Mask) -> None:
        words = ballot(_active(launch, active))
        leader = per_lane(np.bitwise_count((words & (~words + np.uint32(1))) - np.uint32(1)).astype(np.uint32))
        write(launch.threads, leader, active)
        chosen(launch.threads, launch.threads.lane == leader, active)

    return run


def _warp_barrier(ins: Instruction) -> LaunchRunner:
    del ins

    def run(launch: Launch, active: Mask) -> None:
        if launch.races:
            launch.races.warp_barrier(_active(launch, active))

    return run


BUILDERS: dict[str, Callable[[Instruction], LaunchRunner]] = {
    "shfl": _shuffle, "vote": _vote, "activemask": _active_mask, "redux": _reduce, "match": _match,
    "elect": _elect, "bar": _warp_barrier, "barrier": _warp_barrier,
}  # fmt: skip
