"""List faults to plant in the masks and ghost batches of the CUDA kernels, and the call that reveals each."""

from __future__ import annotations

from gpu_bn.testing import Case
from support.cuda_masked import ROWS, Masked

LONGER = Masked(Case((8, 1, 64, 64), activation="relu"), "half")
GROUPED = Masked(Case(ROWS, activation="relu", residual=True), "a group is empty", 3)
FAULTS = {
    "mask dropped in the sums": ("const A d = selected[j] ?", "const A d = true ?", Masked(Case(ROWS))),
    "mask dropped in the sums of the backward pass": (
        "return at.selected[j] ? dz_of_any", "return true ? dz_of_any", Masked(Case(ROWS))),
    "mask dropped in x - centre": ("return at.selected[j] ? affine", "return true ? affine", Masked(Case(ROWS))),
    "mask dropped in y": ("selected[j] ? Activation::value", "true ? Activation::value", Masked(Case(ROWS))),
    "mask dropped in dx": ("at.selected[j] ? dxj", "true ? dxj", Masked(Case(ROWS))),
    "mask dropped in dx of frozen statistics": (
        "at.selected[j] ? g[j] * affine", "true ? affine.centred(j, at.x[j]) * affine",
        Masked(Case(ROWS, mode="eval"))),
    "shift from what does not count": ("if (selected[j]) sum", "sum", Masked(Case(ROWS))),
    "origins of blocks not told apart": ("return (origin_of(r, place) - origin) +", "return", LONGER),
    "a bad shift is not noticed": (
        "if (!__syncthreads_or(again) || attempt == 3) return n;", "__syncthreads_or(again); return n;",
        Masked(Case((8, 1, 64, 64), mean=1e4, std=1), "few")),
    "counts of blocks not merged": ("n += of(r)", "n = r ? n : of(r)", LONGER),
    "means of blocks weighted by their shape": (
        "nd = shares.of(r)", "nd = tile.elements_of(r)", Masked(LONGER.case, "few")),
    "idle lanes counted": ("tile.lane ? 0. : d.count", "d.count", Masked(Case((60, 24)))),
    "count not written": ("selection.counts[tile.group] = n;", ";", LONGER),
    "count of the first group for all": ("selection.counts[tile.group], 1.", "selection.counts[0], 1.", GROUPED),
    "stride of groups wrong": ("(L::COLUMNS ? g.inner : g.channels)", "g.inner", GROUPED),
    "mask of the first group for all": ("(tile.group * tile.g.positions + in_strip)", "in_strip", GROUPED),
    "statistics of the first group for all": (
        "(i64)group * g.channels + channel : channel", "channel : channel", GROUPED),
    "tickets of the first group for all": (
        "counters += tile.group * tile.g.strips;", "", Masked(Case((8, 1, 64, 64)), "half", 2)),
    "empty group moves the running statistics": ("if (n == 0.) continue;", "", GROUPED),
    "empty batch moves the running statistics": ("if (!L::MASKED || n > 0) per", "per", Masked(Case(ROWS), "none")),
    "groups added up but for the first": (
        "dz_xhat = 0;\n  for (u32 group = 0", "dz_xhat = 0;\n  for (u32 group = 1", GROUPED),
    "running variance of groups without Bessel": (
        "m * (n > 1. ? n / (n - 1.) : 1.) * var[", "m * var[", GROUPED),
}  # fmt: skip
