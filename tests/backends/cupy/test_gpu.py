"""The CuPy backend on a real GPU: the conformance suite on every tier, a graph, another stream."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from support import rng

import gpu_bn
from gpu_bn.plan import TIERS, NoPlanError
from gpu_bn.testing import cases, check, extended_cases

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install -e '.[cupy]'")
    try:
        gpu_bn.registry.load("cupy")
    except gpu_bn.BackendUnavailableError as error:
        pytest.skip(str(error))
    return cupy


@pytest.mark.parametrize("tier", [None, *TIERS])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case, tier, cupy):
    del cupy  # skips the test if there is no GPU
    try:
        check(case, importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier))
    except NoPlanError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("case", extended_cases(), ids=str)
def test_masks_ghost_batches_and_renormalisation(case, cupy):
    del cupy  # skips the test if there is no GPU
    check(case, "cupy")


@pytest.mark.parametrize("shape", [(4, 8, 5, 8), (64, 64, 56, 56), (1, 3, 1024, 1024)], ids=str)
def test_a_graph_replays_what_was_called(shape, cupy):
    x = cupy.asarray(rng().normal(3, 2, shape).astype(np.float32))
    mean, var = cupy.zeros(shape[1], np.float32), cupy.ones(shape[1], np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        want = gpu_bn.batch_norm(x, mean.copy(), var.copy(), training=True, activation="relu")
        stream.begin_capture()
        y, saved = gpu_bn.batch_norm_forward(x, mean, var, training=True, activation="relu")
        grads = gpu_bn.batch_norm_backward(y, saved)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
    stream.synchronize()
    assert cupy.array_equal(y, want)
    assert bool(cupy.isfinite(grads.dx).all())
    expected = x.mean(axis=(0, 2, 3)) * (1 - 0.9**3)
    assert cupy.allclose(mean, expected, rtol=1e-4)


def test_runs_are_bitwise_equal(cupy):
    x = cupy.asarray(rng().normal(3, 2, (8, 3, 512, 512)).astype(np.float32))
    results = [gpu_bn.batch_norm(x, training=True) for _ in range(5)]
    assert all(cupy.array_equal(result, results[0]) for result in results)
