"""The CUDA backend through the conformance suite, on emulated GPUs with every check on."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
from support.pairwise import covering

import gpu_bn
from gpu_bn import functional
from gpu_bn.plan import NoPlanError
from gpu_bn.testing import Case, cases, check, extended_cases
from gpu_bn.testing.cases import build
from gpu_bn.testing.check import run

pytestmark = pytest.mark.compile
TARGETS = ((80, None), (80, "cta"), (80, "cooperative"), (80, "split"), (90, None), (90, "cluster"))
"""Architectures, and a tier that is forced on training calls or None for the plan's own choice."""

COVERING = (
    (80, "cta", Case((4, 6, 5), param_dtype="bfloat16")),
    (80, "split", Case((4, 6, 5), "float16", param_dtype="float16")),
    (90, "split", Case((4, 2, 64, 32), affine="none", activation="relu")),
    (90, "cta", Case((3, 4, 41, 8), activation="leaky_relu", residual=True)),
    (90, "cta", Case((3, 4, 41, 8), activation="relu", mean=1e30, std=1e30, mode="train_no_stats")),
    (90, "cta", Case((3, 4, 41, 8), activation="relu", mean=1e-20, std=1e-20, eps=1e-50)),
)
"""In every run: 16-bit parameters, no parameters and two blocks a channel, a mask's slope, squares out of range."""


def selected() -> list:
    return list(_selected())


def _selected():
    """The normal and the long run have half each of the cases with all pairs of values."""
    every = cases()
    runs = {case: (i // 2 % len(TARGETS), [pytest.mark.slow] * (i % 2)) for i, case in enumerate(covering(every))}
    for target, (arch, tier) in enumerate(TARGETS):
        for case in every:
            chosen, marks = runs.get(case, (None, []))
            marks = marks if chosen == target else [pytest.mark.exhaustive]
            yield pytest.param(arch, tier, case, id=f"sm_{arch}-{tier or 'planned'}-{case}", marks=marks)


@pytest.mark.parametrize(("arch", "tier", "case"), selected())
def test_case(arch, tier, case, make_gpu):
    gpu = make_gpu(arch, tier)
    try:
        shares = check(case, gpu.backend)
    except NoPlanError as refusal:  # only a tier that is forced on too small a tensor
        assert tier is not None
        pytest.skip(str(refusal))
    assert {"y", "mean", "rstd", "dx"} <= shares.keys()
    forward, backward = launches(gpu)
    fused = tier not in (None, "split")
    assert forward + backward == len(gpu.launched)
    assert forward <= 1 if fused or case.mode == "eval" else forward <= 2
    assert backward <= 1 if fused or case.mode == "eval" else backward <= 2


def test_both_runs_have_all_pairs_of_values():
    def pairs(chosen):
        values = [{name: value for name, value in asdict(case).items() if name != "shape"} for case in chosen]
        return {pair for found in values for pair in combinations(found.items(), 2)}

    usual = [param.values for param in selected() if not param.marks]
    run = [param.values for param in selected() if pytest.mark.exhaustive not in param.marks]
    assert pairs(case for *_, case in run) == pairs(cases())
    assert {(arch, tier) for arch, tier, _ in usual} == set(TARGETS)
    assert len(usual) < len(cases()) / 6


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=str(case), marks=[[], pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.exhaustive][index % 4]
        )
        for index, case in enumerate(extended_cases())
    ],
)
def test_extended_case(case, make_gpu):
    """Masks, ghost batches and renormalisation."""
    shares = check(case, make_gpu(80).backend)
    assert {"y", "mean", "rstd", "dx"} <= shares.keys()


@pytest.mark.parametrize(("arch", "tier", "case"), COVERING, ids=str)
def test_covering_case(arch, tier, case, make_gpu):
    check(case, make_gpu(arch, tier).backend)


@pytest.mark.parametrize("tier", [None, "split"])
def test_without_asynchronous_copies_and_bfloat16_instructions(tier, make_gpu):
    check(Case((3, 4, 41, 8), "bfloat16", activation="relu", residual=True), make_gpu(75, tier).backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("arch", [100, 120])
def test_reduction_that_stores_before_it_flushes_its_sums(arch, layout, make_gpu):
    """On these architectures backward.cuh has another order of the two, which no target above compiles."""
    case = Case((4, 8, 16, 16), "float16", layout, activation="gelu", residual=True, virtual_batch_size=2)
    check(case, make_gpu(arch, "split").backend)


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu", "elu", "hardswish"])
def test_gradients_where_they_jump(activation, make_gpu):
    check(Case((4, 6, 5), activation=activation, affine="kinks"), make_gpu(80).backend)


@pytest.mark.parametrize("tier", ["cta", "cluster", "cooperative", "split"])
def test_nan_and_infinity_stay_in_their_channel(tier, make_gpu):
    problem = build(Case((3, 4, 41, 8), activation="relu"))
    results = []
    for poison in (None, np.nan, np.inf):
        x = problem.x.copy()
        x[1, 2, 3, 4] = x[1, 2, 3, 4] if poison is None else poison
        results.append(run(replace(problem, x=x), make_gpu(90, tier).backend))
    others = [0, 1, 3]
    for poisoned in results[1:]:
        for name, clean in results[0].items():
            channels = -1 if clean.ndim == 1 else 1
            got = np.take(poisoned[name], others, channels)
            assert got.tobytes() == np.take(clean, others, channels).tobytes(), name
            assert np.isnan(np.take(poisoned[name], 2, channels)).all() or name in ("dbias", "mean", "running_mean")


def launches(gpu) -> tuple[int, int]:
    """How many launches were of the forward and of the backward pass."""
    kinds = Counter("backward" in name for name in gpu.launched)
    return kinds[False], kinds[True]


def test_phases_give_what_the_fused_calls_give(make_gpu, monkeypatch):
    """The phases are what SyncBatchNorm is made of."""
    gpu = make_gpu(80)
    monkeypatch.setattr(gpu_bn.algorithm, "_fused", lambda *_: None)
    for case in cases()[::45]:
        check(case, gpu.backend)
    assert {name.partition("kernel")[0].partition("bn_")[2] for name in gpu.launched} == {
        "stats_", "normalize_", "backward_reduce_", "backward_input_",
    }  # fmt: skip
    assert functional.algorithm is gpu_bn.algorithm
