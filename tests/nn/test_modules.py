"""The layers against torch's: construction, state, repr, training, and every error."""

import copy
import inspect
import io
import re

import numpy as np
import pytest
from support import as_torch_2_13, rng

import gpu_bn

torch = pytest.importorskip("torch")

from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.operators import library

PAIRS = {
    "1d": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3, 5)),
    "1d of rows": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    "2d": (nn.BatchNorm2d, torch.nn.BatchNorm2d, (6, 3, 4, 5)),
    "3d": (nn.BatchNorm3d, torch.nn.BatchNorm3d, (6, 3, 2, 3, 4)),
}
LAZY = {
    "1d": (nn.LazyBatchNorm1d, torch.nn.LazyBatchNorm1d, nn.BatchNorm1d),
    "2d": (nn.LazyBatchNorm2d, torch.nn.LazyBatchNorm2d, nn.BatchNorm2d),
    "3d": (nn.LazyBatchNorm3d, torch.nn.LazyBatchNorm3d, nn.BatchNorm3d),
}
OPTIONS = [
    {},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.3},
    {"affine": False},
    pytest.param({"bias": False}, marks=as_torch_2_13),
    {"track_running_stats": False},
    {"dtype": torch.float64},
]


def data(shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(rng(seed).standard_normal(shape)).to(dtype)


def step(layer, x, seed):
    """Outputs and gradients of a call; the layer's parameters are moved by them."""
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
    """torch 2.11's layers do not have the option."""
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
    ours.load_state_dict(old)  # a state of before version 2
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert repr(again) == repr(ours) == f"gpu_bn.{theirs!r}"[:-1] + ", activation=leaky_relu(negative_slope=0.2))"
    assert torch.equal(again.eval()(x), ours.eval()(x))


def test_a_pickle_of_an_older_version_still_works():
    """It has ``eps`` and ``num_features`` under their own names only."""
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


def broken(cls, **attributes):
    layer = cls(3)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


X = data((4, 3, 5))
MISTAKES = {
    "rank": lambda c: c(3)(data((3,))),
    "rank of 2d": lambda c: PAIRS["2d"][c is torch.nn.BatchNorm1d](3)(X),
    "rank of 3d": lambda c: PAIRS["3d"][c is torch.nn.BatchNorm1d](3)(X),
    "channels": lambda c: c(4)(X),
    "channels without statistics": lambda c: c(4, track_running_stats=False)(X),
    "channels of nothing": lambda c: c(4, track_running_stats=False, affine=False)(data((1, 4))),
    "one value": lambda c: c(3)(data((1, 3))),
    "eps 0": lambda c: c(3, eps=0)(X),
    "eps below 0": lambda c: c(3, eps=-1.0)(X),
    "eps below 0 in evaluation": lambda c: c(3, eps=-1.0).eval()(X),
    "eps of text": lambda c: c(3, eps="a")(X),
    "eps of a complex number": lambda c: c(3, eps=1j)(X),
    "eps of two": lambda c: c(3, eps=torch.ones(2))(X),
    "momentum of one in a row": lambda c: c(3, momentum=torch.ones(1))(X),
    "learned momentum": lambda c: c(3, momentum=torch.tensor(0.1, requires_grad=True))(X),
    "momentum of text": lambda c: c(3, momentum="a")(X),
    "whole numbers": lambda c: c(3)(X.long()),
    "sparse": lambda c: c(3)(data((4, 3)).to_sparse()),
    "complex": lambda c: c(3)(X.to(torch.complex64)),
    "not a tensor": lambda c: c(3)([1.0]),
    "meta input": lambda c: c(3)(X.to("meta")),
    "meta layer": lambda c: c(3, device="meta")(X),
    "no mean": lambda c: broken(c, running_mean=None)(X),
    "no mean in evaluation": lambda c: broken(c, running_mean=None).eval()(X),
    "no variance in evaluation": lambda c: broken(c, running_var=None).eval()(X),
    "long variance": lambda c: broken(c, running_var=torch.ones(4))(X),
    "long bias": lambda c: broken(c, bias=torch.nn.Parameter(torch.ones(4)))(X),
    "two axes": lambda c: broken(c, running_mean=torch.zeros(3, 1))(X),
    "learned statistics": lambda c: broken(c, running_mean=torch.zeros(3, requires_grad=True))(X),
    "negative features": lambda c: c(-3),
    "fractional features": lambda c: c(3.5),
    "unknown key": lambda c: c(3).load_state_dict({"gamma": torch.ones(3)}),
    "lazy rank": lambda c: LAZY["1d"][c is torch.nn.BatchNorm1d]()(data((3,))),
}


def said(mistake, cls):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is compared
        MISTAKES[mistake](cls)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[as_torch_2_13] if "eps" in name else []) for name in MISTAKES]
)
def test_errors_are_those_of_torch(mistake):
    assert said(mistake, nn.BatchNorm1d) == said(mistake, torch.nn.BatchNorm1d)


@pytest.mark.parametrize("mistake", ["channels", "one value", "long variance", "long bias", "whole numbers"])
def test_errors_of_the_functional_form_are_those_of_torch(mistake):
    bad = {
        "channels": {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
        "one value": {"input": data((1, 3))},
        "long variance": {"running_var": torch.ones(4)},
        "long bias": {"bias": torch.ones(4)},
        "whole numbers": {"input": X.long()},
    }[mistake]
    arguments = {"input": X, "running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True} | bad
    texts = []
    for function in (nn.batch_norm, torch.nn.functional.batch_norm):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            function(**arguments)
        texts.append((caught.type, str(caught.value)))
    assert texts[0] == texts[1]
    assert not arguments["running_mean"].any()


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "input"])
@pytest.mark.parametrize("value", [[0.0] * 3, np.zeros(3), 1.0], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_no_tensor_is_refused_as_by_torch(name, value, training):
    arguments = {"input": X, "running_mean": torch.zeros(3), "running_var": torch.ones(3)} | {name: value}
    with pytest.raises(TypeError) as ours:
        nn.batch_norm(**arguments, training=training)
    with pytest.raises(TypeError) as theirs:
        torch.nn.functional.batch_norm(**arguments, training=training and name != "input")
    assert str(ours.value) == re.sub(r" \(position \d\)", "", str(theirs.value))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("residual", 1.0, "float"),
        ("residual", X.numpy(), "numpy.ndarray"),
        ("num_batches_tracked", 0, "int"),
        ("num_batches_tracked", np.zeros((), np.int64), "numpy.ndarray"),
    ],
)
def test_what_only_we_take_is_to_be_a_tensor_too(name, value, kind):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match=rf"batch_norm\(\): argument '{name}' must be Tensor, not {kind}"):
        nn.batch_norm(X, mean, var, training=True, **{name: value})
    assert not mean.any()


@pytest.mark.parametrize("x", [data((1, 3)), data((4, 4)), X.long(), data((3,))], ids=lambda x: str(tuple(x.shape)))
def test_a_refused_call_changes_nothing(x):
    layer = nn.BatchNorm1d(3, momentum=None)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        layer(x)
    assert_close(layer.state_dict(), before)


ODD = {
    "whole numbers": lambda: torch.ones(3, dtype=torch.int32),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.parametrize("affine", [False, True])
def test_asking_torch_what_is_wrong_changes_nothing(name, kind, affine):
    """It takes some of what is refused here, and finds others wrong when it has written the statistics."""
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    if affine:
        arguments |= {"weight": torch.ones(3), "bias": torch.zeros(3)}
    with pytest.raises((TypeError, RuntimeError)):
        nn.batch_norm(X, **(arguments | {name: ODD[kind]()}))
    assert not arguments["running_mean"].any()
    assert (arguments["running_var"] == 1).all()


def test_what_torch_takes_and_is_refused_here_is_named():
    with pytest.raises(TypeError, match=r"expects arguments of .*, got bias of torch.int32 on cpu"):
        nn.batch_norm(X[:0], bias=torch.zeros(3, dtype=torch.int32), training=True)


def test_a_subclass_may_check_its_inputs_itself():
    class Accepting:
        def _check_input_dim(self, input):
            if input.shape[0] == 1:
                raise ValueError("one sample")

    class Ours(Accepting, nn.BatchNorm2d):
        pass

    class Theirs(Accepting, torch.nn.BatchNorm2d):
        pass

    class Further(Ours):
        pass

    for cls in (Ours, Further):
        assert_close(cls(3)(X), Theirs(3)(X))
        with pytest.raises(ValueError, match="one sample"):
            cls(3)(X[:1])
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNorm2d(3)(X)


@pytest.mark.parametrize("training", [True, False])
def test_tensors_in_the_layout_of_onednn(training):
    layer, plain = (nn.BatchNorm2d(3, activation="relu").train(training) for _ in range(2))
    x, other = data((6, 3, 4, 5)), data((6, 3, 4, 5), 1)
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(given.to_mkldnn(), other.to_mkldnn())
    assert y.is_mkldnn
    y.to_dense().square().sum().backward()
    z = plain(expected, other)
    z.square().sum().backward()
    assert torch.equal(y.to_dense(), z)
    assert torch.equal(given.grad, expected.grad)
    assert_close(layer.state_dict(), plain.state_dict())


def created_for_inference(layer):
    with torch.inference_mode():
        layer.running_mean, layer.running_var, layer.num_batches_tracked = (
            buffer.clone() for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        )


NO_COUNTERS = {
    "bool": lambda layer: setattr(layer, "num_batches_tracked", torch.tensor(False)),
    "float8": lambda layer: setattr(layer, "num_batches_tracked", torch.tensor(0.0).to(torch.float8_e4m3fn)),
    "inference": created_for_inference,
}


@pytest.mark.parametrize("counter", list(NO_COUNTERS))
@pytest.mark.parametrize("options", [{}, {"renorm": (2.0, 1.0)}], ids=str)
@pytest.mark.parametrize("x", [X, data((8, 3, 2048))], ids=["small", "large"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_cannot_be_counted_is_refused_before_anything_changes(counter, options, x, grad):
    ours, theirs = nn.BatchNorm1d(3, **options), torch.nn.BatchNorm1d(3)
    texts = []
    for layer in (ours, theirs):
        NO_COUNTERS[counter](layer)
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, NotImplementedError)) as caught:
            layer(x)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert not ours.running_mean.any()
    assert not ours.num_batches_tracked.float()


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"virtual_batch_size": 2}], ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_what_cannot_be_saved_is_refused_before_anything_changes(options, name):
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    arguments |= {"input": X, "weight": torch.ones(3), "bias": torch.zeros(3)}
    with torch.inference_mode():
        arguments[name] = arguments[name].clone()
    leaf = "weight" if name == "input" else "input"
    arguments[leaf] = arguments[leaf].clone().requires_grad_()
    if name == "bias" and "activation" not in options:  # which is not saved
        nn.batch_norm(**arguments, **options).sum().backward()
        return
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        nn.batch_norm(**arguments, **options)
    assert not arguments["running_mean"].any()


def test_statistics_made_for_inference_are_updated_there():
    ours, theirs = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    created_for_inference(ours)
    with torch.inference_mode():
        assert_close(ours(X), theirs(X))
    assert_close(ours.state_dict(), theirs.state_dict())


def test_a_call_that_fails_has_not_counted(monkeypatch):
    class Failed(Exception):
        pass

    def fail(*_):
        raise Failed

    for options in ({}, {"virtual_batch_size": 2}):
        layer = nn.BatchNorm1d(3, **options)
        monkeypatch.setattr(library.registry, "serving", fail)
        with pytest.raises(Failed):
            layer(X)
        assert layer.num_batches_tracked == 0


NUMBERS = [np.float32(0.3), np.float64(0.3), np.int64(1), np.bool_(True), torch.tensor(0.3), torch.tensor(1)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_numbers_of_numpy_and_tensors_as_torch(number, name):
    ours, theirs = nn.BatchNorm1d(3, **{name: number}), torch.nn.BatchNorm1d(3, **{name: number})
    for _ in range(2):
        assert_close(ours(X), theirs(X))
    assert_close(ours.state_dict(), theirs.state_dict())
    assert_close(ours.eval()(X), theirs.eval()(X))


@pytest.mark.parametrize("momentum", [np.float32(0.3), np.array(0.3), torch.tensor(0.3)], ids=repr)
def test_the_front_door_takes_a_momentum_of_its_library(momentum):
    if isinstance(momentum, np.ndarray):
        momentum = torch.from_numpy(momentum)
    expected, got = torch.zeros(3), torch.zeros(3)
    gpu_bn.batch_norm(X, expected, torch.ones(3), training=True, momentum=0.3)
    gpu_bn.batch_norm(X, got, torch.ones(3), training=True, momentum=momentum)
    assert_close(got, expected)


def test_a_momentum_on_a_gpu_is_not_read(monkeypatch):
    monkeypatch.setattr(library, "unread", lambda _: True)
    ours, theirs = nn.BatchNorm1d(3, momentum=torch.tensor(0.3)), torch.nn.BatchNorm1d(3, momentum=0.3)
    monkeypatch.setattr(torch.Tensor, "item", None)
    x = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(ours(x).sum(), x), torch.autograd.grad(theirs(x).sum(), x))
    assert_close(ours.state_dict(), theirs.state_dict())
    nn.batch_norm(X, training=True, momentum=torch.tensor(0.3), num_batches_tracked=ours.num_batches_tracked)
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("residual", "error", "text"),
    [
        (data((4, 3, 4)), ValueError, r"residual should have the input's shape \(4, 3, 5\), got \(4, 3, 4\)"),
        (X.double(), TypeError, "residual should have the input's dtype torch.float32, got torch.float64"),
        (X.to("meta"), RuntimeError, "residual should be on the input's device cpu, got meta"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(residual, error, text):
    layer = nn.BatchNorm1d(3)
    with pytest.raises(error, match=text):
        layer(X, residual)
    assert layer.num_batches_tracked == 0
