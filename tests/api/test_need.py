"""Only the gradients asked for are computed, and each is the same whichever others are asked for."""

from itertools import combinations

import numpy as np
import pytest
from support import rng, running_pair, same_bits

import gpu_bn
from gpu_bn.backends.numpy import NumpyBackend

NAMES = ("dx", "dweight", "dbias", "dresidual")
SUBSETS = [subset for size in range(5) for subset in combinations(NAMES, size)]


class Spy(NumpyBackend):
    """A backend that records which phases run and how many full-size arrays are allocated."""

    def __init__(self):
        self.calls = []

    def empty_like(self, x):
        self.calls.append("empty_like")
        return super().empty_like(x)

    def copy(self, *arguments):
        self.calls.append("copy")
        return NumpyBackend().copy(*arguments)

    def backward_reduce(self, *arguments):
        self.calls.append("backward_reduce")
        return super().backward_reduce(*arguments)

    def backward_input(self, *arguments):
        self.calls.append("backward_input")
        return super().backward_input(*arguments)


def forward(shape, activation, training, backend=None):
    x, dy, residual = rng().standard_normal((3, *shape)).astype(np.float32)
    weight, bias = rng(1).standard_normal((2, shape[1])).astype(np.float32)
    options = {"residual": residual, "activation": activation, "backend": backend}
    return dy, gpu_bn.batch_norm_forward(x, *running_pair(shape[1]), weight, bias, training, **options)[1]


@pytest.mark.parametrize("shape", [(6, 4, 5), (12, 8, 10, 11)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", SUBSETS, ids="+".join)
def test_each_subset_is_part_of_the_whole(shape, activation, training, need, backend):
    dy, saved = forward(shape, activation, training)
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    some = gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)
    for name in NAMES:
        value = getattr(some, name)
        if name not in need:
            assert value is None
        elif name in ("dweight", "dbias"):
            assert same_bits(value, getattr(everything, name))
        else:  # a dz that is stored is rounded once more
            assert np.allclose(value, getattr(everything, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4, 5), (12, 8, 10, 11)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(
    ("training", "need", "phases", "arrays"),
    [
        (True, ["dx"], {"backward_reduce", "backward_input"}, 1),
        (False, ["dx"], {"backward_input"}, 1),
        (True, ["dweight"], {"backward_reduce"}, 0),
        (False, ["dbias"], {"backward_reduce"}, 0),
        (True, ["dweight", "dbias"], {"backward_reduce"}, 0),
        (True, [], set(), 0),
        (True, list(NAMES), {"backward_reduce", "backward_input"}, 2),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_only_the_phases_needed_run(shape, activation, training, need, phases, arrays):
    dy, saved = forward(shape, activation, training)
    spy = Spy()
    gpu_bn.batch_norm_backward(dy, saved, need=need, backend=spy)
    assert {call for call in spy.calls if call.startswith("backward")} == phases
    assert sum(not call.startswith("backward") for call in spy.calls) == arrays


def test_the_residual_of_an_identity_costs_one_copy():
    dy, saved = forward((6, 4, 5), "identity", True)
    spy = Spy()
    grads = gpu_bn.batch_norm_backward(dy, saved, need=["dresidual"], backend=spy)
    assert spy.calls == ["copy"]
    assert same_bits(grads.dresidual, dy)


@pytest.mark.parametrize("need", ["dx", ("dx",), {"dx"}, iter(["dx"])], ids=lambda value: type(value).__name__)
def test_need_may_be_a_name_or_any_iterable(need):
    dy, saved = forward((6, 4, 5), "relu", True)
    grads = gpu_bn.batch_norm_backward(dy, saved, need=need)
    assert grads.dx is not None
    assert grads[1:] == (None, None, None)


def test_by_default_there_is_a_gradient_for_each_argument_given():
    x = rng().standard_normal((6, 4)).astype(np.float32)
    _, saved = gpu_bn.batch_norm_forward(x, bias=np.ones(4), training=True)
    grads = gpu_bn.batch_norm_backward(x, saved)
    assert [gradient is not None for gradient in grads] == [True, False, True, False]


def test_backward_may_be_called_again():
    dy, saved = forward((12, 8, 10, 11), "relu", True)
    first, second = (gpu_bn.batch_norm_backward(dy, saved)._asdict() for _ in range(2))
    assert same_bits(first, second)
