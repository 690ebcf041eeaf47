"""List faults to plant in the CUDA kernels, and the check that must report each."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_bn.testing import Case

ROWS = Case((3, 2, 41, 8), activation="relu")
"""A case with 246 vectors of 4 floats per channel."""
LONG = Case((5, 3, 41, 8), activation="relu")
"""A case with 410 vectors per channel. Some threads have two, before and after the end of a row of 82."""
LONGER = Case((5, 2, 41, 24), activation="relu")
"""A case with 1,230 vectors per channel: four or five for each thread."""
UNEVEN = Case((3, 3, 41, 12), activation="relu")
"""A case with 369 vectors per channel, which the blocks of a cluster cannot share equally."""
SMALL = Case((3, 2, 4, 8), activation="relu")
CHANNELS = Case((3, 20, 4, 8), activation="relu")
"""A case with more channels than co-resident groups of two blocks."""
TICKETS = Case((4, 2, 64, 32), activation="relu")
"""A case with 2,048 vectors per channel: enough for two blocks of a split launch."""
COLUMNS = Case((260, 40), "float16", activation="relu")
RESIDUAL = Case((3, 2, 41, 8), activation="relu", residual=True)
WITHOUT_WEIGHT = Case((4, 2, 64, 32), activation="relu", affine="none")
SLOPED = Case((3, 2, 41, 8), activation="leaky_relu", residual=True)
KINKS = Case((4, 6, 5), activation="relu6", affine="kinks")
HUGE = Case((3, 2, 41, 8), activation="relu", mean=1e30, std=1e30, mode="train_no_stats")
TINY = Case((3, 2, 41, 8), activation="relu", mean=1e-20, std=1e-20, eps=1e-50)
OF_16_BITS = Case((4, 6, 5), param_dtype="bfloat16")
RAGGED = Case((8, 3, 27), activation="relu")
"""A case with rows that span seven or eight vectors of 4 floats. The last row spans seven."""


@dataclass(frozen=True)
class Planted:
    """A fault, and the ``check`` that must report it: a check of the emulator, or "wrong result" for the oracle."""

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


BLOCK_SUM_READS = "  if (t >= width) return 0;"
EARLY = "data race or uninitialised read or wrong result"
"""The checks for a block that does not wait for the others. Which one reports depends on the progress of the others."""
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
            "(i64)(step / g.inner) * g.channels * pitch()", "(i64)(step / g.channels) * g.inner * g.channels", LONG),
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
    # Ragged rows
    planted("ragged rows: neighbours counted", "data race or wrong result", "cta", "return bits >> j & 1u;",
            "return true;", RAGGED),
    planted("ragged rows: neighbours written", "data race or wrong result", "split", "if (selected[j]) to->at[j]",
            "to->at[j]", RAGGED),
    planted("ragged rows: a vector beyond the last row", "out of bounds", "cta", "(rest < last ? rest : last)", "rest",
            RAGGED),
    planted("ragged rows: elements not counted", "wrong result", "cta",
            "return (double)(elements_before(begin + length_of(r)) - elements_before(begin));",
            "return (double)length_of(r) * L::PER_POSITION;", RAGGED),
]  # fmt: skip


GEOMETRIES = {
    # channels, inner, row, lanes, strips, positions, share, blocks, groups; strip, rank, first
    "rows": (70_000, 1_000, 0, 1, 70_000, 100_000_000, 1_000_000, 100, 1, 69_999, 99, 999_000),
    "long rows": (70_000, 100_000, 0, 1, 70_000, 100_000_000, 1_000_000, 100, 1, 69_999, 98, 999_900),
    "one long row": (1, (1 << 32) - 1, 0, 1, 1, (1 << 32) - 1, 1 << 25, 128, 1, 0, 127, (1 << 25) - 600),
    "more positions than 32 bits": (1, 4_000_000_000, 0, 1, 1, 5_000_000_000, 50_000_000, 100, 1, 0, 99, 49_000_000),
    "ragged rows": (1_200_000, 1_001, 4_001, 1, 1_200_000, 1_001_000, 10_010, 100, 1, 1_199_999, 99, 9_000),
    "columns": (400_000, 100_000, 0, 8, 12_500, 1_000_000, 10_000, 100, 12_500, 12_499, 99, 9_000),
    "rows of groups": (70_000, 1_000, 0, 1, 70_000, 1_000_000, 10_000, 100, 350_000, 349_999, 9, 9_000),
    "columns of groups": (400_000, 100_000, 0, 8, 12_500, 10_000, 10_000, 1, 75_000, 74_999, 0, 9_000),
}
