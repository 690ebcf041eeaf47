"""Cases only for the CuPy backend, on emulated GPUs with every check on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import gpu_bn
from gpu_bn import functional
from gpu_bn.testing import Case, cases, check
from gpu_bn.testing.cases import build
from gpu_bn.testing.check import run

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("tier", [None, "split"])
def test_without_asynchronous_copies_and_bfloat16_instructions(tier, make_gpu):
    check(Case((3, 4, 41, 8), "bfloat16", activation="relu", residual=True), make_gpu(75, tier).backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.one_in(3)
def test_reduction_that_stores_before_it_flushes_its_sums(arch, layout, make_gpu):
    """From sm_100 on, backward.cuh may store before it flushes; the suite compiles for no such target."""
    case = Case((4, 8, 8, 8), "float16", layout, activation="gelu", residual=True, virtual_batch_size=2)
    check(case, make_gpu(arch, "split").backend)


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu", "elu", "hardswish"])
@pytest.mark.one_in(3)
def test_gradients_at_the_kinks_of_activations(activation, make_gpu):
    check(Case((4, 6, 5), activation=activation, affine="kinks"), make_gpu(80).backend)


@pytest.mark.parametrize("tier", ["cta", "cluster", "cooperative", "split"])
def test_nan_and_infinity_stay_in_their_channel(tier, make_gpu):
    problem = build(Case((3, 3, 9, 8), activation="relu"))
    results = []
    for poison in (None, np.nan, np.inf):
        x = problem.x.copy()
        x[1, 2, 3, 4] = x[1, 2, 3, 4] if poison is None else poison
        results.append(run(replace(problem, x=x), make_gpu(90, tier).backend))
    others = [0, 1]
    for poisoned in results[1:]:
        for name, clean in results[0].items():
            channels = -1 if clean.ndim == 1 else 1
            got = np.take(poisoned[name], others, channels)
            assert got.tobytes() == np.take(clean, others, channels).tobytes(), name
            assert np.isnan(np.take(poisoned[name], 2, channels)).all() or name in ("dbias", "mean", "running_mean")


def test_phases_give_what_the_fused_calls_give(make_gpu, monkeypatch):
    """The single phases, which SyncBatchNorm uses, meet the tolerances of the cases."""
    gpu = make_gpu(80)
    monkeypatch.setattr(gpu_bn.algorithm, "_fused_backend", lambda *_: None)
    for case in cases()[::150]:
        check(case, gpu.backend)
    assert {name.partition("kernel")[0].partition("bn_")[2] for name in gpu.launched} == {
        "stats_", "normalize_", "track_", "backward_reduce_", "backward_input_",
    }  # fmt: skip
    assert functional.algorithm is gpu_bn.algorithm
