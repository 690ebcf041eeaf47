"""Every refused call raises an error that says what was expected and what was given, and changes nothing."""

import dataclasses
import sys

import numpy as np
import pytest
from support import read_only, running_pair, same_bits

import gpu_bn
from gpu_bn import registry


def array(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(dtype)


X = array(4, 3)
BOTH = "float16, bfloat16, float32, float64"
PAIR = "running_mean and running_var must either both be None or neither be None"
ONE_VALUE = "Expected more than 1 value per channel when training"
ARRAY = "input should be an array (numpy.ndarray, cupy.ndarray, torch.Tensor)"
REFUSED = [
    ({"x": array(3)}, ValueError, "expected 2D to 5D input (got 1D input)"),
    ({"x": array(2, 3, 1, 1, 1, 1)}, ValueError, "expected 2D to 5D input (got 6D input)"),
    ({"x": array()}, ValueError, "expected 2D to 5D input (got 0D input)"),
    ({"x": array(1, 3)}, ValueError, f"{ONE_VALUE}, got input size (1, 3)"),
    ({"x": array(1, 3, 1, 1)}, ValueError, f"{ONE_VALUE}, got input size (1, 3, 1, 1)"),
    ({"x": X.astype(int)}, TypeError, f"input should be one of {BOTH}, got int64"),
    ({"x": X.astype(complex)}, TypeError, f"input should be one of {BOTH}, got complex128"),
    ({"x": X > 1}, TypeError, f"input should be one of {BOTH}, got bool"),
    ({"x": X.astype(np.longdouble)}, TypeError, f"input should be one of {BOTH}, got {np.dtype(np.longdouble)}"),
    ({"x": X.tolist()}, TypeError, f"{ARRAY}, got builtins.list"),
    ({"x": None}, TypeError, f"{ARRAY}, got builtins.NoneType"),
    ({"x": np.ma.masked_array(X)}, TypeError, "input should be an array"),
    ({"weight": array(4)}, ValueError, "weight should contain 3 elements not 4"),
    ({"bias": array(2)}, ValueError, "bias should contain 3 elements not 2"),
    ({"weight": array(3, 1)}, ValueError, "weight should have shape (3,), got (3, 1)"),
    ({"bias": array()}, ValueError, "bias should have shape (3,), got ()"),
    ({"weight": np.arange(3)}, TypeError, f"weight should be one of {BOTH}, got int64"),
    ({"weight": [1.0, 2.0, 3.0]}, TypeError, "weight should be an array"),
    ({"running_mean": array(4)}, ValueError, "running_mean should contain 3 elements not 4"),
    ({"running_var": array(5)}, ValueError, "running_var should contain 3 elements not 5"),
    ({"running_mean": np.arange(3)}, TypeError, f"running_mean should be one of {BOTH}, got int64"),
    ({"running_mean": None}, ValueError, PAIR),
    ({"running_var": None}, ValueError, PAIR),
    ({"running_mean": None, "training": False}, ValueError, "running_mean must be defined in evaluation mode"),
    ({"running_var": None, "training": False}, ValueError, "running_var must be defined in evaluation mode"),
    ({"running_mean": read_only(array(3))}, ValueError, "running_mean is written to, but the array given is read-only"),
    ({"running_var": read_only(array(3))}, ValueError, "running_var is written to, but the array given is read-only"),
    ({"eps": 0.0}, ValueError, "batch_norm eps must be positive during training, but got 0.0"),
    ({"eps": -1e-5}, ValueError, "batch_norm eps must be positive during training, but got -1e-05"),
    ({"eps": float("nan")}, ValueError, "batch_norm eps must be positive during training, but got nan"),
    ({"eps": -1e-5, "training": False}, ValueError, "batch_norm eps must be non-negative, but got -1e-05"),
    ({"eps": "small"}, TypeError, "eps should be a number, got str"),
    ({"eps": 10**400}, ValueError, "batch_norm eps must be finite, but got 1000"),
    ({"momentum": None}, TypeError, "momentum should be a number, got NoneType"),
    ({"momentum": float("nan")}, ValueError, "momentum should be finite, got nan"),
    ({"momentum": 10**400}, ValueError, "momentum should be finite, got 1000"),
    ({"renorm": (-(10**400), 1)}, ValueError, "renorm should have r_max >= 1 and d_max >= 0, got (-1000"),
    ({"momentum": np.array("abc")}, TypeError, "momentum should be a number, got ndarray"),
    ({"momentum": np.array(1j)}, TypeError, "momentum should be a number, got ndarray"),
    ({"channel_axis": 2}, ValueError, "channel_axis should be in [-2, 2) for 2D input, got 2"),
    ({"channel_axis": -3}, ValueError, "channel_axis should be in [-2, 2) for 2D input, got -3"),
    ({"channel_axis": 1.0}, TypeError, "channel_axis should be an int, got float"),
    ({"channel_axis": True}, TypeError, "channel_axis should be an int, got bool"),
    ({"residual": array(4, 2)}, ValueError, "residual should have the input's shape (4, 3), got (4, 2)"),
    ({"residual": X.astype(float)}, TypeError, "residual should have the input's dtype float32, got float64"),
    ({"residual": 1.0}, TypeError, "residual should be an array"),
    ({"out": array(3, 4)}, ValueError, "out should have the input's shape (4, 3), got (3, 4)"),
    ({"out": array(4, 3, dtype=np.float16)}, TypeError, "out should have the input's dtype float32, got float16"),
    ({"out": read_only(array(4, 3))}, ValueError, "out is written to, but the array given is read-only"),
    ({"activation": "swish"}, ValueError, "unknown activation 'swish', expected one of identity, relu, "),
    ({"activation": gpu_bn.Activation("leaky")}, ValueError, "unknown activation 'leaky', expected one of identity"),
    ({"activation": max}, TypeError, "activation should be a name or an Activation, got builtin_function_or_method"),
    ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of cpu, numpy, cupy, triton, torch"),
    ({"backend": "cupy"}, ValueError, "serves arrays of type cupy.ndarray or torch.Tensor on cuda, got numpy.ndarray"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), REFUSED, ids=[text[:60] for _, _, text in REFUSED])
@pytest.mark.parametrize("function", [gpu_bn.batch_norm, gpu_bn.batch_norm_forward])
def test_a_refused_call_says_why_and_changes_nothing(change, error, text, function):
    running_mean, running_var = running_pair(3)
    arguments = {"x": X, "running_mean": running_mean, "running_var": running_var, "weight": array(3), "bias": array(3)}
    arguments |= {"training": True, "out": np.full((4, 3), 7, np.float32)}
    function(**arguments)  # the signature of the valid call is remembered
    arguments |= change
    before = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    for _ in range(2):
        with pytest.raises(error) as caught:
            function(**arguments)
        assert text in str(caught.value)
    for name, value in before.items():
        assert same_bits(np.asarray(arguments[name]), np.asarray(value)), f"{name} was changed"


def test_one_library_for_all_arrays():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"one library and on one device, got: input is a numpy.ndarray, weight is a torch.Tensor"
    ):
        gpu_bn.batch_norm(X, weight=torch.ones(3), training=True)


def test_a_backend_that_cannot_be_had_says_why(monkeypatch):
    pytest.importorskip("torch")
    for module in [name for name in sys.modules if name.startswith("gpu_bn.backends.triton.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    registry.load.cache_clear()
    with pytest.raises(gpu_bn.BackendUnavailableError, match=r"'triton' cannot be used: .*triton"):
        registry.load("triton")
    registry.load.cache_clear()


@pytest.mark.parametrize(
    ("missing", "name", "library", "extra"),
    [
        ("triton", "triton", "torch", "torch"),
        ("cupy", "cupy", "torch", "cupy"),
        ("torch", "cupy", "torch", "torch"),
        ("cupy", "cupy", "cupy", "cupy"),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(missing, name, library, extra, monkeypatch, make_gpu):
    pytest.importorskip("torch")
    make_gpu(80)
    mine = "gpu_bn.backends.cupy.", "gpu_bn.backends.triton."
    for module in [found for found in sys.modules if found.startswith(mine)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    registry.load.cache_clear()
    text = rf"backend '{name}' cannot be used: .*{missing}.*; install it with pip install -e '.\[{extra}\]' in a clone"
    with pytest.raises(gpu_bn.BackendUnavailableError, match=text):
        registry.load(name, library)
    registry.load.cache_clear()


@pytest.mark.parametrize(
    ("device", "backend", "error", "text"),
    [
        ("cpu", "triton", ValueError, "backend 'triton' serves arrays of type torch.Tensor on cuda, got .* on cpu"),
        ("meta", None, TypeError, "input should be on one of cpu, cuda, got meta"),
    ],
)
def test_a_tensor_is_served_where_it_is(device, backend, error, text):
    torch = pytest.importorskip("torch")
    with pytest.raises(error, match=text):
        gpu_bn.batch_norm(torch.ones(4, 3, device=device), training=True, backend=backend)


def test_one_device_for_all_tensors():
    torch = pytest.importorskip("torch")

    class Second(torch.Tensor):
        device = torch.device("cuda:1")

    class First(torch.Tensor):
        device = torch.device("cuda:0")

    first, second = torch.ones(4, 3).as_subclass(First), torch.ones(4, 3).as_subclass(Second)
    assert registry.find_row(None, input=first, residual=first)
    for function in (gpu_bn.batch_norm, gpu_bn.batch_norm_forward):
        with pytest.raises(
            TypeError, match=r"one device, got: input is a torch.Tensor on cuda:0, weight is a torch.Tensor on cuda:1"
        ):
            function(first, weight=second[0], training=True)
    _, saved = gpu_bn.batch_norm_forward(torch.ones(4, 3), training=True)
    with pytest.raises(TypeError, match=r"one device, got: dy is a torch.Tensor on cuda:1, input is a .* on cuda:0"):
        gpu_bn.batch_norm_backward(second, dataclasses.replace(saved, x=first))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dy": array(4, 2)}, ValueError, "dy should have the input's shape (4, 3), got (4, 2)"),
        ({"dy": array(4, 3, dtype=np.float64)}, TypeError, "dy should have the input's dtype float32, got float64"),
        ({"dy": None}, TypeError, "dy should be an array"),
        ({"dy": 1.0}, TypeError, "dy should be an array"),
        ({"saved": (X,)}, TypeError, "saved should be what batch_norm_forward returned, got tuple"),
        ({"need": ["dz"]}, ValueError, "unknown gradient 'dz', expected some of dx, dweight, dbias, dresidual"),
        ({"need": "dy"}, ValueError, "unknown gradient 'dy'"),
        ({"need": ["dx", "dbias"]}, ValueError, "dbias was requested, but the forward call had no bias"),
        ({"need": ["dresidual"]}, ValueError, "dresidual was requested, but the forward call had no residual"),
        (
            {"backend": "cupy"},
            ValueError,
            "backend 'cupy' serves arrays of type cupy.ndarray or torch.Tensor on cuda, got numpy.ndarray",
        ),
    ],
    ids=str,
)
def test_a_refused_backward_call_says_why(change, error, text):
    _, saved = gpu_bn.batch_norm_forward(X, weight=array(3), training=True)
    arguments = {"dy": array(4, 3), "saved": saved}
    gpu_bn.batch_norm_backward(**arguments)
    for _ in range(2):
        with pytest.raises(error) as caught:
            gpu_bn.batch_norm_backward(**(arguments | change))
        assert text in str(caught.value)


def test_out_may_not_be_what_backward_reads():
    x, residual = array(4, 3), array(4, 3)
    for out, name in ((x, "the input"), (residual, "the residual")):
        with pytest.raises(ValueError, match=f"out may not be {name}"):
            gpu_bn.batch_norm_forward(x, training=True, residual=residual, out=out)


def test_an_unknown_activation_can_be_shown():
    assert "leaky" in repr(gpu_bn.Activation("leaky"))


@pytest.mark.parametrize("eps", [0, 0.0])
def test_eps_zero_is_allowed_in_evaluation(eps):
    y = gpu_bn.batch_norm(X, np.zeros(3, np.float32), np.full(3, 4, np.float32), eps=eps)
    assert np.array_equal(y, X / 2)


def torch_message(**options):
    """Return the message that torch raises for the same mistake, with shapes written as in gpu_bn."""
    torch = pytest.importorskip("torch")
    arguments = {
        "input": torch.ones(4, 3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "training": True,
    }
    with pytest.raises((ValueError, RuntimeError)) as caught:
        torch.nn.functional.batch_norm(**(arguments | options))
    text = str(caught.value)
    return text.replace("torch.Size([", "(").replace("])", ")")


@pytest.mark.parametrize(
    ("change", "to_torch"),
    [
        ({"x": np.ones((1, 3), np.float32)}, {"input": (1, 3)}),
        ({"x": np.ones((1, 3, 1), np.float32)}, {"input": (1, 3, 1)}),
        ({"eps": 0.0}, {"eps": 0.0}),
        ({"eps": -1e-5, "training": False}, {"eps": -1e-5, "training": False}),
        ({"weight": array(4)}, {"weight": (4,)}),
        ({"bias": array(4)}, {"bias": (4,)}),
        ({"running_mean": array(4)}, {"running_mean": (4,)}),
        ({"running_var": array(4)}, {"running_var": (4,)}),
        ({"running_mean": None}, {"running_mean": None}),
        ({"running_mean": None, "training": False}, {"running_mean": None, "training": False}),
        ({"running_var": None, "training": False}, {"running_var": None, "training": False}),
    ],
    ids=str,
)
def test_texts_are_those_of_torch(change, to_torch):
    torch = pytest.importorskip("torch")
    expected = torch_message(**{k: torch.ones(v) if isinstance(v, tuple) else v for k, v in to_torch.items()})
    running_mean, running_var = running_pair(3)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        gpu_bn.batch_norm(
            **({"x": X, "running_mean": running_mean, "running_var": running_var, "training": True} | change)
        )
    assert str(caught.value) == expected
