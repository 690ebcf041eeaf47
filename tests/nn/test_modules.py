"""Test that layers agree with torch's: construction, state, repr and training."""

import copy
import inspect
import io

import pytest
from support import as_torch_2_13, fresh

import gpu_bn

torch = pytest.importorskip("torch")
from support.layer_pairs import LAZY, PAIRS, data
from torch.testing import assert_close

from gpu_bn import nn

OPTIONS = [
    {},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.3},
    {"affine": False},
    pytest.param({"bias": False}, marks=as_torch_2_13),
    {"track_running_stats": False},
    {"dtype": torch.float64},
]


def step(layer, x, seed):
    """Return the output and the gradients of a call, and move the parameters against their gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], data(y.shape, seed, y.dtype))
    with torch.no_grad():
        for parameter, gradient in zip(layer.parameters(), gradients[1:], strict=True):
            parameter -= 0.1 * gradient
    return [y.detach(), *gradients]


@pytest.mark.parametrize("kind", list(PAIRS))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_and_evaluation_as_torch(kind, options):
    ours, theirs, shape = PAIRS[kind]
    layers = ours(3, **options), theirs(3, **options)
    assert repr(layers[0]) == f"gpu_bn.{layers[1]!r}"
    for seed in range(6):
        x = data(shape, seed, options.get("dtype", torch.float32))
        for layer in layers:
            layer.train(seed < 4)
        for mine, other in zip(*(step(layer, x, 10 + seed) for layer in layers), strict=True):
            assert_close(mine, other, rtol=1e-4, atol=1e-5)
    states = [layer.state_dict() for layer in layers]
    assert list(states[0]) == list(states[1])
    assert_close(states[0], states[1])
    assert states[0]._metadata == states[1]._metadata


@pytest.mark.parametrize("extension", [{}, {"mask": torch.ones(1, 1, dtype=torch.bool)}], ids=["plain", "mask"])
def test_a_count_that_is_the_mean_of_several_layers_need_not_be_whole(extension):
    x, layers = data((6, 3)), (nn.BatchNorm1d(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None))
    for layer, options in zip(layers, (extension, {}), strict=True):
        layer.num_batches_tracked = torch.tensor(2.5)
        layer(x, **options)
    assert_close(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize("kind", list(LAZY))
@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_lazy_layers_become_ours(kind, options):
    ours, theirs, become = LAZY[kind]
    layers = ours(**options, activation="relu"), theirs(**options)
    x, residual = (data((6, 3, *(4,) * become.ranks[-1])[: become.ranks[-1]], seed) for seed in range(2))
    y = layers[0](x, residual=residual)
    assert type(layers[0]) is become
    assert_close(y, (layers[1](x) + residual).relu())
    assert_close(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize("lazy", [False, True])
def test_layers_without_a_bias_on_every_torch(lazy):
    """Layers have the option ``bias`` also with torch 2.11, whose layers do not have it."""
    layer = nn.LazyBatchNorm1d(bias=False) if lazy else nn.BatchNorm1d(3, bias=False)
    layer.reset_parameters()
    layer(data((6, 3), 0))
    assert type(layer) is nn.BatchNorm1d
    assert layer.bias is None
    torch.nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert (layer.weight == 1).all()
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]


@as_torch_2_13
def test_signatures_are_those_of_torch_and_what_is_ours():
    for ours, theirs, _ in PAIRS.values():
        mine, other = (list(inspect.signature(cls).parameters.values()) for cls in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine[:-3]] == [(p.name, p.default, p.kind) for p in other]
        assert [p.name for p in mine[-3:]] == ["activation", "virtual_batch_size", "renorm"]
        assert all(p.default is None and p.kind is p.KEYWORD_ONLY for p in mine[-3:])
        assert issubclass(ours, theirs)


def test_state_goes_to_torch_and_comes_back_also_by_pickle():
    ours, theirs = nn.BatchNorm2d(3, activation=gpu_bn.leaky_relu(0.2)), torch.nn.BatchNorm2d(3)
    x = data((6, 3, 4, 4))
    ours(x)
    theirs.load_state_dict(ours.state_dict())
    assert_close(theirs(x), torch.nn.BatchNorm2d(3)(x))
    ours.load_state_dict(theirs.state_dict())
    old = {name: value for name, value in ours.state_dict().items() if name != "num_batches_tracked"}
    ours.load_state_dict(old)  # states of version 1 had no counter
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert repr(again) == repr(ours) == f"gpu_bn.{theirs!r}"[:-1] + ", activation=leaky_relu(negative_slope=0.2))"
    assert torch.equal(again.eval()(x), ours.eval()(x))


def test_a_pickle_of_an_older_version_still_works():
    """Such a pickle has no ``_eps`` and ``_num_features``, only ``eps`` and ``num_features``."""
    layer, x = nn.BatchNorm2d(3, eps=0.5).eval(), data((6, 3, 4, 4))
    old = {name: value for name, value in vars(layer).items() if name not in ("_eps", "_num_features")}
    again = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    again.__setstate__(old)
    assert (again.eps, again.num_features, repr(again)) == (0.5, 3, repr(layer))
    assert torch.equal(again(x), layer(x))


def test_residual_and_activation():
    layer = nn.BatchNorm2d(3, activation="silu")
    plain = torch.nn.BatchNorm2d(3)
    x, residual = data((4, 3, 5, 5)), data((4, 3, 5, 5), 1)
    assert_close(layer(x, residual), torch.nn.functional.silu(plain(x) + residual))
    assert_close(layer(x, activation="relu"), torch.relu(plain(x)))
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        nn.BatchNorm2d(3, activation="swish")


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.FrozenBatchNorm2d])
def test_an_activation_may_be_set_later(cls):
    layer, x = cls(3), data((4, 3, 5, 5))
    plain = layer(x)
    layer.activation = "relu"
    assert layer.activation == gpu_bn.activations.Activation("relu")
    assert repr(layer).count("activation=relu") == 1
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    for one in (layer, copy.deepcopy(layer), again, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        assert_close(one(x), plain.relu())
    assert layer.state_dict().keys() == cls(3).state_dict().keys()
    for wrong, error in (("swish", ValueError), (torch.nn.ReLU(), TypeError)):
        with pytest.raises(error, match="activation"):
            layer.activation = wrong
    assert repr(layer).count("activation=relu") == 1
    layer.activation = None
    assert "activation" not in repr(layer)
    assert_close(layer(x), plain)


def test_an_activation_set_later_is_kept_and_missed_as_any():
    layer = nn.convert(torch.nn.BatchNorm2d(3))
    layer.activation = "relu"
    with pytest.raises(ValueError, match="has the activation relu"):
        nn.revert(layer)
    assert repr(nn.SyncBatchNorm.convert_sync_batchnorm(layer)).endswith("activation=relu)")
    layer.activation = None
    assert type(nn.revert(layer)) is torch.nn.BatchNorm2d
    assert "activation" not in vars(layer)


def test_frozen_layers_use_their_statistics_in_training():
    layer = nn.BatchNorm2d(3)
    layer(data((4, 3, 5, 5)))
    x = data((4, 3, 5, 5), 1).requires_grad_()
    expected = layer.eval()(x)
    model = nn.freeze(torch.nn.Sequential(layer)).train()
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model(x), expected)
    assert_close(model.state_dict(), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert repr(layer).endswith("frozen=True)")
    nn.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("parameters", [True, False])
def test_lazy_layers_freeze_before_their_first_input(parameters):
    model = torch.nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d(affine=False))
    x = data((4, 3, 5, 5))
    nn.freeze(model, parameters=parameters)
    assert_close(model(x), x, rtol=1e-4, atol=1e-4)
    assert all(layer.frozen for layer in model)
    assert [p.requires_grad for p in model.parameters()] == [not parameters] * 4
    again = nn.unfreeze(nn.freeze(torch.nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())))
    again(x)
    assert all(p.requires_grad for p in again.parameters())
    assert again[1].num_batches_tracked == 1


def test_the_identity():
    x = 5 + 3 * data((64, 8, 3, 3))
    layer = nn.BatchNorm2d(8).init_identity_(x)
    assert_close(layer(x), x)
    layer.init_identity_(x)
    assert_close(layer.eval()(x), x)
    with pytest.raises(ValueError, match="an identity needs weight and bias"):
        nn.BatchNorm2d(8, affine=False).init_identity_(x)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (data((3, 1, 4, 4)), "weight should contain 1 elements not 5"),
        (data((3, 4, 4, 4)), "weight should contain 4 elements not 5"),
        (data((5,)), "expected 2D to 5D input"),
    ],
)
def test_an_identity_on_another_number_of_channels_is_refused(x, text):
    layer = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match=text) as ours:
        layer.init_identity_(x)
    assert_close(layer.state_dict(), nn.BatchNorm2d(5).state_dict())
    with pytest.raises(ValueError, match=text) as plain:
        gpu_bn.BatchNorm(5).init_identity_(x.numpy())
    assert str(ours.value) == str(plain.value)


def test_bfloat16_needs_no_package_of_its_own():
    pytest.importorskip("numba", reason="without Numba, NumPy's backend serves, which needs ml_dtypes")
    printed = fresh.python(
        """
import sys
sys.modules["ml_dtypes"] = None  # an import of it fails
import torch
from gpu_bn import nn
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
nn.convert(model, fuse=True)
with torch.autocast("cpu"):
    y = model(torch.randn(2, 3, 6, 6))
y.sum().backward()
x = torch.randn(4, 8, 5, 5, dtype=torch.bfloat16, requires_grad=True)
nn.BatchNorm2d(8, activation="gelu").bfloat16()(x).sum().backward()
print(y.dtype, model[0].weight.grad.dtype, x.grad.dtype)
"""
    )
    assert printed == ["torch.bfloat16", "torch.float32", "torch.bfloat16"]
