"""How a tensor is cut into channels or rows, and which kernels serve it. All of it follows from shapes and strides."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gpu_bn.activations import ROWS
from gpu_bn.backends.layout import memory_order
from gpu_bn.kernels.cpu import channels, rows
from gpu_bn.kernels.cpu.activations import CHEAP, NAMES, OF_Y
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT64, SIZES, WIDE

SHORT = 16
"""Adjacent elements of a channel below which channels are columns of rows."""
MEDIUM, ENOUGH = 36, 16
"""Up to so many they are too, of as many runs or more (of float64 twice, to evaluate half as many), if the scratch
memory is then at most ``KEPT``: a vector or two take less time than what each run of a channel takes besides."""
KEPT = 1 << 19
"""Bytes of scratch memory that each thread keeps for its next call."""
TINY = 2048
"""Elements up to which they are not: one pass over few elements costs less than sums of columns."""
GROUP = 128 << 10
"""Bytes of channels, at least, that are summed, then written, together: they stay in the second-level cache in between,
and the processor need not wait for one channel's last sum before it starts with the next. A larger cache has larger
groups, whose memory lies in longer pieces. No sum depends on it."""
SHARE = 16 << 20
"""Bytes of the last cache that count for each core, at most: virtual machines are told its size on a host of many."""
FEW_CHANNELS, LARGE = 16, 1 << 20
"""So few channels of a tensor of so many elements are cut into parts, so that threads have enough of them."""
PART = 1 << 15
"""Elements of a part."""
CHUNKS, CHUNK, COLUMN = 16, 1 << 17, 64
"""Chunks of rows at most, and elements of one at least: each has sums of its own, which are cleared and added up.

They take 16 bytes a column, of float64 elements 32; more than two chunks have ``COLUMN`` bytes of each column at least,
or twice that: four times as much."""
FOLDED, MOST_FOLDED = 64, 640
"""Rows of less than 1024 columns are joined to longer ones, of a multiple of ``FOLDED`` columns, whole wide vectors, if
that takes no more than ``MOST_FOLDED``; else of at least ``FOLDED``, a whole number of vectors."""


class Geometry(NamedTuple):
    """A tensor as (runs, channels, length), with its axes in the order in which they lie in memory.

    ``order`` is that order, ``at`` the channels' place in it.
    """

    runs: int
    channels: int
    length: int
    order: tuple[int, ...]
    at: int


def geometry(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Geometry:
    order = memory_order(shape, strides)
    at = order.index(axis)
    sizes = [shape[a] for a in order]
    return Geometry(math.prod(sizes[:at]), shape[axis], math.prod(sizes[at + 1 :]), order, at)


def step(shape: tuple[int, ...], strides: tuple[int, ...], seen: Geometry) -> int | None:
    """Elements from a run to the next, of a tensor seen as another is; ``None`` if it cannot be."""
    expected = 1
    for place in range(len(shape) - 1, seen.at - 1, -1):
        size, stride = shape[seen.order[place]], strides[seen.order[place]]
        if size > 1 and stride != expected:
            return None
        expected *= size
    found = None
    for place in range(seen.at - 1, -1, -1):
        size, stride = shape[seen.order[place]], strides[seen.order[place]]
        if size == 1:
            continue
        if found is None:
            if stride < expected:
                return None
            found = expected = stride
        elif stride != expected:
            return None
        expected *= size
    return expected if found is None else found


@dataclass(frozen=True, slots=True)
class Plan:
    """How a tensor is cut; see :mod:`gpu_bn.kernels.cpu.calls_channels` and ``calls_rows`` for the numbers."""

    by_rows: bool
    scratch: int
    """Bytes."""
    group: int = 0
    parts: int = 0
    part_runs: int = 0
    part_channels: int = 0
    part_length: int = 0
    folded: int = 0
    chunks: int = 0
    width: int = 0


def plan(seen: Geometry, code: int, dense: bool, evaluates: bool) -> Plan:
    """How to cut a tensor; ``dense`` if all tensors of the call are."""
    runs, count_channels, length = seen[:3]
    size, total = SIZES[code], runs * count_channels * length
    if length <= MEDIUM and total > TINY:
        plan = _rows_plan(runs, count_channels, length, size, dense)
        enough = ENOUGH // (2 if evaluates else 1) * (2 if code == FLOAT64 else 1)
        if length < SHORT or (runs >= enough and plan.scratch + 16 * count_channels <= KEPT):
            return plan
    group = max(1, max(GROUP, second_cache() // 8) // (size * runs * length))
    if evaluates or not (count_channels < FEW_CHANNELS and total >= LARGE):
        part_length = min(length, PART)
        part_channels = 1 if part_length < length else min(count_channels, max(1, PART // length))
        part_runs = max(1, PART // (count_channels * length)) if part_channels == count_channels else 1
        parts = -(-runs // part_runs) * -(-length // part_length)
    else:
        part_length, part_channels = min(length, PART), 1
        part_runs = max(1, PART // length)
        parts = -(-runs // part_runs) * -(-length // part_length)
        scratch = 8 * (5 * count_channels + 2 * count_channels * parts)
        return Plan(False, scratch, 0, parts, part_runs, 1, part_length)
    return Plan(False, 8 * 5 * count_channels, group, parts, part_runs, part_channels, part_length)


def _rows_plan(runs: int, count_channels: int, length: int, size: int, dense: bool) -> Plan:
    period, folded = count_channels * length, 1
    if dense and period < 1024:
        folded = FOLDED // math.gcd(period, FOLDED)
        if folded * period > MOST_FOLDED:
            folded = 16 // math.gcd(period, 16)
        while folded * period < FOLDED:
            folded *= 2
        folded = max(1, min(folded, runs))
    columns = folded * period
    width = -(-columns // 64) * 64 + WIDE * BYTES // 4
    pairs = 2 if size == SIZES[FLOAT64] else 1
    chunks = max(1, min(CHUNKS, runs * period // CHUNK, runs // folded, max(2, runs * size // (COLUMN * pairs))))
    scratch = 8 * ((5 + 2 * pairs * chunks) * width + 5 * count_channels)
    return Plan(True, scratch, folded=folded, chunks=chunks, width=width)


@cache
def address(kernel: Any, floats: tuple[str, ...] = ("p",)) -> int:
    """Where a compiled kernel is; all parameters but ``floats`` are int64."""
    found: int = kernel.address(floats)
    return found


@cache
def forward_kernels(
    by_rows: bool, code: int, which: int, residual: bool, statistics: bool, writes: bool
) -> tuple[int, ...]:
    """The addresses that a forward call takes; 0 for what it does not need."""
    first = (rows.shifts, rows.deviations, rows.deviations_again) if by_rows else (channels.moments,)
    last = (rows if by_rows else channels).writer
    return (
        *[address(one(code)) if statistics else 0 for one in first],
        address(last(code, which, residual, False, True, False)) if writes else 0,
    )


@cache
def backward_kernels(
    by_rows: bool, code: int, which: int, residual: bool, sums: bool, writes: bool, adds: bool
) -> tuple[int, int, int]:
    """Whether the sums' kernel keeps dz, and the addresses that a backward call takes; 0 for what it does not need.

    dz is kept where dresidual, which it is, is wanted, and where it takes long to compute again: in the place of dx
    until that is known. In half precision only what is dy or 0 is kept: anything else would be rounded.
    """
    module, name = (rows if by_rows else channels), NAMES[which]
    exact = SIZES[code] > 2 or bool(ROWS[name.removesuffix(OF_Y)].device.dropped)
    keeps = sums and writes and exact and (adds or name not in CHEAP)
    last = (0, False, True, True, False) if keeps else (which, residual, True, writes, adds)
    return (
        int(keeps),
        address(module.products(code, which, residual, keeps)) if sums else 0,
        address(module.writer(code, *last)) if writes or adds else 0,
    )


@cache
def second_cache() -> int:
    """Bytes of a core's second-level cache."""
    return next((size for level, size, _ in _caches() if level == 2), 1 << 20)


@cache
def last_cache() -> int:
    """Bytes of the last-level cache, as far as this system's cores may have them."""
    return max((min(size, SHARE * cores) for _, size, cores in _caches()), default=32 << 20)


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[int, int, int]]:
    """The first core's caches, as far as the system tells: level, bytes, and how many cores share it."""
    found = []
    for index in folder.glob("index*"):
        with suppress(OSError, ValueError, KeyError):
            level, size, cores = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_map"))
            nbytes = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
            found.append((int(level), nbytes, int(cores.replace(",", ""), 16).bit_count()))
    return found
