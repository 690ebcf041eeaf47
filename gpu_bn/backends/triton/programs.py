"""Choose the programs of Triton launches: plans, strips, tiles and warps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gpu_bn.backends.triton.launch import interpreting
from gpu_bn.gpu_model import memory_bandwidth
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
"""The most additions in a row in float32, before a sum continues in float64."""
AHEAD = 1 << 20
"""A bound on how far the last block's share, chain and tile reach beyond the last position."""
SAMPLES = {False: 32, True: 16}
"""The number of positions whose mean is the first shift: in rows, and in channels-last (True)."""
MERGED_AT_ONCE = 4
"""Partial results that a thread loads at a time. All threads compute in double precision after each load: fewer loads
are better, as long as registers suffice."""
MOST_RESULTS = {False: 1024, True: 4096}
"""The most blocks of a strip times its channels, in rows and in channels-last (True): each program of the second launch
reads the results of all blocks."""
MOST_WARPS = 8
WARP = 32
"""Threads of a warp."""


class Room(NamedTuple):
    """The numbers of elements that a program can hold in registers without spilling, for any activation."""

    rows: int  # forward, in rows of full vectors
    narrow: int  # forward, in rows of narrower vectors, which need more addresses, or in ragged rows, which need masks
    columns: int  # forward, in channels-last, where a thread also has sums of several channels
    backward: int  # backward, elements of all tensors; in rows of single elements at most ``narrow``

    def elements(self, work: Work) -> int:
        """Return the number of elements for a call."""
        tiling = tile(work)
        if work.backward:
            return self.backward if tiling.columns or tiling.vector > 1 else min(self.backward, self.narrow)
        if tiling.columns:
            return self.columns
        full = tiling.vector * work.itemsize == VECTOR_BYTES and not tiling.ragged
        return self.rows if full else self.narrow


ROOM = {2: Room(20480, 12288, 12288, 16384), 4: Room(16384, 12288, 12288, 16384), 8: Room(8192, 8192, 8192, 4096)}
"""The room, by the bytes of an element. ``tests/record_gates.py`` compiles kernels that use all of it."""


class Shape(NamedTuple):
    """The size of a program's tiles: the most elements, and the fewest elements for each thread."""

    elements: int
    per_thread: int


STREAMED = {2: Shape(4096, 16), 4: Shape(4096, 16), 8: Shape(2048, 8)}
"""Tiles of programs that go through their share tile by tile, by the bytes of an element."""
CROWDED = STREAMED | {8: Shape(1024, 4)}
"""Tiles of backward programs in channels-last, or with a mask and ghost batches."""
SHORT = CROWDED | {2: Shape(2048, 8), 4: Shape(2048, 8)}
"""Tiles of backward programs that would spill with larger ones and GELU: in channels-last, those that write two
gradients and sums (sm_100, sm_120) or have 64-bit offsets (sm_75); in ragged rows with 64-bit offsets, those that
compute sums (sm_80)."""
SUMMED = {size: Shape(shape.elements // 2, shape.per_thread // 2) for size, shape in STREAMED.items()}
"""Tiles of programs that sum up statistics, half as large so that fewer sums take registers. Also of some programs that
hold a strip."""
AT_ONCE = 4
"""The fewest vectors that a thread loads before it uses one, in a program that sums up statistics."""
SUMS_REGISTERS = {False: 80, True: 128}
"""The limit of registers of a thread in such a program: in rows, and in channels-last or in ragged rows with 64-bit
offsets (True). Without a limit, the assembler saves registers by loading one vector after another."""
HELD = {2: Shape(4096, 8), 4: Shape(4096, 8), 8: Shape(2048, 8)}
"""Tiles of programs that hold a strip."""
WITHOUT_COOPERATION = replace(THRESHOLDS, max_cooperative=0)
"""Thresholds without the cooperative tier: the programs of a Triton launch do not wait for each other."""
INTERPRETER = Device("Triton's interpreter", 80, 4, 164 << 10, 163 << 10, 1 << 20, 1e8)
"""The device to plan for if Triton's interpreter runs the kernels. The interpreter runs one program at a time, slowly:
few SMs make few programs, but several for a channel."""
INTERPRETER_HINT = "with TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly"


def device_of(device: Any) -> Device:
    """Return the planner's description of a torch device.

    If torch does not know the clock rate or the width of the memory, the bandwidth is that of an A100.
    """
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        clock, bus = getattr(gpu, "memory_clock_rate", 0), getattr(gpu, "memory_bus_width", 0)
        return Device(
            gpu.name, 10 * gpu.major + gpu.minor, gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor,
            gpu.shared_memory_per_block, gpu.L2_cache_size, memory_bandwidth(clock, bus) or DEVICES["a100"].bandwidth,
        )  # fmt: skip
    if device.type == "cpu" and interpreting():
        return INTERPRETER
    raise ValueError(f"the Triton backend serves tensors on a CUDA device, got one on {device} ({INTERPRETER_HINT})")


def training_plan(work: Work, device: Device, tier: str | None) -> LaunchPlan:
    """Return the plan of a call with batch statistics; ``tier`` is used if it can serve the call.

    On-chip tiers hold a strip in registers.
    """
    room = ROOM[work.itemsize].elements(work) * work.itemsize
    registers = OnChip(per_block=room, per_sm=THRESHOLDS.blocks_per_sm * (room // 2))
    try:
        found = plan(work, device, tier, WITHOUT_COOPERATION, registers)
    except NoPlanError:
        found = plan(work, device, None, WITHOUT_COOPERATION, registers)
    if found.tier != "split":
        return found
    twice = plan_twice(work, device, WITHOUT_COOPERATION, one_pass_plan(work, device))
    launches = 3 if device.slow_doubles else 2  # see StepBuilder.merges_separately
    times = replace(twice.times, launches=launches * THRESHOLDS.launch)
    return replace(twice, launches=launches, times=times, reason=found.reason)


def one_pass_plan(work: Work, device: Device) -> LaunchPlan:
    """Return the plan of one pass over the tensors, in the widest strips whose programs fill the SMs.

    If none do, it has the strips with the most programs, and more programs if there are fewer than SMs. In
    channels-last, a few wide strips of a few blocks each would leave SMs idle.
    """
    tilings = narrower_tilings(tile(work), THRESHOLDS.narrow_bytes, work.itemsize)
    plans = [_fewer_blocks(plan_once(work, device, WITHOUT_COOPERATION, tiling)) for tiling in tilings]
    filling = [found for found in plans if found.grid >= THRESHOLDS.fill * CO_RESIDENT * device.sms]
    return filling[0] if filling else _more_blocks(max(plans, key=lambda found: found.grid), work, device)


class Geometry(NamedTuple):
    """The division of a tensor into strips, as kernels take it."""

    tail: tuple[int | None, ...]  # the arguments channels, row, jump, magic, power, length, positions
    wide: bool  # whether offsets need 64 bits

    @staticmethod
    def from_plan(plan: LaunchPlan, groups: int = 1) -> Geometry:
        """Return the geometry of a plan; ``groups``: the number of ghost batches."""
        tiling = plan.tiling
        elements, results = tiling.n * tiling.c * tiling.s, 5 * plan.blocks * tiling.c
        wide = groups * max(elements, results) >= (1 << 31) - AHEAD
        for what, number in (("channels", tiling.c), ("programs", groups * tiling.strips)):  # both have 32 bits
            if number >= (1 << 31) - AHEAD:
                raise ValueError(f"expected less than 2**31 - {AHEAD} {what}, got {number}")
        row, length = tiling.inner, tiling.s if tiling.ragged else None
        jump = 0 if tiling.columns else (tiling.c - 1) * row if length is None else tiling.c * length
        power = 31 + (row - 1).bit_length()
        magic = -(-(1 << power) // row)
        return Geometry((tiling.c, row, jump, magic, power, length, tiling.positions), wide)


def strip_constants(plan: LaunchPlan) -> tuple[int, int, bool]:
    """Return the kernels' constants LANES, VEC and COLUMNS."""
    return plan.tiling.lanes, plan.tiling.vector, plan.tiling.columns


def _fewer_blocks(plan: LaunchPlan) -> LaunchPlan:
    """Return the plan with at most MOST_RESULTS results for each strip."""
    most = MOST_RESULTS[plan.tiling.columns] // plan.tiling.channels_per_strip
    if plan.tier != "split" or plan.blocks <= most:
        return plan
    share = -(-plan.tiling.positions // most)
    return replace(plan, share=share, blocks=-(-plan.tiling.positions // share))


def _more_blocks(plan: LaunchPlan, work: Work, device: Device) -> LaunchPlan:
    """Return the plan with a program for each SM, or with as many as the same kernels can serve.

    Kernels that merge results are compiled for a power of two of blocks, and others for a tile of positions.
    """
    most = min(_power_of_two(plan.blocks), -(-device.sms // plan.tiling.strips))
    share = max(-(-plan.tiling.positions // most), STREAMED[work.itemsize].elements // _width(plan))
    return replace(plan, share=share, blocks=-(-plan.tiling.positions // share)) if share < plan.share else plan


def chunk(plan: LaunchPlan, warps: int) -> int:
    """Return the number of blocks whose results a program merges at a time."""
    return min(_power_of_two(plan.blocks), max(1, MERGED_AT_ONCE * 32 * warps // _width(plan)))


def merge_block(plan: LaunchPlan) -> tuple[int, int]:
    """Return the blocks whose results a program that only merges loads at a time, and its channels.

    The program has one warp, so that no two warps repeat the same double precision, and each thread loads few results.
    """
    most = MERGED_AT_ONCE * WARP
    blocks = min(_power_of_two(plan.blocks), most)
    return blocks, min(WARP, most // blocks)


def chain_length(plan: LaunchPlan, positions: int) -> int:
    """Return the most additions in a row in float32; 0 if a share needs no more than that."""
    return CHAIN if plan.share > CHAIN * positions else 0


def _width(plan: LaunchPlan) -> int:
    return plan.tiling.lanes * plan.tiling.vector


def streamed_block(plan: LaunchPlan, x: Array, shapes: dict[int, Shape] = STREAMED) -> tuple[int, int]:
    """Return the positions of a tile and the warps of a program that goes through its share tile by tile."""
    shape = shapes[x.element_size()]
    positions = min(_power_of_two(plan.share), max(1, shape.elements // _width(plan)))
    return positions, _warps(positions * _width(plan), shape)


def loads_at_once(plan: LaunchPlan, x: Array) -> int:
    """Return the number of tiles that a program that sums up statistics loads before it uses one."""
    return max(1, AT_ONCE * plan.tiling.vector // SUMMED[x.element_size()].per_thread)


def held_block(plan: LaunchPlan, x: Array) -> tuple[int, int, int]:
    """Return the positions of a tile, the tiles, and the warps of each block of a program that holds a strip."""
    vector = plan.tiling.vector
    crowded = vector > 1 if plan.tiling.columns else vector == 1  # many sums, or many addresses
    shape = (SUMMED if crowded else HELD)[x.element_size()]
    most = max(1, plan.blocks * shape.elements // _width(plan))
    positions = min(_power_of_two(plan.tiling.positions), most)
    tiles = -(-plan.tiling.positions // positions)
    return positions, tiles, _warps(positions * _width(plan) // plan.blocks, shape)


def _warps(elements: int, shape: Shape) -> int:
    return max(1, min(MOST_WARPS, elements // (32 * shape.per_thread)))


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least ``least``."""
    return 1 << (least - 1).bit_length()
