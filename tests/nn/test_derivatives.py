"""Test derivatives of the operators, of any order."""

from itertools import product

import pytest

from gpu_bn.activations import ROWS

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.operator_cases import reference
from support.tensors import inputs, running, tensor
from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.operators import (
    autograd,
    cpu_calls,
    library,
    plain_calls,
)

pytestmark = pytest.mark.usefixtures("forget_compilations")


# ----------------------------------------------------------------------------------------------------- derivatives
@pytest.mark.parametrize("activation", list(ROWS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.one_in(5)
def test_first_and_second_derivatives(activation, training):
    x, weight, bias, residual = inputs()
    mean, var = running()

    def call(x, weight, bias, residual):
        return nn.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, residual=residual, activation=activation
        )

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))


@pytest.mark.parametrize(("affine", "training"), list(product(["weight", "bias", "none"], [True, False])))
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_second_derivatives_without_some_arguments(affine, training, activation):
    x, weight, bias, _ = inputs((2, 3, 3, 2))
    parameters = {"weight": weight} if affine == "weight" else {"bias": bias} if affine == "bias" else {}

    def call(x, *values):
        chosen = dict(zip(parameters, values, strict=True))
        statistics = () if training else running(3)
        return nn.batch_norm(x, *statistics, **chosen, training=training, activation=activation)

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_batched_gradients(training, activation):
    def call(x, weight, bias, residual):
        return nn.batch_norm(x, *running(), weight, bias, training, residual=residual, activation=activation)

    given = inputs()
    y, many = call(*given), tensor(5, 3, 2, 4, grad=False)
    batched = torch.autograd.grad(y, given, many, is_grads_batched=True, retain_graph=True)
    for at, dy in enumerate(many):
        assert_close(
            [gradients[at] for gradients in batched], list(torch.autograd.grad(y, given, dy, retain_graph=True))
        )
    assert torch.autograd.gradcheck(call, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, given, check_batched_grad=True)


def test_third_derivatives():
    """The textbook's formula gives the expected values. torch's are wrong: they take saved statistics as constants."""

    def textbook(x, weight, bias):
        var, mean = torch.var_mean(x, 0, correction=0)
        return weight * (x - mean) / (var + 1e-5).sqrt() + bias

    def third_derivatives(function):
        x, weight, bias, _ = inputs((4, 2))
        y = function(x, weight, bias).sin().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
            y = (gradient**2).sum()
        return torch.autograd.grad(y, (x, weight, bias))

    ours = third_derivatives(lambda x, weight, bias: nn.batch_norm(x, None, None, weight, bias, True))
    assert_close(ours, third_derivatives(textbook), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("quick", [True, False])
def test_only_gradients_asked_for_are_computed(needs, activation, quick, monkeypatch):
    asked = []
    doors = pytest.importorskip("gpu_bn.backends.cpu.doors", reason="numba is not installed", exc_type=ImportError)
    find, compute = doors.backward, autograd.algorithm.backward

    def find_and_record(*arguments):
        door = find(*arguments)

        def record(*given):
            written = zip(library.NAMES, (given[4], given[8], given[9], given[5]), strict=True)
            asked.append({name for name, one in written if one is not None})
            return door.function(*given)

        return door._replace(function=record)

    def compute_and_record(engine, dy, saved, need):
        results = compute(engine, dy, saved, need)
        asked.append({name for name, result in zip(library.NAMES, results, strict=True) if result is not None})
        return results

    if quick:
        monkeypatch.setattr(doors, "backward", find_and_record)
        monkeypatch.setattr(cpu_calls, "_cache", {})
    else:
        monkeypatch.setattr(plain_calls, "forward", lambda *_: None)
        monkeypatch.setattr(autograd.algorithm, "backward", compute_and_record)
    given = [t.detach().requires_grad_(need) for t, need in zip(inputs(), needs, strict=True)]
    twin = [t.detach().clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    y = nn.batch_norm(given[0], None, None, *given[1:3], True, residual=given[3], activation=activation)
    y.backward(dy := tensor(*y.shape, seed=9, grad=False))
    reference(twin[0], None, None, *twin[1:3], True, twin[3], activation).backward(dy)
    for mine, other, need in zip(given, twin, needs, strict=True):
        assert (mine.grad is not None) == need
        if need:
            assert_close(mine.grad, other.grad)
    wanted = {name for name, need in zip(library.NAMES, needs, strict=True) if need}
    wanted -= {"dresidual"} if activation == "identity" else set()  # with the identity, dresidual is dy itself
    assert asked[-1:] == ([wanted] if wanted else [])


def test_parameters_keep_their_own_dtypes():
    x = tensor(4, 3, 5, dtype=torch.bfloat16)
    weight, bias = tensor(3, dtype=torch.float32, seed=1), tensor(3, dtype=torch.float64, seed=2)
    nn.batch_norm(x, None, None, weight, bias, True, activation="relu").sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float64)
