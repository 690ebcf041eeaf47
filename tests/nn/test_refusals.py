"""Test that layers and the functional form raise torch's errors, before anything changes."""

import copy
import re

import numpy as np
import pytest
from support import as_torch_2_13

import gpu_bn

torch = pytest.importorskip("torch")
from support.layer_pairs import LAZY, PAIRS, data
from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.operators import library


def make_broken(cls, **attributes):
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
    "no mean": lambda c: make_broken(c, running_mean=None)(X),
    "no mean in evaluation": lambda c: make_broken(c, running_mean=None).eval()(X),
    "no variance in evaluation": lambda c: make_broken(c, running_var=None).eval()(X),
    "long variance": lambda c: make_broken(c, running_var=torch.ones(4))(X),
    "long bias": lambda c: make_broken(c, bias=torch.nn.Parameter(torch.ones(4)))(X),
    "two axes": lambda c: make_broken(c, running_mean=torch.zeros(3, 1))(X),
    "learned statistics": lambda c: make_broken(c, running_mean=torch.zeros(3, requires_grad=True))(X),
    "negative features": lambda c: c(-3),
    "fractional features": lambda c: c(3.5),
    "unknown key": lambda c: c(3).load_state_dict({"gamma": torch.ones(3)}),
    "lazy rank": lambda c: LAZY["1d"][c is torch.nn.BatchNorm1d]()(data((3,))),
}


def error_of(mistake, cls):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the type is compared
        MISTAKES[mistake](cls)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[as_torch_2_13] if "eps" in name else []) for name in MISTAKES]
)
def test_errors_are_those_of_torch(mistake):
    assert error_of(mistake, nn.BatchNorm1d) == error_of(mistake, torch.nn.BatchNorm1d)


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
    "sparse": lambda: torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.parametrize("affine", [False, True])
def test_asking_torch_what_is_wrong_changes_nothing(name, kind, affine):
    """torch accepts some of these arguments, and refuses others only after it has written the statistics."""
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    if affine:
        arguments |= {"weight": torch.ones(3), "bias": torch.zeros(3)}
    with pytest.raises((TypeError, RuntimeError)):
        nn.batch_norm(X, **(arguments | {name: ODD[kind]()}))
    assert not arguments["running_mean"].any()
    assert (arguments["running_var"] == 1).all()


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_sparse_vector_is_refused_as_by_torch(name):
    texts = []
    for function in (nn.batch_norm, torch.nn.functional.batch_norm):
        with pytest.raises(NotImplementedError) as caught:
            function(X, **{"running_mean": torch.zeros(3), "running_var": torch.ones(3), name: ODD["sparse"]()})
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("name", ["x", "residual", "mask", "out"])
def test_a_tensor_whose_memory_is_not_its_elements_is_named(name, convert):
    x, mean, var = data((4, 3)), torch.zeros(3), torch.ones(3)
    dense = x[:, :1] > 0 if name == "mask" and convert != "to_mkldnn" else x
    wrong = {name: getattr(dense, convert)()}
    arguments = {"x": x, "running_mean": mean, "running_var": var, "training": True} | wrong
    named = f"{'input' if name == 'x' else name} should be a tensor of layout torch.strided, got {wrong[name].layout}"
    for function in (gpu_bn.batch_norm, gpu_bn.batch_norm_forward):
        for backend in ("cpu", "numpy"):
            with pytest.raises(TypeError, match=named):
                function(**arguments, backend=backend)
    if name == "residual" or (name == "mask" and dense is not x):
        with pytest.raises(TypeError, match=named):
            nn.batch_norm(x, mean, var, training=True, **wrong)
    assert not mean.any()
    assert (var == 1).all()


@pytest.mark.parametrize("training", ["yes", 2, (), None], ids=repr)
@pytest.mark.parametrize("function", [nn.batch_norm, gpu_bn.batch_norm])
def test_training_means_whether_it_is_true_and_spoils_no_later_call(training, function):
    results = []
    for one in (training, bool(training)):
        mean, var = torch.zeros(3), torch.ones(3)
        results.append((function(X[:, :, :2], mean, var, training=one), mean, var))
    assert_close(*results, rtol=0, atol=0)


def test_what_torch_takes_and_is_refused_here_is_named():
    with pytest.raises(TypeError, match=r"expects arguments of .*, got bias of torch.int32 and .* on cpu"):
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


def make_buffers_in_inference_mode(layer):
    with torch.inference_mode():
        layer.running_mean, layer.running_var, layer.num_batches_tracked = (
            buffer.clone() for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        )


NO_COUNTERS = {
    "bool": lambda layer: setattr(layer, "num_batches_tracked", torch.tensor(False)),
    "float8": lambda layer: setattr(layer, "num_batches_tracked", torch.tensor(0.0).to(torch.float8_e4m3fn)),
    "inference": make_buffers_in_inference_mode,
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
    if name == "bias" and "activation" not in options:  # a bias alone is not saved for backward
        nn.batch_norm(**arguments, **options).sum().backward()
        return
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        nn.batch_norm(**arguments, **options)
    assert not arguments["running_mean"].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda *running: gpu_bn.batch_norm(X, *running, training=True, out=torch.empty_like(X)),
        lambda *running: gpu_bn.batch_norm(X, *running, training=True, backend="numpy"),
        lambda *running: gpu_bn.batch_norm_forward(X, *running, training=True),
    ],
    ids=["out", "backend", "forward"],
)
def test_statistics_made_for_inference_are_not_updated_elsewhere(call):
    with torch.inference_mode():
        running = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        call(*running)
    assert not running[0].any()


def test_statistics_made_for_inference_are_updated_there():
    ours, theirs = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    make_buffers_in_inference_mode(ours)
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
        monkeypatch.setattr(library.registry, "backend_for", fail)
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
    monkeypatch.setattr(library, "stays_on_device", lambda _: True)
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
