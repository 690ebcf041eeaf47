"""The oracle itself: against finite differences, torch in float64, exact rational numbers, and its functions."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from support import make_problem, rng

from gpu_bn.activations import ROWS
from gpu_bn.testing import Case, build, compare, oracle, tolerance
from gpu_bn.testing.oracle import WIDE, derivative, value
from gpu_bn.testing.tolerance import ulp

ACTIVATIONS = [(name, row.default.parameter) for name, row in ROWS.items()] + [("elu", 1.7), ("leaky_relu", 0.3)]


@pytest.mark.parametrize(("name", "parameter"), ACTIVATIONS)
def test_derivative_is_the_slope_of_the_value(name, parameter):
    z = np.linspace(-5.03, 7.01, 400).astype(WIDE)  # no point lies within a step of a kink
    step = WIDE(1e-4)
    slope = (value(name, parameter, z + step) - value(name, parameter, z - step)) / (2 * step)
    assert np.abs(slope - derivative(name, parameter, z)).max() < 1e-8


def test_an_activation_that_the_oracle_lacks_is_named():
    with pytest.raises(ValueError, match="the oracle knows no activation 'mish'"):
        oracle(replace(build(Case((3, 2))), activation=("mish", 0.0)))


@pytest.mark.parametrize("mode", ["train", "eval", "train_no_stats"])
@pytest.mark.parametrize("activation", ["identity", "silu", "leaky_relu"])
def test_gradients_are_the_slopes_of_the_transform(mode, activation):
    problem = build(Case((3, 2, 4), "float64", mode=mode, activation=activation, residual=True))
    truth = oracle(problem)
    for name in ("x", "weight", "bias", "residual"):
        gradient = getattr(truth, "d" + name)
        slope = np.zeros_like(gradient)
        for index in np.ndindex(slope.shape):
            losses = []
            for step in (1e-6, -1e-6):
                moved = getattr(problem, name).copy()
                moved[index] += step
                moved_problem = replace(problem, **{name: moved})
                losses.append((oracle(moved_problem).y * problem.dy).sum())
            slope[index] = (losses[0] - losses[1]) / 2e-6
        assert np.abs(slope - gradient).max() < 1e-7, name


def test_moments_are_exact_where_float64_cancels():
    x = (1e6 + rng().standard_normal((50, 1))).astype(np.float64)
    exact = [Fraction(float(v)) for v in x[:, 0]]
    mean = sum(exact) / 50
    var = sum((v - mean) ** 2 for v in exact) / 50
    truth = oracle(make_problem(x))
    assert abs(Fraction(float(truth.mean[0])) - mean) <= mean * Fraction(2) ** -53
    assert abs(float(truth.var[0]) / float(var) - 1) < 1e-15


def test_large_values_do_not_overflow():
    x = (1e18 * rng().standard_normal((40, 3))).astype(np.float32)
    truth = oracle(make_problem(x))
    assert np.isfinite(truth.y).all()
    assert np.allclose(np.asarray(truth.var, np.float64), x.astype(np.float64).var(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    "case", [Case((6, 3, 4), "float64", mode=mode, residual=True) for mode in ("train", "eval")], ids=str
)
def test_agrees_with_torch_in_float64(case):
    torch = pytest.importorskip("torch")
    problem = build(case)
    names = ("x", "weight", "bias", "residual")
    x, weight, bias, residual = (torch.tensor(getattr(problem, name), requires_grad=True) for name in names)
    running_mean, running_var = torch.tensor(problem.running_mean), torch.tensor(problem.running_var)
    y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, problem.training, 0.1, problem.eps)
    (y + residual).backward(torch.tensor(problem.dy))
    truth = oracle(problem)
    expected = {"dx": x.grad, "dweight": weight.grad, "dbias": bias.grad, "dresidual": residual.grad, "y": y + residual}
    expected |= {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in expected.items():
        assert np.allclose(np.asarray(getattr(truth, name), np.float64), tensor.detach().numpy(), 1e-12, 1e-12), name


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ulp_is_the_spacing_of_the_numbers(dtype):
    values = np.array([0, 1, 1.5, 2, -3.99, 1000, 6e-5, 1e-6, -60000], dtype)
    assert np.array_equal(ulp(values, dtype).astype(dtype), np.spacing(np.abs(values)))


def test_tolerance_of_ordinary_float32_data_is_a_few_roundings():
    problem = build(Case((8, 4, 10)))
    truth = oracle(problem)
    allowed = tolerance(problem, truth)
    assert allowed["y"].max() < 1e-5
    assert (allowed["rstd"] / truth.rstd).max() < 1e-6
    assert allowed["dx"].max() < 1e-5


def test_tolerance_at_a_ratio_of_10000_is_the_contract():
    problem = build(Case((8, 4, 10), mean=1e4, std=1.0, affine="none"))
    truth = oracle(problem)
    allowed = tolerance(problem, truth)
    assert (2 * allowed["rstd"] / truth.rstd).max() < 1.3e-5  # half the error of var, and rounding errors
    assert allowed["y"].max() < 1.3e-4


@pytest.mark.parametrize(
    ("got", "exact", "share"),
    [(1.0, 1.0, 0), (np.nan, np.nan, 0), (np.inf, np.inf, 0), (1 + 2.0**-23, 1.0, 1)],
)
def test_compare_gives_the_share_of_the_error_allowed(got, exact, share):
    arrays = np.array([got], np.float32), np.array([exact], WIDE), np.zeros(1, WIDE)
    assert compare("title", *arrays) == pytest.approx(share)


@pytest.mark.parametrize(
    ("got", "exact"), [(1.001, 1.0), (np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (-np.inf, np.inf)]
)
def test_compare_names_the_element(got, exact):
    arrays = np.array([[0, got]], np.float32), np.array([[0, exact]], WIDE), np.zeros((1, 2), WIDE)
    with pytest.raises(AssertionError, match=r"title\[0, 1\]: expected .*, got .*, allowed .*, 1 of 2 elements wrong"):
        compare("title", *arrays)


def test_compare_refuses_another_shape():
    with pytest.raises(AssertionError, match="shape"):
        compare("title", np.zeros(3), np.zeros(4, WIDE), np.zeros(4, WIDE))
