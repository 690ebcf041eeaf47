"""Faults planted in the CUDA kernels: the named check must report each, or the oracle must find a wrong result.

A missing fence shows as a data race, unless something else orders the same accesses. Two omissions go unnoticed
for this reason: the release of a cooperative arrival, which follows the fence in publish, and the barrier at the end of
a strip, since each thread passes a later barrier before it overwrites what others still read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from emulator import Device, EmulatorError
from support.cuda_faults import GEOMETRIES, PLANTED

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.testing import check

pytestmark = pytest.mark.compile
SEEDS = (None, 0, 1)


def first_report(run: Callable[[Device], object]) -> EmulatorError:
    """Return the first error of a faulty run, in lock-step or under a random schedule."""
    for seed in SEEDS:
        try:
            run(Device(seed=seed, max_steps=50_000))
        except EmulatorError as error:
            return error
        except AssertionError as error:
            return EmulatorError("wrong result", str(error))
    pytest.fail("nothing reported the fault")


FIRST = {(planted.check, planted.tier): planted.fault for planted in reversed(PLANTED)}.values()
"""The faults of a normal run: the first of each check and tier."""


@pytest.mark.parametrize(
    "planted",
    [pytest.param(planted, marks=[pytest.mark.slow] * (planted.fault not in FIRST)) for planted in PLANTED],
    ids=lambda planted: planted.fault,
)
def test_a_planted_fault_is_reported(planted, make_gpu, caught_faults):
    def run(device: Device) -> None:
        gpu = make_gpu(90, planted.tier, device)
        gpu.edit_source = planted.edit
        check(planted.case, gpu.backend)
        check(planted.case, gpu.backend)  # the second call finds the counters of the first

    error = first_report(run)
    caught_faults[f"CUDA: {planted.fault}"] = str(error)
    assert error.check in planted.check.split(" or "), str(error)


@pytest.mark.parametrize(
    ("tier", "case", "seed"),
    [
        pytest.param(
            *one, seed, marks=pytest.mark.exhaustive if seed is not None else [pytest.mark.slow] * (index % 4 > 0)
        )
        for index, one in enumerate(dict.fromkeys((planted.tier, planted.case) for planted in PLANTED))
        for seed in SEEDS
    ],
    ids=str,
)
def test_the_kernels_without_faults_are_clean(tier, case, seed, make_gpu):
    check(case, make_gpu(90, tier, Device(seed=seed)).backend)


# -------------------------------------------------------------------- offsets beyond 32 bits

SEEK = """
template <bool COLUMNS, Batch BATCH> __device__ void seek_and_step(
    i64* out, const u8* flags, i64 flag, GEOMETRY_ARGS, u32 strip, u32 rank, u32 first) {
  typedef Layout<F32, 4, COLUMNS, BATCH> L;
  const Geometry g = GEOMETRY;
  const Tile<L> tile(g, strip, rank);
  Cursor cursor = tile.seek(first), back = tile.seek(first + tile.step);
  i64* own = out + threadIdx.x * 7;
  own[0] = tile.seek(first + threadIdx.x / lanes).offset;
  own[1] = cursor.offset;
  tile.template advance<false>(cursor);
  own[2] = cursor.offset;
  tile.template advance<true>(back);
  own[3] = back.offset;
  own[4] = (i64)tile.elements();
  own[5] = 0;
  if constexpr (L::MASKED) own[5] = Selection<L>{flags - flag, nullptr}.at(tile, first).count();
  own[6] = tile.in_strip((i64)rank * share + first);
}
#define SEEK(NAME, COLUMNS, BATCH)                                                                                \\
  extern "C" __global__ void NAME(                                                                              \\
      i64* out, const u8* flags, i64 flag, GEOMETRY_ARGS, u32 strip, u32 rank, u32 first) {                     \\
    seek_and_step<COLUMNS, BATCH>(out, flags, flag, GEOMETRY_NAMES, strip, rank, first);                        \\
  }
SEEK(seek_rows, false, MASKED_GROUPS)
SEEK(seek_ragged, false, RAGGED_ROWS)
SEEK(seek_columns, true, MASKED_GROUPS)
"""
CUTS = {
    "rows": [("return {(n * g.channels + strip) * g.inner + rest, rest, 0};",
              "return {(i64)(((u32)n * g.channels + strip) * g.inner + rest), rest, 0};")],
    "long rows": [("const i64 gap = (i64)(g.channels - 1) * g.inner;", "const i64 gap = (g.channels - 1) * g.inner;")],
    "one long row": [("return {(n * g.channels + strip) * g.inner + rest, rest, 0};",
                      "return {(i64)(int)((n * g.channels + strip) * g.inner + rest), rest, 0};")],
    "more positions than 32 bits": [
        ("in_strip(i64 position)", "in_strip(u32 position)"),
        ("const i64 p = (i64)rank * g.share + position;", "const i64 p = rank * g.share + position;"),
        ("return (double)g.positions * L::PER_POSITION;", "return (double)((u32)g.positions * L::PER_POSITION);")],
    "ragged rows": [
        ("return (n * g.channels + strip) * g.row;", "return ((u32)n * g.channels + strip) * g.row;"),
        ("const i64 to_next = (i64)g.channels * g.row;", "const i64 to_next = g.channels * g.row;")],
    "columns": [("return {p * g.inner + column(), 0, 0};", "return {(i64)((u32)p * g.inner + column()), 0, 0};")],
    "rows of groups": [("group * g.positions * (L::COLUMNS", "group * (u32)g.positions * (L::COLUMNS")],
    "columns of groups": [("group * g.positions * (L::COLUMNS", "group * (u32)g.positions * (L::COLUMNS")],
}  # fmt: skip


def seek_errors(source: str, name: str, compile_cuda) -> int:
    """Return how many numbers of a kernel differ from those computed with Python integers."""
    *geometry, of_all, rank, first = GEOMETRIES[name]
    channels, inner, elements, lanes, strips, positions, share, *_ = geometry
    kind = name.split()[0]
    columns, ragged = kind == "columns", kind == "ragged"
    group, strip = divmod(of_all, strips)
    start = group * positions * (inner if columns else channels)
    kernel = compile_cuda(source + SEEK, 80, cuda_sources.OPTIONS)[f"seek_{kind if columns or ragged else 'rows'}"]
    device = Device()
    out, flags = device.empty((256, 7), np.int64), np.array([1, 0, 1, 1], np.uint8)
    wide = [np.int64(value) if at == 5 else np.uint32(value) for at, value in enumerate(geometry)]

    def offset(position: int, lane: int) -> int:
        assert position < positions
        row, rest = divmod(position, inner)
        if columns:
            return start + position * inner + strip * lanes + lane
        if ragged:
            begins = (row * channels + strip) * elements
            return begins // 4 + min(rest, (begins % 4 + elements - 1) // 4)
        return start + (row * channels + strip) * inner + rest

    begin, step, per_position = rank * share + first, 256 // lanes, 1 if columns else 4
    flag = (group * positions + begin) * per_position
    device.launch(kernel.kernel, 1, 256, [out, flags, np.int64(flag), *wide, *map(np.uint32, (of_all, rank, first))])
    counted = int(flags[:per_position].sum())
    whole = positions // inner * elements if ragged else positions * per_position
    want = [
        (offset(begin + t // lanes, t % lanes), offset(begin, t % lanes), offset(begin + step, t % lanes),
         offset(begin, t % lanes), whole, 0 if ragged else counted, offset(begin, t % lanes))
        for t in range(256)
    ]  # fmt: skip
    assert max(map(max, want)) * 16 >= 1 << 32
    return int((out != np.array(want)).sum())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_offsets_beyond_32_bits(name, compile_cuda, caught_faults):
    source = cuda_sources.source("identity")
    assert seek_errors(source, name, compile_cuda) == 0
    for old, new in CUTS[name]:
        assert old in source
        wrong = seek_errors(source.replace(old, new), name, compile_cuda)
        assert wrong > 0
        caught_faults[f"CUDA: offset cut to 32 bits, {name}"] = f"wrong result: {wrong} of 1792 numbers"


def test_the_place_of_a_flag_beyond_32_bits(compile_cuda):
    source = cuda_sources.source("identity")
    old, new = "const i64 in_strip = (i64)tile.rank *", "const u32 in_strip = tile.rank *"
    assert old in source
    with pytest.raises(EmulatorError, match="out of bounds"):
        seek_errors(source.replace(old, new), "more positions than 32 bits", compile_cuda)
