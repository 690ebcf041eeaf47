"""ReLU's output, which autograd saves instead of the residual: equal gradients; which tensors may be overwritten."""

import contextlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from gpu_bn import nn
from gpu_bn.backends.cpu.backend import CpuBackend
from gpu_bn.nn.operators import cpu_calls, plain_calls

WAYS = ["quickest", "direct"]


def data(seed, dtype=torch.float32):
    """Return small integers, so that many sums are 0; with seed 1, one NaN and two infinite numbers, too."""
    x = torch.randint(-2, 3, (4, 3, 5, 7), generator=torch.Generator().manual_seed(seed)).to(dtype)
    if seed == 1:
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return x


@contextlib.contextmanager
def calls_by(way):
    """Make calls use the builtin function (``quickest``) or the backend (``direct``)."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "direct":
            patch.setattr(plain_calls, "forward", lambda *_: None)
        yield


def call_and_leaves(x, residual, way, training=True, activation="relu"):
    """Return the output of a call and the tensors that it can be differentiated with respect to."""
    leaves = [*(one.detach().requires_grad_() for one in (x, residual)), *torch.ones(2, 3).requires_grad_().unbind()]
    statistics = torch.zeros(3), torch.full((3,), 1.0 - 1e-5)  # the identity
    with calls_by(way):
        x, residual, *vectors = leaves
        y = nn.batch_norm(x, *statistics, *vectors, training, residual=residual, activation=activation)
    return y, leaves


def saved_addresses(y):
    return {one.data_ptr() for one in y.grad_fn.saved_tensors if one is not None}


LAYOUTS = {
    "dense": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "gaps": lambda x: torch.cat([x, x], 1)[:, :3],
    "expanded": lambda x: x[:1].expand(4, 3, 5, 7),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.one_in(4)
def test_gradients_have_the_same_bits(way, layout, training, dtype, monkeypatch):
    x, residual, dy = LAYOUTS[layout](data(0, dtype)), data(1, dtype), data(2, dtype)

    def gradients():
        y, leaves = call_and_leaves(x, residual, way, training)
        return saved_addresses(y) & {y.data_ptr()}, torch.autograd.grad(y, leaves, dy)

    output, found = gradients()
    assert bool(output) == (dtype.itemsize > 2)  # in half precision y may round to 0 where z > 0
    monkeypatch.setattr(CpuBackend, "keeps_output", lambda *_: False)
    monkeypatch.setattr(cpu_calls, "_cache", {})
    output, expected = gradients()
    assert not output
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.isnan(), its.isnan())
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())


@pytest.mark.parametrize("way", WAYS)
def test_the_residual_may_change_and_y_may_not(way):
    y, leaves = call_and_leaves(data(0), data(3), way)
    assert leaves[1].data_ptr() not in saved_addresses(y)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    leaves[1].detach().fill_(-9)
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True), expected))
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("activation", ["identity", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_of_other_activations_may_change(way, activation):
    y, leaves = call_and_leaves(data(0), data(3), way, activation=activation)
    assert y.data_ptr() not in saved_addresses(y)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    y.detach().zero_()
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, torch.ones_like(y)), expected))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(way, training):
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3, 2), 3, 3, (4, 3, 2))]

    def call(x, weight, bias, residual):
        statistics = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        with calls_by(way):
            y = nn.batch_norm(x, *statistics, weight, bias, training, residual=residual, activation="relu")
        assert y.data_ptr() in saved_addresses(y)
        return y

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, [*given[:3], given[3].detach()])
