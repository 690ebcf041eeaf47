"""Execute the instructions that exchange values between the lanes of a warp: shuffles, votes and reductions.

The scheduler runs them when all living lanes in their member mask have arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .instructions import Runner, builds, unsupported
from .parser import Instruction, Operand, Vector
from .threads import WARP, Array, Mask, Threads, bits_reader, predicate_reader, reader, writer

if TYPE_CHECKING:
    from .machine import Launch


def ballot(lanes: Array) -> Array:
    """Return one 32-bit word for each warp, from one truth value for each lane."""
    return np.packbits(lanes.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32).reshape(-1)


def per_lane(words: Array) -> Array:
    return np.repeat(words, WARP)


def mask_operand(ins: Instruction) -> Operand:
    """Return the operand that is the member mask of a .sync instruction."""
    return ins.operands[-1]


def is_warp_synchronous(ins: Instruction) -> bool:
    return ins.opcode in ("shfl", "vote", "redux") or ins.modifiers[:1] == ("warp",)


def _taking(launch: Launch, active: Mask) -> Array:
    return launch.threads.exists if active is None else active


def _sources(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Return the lane that each lane reads, and whether its source is valid; if not, it reads its own value."""
    b, segment = b & 31, (c >> 8) & 31
    lowest = lane & segment
    highest = lowest | (c & 31 & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    valid = source >= highest if mode == "up" else source <= highest
    return np.where(valid, source, lane), valid


@builds("shfl", "sync up down bfly idx")
def _shuffle(ins: Instruction) -> Runner:
    sync, mode, _ = ins.modifiers
    if sync != "sync":
        raise unsupported(ins)
    first = ins.operands[0]
    first, second = first.items if isinstance(first, Vector) else (first, None)
    write = writer(ins, first, "b32")
    write_valid = writer(ins, second, "pred") if second is not None else None
    value, amount, clamp, mask = (bits_reader(ins, operand, 4) for operand in ins.operands[1:5])

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        b, c = amount(threads), clamp(threads)
        if np.ndim(b) or np.ndim(c):
            source, valid = _sources(mode, threads.lane, b.astype(int), c.astype(int))
        else:
            key = (mode, int(b), int(c))
            if key not in threads.memo:
                threads.memo[key] = _sources(mode, threads.lane, *key[1:])
            source, valid = threads.memo[key]
        position = threads.every - threads.lane + source
        taking, members = _taking(launch, active), mask(threads)
        absent = taking & (~taking[position] | ((members >> source.astype(np.uint32)) & 1 == 0))
        if absent.any():
            reading = int(np.flatnonzero(absent)[0])
            message = f"the shuffle reads lane {int(source[reading])}, which takes no part"
            launch.fail("absent lane", message, ins, reading)
        write(threads, threads.everywhere(value(threads))[position], active)
        if write_valid:
            write_valid(threads, valid, active)

    return run


@builds("vote", "sync ballot any all uni")
def _vote(ins: Instruction) -> Runner:
    sync, mode, _ = ins.modifiers
    if sync != "sync":
        raise unsupported(ins)
    write = writer(ins, ins.operands[0], "b32" if mode == "ballot" else "pred")
    predicate, members = predicate_reader(ins.operands[1]), bits_reader(ins, ins.operands[2], 4)

    def run(launch: Launch, active: Mask) -> None:
        threads, taking = launch.threads, _taking(launch, active)
        mask, truth = members(threads), predicate(threads)
        true, false = (per_lane(ballot(taking & t)) & mask for t in (truth, ~truth))
        results = {"ballot": true, "any": true != 0, "all": false == 0, "uni": (true == 0) | (false == 0)}
        write(threads, results[mode], active)

    return run


@builds("activemask")
def _active_mask(ins: Instruction) -> Runner:
    write = writer(ins, ins.operands[0], "b32")
    return lambda launch, active: write(launch.threads, per_lane(ballot(_taking(launch, active))), active)


def _groups(threads: Threads, taking: Array, masks: Array) -> Iterator[Array]:
    """Yield the groups of lanes that are of one warp and have one member mask."""
    lanes = np.flatnonzero(taking)
    keys = (lanes // WARP << 32) | threads.everywhere(masks)[lanes]
    for key in np.unique(keys):
        yield lanes[keys == key]


@builds("redux", "sync add min max and or xor")
def _reduce(ins: Instruction) -> Runner:
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    function = functions[ins.modifiers[1]]
    if ins.type == "f32":
        raise unsupported(ins)
    write, read = writer(ins, ins.operands[0], ins.type), reader(ins, ins.operands[1], ins.type)
    members = bits_reader(ins, ins.operands[2], 4)

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        values = threads.everywhere(read(threads))
        result = np.zeros_like(values)
        for lanes in _groups(threads, _taking(launch, active), members(threads)):
            result[lanes] = function.reduce(values[lanes])
        write(threads, result, active)

    return run


def warp_barrier(launch: Launch, active: Mask) -> None:
    if launch.races:
        launch.races.warp_barrier(_taking(launch, active))
