"""The accuracy contract, on every backend; and inputs for which nothing may overflow or spread to other channels."""

import numpy as np
import pytest
from support import make_problem, relative_error, rng, running_pair, same_bits
from support.conformance import kernel_mark

import gpu_bn
from gpu_bn.activations import ROWS
from gpu_bn.testing import check, oracle, run
from gpu_bn.testing.oracle import wide
from gpu_bn.testing.tolerance import ulp

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")

SHAPES = [(64, 5), (8, 4, 6, 6), (700, 33), (16, 8, 12, 12), (3, 5, 2100)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def variance(results, eps):
    return 1 / wide(results["rstd"]) ** 2 - np.longdouble(eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0, 1, 1.9, 2.1, 30, 1e3, 1e4, -1e4])
def test_float32_contract(shape, ratio, backend):
    x = (ratio + rng(1).standard_normal(shape)).astype(np.float32)
    problem = make_problem(x, eps=1e-12)
    results, truth = run(problem, backend), oracle(problem)
    tight = abs(ratio) < 2
    assert relative_error(variance(results, 1e-12), truth.var) <= (2e-6 if tight else 1e-5)
    assert relative_error(results["y"], truth.y) <= (2e-6 if tight else 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beyond_the_contract_the_variance_is_still_right(shape, backend):
    x = (1e6 + rng(2).standard_normal(shape)).astype(np.float32)
    problem = make_problem(x)
    results, truth = run(problem, backend), oracle(problem)
    assert relative_error(variance(results, 1e-5), truth.var) <= 1e-3
    assert relative_error(results["y"], truth.y) <= 1e-2


EXTREMES = {"one is 1e308": 1e308, "one is infinite": np.inf, "all are tiny": 5e-324, "a variance is negative": -1.0}


@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("options", [{}, {"mask": True}, {"virtual_batch_size": 2}, {"renorm": (3.0, 5.0)}], ids=str)
def test_numpys_error_state_is_not_asked(extreme, options, backend):
    x, running = rng(5).standard_normal((6, 4, 5)), running_pair(4)
    if extreme == -1.0:
        running[1][1] = extreme
    else:
        x[:, 1] = extreme if extreme < 1 else x[:, 1]
        x[0, 1, 2] = extreme
    if "mask" in options:
        options = {"mask": rng(6).random((6, 5)) > 0.3}
    found = []
    for state in ("ignore", "raise"):
        pair = [vector.copy() for vector in running]
        with np.errstate(all=state):
            y, saved = gpu_bn.batch_norm_forward(x[::-1], *pair, *running, training=True, backend=backend, **options)
            found.append((y, *pair, *gpu_bn.batch_norm_backward(x, saved, backend=backend)[:3]))
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0, 2.1, 1e4, 1e6])
def test_float64_is_right_to_roundings(shape, ratio, backend):
    problem = make_problem(ratio + rng(3).standard_normal(shape))
    results, truth = run(problem, backend), oracle(problem)
    assert relative_error(variance(results, 1e-5), truth.var) <= 1e-14
    assert relative_error(results["y"], truth.y) <= 1e-14 + 3e-16 * ratio


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        pytest.param(dtype, activation, marks=kernel_mark(activation, str(dtype)))
        for dtype in (np.dtype(np.float16), BFLOAT16)
        for activation in ROWS
    ],
    ids=str,
)
def test_half_outputs_are_within_one_ulp(dtype, activation, backend):
    shape = (16, 8, 12, 12)
    x, residual = ((1 + 2 * rng(seed).standard_normal(shape)).astype(dtype) for seed in (4, 5))
    weight, bias = rng(6).uniform(0.5, 2, (2, 8)).astype(np.float32)
    activation = (activation, ROWS[activation].default.parameter)
    problem = make_problem(x, weight=weight, bias=bias, residual=residual, activation=activation)
    got = run(problem, backend)["y"].astype(np.float64)
    rounded = oracle(problem).y.astype(np.float64).astype(dtype).astype(np.float64)
    # Where z is nearly 0, the float32 rounding errors of its terms may exceed an ulp of the small result.
    floor = 2.0**-20 if activation[0] != "identity" else 0
    assert (np.abs(got - rounded) <= np.maximum(ulp(rounded, str(dtype)), floor)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", ["all", "alternating", "random"])
def test_the_largest_float16_do_not_overflow(shape, pattern, backend):
    signs = {"all": np.ones(shape), "alternating": np.resize([1, -1], shape)}
    signs = signs.get(pattern, rng(8).choice([-1.0, 0.25, 1.0], shape))
    problem = make_problem((65504 * signs).astype(np.float16))
    results = run(problem, backend)
    assert all(np.isfinite(array.astype(np.float64)).all() for array in results.values())
    assert check(problem, backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e18, 1e-20, 1e-30, 1e-38])
def test_float32_at_both_ends_of_its_range(shape, scale, backend):
    eps = 1e-5 if scale > 1 else scale**2 * 1e-3
    x = (scale * (1 + rng(9).standard_normal(shape))).astype(np.float32)
    mean, var = (np.zeros(shape[1], np.float64) for _ in range(2))
    weight = np.full(shape[1], 1e-10 if scale < 1e-20 else 1.0)  # keeps dx within the range of float32
    problem = make_problem(x, eps=eps, momentum=1.0, running_mean=mean, running_var=var, weight=weight)
    results = run(problem, backend)
    assert np.isfinite(results["dx"]).all()
    truth = oracle(problem)
    assert relative_error(results["running_var"], truth.running_var) <= 1e-5
    assert relative_error(results["y"], truth.y) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e150, 1e200, 1e300])
def test_float64_whose_squares_overflow_gives_no_plausible_wrong_number(shape, scale, backend):
    problem = make_problem(scale * (1 + rng(9).standard_normal(shape)))
    y, truth = run(problem, backend)["y"], oracle(problem).y
    assert (np.isnan(y) | (np.abs(y - truth) < 1e-9)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_that_differ_from_channel_to_channel(shape, backend):
    scales = np.resize([1e18, 1.0, 1e-20, 1e4], shape[1]).astype(np.float32)
    column = scales.reshape(1, -1, *(1,) * (len(shape) - 2))
    offset = np.where(column == 1e4, 1e4, 0)
    x = np.where(column == 1e4, offset + rng(10).standard_normal(shape), column * rng(10).standard_normal(shape))
    assert check(make_problem(x.astype(np.float32), eps=1e-12), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_channel(shape, dtype, bad, backend):
    x = (rng(11).standard_normal(shape) + np.arange(shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))).astype(dtype)
    running_mean, running_var = running_pair(shape[1])
    weight, bias = rng(12).standard_normal((2, shape[1])).astype(np.float32)
    options = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    clean = run(make_problem(x, **options, activation=("relu", 0.0)), backend)
    spoilt = x.copy()
    spoilt[(1, 2) + (0,) * (len(shape) - 2)] = bad
    dirty = run(make_problem(spoilt, **options, activation=("relu", 0.0)), backend)
    others = np.arange(shape[1]) != 2
    for name, array in dirty.items():
        if array.ndim == 1:
            assert same_bits(array[others], clean[name][others]), name
        else:
            assert same_bits(array[:, others], clean[name][:, others]), name
            assert np.isnan(array[:, 2].astype(np.float64)).all(), name
    for name in ("rstd", "running_var", "dweight"):
        assert np.isnan(dirty[name][2]), name


def test_a_bad_value_beside_a_channel_of_zeros_stays_in_its_channel(backend):
    x = rng(11).normal(1, 2, (40, 12, 30)).astype(np.float32)
    x[:, 2] = 0
    clean = run(make_problem(x), backend)
    spoilt = x.copy()
    spoilt[0, 1, 0] = np.nan
    dirty = run(make_problem(spoilt), backend)
    others = np.arange(12) != 1
    assert same_bits(dirty["y"][:, others], clean["y"][:, others])
    assert same_bits(dirty["dx"][:, others], clean["dx"][:, others])


@pytest.mark.parametrize("numbers", [[1e200, 3e200, -2e200], [1e9, 1e9 + 1e-3, 1e9 + 4e-3]], ids=str)
def test_the_order_of_bytes_does_not_matter(numbers):
    x = np.array(numbers)[:, None]
    assert np.array_equal(*(gpu_bn.batch_norm(x.astype(dtype), training=True) for dtype in ("<f8", ">f8")), True)


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.one_in(2)
def test_nan_passes_through_every_activation(name, backend):
    x = rng(13).standard_normal((40, 3)).astype(np.float32)
    x[5, 1] = np.nan
    activation = (name, ROWS[name].default.parameter)
    running = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32), "training": False}
    results = run(make_problem(x, activation=activation, **running), backend)
    assert np.array_equal(np.isnan(results["y"]), np.isnan(x))
    smooth = name not in ("identity", "relu", "relu6", "leaky_relu")
    assert np.isnan(results["dx"][5, 1]) or not smooth


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_residual_spoils_its_element_alone(bad, backend):
    x = rng(14).standard_normal((40, 3)).astype(np.float32)
    residual = np.zeros_like(x)
    clean = run(make_problem(x, residual=residual, activation=("relu", 0.0)), backend)["y"]
    residual[3, 2] = bad
    y = run(make_problem(x, residual=residual, activation=("relu", 0.0)), backend)["y"]
    assert np.isnan(y[3, 2]) if np.isnan(bad) else np.isposinf(y[3, 2])
    y[3, 2] = clean[3, 2]
    assert same_bits(y, clean)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1e4 / 3, -1e18, 6e-5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_constant_channels_give_the_bias(shape, value, dtype, backend):
    bias = np.linspace(-2, 2, shape[1]).astype(dtype)
    x = np.full(shape, value, dtype)
    results = run(make_problem(x, bias=bias, eps=1e-5), backend)
    expected = np.broadcast_to(bias.reshape(1, -1, *(1,) * (len(shape) - 2)), shape)
    mean_to_one_rounding = 2.0**-52 * abs(value) / 1e-5**0.5
    assert np.allclose(results["y"], expected, rtol=1e-7, atol=mean_to_one_rounding)
    assert np.allclose(variance(results, 1e-5).astype(float), 0, atol=1e-12)
    assert np.isfinite(results["dx"]).all()


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_zero_weights(activation, backend):
    x = rng(15).standard_normal((30, 4, 5)).astype(np.float32)
    weight, bias = np.array([0, 1, 0, -0.0], np.float32), np.array([1, 0, 0, -1], np.float32)
    problem = make_problem(x, weight=weight, bias=bias, activation=(activation, 0.0))
    assert check(problem, backend)
    assert not run(problem, backend)["dx"][:, [0, 2, 3]].any()


@pytest.mark.parametrize("shape", [(2, 5), (1, 5, 2), (2, 5, 1, 1), (1, 9000, 2), (2, 9000, 1)], ids=str)
def test_two_values_a_channel(shape, backend):
    x = rng(16).standard_normal(shape).astype(np.float32)
    y = run(make_problem(x), backend)["y"]
    assert np.allclose(y.sum(axis=(0, *range(2, len(shape)))), 0, atol=1e-6)
    assert check(make_problem(x), backend)


def test_the_variance_is_never_negative(backend):
    for seed in range(20):
        x = (rng(seed).uniform(-1e4, 1e4, (1, 40)) + 1e-3 * rng(seed).standard_normal((300, 40))).astype(np.float32)
        results = run(make_problem(x, eps=1e-30), backend)
        assert np.isfinite(results["rstd"]).all()
        assert (variance(results, 1e-30) >= 0).all()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.one_in(5)
def test_backward_recomputes_the_sign_that_forward_took(activation, residual, shape, mean, backend):
    """Backward takes the same side of the kink as forward, where z differs from the kink by a rounding error."""
    x = (mean + rng(17).integers(-2, 3, shape)).astype(np.float32)
    plain = oracle(make_problem(x))
    level = rng(18).integers(-2, 3, shape[1])
    bias = -(((mean + level) - plain.mean) * plain.rstd).astype(np.float32)
    near = np.abs(plain.z + wide(bias).reshape(1, -1, *(1,) * (len(shape) - 2))) < 1e-5
    assert near.mean() > 0.05
    zeros = np.zeros_like(x) if residual else None
    problem = make_problem(x, dy=np.ones_like(x), bias=bias, residual=zeros, activation=(activation, 0.0))
    results = run(problem, backend)
    if residual:
        assert np.array_equal(results["y"] > 0, results["dresidual"] > 0)
    axes = (0, *range(2, len(shape)))
    assert np.array_equal(results["dbias"], ((results["y"] > 0) & (results["y"] < 6)).sum(axis=axes))
