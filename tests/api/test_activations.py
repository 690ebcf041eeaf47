"""The activations of the library: values, exact gradients, kinks, tails, NaN, and their parameters."""

from fractions import Fraction

import numpy as np
import pytest
from support import rng

import gpu_bn
from gpu_bn.activation_values import normal_cdf
from gpu_bn.activations import ROWS, Activation
from gpu_bn.testing.oracle import derivative, value

FORMS = [Activation.of(name) for name in ROWS]
FORMS += [gpu_bn.leaky_relu(0.3), gpu_bn.leaky_relu(0.0), gpu_bn.leaky_relu(-0.5), gpu_bn.elu(1.7), gpu_bn.elu(0.0)]
SMOOTH = ["elu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh"]


def values(activation, z):
    y = z.copy()
    with np.errstate(all="ignore"):  # backends call them under errstate, too
        activation.value(y)
    return y


def slopes(activation, z, dy=None):
    out = np.full_like(z, np.nan)
    with np.errstate(all="ignore"):
        activation.gradient(z.copy(), np.ones_like(z) if dy is None else dy, out)
    return out


def evaluate(expression, activation, z, dy):
    """Evaluate a kernel's expression in float64."""
    functions = {
        "where": np.where, "abs": np.abs, "exp": np.exp, "expm1": np.expm1, "tanh": np.tanh, "normal_cdf": normal_cdf,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sigmoid_slope": lambda z: np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2,
    }  # fmt: skip
    names = {"z": z, "dy": dy, "p": activation.parameter, "__builtins__": {}}
    with np.errstate(all="ignore"):
        return eval(expression, functions | names)


@pytest.mark.parametrize("activation", FORMS, ids=repr)
def test_the_expressions_for_kernels_are_the_same_functions(activation):
    z = np.concatenate([np.linspace(-20, 20, 1001), [0.0, 6.0, -3.0, 3.0, np.nan]])
    dy = np.linspace(-2, 3, len(z))
    code = activation.row.device
    dropped = f"{code.slope} * dy" if code.slope else code.dropped
    assert bool(code.drop) == bool(dropped) != bool(code.gradient)
    gradient = code.gradient or f"where({code.drop}, {dropped}, dy)"
    close = {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(evaluate(code.value, activation, z, dy), values(activation, z), **close)
    np.testing.assert_allclose(evaluate(gradient, activation, z, dy), slopes(activation, z, dy), **close)


@pytest.mark.parametrize("activation", FORMS, ids=repr)
def test_gradient_is_the_slope_of_the_value(activation):
    z = np.linspace(-7.03, 7.01, 1001)
    step = 1e-6
    slope = (values(activation, z + step) - values(activation, z - step)) / (2 * step)
    assert np.abs(slope - slopes(activation, z)).max() < 1e-8


@pytest.mark.parametrize("activation", FORMS, ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_values_and_slopes_are_those_of_the_oracle(activation, dtype):
    z = np.concatenate([np.linspace(-40, 40, 2001), [-1e4, 1e4], 10.0 ** np.arange(-30, 0)]).astype(dtype)
    roundings = 8 * np.finfo(dtype).eps
    for got, exact in (
        (values(activation, z), value(activation.name, activation.parameter, z.astype(np.longdouble))),
        (slopes(activation, z), derivative(activation.name, activation.parameter, z.astype(np.longdouble))),
    ):
        assert got.dtype == dtype
        assert (np.abs(got - exact) <= roundings * np.maximum(np.abs(exact), np.minimum(np.abs(z), 1))).all()


@pytest.mark.parametrize("name", ["silu", "sigmoid", "gelu", "elu"])
def test_the_left_tail_keeps_its_relative_accuracy(name):
    special = pytest.importorskip("scipy.special")
    z = np.linspace(-30, -1, 500)
    exact = {
        "silu": z * special.expit(z),
        "sigmoid": special.expit(z),
        "gelu": z * special.ndtr(z),
        "elu": special.expm1(z),
    }
    assert np.allclose(values(Activation.of(name), z), exact[name], rtol=1e-12, atol=0)


def test_normal_cdf():
    special = pytest.importorskip("scipy.special")
    z = np.concatenate([np.linspace(-37, 10, 5001), [0.0, -0.0]])
    assert np.allclose(normal_cdf(z), special.ndtr(z), rtol=2e-13, atol=0)
    assert np.array_equal(normal_cdf(np.array([-np.inf, np.inf, np.nan])), [0, 1, np.nan], equal_nan=True)


@pytest.mark.parametrize("activation", FORMS, ids=repr)
def test_value_and_gradient_are_those_of_torch(activation):
    torch = pytest.importorskip("torch")
    functions = {
        "identity": lambda z: z * 1,
        "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, activation.parameter),
        "elu": lambda z: torch.nn.functional.elu(z, activation.parameter),
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    function = functions.get(activation.name) or getattr(torch.nn.functional, activation.name)
    kinks = np.array([-3.0, 0.0, -0.0, 3.0, 6.0, -1e-300, 1e-300, 700.0, -700.0])
    z = np.concatenate([10 * rng().standard_normal(500), kinks])
    if activation.parameter == -0.5:
        z = z[z != 0]
    tensor = torch.tensor(z, requires_grad=True)
    y = function(tensor)
    y.sum().backward()
    assert np.allclose(values(activation, z), y.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert np.allclose(slopes(activation, z), tensor.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "point", "slope"),
    [("relu", 0, 0), ("relu6", 0, 0), ("relu6", 6, 0), ("leaky_relu", 0, 0.01), ("elu", 0, 1), ("hardswish", -3, 0),
     ("hardswish", 3, 1)],
)  # fmt: skip
def test_slope_at_the_kink(name, point, slope):
    assert slopes(Activation.of(name), np.array([point, -float(-point)])) == pytest.approx([slope, slope])


@pytest.mark.parametrize("activation", FORMS, ids=repr)
def test_infinite_arguments_have_limits(activation):
    got = values(activation, np.array([-np.inf, np.inf]))
    limits = {"relu6": [0, 6], "sigmoid": [0, 1], "tanh": [-1, 1], "relu": [0, np.inf], "identity": [-np.inf, np.inf]}
    limits["elu"] = [-activation.parameter, np.inf]
    if activation.name in limits:
        assert np.array_equal(got, limits[activation.name])
    assert got[1] > 0


@pytest.mark.parametrize("activation", FORMS, ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_the_gradient_of_large_numbers_is_that_of_smaller_ones(activation, dtype):
    most = np.log10(np.finfo(dtype).max)
    z = np.concatenate([sign * np.logspace(3, most - 0.1, 50, dtype=dtype) for sign in (1, -1)])
    expected = slopes(activation, np.copysign(np.full_like(z, 1000), z))
    assert np.array_equal(slopes(activation, z), expected)
    code = activation.row.device
    if code.gradient:
        assert np.array_equal(evaluate(code.gradient, activation, z, np.ones_like(z)), expected)


@pytest.mark.parametrize("activation", FORMS, ids=repr)
def test_nan_propagates(activation):
    z = np.array([np.nan, 1.0])
    assert np.isnan(values(activation, z)).tolist() == [True, False]
    assert np.isnan(slopes(activation, np.ones(2), dy=z)).tolist() == [True, False]


@pytest.mark.parametrize("activation", FORMS, ids=repr)
@pytest.mark.parametrize("target", ["z", "dy"])
def test_the_gradient_may_be_written_over_an_argument(activation, target):
    z, dy = rng().standard_normal((2, 50))
    expected = slopes(activation, z, dy)
    arguments = {"z": z.copy(), "dy": dy.copy()}
    activation.gradient(arguments["z"], arguments["dy"], arguments[target])
    assert np.array_equal(arguments[target], expected)


@pytest.mark.parametrize("activation", [form for form in FORMS if form.name in SMOOTH], ids=repr)
@pytest.mark.parametrize("shape", [(3, 2, 4), (12, 8, 10, 11)], ids=str)
def test_finite_differences_of_the_whole_transform(activation, shape):
    """Compare with d(sum(y * dy)) along a random direction of every argument, in float64.

    The compiled backend is tested with SiLU only, because it compiles a kernel for each activation.
    """
    backend = None if activation.name == "silu" else "numpy"
    x, dy, residual, dx, dresidual = rng(1).standard_normal((5, *shape))
    weight, bias, dweight, dbias = rng(2).standard_normal((4, shape[1]))

    def loss(step):
        y = gpu_bn.batch_norm(
            x + step * dx, None, None, weight + step * dweight, bias + step * dbias, True,
            residual=residual + step * dresidual, activation=activation, backend=backend,
        )  # fmt: skip
        return float((y * dy).sum())

    _, saved = gpu_bn.batch_norm_forward(
        x, None, None, weight, bias, True, residual=residual, activation=activation, backend=backend
    )
    grads = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    expected = sum(
        float((gradient * direction).sum())
        for gradient, direction in zip(grads, (dx, dweight, dbias, dresidual), strict=True)
    )
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.sqrt(x.size))


def test_names_parameters_and_text():
    assert Activation.of(None) == Activation.of("identity")
    assert Activation.of(gpu_bn.elu(2)) == Activation("elu", 2.0)
    assert gpu_bn.leaky_relu() == Activation.of("leaky_relu") == Activation("leaky_relu", 0.01)
    assert repr(gpu_bn.leaky_relu(0.2)) == "leaky_relu(negative_slope=0.2)"
    assert repr(gpu_bn.elu()) == "elu(alpha=1.0)"
    assert repr(Activation.of("relu")) == "relu"


@pytest.mark.parametrize("make", [gpu_bn.leaky_relu, gpu_bn.elu])
@pytest.mark.parametrize("value", ["0.2", "a", b"1", None, [1], 1j, np.ones(2)])
def test_a_parameter_is_a_number(make, value):
    with pytest.raises(TypeError):
        make(value)


@pytest.mark.parametrize("make", [gpu_bn.leaky_relu, gpu_bn.elu])
@pytest.mark.parametrize("value", [np.float64(0.5), np.array(0.5), Fraction(1, 2)])
def test_a_parameter_may_be_any_number(make, value):
    assert make(value) == make(0.5)
