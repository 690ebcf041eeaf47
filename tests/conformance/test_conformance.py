"""Every backend against the oracle: the standard cases, and those of masks, ghost batches and renormalisation.

``tests/support/conformance.py`` has the backends, and the cases that each gets in a normal run, with ``-m slow`` and
with ``-m exhaustive``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import combinations

import pytest
from support.conformance import KNOWN, TRITON, parameters, trained_cases

from gpu_bn.activations import ROWS
from gpu_bn.plan import NoPlanError
from gpu_bn.testing import cases, check, unavailable_cases
from gpu_bn.testing.cases import AFFINE, DTYPES, LAYOUTS, MODES

PARAMETERS = parameters()


@pytest.mark.parametrize(("target", "case"), PARAMETERS)
def test_case(target, case, request):
    backend = target.open(request)
    try:
        shares = check(case, backend)
    except NoPlanError as refusal:  # a forced tier cannot serve each tensor
        assert target.refuses
        pytest.skip(str(refusal))
    assert {"y", "mean", "rstd", "dx"} <= shares.keys()
    assert all(0 <= share <= 1 for share in shares.values())
    target.require(backend, case)


# ----------------------------------------------------------------------------------------- what the cases cover
def test_cases_cover_all_kinds_of_input():
    everything = cases() + unavailable_cases()
    assert len({str(case) for case in everything}) == len(everything)
    assert not unavailable_cases(), "ml_dtypes is part of the test extra"
    for field, values in {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "mode": MODES,
        "affine": AFFINE,
        "activation": ROWS,
    }.items():
        assert {getattr(case, field) for case in everything} == set(values), field
    assert {len(case.shape) for case in everything} == {2, 3, 4, 5}


def run_of(prefix, *, without=()):
    """Return the cases of targets whose names begin with ``prefix``, without cases that have a mark in ``without``."""
    return [
        (target, case)
        for target, case, marks in ((*param.values, {mark.name for mark in param.marks}) for param in PARAMETERS)
        if target.name.startswith(prefix) and not marks & set(without)
    ]


def pairs(run):
    values = [{name: value for name, value in asdict(case).items() if name != "shape"} for _, case in run]
    return {pair for found in values for pair in combinations(found.items(), 2)}


def test_each_backend_has_cases_in_a_normal_run():
    run = {target.name for target, _ in run_of("", without=("slow", "exhaustive"))}
    assert run == {target.name for target, _ in run_of("")}


@pytest.mark.parametrize("prefix", ["numpy", "torch on numpy", "cupy"])
def test_normal_and_long_run_have_all_pairs_of_values(prefix):
    every = {pair for case in cases() for pair in pairs([(None, case)])}
    assert every <= pairs(run_of(prefix, without=("exhaustive",)))


def test_a_normal_run_has_each_activation_and_each_dtype_of_compiled_kernels():
    for name in ("cpu", "torch"):
        run = [case for target, case in run_of(name, without=("slow", "exhaustive")) if target.name == name]
        assert {case.activation for case in run} == set(ROWS)
        for dtype in DTYPES:
            assert {case.activation for case in run if case.dtype == dtype} >= {"identity", "relu", "silu"}


def test_the_chosen_cases_of_triton_cover_dtypes_modes_tiers_and_layouts():
    chosen = [case for _, _, case in TRITON]
    assert {case.dtype for case in chosen} == {"float16", "bfloat16", "float32", "float64"}
    assert {case.mode for case in chosen} == {"train", "train_no_stats", "eval"}
    assert {bool(ROWS[case.activation].device.drop) for case in chosen if case.residual} == {True, False}
    assert {tier for _, tier, _ in TRITON} == {None, "split", "cluster"}
    assert {"contiguous", "channels_last", "sliced"} <= {case.layout for case in chosen} <= set(LAYOUTS)


def test_the_cases_of_the_reference_kernels_cover_all_kinds_of_input():
    selected = trained_cases()
    assert len(selected) >= 180
    dtypes = Counter(case.dtype for case in selected)
    assert dtypes.keys() == set(KNOWN)
    assert dtypes["float32"] >= 100
    assert dtypes["float16"] >= 50
    assert dtypes["bfloat16"] >= 20
    assert {case.layout for case in selected} == set(LAYOUTS)
    assert {case.affine for case in selected} == set(AFFINE)
    assert {case.mode for case in selected} == {"train", "train_no_stats"}
    assert {case.param_dtype for case in selected} >= {None, "float16", "bfloat16", "float64"}
    assert {case.channel_axis for case in selected} >= {-3, -2, -1, 0, 1, 2, 3}
    assert {case.mean for case in selected} >= {1e4, 1e18, 1e-20}
    assert {case.std for case in selected} >= {0.0, 1.0, 1e18, 1e-20}
    assert {len(case.shape) for case in selected} == {2, 3, 4, 5}
    assert min(case.shape[1] for case in selected) == 1
    assert max(case.shape[1] for case in selected) == 9000
