"""The launches of a layer on a GPU: at most two kernels in each direction, none by torch; a kernel counts the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend
from torch.testing import assert_close

from gpu_bn import (
    nn,
    registry,
)
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.bench.training import count_operations
from gpu_bn.plan import DEVICES


class Recording(RecordingBackend):
    forward_at_once = TritonBackend.forward_at_once


def test_operations_are_seen():
    vector = torch.ones(3)
    assert count_operations(lambda: vector.to(torch.float64))["copy_"] == 1
    assert count_operations(lambda: torch.empty(3).unbind()) == Counter()


@pytest.mark.parametrize(("shape", "launches"), [((2, 3, 4, 4), (1, 1)), ((64, 8, 128, 128), (2, 2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_launches_at_most_two_kernels_each_way_and_nothing_else(shape, launches, dtype, residual, monkeypatch):
    backend = Recording(DEVICES["a100"])
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer = nn.BatchNorm2d(shape[1], activation="relu")
    x, added = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    dy = torch.empty(shape, dtype=dtype)
    inputs = [x, *layer.parameters(), *[added] * residual]
    results = []
    found = count_operations(lambda: results.append(layer(x, added) if residual else layer(x)))
    assert not found
    assert len(backend.launches) == launches[0]
    found = count_operations(lambda: torch.autograd.grad(results[0], inputs, dy))
    assert not found
    assert len(backend.launches) == sum(launches)


def test_the_operators_launch_no_more(monkeypatch):
    """The operators that compiled code calls launch as many kernels as the layer."""
    backend = Recording(DEVICES["a100"])
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    x, vectors, counter = torch.empty(64, 8, 128, 128), [torch.ones(8) for _ in range(4)], torch.tensor(0)
    train, backward = torch.ops.gpu_bn.train, torch.ops.gpu_bn.backward
    results = []
    found = count_operations(
        lambda: results.extend(train(x, *vectors[:2], None, *vectors[2:], counter, 0.1, 1e-5, "relu", 0.0))
    )
    assert not found
    y, *kept = results
    options = (torch.float32, True, 1e-5, "relu", 0.0, 1, False, [True, True, True, False])
    found = count_operations(lambda: backward(y, x, *vectors[:2], None, None, *kept, *options))
    assert not found
    assert len(backend.launches) == 4


@pytest.mark.compile
@pytest.mark.parametrize(("tier", "shape"), [("cta", (4, 6, 5)), ("split", (9, 70, 3)), ("split", (70, 40))], ids=str)
def test_the_batch_is_counted_once(tier, shape, device, compile_triton, monkeypatch):
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer, peer = nn.BatchNorm1d(shape[1]), torch.nn.BatchNorm1d(shape[1])
    for _ in range(2):
        x = torch.randn(shape)
        versions = [buffer._version for buffer in layer.buffers()]
        assert_close(layer(x), peer(x), rtol=1e-4, atol=1e-5)
        assert all(buffer._version > before for buffer, before in zip(layer.buffers(), versions, strict=True))
    assert layer.num_batches_tracked == peer.num_batches_tracked == 2
    assert_close(layer.running_mean, peer.running_mean)
    assert len(backend.steps) == (2 if tier == "cta" else 4)
