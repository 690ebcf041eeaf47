"""Cut tensors into the programs of Triton launches, and tell plans what they need to know of the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gpu_bn.backends.triton.launch import interpreting
from gpu_bn.plan import (
    CO_RESIDENT,
    DEVICES,
    THRESHOLDS,
    VECTOR_BYTES,
    Device,
    LaunchPlan,
    NoPlanError,
    OnChip,
    Work,
    narrower_tilings,
    plan,
    plan_once,
    plan_twice,
    tile,
)

Array = Any

CHAIN = 64
"""Additions in a row in float32 at most, before a sum goes on in float64."""
AHEAD = 1 << 20
"""Numbers of positions go so far beyond the last at most: those of a last block's share, chain and tile."""
SAMPLES = {False: 32, True: 16}
"""Positions that the first shift is the mean of; the second number is for channels-last."""
MERGED_AT_ONCE = 4
"""Partial results that a thread reads at a time. What follows each reading is done by all threads, in double precision:
the fewer of them the better, as long as registers suffice."""
MOST_BLOCKS = {False: 1024, True: 64}
"""Blocks that a strip is cut into: each program of the second launch reads the results of all."""
MOST_WARPS = 8
WARP = 32
"""Threads."""


class Room(NamedTuple):
    """Count the elements that a program can hold in registers with nothing spilled, whatever the activation.

    Forward in rows, of full vectors, and of narrower ones, which need more addresses, or ragged ones, which need masks;
    in channels-last, where a thread has several channels' sums besides; backward, of all tensors, but in rows of single
    elements no more than of narrow ones.
    """

    rows: int
    narrow: int
    columns: int
    backward: int

    def of(self, work: Work) -> int:
        """Return the number for a call."""
        tiling = tile(work)
        if work.backward:
            return self.backward if tiling.columns or tiling.vector > 1 else min(self.backward, self.narrow)
        if tiling.columns:
            return self.columns
        full = tiling.vector * work.itemsize == VECTOR_BYTES and not tiling.ragged
        return self.rows if full else self.narrow


ROOM = {2: Room(20480, 12288, 12288, 16384), 4: Room(16384, 12288, 12288, 16384), 8: Room(8192, 8192, 8192, 4096)}
"""By the size of an element. ``tests/record_gates.py`` compiles what it allows."""


class Shape(NamedTuple):
    """Bound the blocks of elements that a program works on: elements, and elements for each of its threads at least."""

    elements: int
    per_thread: int


STREAMED = {2: Shape(4096, 16), 4: Shape(4096, 16), 8: Shape(2048, 8)}
"""Of a program that reads its share piece by piece; by the size of an element."""
CROWDED = STREAMED | {8: Shape(1024, 4)}
"""Of a backward one in channels-last, or with a mask and ghost batches."""
SHORT = CROWDED | {2: Shape(2048, 8), 4: Shape(2048, 8)}
"""Of one that writes two gradients in channels-last, with sums (sm_100, 120) or offsets of 64 bits (sm_75), and of sums
of ragged rows with offsets of 64 bits (sm_80): with GELU more would spill."""
SUMMED = {size: Shape(shape.elements // 2, shape.per_thread // 2) for size, shape in STREAMED.items()}
"""Of one that sums up statistics: half as many, for fewer sums in registers. And of some of those that hold a strip."""
AT_ONCE = 4
"""Vectors that each of its threads loads before it uses one, at least."""
SUMS_REGISTERS = {False: 80, True: 128}
"""Registers that a thread of it may have; the second number is for channels-last, and for ragged rows with offsets of
64 bits. Told no number, the assembler saves registers by loading one vector after the other."""
HELD = {2: Shape(4096, 8), 4: Shape(4096, 8), 8: Shape(2048, 8)}
"""Of one that holds it."""
WITHOUT_COOPERATION = replace(THRESHOLDS, max_cooperative=0)
"""Programs of one launch do not wait for each other."""
INTERPRETER = Device("Triton's interpreter", 80, 4, 164 << 10, 163 << 10, 1 << 20, 1e8)
"""It runs one program at a time, each slowly: few of them, but enough to be several for a channel."""
ELSEWHERE = "with TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly"


def device_of(device: Any) -> Device:
    """Return what a plan needs to know of torch's device."""
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        return Device(
            of.name, 10 * of.major + of.minor, of.multi_processor_count, of.shared_memory_per_multiprocessor,
            of.shared_memory_per_block, of.L2_cache_size, DEVICES["a100"].bandwidth,
        )  # fmt: skip
    if device.type == "cpu" and interpreting():
        return INTERPRETER
    raise ValueError(f"the Triton backend serves tensors on a CUDA device, got one on {device} ({ELSEWHERE})")


def training_plan(work: Work, device: Device, tier: str | None) -> LaunchPlan:
    """Return the plan of a call with batch statistics, where a block keeps a channel in registers."""
    room = ROOM[work.itemsize].of(work) * work.itemsize
    registers = OnChip(per_block=room, per_sm=THRESHOLDS.blocks_per_sm * (room // 2))
    try:
        found = plan(work, device, tier, WITHOUT_COOPERATION, registers)
    except NoPlanError:
        found = plan(work, device, None, WITHOUT_COOPERATION, registers)
    if found.tier != "split":
        return found
    twice = plan_twice(work, device, WITHOUT_COOPERATION, one_pass_plan(work, device))
    launches = 3 if device.slow_doubles else 2  # see StepBuilder.merges_apart
    times = replace(twice.times, launches=launches * THRESHOLDS.launch)
    return replace(twice, launches=launches, times=times, reason=found.reason)


def one_pass_plan(work: Work, device: Device) -> LaunchPlan:
    """Plan one pass over the tensors: in the widest strips whose programs fill the SMs, or else most of them.

    In channels-last few wide strips, each of which is cut into few blocks, would leave SMs idle.
    """
    tilings = narrower_tilings(tile(work), THRESHOLDS.narrow_bytes, work.itemsize)
    plans = [_fewer_blocks(plan_once(work, device, WITHOUT_COOPERATION, tiling)) for tiling in tilings]
    filling = [found for found in plans if found.grid >= THRESHOLDS.fill * CO_RESIDENT * device.sms]
    return filling[0] if filling else max(plans, key=lambda found: found.grid)


class Geometry(NamedTuple):
    """Tell kernels how a tensor is cut into strips."""

    tail: tuple[int | None, ...]
    columns: bool
    lanes: int
    vector: int
    positions: int
    wide: bool

    @staticmethod
    def of(plan: LaunchPlan, groups: int = 1) -> Geometry:
        tiling = plan.tiling
        elements, results = tiling.n * tiling.c * tiling.s, 5 * plan.blocks * tiling.c
        wide = groups * max(elements, results) >= (1 << 31) - AHEAD
        for what, number in (("channels", tiling.c), ("programs", groups * tiling.strips)):  # which have 32 bits
            if number >= (1 << 31) - AHEAD:
                raise ValueError(f"expected less than 2**31 - {AHEAD} {what}, got {number}")
        row, length = tiling.inner, tiling.s if tiling.ragged else None
        jump = 0 if tiling.columns else (tiling.c - 1) * row if length is None else tiling.c * length
        power = 31 + (row - 1).bit_length()
        magic = -(-(1 << power) // row)
        return Geometry(
            (tiling.c, row, jump, magic, power, length),
            tiling.columns,
            tiling.lanes,
            tiling.vector,
            tiling.positions,
            wide,
        )


def strip(plan: LaunchPlan) -> tuple[int, int, bool]:
    """Return a strip's vectors, the elements of one, and whether strips are of columns."""
    return plan.tiling.lanes, plan.tiling.vector, plan.tiling.columns


def _fewer_blocks(plan: LaunchPlan) -> LaunchPlan:
    most = MOST_BLOCKS[plan.tiling.columns]
    if plan.tier != "split" or plan.blocks <= most:
        return plan
    share = -(-plan.tiling.positions // most)
    return replace(plan, share=share, blocks=-(-plan.tiling.positions // share))


def chunk(plan: LaunchPlan, warps: int) -> int:
    """Return how many blocks have their results merged at a time."""
    return min(_power_of_two(plan.blocks), max(1, MERGED_AT_ONCE * 32 * warps // _width(plan)))


def merging(plan: LaunchPlan) -> tuple[int, int, int]:
    """Return what a program of one warp merges: results of so many blocks at a time, of channels side by side.

    So no two warps do the same in double precision, and each thread reads few results. The third number is how many
    elements of a channel a position has.
    """
    most = MERGED_AT_ONCE * WARP
    blocks = min(_power_of_two(plan.blocks), most)
    return blocks, min(WARP, most // blocks), 1 if plan.tiling.columns else plan.tiling.vector


def chain(plan: LaunchPlan, positions: int) -> int:
    """Return the longest chain of additions, 0 if a share is no longer than that."""
    return CHAIN if plan.share > CHAIN * positions else 0


def _width(plan: LaunchPlan) -> int:
    return plan.tiling.lanes * plan.tiling.vector


def streamed_block(plan: LaunchPlan, x: Array, shapes: dict[int, Shape] = STREAMED) -> tuple[int, int]:
    """Return positions and warps of a program that reads its share piece by piece."""
    shape = shapes[x.element_size()]
    positions = min(_power_of_two(plan.share), max(1, shape.elements // _width(plan)))
    return positions, _warps(positions * _width(plan), shape)


def at_once(plan: LaunchPlan, x: Array) -> int:
    """Return how many pieces a program that sums up statistics loads before it uses one."""
    return max(1, AT_ONCE * plan.tiling.vector // SUMMED[x.element_size()].per_thread)


def held_block(plan: LaunchPlan, x: Array) -> tuple[int, int, int]:
    """Return positions of a tile, tiles, and warps of a program, or of a cluster's block, that holds a strip."""
    vector = plan.tiling.vector
    crowded = vector > 1 if plan.tiling.columns else vector == 1  # a thread has sums of channels, or many addresses
    shape = (SUMMED if crowded else HELD)[x.element_size()]
    most = max(1, plan.blocks * shape.elements // _width(plan))
    positions = min(_power_of_two(plan.tiling.positions), most)
    tiles = -(-plan.tiling.positions // positions)
    return positions, tiles, _warps(positions * _width(plan) // plan.blocks, shape)


def _warps(elements: int, shape: Shape) -> int:
    return max(1, min(MOST_WARPS, elements // (32 * shape.per_thread)))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
