"""Faults planted in the CUDA kernels: each must be reported by the named check, or found wrong by the oracle.

A missing fence shows as a data race. One fence less goes unnoticed where another orders the same accesses: the release
of a cooperative arrival, after the fence of publish. So does the barrier at the end of a strip, after which no thread
writes what another still reads before it has passed a later barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from emulator import Device, EmulatorError

from gpu_bn.backends import _cuda
from gpu_bn.testing import Case, check

pytestmark = pytest.mark.compile
SEEDS = (None, 0, 1)
ROWS = Case((3, 4, 41, 8), activation="relu")
"""246 vectors of 4 floats a channel."""
LONG = Case((5, 3, 41, 8), activation="relu")
"""410 vectors a channel: some threads have two, on both sides of the end of a row of 82."""
LONGER = Case((5, 2, 41, 24), activation="relu")
"""1,230 vectors a channel: four or five for each thread."""
UNEVEN = Case((3, 3, 41, 12), activation="relu")
"""369 vectors a channel: the blocks of a cluster cannot have equal shares."""
SMALL = Case((3, 2, 4, 8), activation="relu")
CHANNELS = Case((3, 20, 4, 8), activation="relu")
"""More channels than two co-resident blocks each can have at a time."""
TICKETS = Case((4, 2, 64, 32), activation="relu")
"""2,048 vectors a channel: enough for two blocks of a split launch."""
COLUMNS = Case((260, 40), "float16", activation="relu")
RESIDUAL = Case((3, 4, 41, 8), activation="relu", residual=True)
WITHOUT_WEIGHT = Case((4, 2, 64, 32), activation="relu", affine="none")
SLOPED = Case((3, 4, 41, 8), activation="leaky_relu", residual=True)
KINKS = Case((4, 6, 5), activation="relu6", affine="kinks")
HUGE = Case((3, 4, 41, 8), activation="relu", mean=1e30, std=1e30, mode="train_no_stats")
TINY = Case((3, 4, 41, 8), activation="relu", mean=1e-20, std=1e-20, eps=1e-50)
OF_16_BITS = Case((4, 6, 5), param_dtype="bfloat16")


@dataclass(frozen=True)
class Planted:
    """``check`` must report it: a check of the emulator (or either of two), or "wrong result" for the oracle."""

    fault: str
    check: str
    tier: str
    edits: tuple[tuple[str, str], ...]
    case: Case = ROWS

    def edit(self, source: str) -> str:
        for old, new in self.edits:
            assert old in source, f"the kernels no longer hold {old!r}"
            source = source.replace(old, new)
        return source


def planted(fault: str, check: str, tier: str, old: str, new: str = "", case: Case = ROWS) -> Planted:
    return Planted(fault, check, tier, ((old, new),), case)


BLOCK_SUM_READS = "  double sum = 0;\n  if (t < width) {"
EARLY = "data race or uninitialised read or wrong result"
"""Of a block that does not wait for the others: what it finds depends on who is how far."""
RELEASE = 'asm volatile("red.release.gpu'
PUBLISHED = "  __threadfence();\n  __syncthreads();\n}"
PLANTED = [
    # Barriers
    planted("block sum: no barrier before reading", "data race", "cta", f"  __syncthreads();\n{BLOCK_SUM_READS}",
            BLOCK_SUM_READS),
    planted("block sum: no barrier before reuse", "data race", "cta", "  __syncthreads();  // the scratch may", "//"),
    planted("cluster: no barrier before reading", "block not started", "cluster",
            "meet(const Tile<L>&) { barrier(); }", "meet(const Tile<L>&) { __syncthreads(); }"),
    planted("cluster: relaxed barrier", "data race", "cluster", "cluster.arrive.release", "cluster.arrive.relaxed"),
    planted("cluster: no barrier before leaving", "exited block", "cluster", "leave() { barrier(); }", "leave() {}"),
    planted("no wait for copies", "copy in flight", "cta",
            'asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");'),
    planted("wait for copies that is one short", "copy in flight", "cta", "wait_copies<0>()",
            "wait_copies<1>()", LONGER),
    # Fences and counters
    Planted("cooperative: arrival without release or fence", "data race", "cooperative",
            ((RELEASE, 'asm volatile("red.relaxed.gpu'), (PUBLISHED, PUBLISHED.replace("__threadfence();", "")))),
    planted("cooperative: relaxed wait", "data race", "cooperative", "ld.acquire.gpu", "ld.relaxed.gpu"),
    planted("cooperative: one set of partials", "data race", "cooperative",
            "((round & 1) * g.groups + group)", "(group)", CHANNELS),
    planted("cooperative: arrivals not reset", EARLY, "cooperative", "atomicExch(arrived + group, 0u);", "",
            SMALL),
    planted("cooperative: departures not reset", EARLY, "cooperative",
            "atomicExch(left + group, 0u);", "", SMALL),
    Planted("split: ticket without fences", "data race", "split", (("__threadfence();", ""),), TICKETS),
    planted("split: tickets not reset", EARLY, "split",
            "if (ticket == tile.g.blocks - 1) atomicExch(counters + tile.strip, 0u);", "", TICKETS),
    # Indices
    planted("one vector too many", "out of bounds", "cta", "length = length_of(rank);",
            "length = length_of(rank) + 1;"),
    planted("lost tail", "wrong result", "cta", "length = length_of(rank);", "length = length_of(rank) - 1;"),
    planted("stride of rows: channels and inner swapped", "out of bounds", "cta",
            "(i64)(step / g.inner) * g.channels * g.inner", "(i64)(step / g.channels) * g.inner * g.channels", LONG),
    planted("row end not noticed", "data race", "cta", "if (c.rest >= g.inner) c", "if (c.rest > g.inner) c", LONG),
    planted("row start not noticed, backwards", "data race", "split",
            "if (c.rest < jump_rest) c.rest += g.inner, c.offset -= gap;", "", LONG),
    planted("mask not stored", "uninitialised read", "cta", "if (MASK) mask[offset] = (u8)bits;", "", RESIDUAL),
    planted("inactive lanes of columns work", "out of bounds", "cta", "!L::COLUMNS || column() < g.inner", "true",
            COLUMNS),
    # Arithmetic
    planted("truncated block sum", "wrong result", "cta", "k < WARPS; ++k", "k < WARPS - 1; ++k"),
    planted("truncated warp sum", "wrong result", "cta", "u32 distance = 16", "u32 distance = 8"),
    planted("merge without the spread of means", "wrong result", "cooperative",
            "peers.second(r, place) + nd * d", "peers.second(r, place)", COLUMNS),
    planted("gradient bit of the wrong sign", "wrong result", "cta", "return z <= A(0); }", "return z >= A(0); }",
            RESIDUAL),
    planted("running variance without Bessel", "wrong result", "cta", "(n > 1. ? n / (n - 1.) : 1.) * var", "var",
            Case((3, 4, 8))),
    planted("dx without the mean of dz", "wrong result", "cta", "(A)(-sums.dz / count - slope * rest)",
            "(A)0", COLUMNS),
    planted("dx without the slope", "wrong result", "cta", "(A)slope;", "(A)0;", COLUMNS),
    planted("absent weight saved as 0", "wrong result", "split", "= weight.get(channel, 1.);",
            "= weight.get(channel, 0.);", WITHOUT_WEIGHT),
    planted("slope forgotten where bits decide", "wrong result", "cta", "dy : Activation::dropped(dy, parameter)",
            "dy : A(0)", SLOPED),
    planted("the other side of a kink", "wrong result", "cta", "return (z <= A(0)) | (z >= A(6))",
            "return (z < A(0)) | (z > A(6))", KINKS),
    planted("overflow not noticed", "wrong result", "cta",
            "if (squares > LARGEST) return scale[place] = SCALE_DOWN, true;", "", HUGE),
    planted("underflow not noticed", "wrong result", "cta",
            "if (small && fabs(c) < 1e-8f) return scale[place] = SCALE_UP, true;", "", TINY),
    planted("running variance flushed", "wrong result", "cta", "cvt.rn.f32.f64", "cvt.rn.ftz.f32.f64", TINY),
    planted("float16 for bfloat16", "wrong result", "cta", "widen(dtype == FLOAT16 ?", "widen(dtype == BFLOAT16 ?",
            OF_16_BITS),
    planted("last share counted as a full one", "wrong result", "cluster", "return (double)length_of(r) *",
            "return (double)g.share *", UNEVEN),
]  # fmt: skip


def first_report(run: Callable[[Device], object]) -> EmulatorError:
    """What is said about a faulty run, in lock-step or under a random schedule."""
    for seed in SEEDS:
        try:
            run(Device(seed=seed, max_steps=50_000))
        except EmulatorError as error:
            return error
        except AssertionError as error:
            return EmulatorError("wrong result", str(error))
    pytest.fail("nothing reported the fault")


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault)
def test_a_planted_fault_is_reported(planted, make_gpu, caught_faults):
    def run(device: Device) -> None:
        gpu = make_gpu(90, planted.tier, device)
        gpu.edit_source = planted.edit
        check(planted.case, gpu.backend)
        check(planted.case, gpu.backend)  # what a call leaves behind, another finds

    error = first_report(run)
    caught_faults[f"CUDA: {planted.fault}"] = str(error)
    assert error.check in planted.check.split(" or "), str(error)


@pytest.mark.parametrize("seed", [None, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in SEEDS[1:])])
@pytest.mark.parametrize("tier", ["cta", "cluster", "cooperative", "split"])
def test_the_kernels_without_faults_are_clean(tier, seed, make_gpu):
    for case in {planted.case for planted in PLANTED if planted.tier == tier}:
        check(case, make_gpu(90, tier, Device(seed=seed)).backend)


# -------------------------------------------------------------------- offsets beyond 32 bits

SEEK = """
template <bool COLUMNS> __device__ void seek_and_step(
    i64* out, const u8* flags, i64 flag, GEOMETRY_ARGS, u32 strip, u32 rank, u32 first) {
  typedef Layout<F32, 4, COLUMNS, MASKED_GROUPS> L;
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
  const Selection<L> selection = {flags - flag, nullptr};
  own[5] = selection.at(tile, first).count();
  own[6] = tile.in_strip((i64)rank * share + first);
}
extern "C" __global__ void seek_rows(
    i64* out, const u8* flags, i64 flag, GEOMETRY_ARGS, u32 strip, u32 rank, u32 first) {
  seek_and_step<false>(
      out, flags, flag, channels, inner, lanes, strips, positions, share, blocks, groups, strip, rank, first);
}
extern "C" __global__ void seek_columns(
    i64* out, const u8* flags, i64 flag, GEOMETRY_ARGS, u32 strip, u32 rank, u32 first) {
  seek_and_step<true>(
      out, flags, flag, channels, inner, lanes, strips, positions, share, blocks, groups, strip, rank, first);
}
"""
GEOMETRIES = {
    # channels, inner, lanes, strips, positions, share, blocks, groups; strip, rank, first
    "rows": (70_000, 1_000, 1, 70_000, 100_000_000, 1_000_000, 100, 1, 69_999, 99, 999_000),
    "long rows": (70_000, 100_000, 1, 70_000, 100_000_000, 1_000_000, 100, 1, 69_999, 98, 999_900),
    "one long row": (1, (1 << 32) - 1, 1, 1, (1 << 32) - 1, 1 << 25, 128, 1, 0, 127, (1 << 25) - 600),
    "more positions than 32 bits": (1, 4_000_000_000, 1, 1, 5_000_000_000, 50_000_000, 100, 1, 0, 99, 49_000_000),
    "columns": (400_000, 100_000, 8, 12_500, 1_000_000, 10_000, 100, 12_500, 12_499, 99, 9_000),
    "rows of groups": (70_000, 1_000, 1, 70_000, 1_000_000, 10_000, 100, 350_000, 349_999, 9, 9_000),
    "columns of groups": (400_000, 100_000, 8, 12_500, 10_000, 10_000, 1, 75_000, 74_999, 0, 9_000),
}
CUTS = {
    "rows": [("return {(n * g.channels + strip) * g.inner + rest, rest};",
              "return {(i64)(((u32)n * g.channels + strip) * g.inner + rest), rest};")],
    "long rows": [("const i64 gap = (i64)(g.channels - 1) * g.inner;", "const i64 gap = (g.channels - 1) * g.inner;")],
    "one long row": [("return {(n * g.channels + strip) * g.inner + rest, rest};",
                      "return {(i64)(int)((n * g.channels + strip) * g.inner + rest), rest};")],
    "more positions than 32 bits": [
        ("in_strip(i64 position)", "in_strip(u32 position)"),
        ("const i64 p = (i64)rank * g.share + position;", "const i64 p = rank * g.share + position;"),
        ("return (double)g.positions * L::PER_POSITION;", "return (double)((u32)g.positions * L::PER_POSITION);")],
    "columns": [("return {p * g.inner + column(), 0};", "return {(i64)((u32)p * g.inner + column()), 0};")],
    "rows of groups": [("group * g.positions * (L::COLUMNS", "group * (u32)g.positions * (L::COLUMNS")],
    "columns of groups": [("group * g.positions * (L::COLUMNS", "group * (u32)g.positions * (L::COLUMNS")],
}  # fmt: skip


def seek_errors(source: str, name: str, compile_cuda) -> int:
    """How many of the numbers differ from those computed in Python's integers."""
    *geometry, of_all, rank, first = GEOMETRIES[name]
    channels, inner, lanes, strips, positions, share, *_ = geometry
    columns = name.startswith("columns")
    group, strip = divmod(of_all, strips)
    start = group * positions * (inner if columns else channels)
    kernel = compile_cuda(source + SEEK, 80, _cuda.OPTIONS)["seek_columns" if columns else "seek_rows"]
    device = Device()
    out, flags = device.empty((256, 7), np.int64), np.array([1, 0, 1, 1], np.uint8)
    wide = [np.int64(value) if at == 4 else np.uint32(value) for at, value in enumerate(geometry)]

    def offset(position: int, lane: int) -> int:
        assert position < positions
        row, rest = divmod(position, inner)
        if columns:
            return start + position * inner + strip * lanes + lane
        return start + (row * channels + strip) * inner + rest

    begin, step, per_position = rank * share + first, 256 // lanes, 1 if columns else 4
    flag = (group * positions + begin) * per_position
    device.launch(kernel.kernel, 1, 256, [out, flags, np.int64(flag), *wide, *map(np.uint32, (of_all, rank, first))])
    counted = int(flags[:per_position].sum())
    want = [
        (offset(begin + t // lanes, t % lanes), offset(begin, t % lanes), offset(begin + step, t % lanes),
         offset(begin, t % lanes), positions * per_position, counted, offset(begin, t % lanes))
        for t in range(256)
    ]  # fmt: skip
    assert max(map(max, want)) * 16 >= 1 << 32
    return int((out != np.array(want)).sum())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_offsets_beyond_32_bits(name, compile_cuda, caught_faults):
    source = _cuda.source("identity")
    assert seek_errors(source, name, compile_cuda) == 0
    for old, new in CUTS[name]:
        assert old in source
        wrong = seek_errors(source.replace(old, new), name, compile_cuda)
        assert wrong > 0
        caught_faults[f"CUDA: offset cut to 32 bits, {name}"] = f"wrong result: {wrong} of 1792 numbers"


def test_the_place_of_a_flag_beyond_32_bits(compile_cuda):
    source = _cuda.source("identity")
    old, new = "const i64 in_strip = (i64)tile.rank *", "const u32 in_strip = tile.rank *"
    assert old in source
    with pytest.raises(EmulatorError, match="out of bounds"):
        seek_errors(source.replace(old, new), "more positions than 32 bits", compile_cuda)
