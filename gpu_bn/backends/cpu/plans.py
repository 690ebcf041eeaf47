"""Plans: the division of a tensor into channels or rows, and the kernels that serve it.

A plan depends on shapes, strides and dtypes alone.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gpu_bn.activations import ROWS
from gpu_bn.backends.layout import Layout
from gpu_bn.kernels.cpu import channels, rows
from gpu_bn.kernels.cpu.activations import CHEAP, NAMES, OF_Y
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT64, SIZES, WIDE

SHORT = 16
"""The run length below which a tensor is processed by rows, with its channels as columns."""
MEDIUM, MIN_RUNS = 36, 16
"""Runs of up to ``MEDIUM`` elements are also processed by rows if there are at least ``MIN_RUNS`` (twice as many for
float64, half as many in evaluation) and the scratch memory fits in ``KEPT``: with so few vectors in a run, the fixed
cost of each run of a channel dominates."""
KEPT = 1 << 19
"""Bytes of scratch memory that each thread keeps for its next call."""
TINY = 2048
"""Tensors of at most this many elements are processed by channels: one pass costs less than sums of columns."""
GROUP = 128 << 10
"""The minimum bytes of a group of channels, which are first summed, then written, together. In between they stay in the
second-level cache, and the processor need not wait for the last sum of one channel before it starts the next. Larger
caches get larger groups, which are longer pieces of memory. Sums do not depend on it."""
SHARE = 16 << 20
"""The most bytes of last-level cache counted for a core: a virtual machine is told the cache of its whole host."""
FEW_CHANNELS, LARGE = 16, 1 << 20
"""Tensors with fewer than ``FEW_CHANNELS`` channels and at least ``LARGE`` elements have their channels cut into parts,
so that all threads have work."""
PART = 1 << 15
"""Elements of a part."""
CHUNKS, CHUNK, COLUMN = 16, 1 << 17, 64
"""The maximum number of chunks of rows, the minimum elements of a chunk, and the minimum bytes of a column in a chunk.

Each chunk has separate sums, which must be cleared and added up. They take 16 bytes for each column (32 for float64
elements), so that with more than two chunks a column has at least ``COLUMN`` bytes (twice that), four times as much."""
FOLDED, MAX_FOLDED = 64, 640
"""Rows of less than 1024 columns are joined to a multiple of ``FOLDED`` columns (whole wide vectors) if that is at most
``MAX_FOLDED`` columns, else to a whole number of vectors with at least ``FOLDED`` columns."""


class Geometry(NamedTuple):
    """A tensor as (runs, channels, length), with its axes in memory order.

    ``order`` is that order, ``place`` the index of the channel axis in it.
    """

    runs: int
    channels: int
    length: int
    order: tuple[int, ...]
    place: int


def geometry_of(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Geometry:
    """Return the geometry of a tensor, from its strides in any unit."""
    layout = Layout.from_strides(shape, strides, axis)
    return Geometry(layout.n, layout.c, layout.s, layout.order, layout.order.index(axis))


def run_stride(shape: tuple[int, ...], strides: tuple[int, ...], geometry: Geometry) -> int | None:
    """Return the elements from one run to the next; ``None`` if a tensor with these strides lacks the geometry."""
    expected = 1
    for axis in reversed(geometry.order[geometry.place :]):
        if shape[axis] > 1 and strides[axis] != expected:
            return None
        expected *= shape[axis]
    between_runs = None
    for axis in reversed(geometry.order[: geometry.place]):
        if shape[axis] == 1:
            continue
        if between_runs is None:
            if strides[axis] < expected:
                return None
            between_runs = expected = strides[axis]
        elif strides[axis] != expected:
            return None
        expected *= shape[axis]
    return expected if between_runs is None else between_runs


@dataclass(frozen=True, slots=True)
class Plan:
    """The division of a tensor; :mod:`gpu_bn.kernels.cpu.calls_channels` and ``calls_rows`` explain the numbers."""

    by_rows: bool
    scratch: int
    """Bytes of scratch memory."""
    group: int = 0
    parts: int = 0
    part_runs: int = 0
    part_channels: int = 0
    part_length: int = 0
    folded: int = 0
    chunks: int = 0
    width: int = 0


def plan(geometry: Geometry, code: int, dense: bool, evaluates: bool) -> Plan:
    """Plan how to cut a tensor of the dtype ``code``; ``dense`` tells whether no tensor of the call has gaps."""
    runs, count_channels, length = geometry[:3]
    size, total = SIZES[code], runs * count_channels * length
    if length <= MEDIUM and total > TINY:
        plan = _rows_plan(runs, count_channels, length, size, dense)
        min_runs = MIN_RUNS // (2 if evaluates else 1) * (2 if code == FLOAT64 else 1)
        if length < SHORT or (runs >= min_runs and plan.scratch + 16 * count_channels <= KEPT):
            return plan
    group = max(1, max(GROUP, second_cache() // 8) // (size * runs * length))
    cuts_channels = not evaluates and count_channels < FEW_CHANNELS and total >= LARGE
    part_length = min(length, PART)
    part_channels = 1 if cuts_channels or part_length < length else min(count_channels, max(1, PART // length))
    part_runs = 1
    if cuts_channels:
        group, part_runs = 0, max(1, PART // length)
    elif part_channels == count_channels:
        part_runs = max(1, PART // (count_channels * length))
    parts = -(-runs // part_runs) * -(-length // part_length)
    vectors = 5 + 2 * parts if cuts_channels else 5
    return Plan(False, 8 * vectors * count_channels, group, parts, part_runs, part_channels, part_length)


def _rows_plan(runs: int, count_channels: int, length: int, size: int, dense: bool) -> Plan:
    period, folded = count_channels * length, 1
    if dense and period < 1024:
        folded = FOLDED // math.gcd(period, FOLDED)
        if folded * period > MAX_FOLDED:
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
    """Return the address of a compiled kernel; the parameters ``floats`` are float64, all others int64."""
    return kernel.address(floats)  # type: ignore[no-any-return]


@cache
def forward_kernels(
    by_rows: bool, code: int, which: int, residual: bool, statistics: bool, writes: bool
) -> tuple[int, ...]:
    """Return the addresses of the kernels of a forward call; 0 for those that it does not need."""
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
    """Tell whether the sums' kernel stores dz, and return the addresses of the kernels; 0 for those not needed.

    dz is stored if dresidual, which equals dz, is wanted, or if computing it again takes long; then it is in the memory
    of dx until dx is written. In half precision dz is stored only if it is dy or 0, for other values would be rounded.
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
    """Return the bytes of a core's second-level cache."""
    return next((size for level, size, _ in _caches() if level == 2), 1 << 20)


@cache
def last_cache() -> int:
    """Return the bytes of the last-level cache that this system's cores may use."""
    return max((min(size, SHARE * cores) for _, size, cores in _caches()), default=32 << 20)


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[int, int, int]]:
    """Return (level, bytes, cores that share it) for each cache of the first core that the system reports."""
    caches = []
    for index in folder.glob("index*"):
        with suppress(OSError, ValueError, KeyError):
            level, size, cores = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_map"))
            nbytes = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
            caches.append((int(level), nbytes, int(cores.replace(",", ""), 16).bit_count()))
    return caches
