"""The public functions against torch on the CPU: forward, every gradient, running statistics, momentum."""

import numpy as np
import pytest
from support import rng, running_pair

import gpu_bn
from gpu_bn.testing.cases import arrange

torch = pytest.importorskip("torch")

SHAPES = [(16, 7), (5, 4, 9), (4, 6, 5, 7), (2, 3, 4, 5, 6), (12, 8, 10, 11), (2100, 3, 5), (3, 5, 2100)]
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}
CLOSE = {"float64": {"rtol": 1e-11, "atol": 1e-11}, "float32": {"rtol": 2e-4, "atol": 2e-5}}


def both(shape, dtype, training, activation, residual=True, layout="contiguous", momentum=0.1):
    """Return the results of gpu_bn and of torch, by name."""
    x, dy, extra = (arrange(rng(seed).standard_normal(shape).astype(dtype), layout, 1) for seed in range(3))
    weight, bias = rng(5).standard_normal((2, shape[1])).astype(dtype)
    running = running_pair(shape[1], dtype)
    added = extra if residual else None
    y, saved = gpu_bn.batch_norm_forward(
        x, *running, weight, bias, training, momentum, residual=added, activation=activation
    )
    grads = gpu_bn.batch_norm_backward(dy, saved)
    ours = {"y": y, "running_mean": running[0], "running_var": running[1], "dx": grads.dx}
    ours |= {"dweight": grads.dweight, "dbias": grads.dbias}
    tx, tweight, tbias, tadded = (
        torch.from_numpy(np.ascontiguousarray(array)).requires_grad_() for array in (x, weight, bias, extra)
    )
    trunning = [torch.from_numpy(array) for array in running_pair(shape[1], dtype)]
    z = torch.nn.functional.batch_norm(tx, *trunning, tweight, tbias, training, momentum)
    ty = ACTIVATIONS[activation](z + tadded if residual else z)
    ty.backward(torch.from_numpy(np.ascontiguousarray(dy)))
    theirs = {"y": ty.detach(), "running_mean": trunning[0], "running_var": trunning[1]}
    theirs |= {"dx": tx.grad, "dweight": tweight.grad, "dbias": tbias.grad}
    if residual:
        ours["dresidual"], theirs["dresidual"] = grads.dresidual, tadded.grad
    return ours, {name: tensor.numpy() for name, tensor in theirs.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [*(("float32", name) for name in ACTIVATIONS), *(("float64", name) for name in ("identity", "relu", "silu"))],
)
@pytest.mark.one_in(4)
def test_results_are_those_of_torch(shape, dtype, training, activation):
    ours, theirs = both(shape, dtype, training, activation, residual=activation != "sigmoid")
    for name, expected in theirs.items():
        assert np.allclose(ours[name], expected, **CLOSE[dtype]), name


@pytest.mark.parametrize("layout", ["channels_last", "negative_stride", "sliced"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (12, 8, 10, 11)], ids=str)
def test_layouts_as_torch(layout, shape):
    ours, theirs = both(shape, "float64", True, "relu", layout=layout)
    for name, expected in theirs.items():
        assert np.allclose(ours[name], expected, **CLOSE["float64"]), name


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_weighs_the_new_value(momentum):
    ours, theirs = both((5, 4, 9), "float64", True, "identity", momentum=momentum)
    for name in ("running_mean", "running_var"):
        assert np.allclose(ours[name], theirs[name], rtol=1e-13, atol=1e-14)
    if momentum == 0:
        assert np.array_equal(ours["running_mean"], running_pair(4, "float64")[0])


@pytest.mark.parametrize("param_dtype", ["float32", "float16"])
def test_half_input_is_as_accurate_as_torch_or_better(param_dtype):
    x = (3 * rng().standard_normal((12, 8, 10, 11)) + 1).astype(np.float16)
    weight, bias = rng(1).standard_normal((2, 8)).astype(param_dtype)
    tensors = [torch.from_numpy(array) for array in (x, weight, bias)]
    exact = torch.nn.functional.batch_norm(tensors[0].double(), None, None, *(t.double() for t in tensors[1:]), True)
    theirs = torch.nn.functional.batch_norm(tensors[0], None, None, *tensors[1:], True)
    ours = gpu_bn.batch_norm(x, None, None, weight, bias, True)
    assert np.abs(ours - exact.numpy()).max() <= np.abs(theirs.double().numpy() - exact.numpy()).max()
