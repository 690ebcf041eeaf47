"""The Triton backend from the public functions to its kernels: CPU tensors in the interpreter of Triton."""

import json

import pytest
from support.interpreter import interpreted


@pytest.mark.parametrize(
    ("tier", "which", "least"),
    [
        ("auto", "few some", 5),
        ("auto", "ragged", 4),
        pytest.param("split", "ragged", 4, marks=pytest.mark.slow),
        pytest.param("split", "few some", 5, marks=pytest.mark.slow),
        pytest.param("auto", "few extended", 2, marks=pytest.mark.exhaustive),
        pytest.param("auto", "some", 70, marks=pytest.mark.exhaustive),
        pytest.param("split", "some", 70, marks=pytest.mark.exhaustive),
        pytest.param("auto", "extended", 20, marks=pytest.mark.exhaustive),
        pytest.param("auto", "all", 400, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
        pytest.param("split", "all", 400, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
    ],
)
def test_cases(tier, which, least):
    result = json.loads(interpreted(["-m", "support.triton_interpreted"], tier, which))
    assert result["failures"] == {}
    assert result["cases"] >= least


@pytest.mark.slow
def test_the_public_calls_select_the_backend_by_the_tensors_type():
    code = """
import torch, gpu_bn
x, weight, bias = torch.randn(6, 4, 5), torch.rand(4), torch.randn(4)
mean, var = torch.zeros(4), torch.ones(4)
want_mean, want_var = mean.clone(), var.clone()
want = torch.relu(torch.nn.functional.batch_norm(x, want_mean, want_var, weight, bias, True))
y = gpu_bn.batch_norm(x, mean, var, weight, bias, True, activation="relu", backend=gpu_bn.registry.load("triton"))
assert (y - want).abs().max() < 1e-5 and (mean - want_mean).abs().max() < 1e-6 and (var - want_var).abs().max() < 1e-6
print(gpu_bn.registry.load("triton").name)
"""
    assert interpreted(["-c", code]).split() == ["triton"]


BY_NAME = """
import torch, gpu_bn
x, residual = torch.randn(6, 4, 3, requires_grad=True), torch.randn(6, 4, 3)
options = {"training": True, "residual": residual, "activation": "relu"}
ours, theirs = (gpu_bn.batch_norm(x, backend=name, **options) for name in ("triton", None))
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, theirs)]
torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
print(ours.grad_fn.engine.name)
"""


def test_the_backend_by_name():
    assert interpreted(["-c", BY_NAME]).strip() == "triton"


OF_A_LAYER = """
import torch
from gpu_bn import nn, registry
backend = registry.load("triton")
registry.backend_for = lambda _: backend
x, dy = torch.randn(6, 4, 3, requires_grad=True), torch.randn(6, 4, 3)
layers = nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
for _ in range(2):
    found = [torch.autograd.grad(layer(x), (x, *layer.parameters()), dy) for layer in layers]
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(*[list(layer.buffers()) for layer in layers])
print(*[len(known) for known in backend.plain.known.values()])
"""


def test_calls_of_a_layer():
    assert interpreted(["-c", OF_A_LAYER]).strip() == "1"
