"""With weight = sqrt(var + eps) and bias = mean the transform is the identity, to a few units in the last place."""

import numpy as np
import pytest
from support import make_problem, read_only, rng

import gpu_bn
from gpu_bn.testing import oracle

SHAPES = [(64, 5), (8, 4, 6, 6), (12, 8, 10, 11), (3, 5, 2100), (700, 33)]


def ulps(got, x):
    """Return the largest error, in units in the last place of the largest number of the channel."""
    axes = (0, *range(2, x.ndim))
    largest = np.abs(x).max(axis=axes, keepdims=True)
    return float((np.abs(got.astype(np.longdouble) - x) / np.spacing(largest)).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1, 2), (-30, 0.1), (1e4, 1), (1e-8, 1e-8)])
@pytest.mark.parametrize("training", [True, False])
def test_identity(shape, dtype, mean, std, training):
    x = (mean + std * rng().standard_normal(shape)).astype(dtype)
    weight, bias = gpu_bn.identity_affine(x)
    assert weight.dtype == bias.dtype == dtype
    running = (
        (bias.copy(), (weight.astype(np.float64) ** 2 - 1e-5).astype(np.float64)) if not training else (None, None)
    )
    if not training and (running[1] < 0).any():
        running = (bias.copy(), np.maximum(running[1], 0))
    y = gpu_bn.batch_norm(x, *running, weight, bias, training)
    assert ulps(y, x) <= 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_a_layer_becomes_the_identity_in_both_modes(shape, dtype):
    x = (3 + 2 * rng(1).standard_normal(shape)).astype(dtype)
    layer = gpu_bn.BatchNorm(shape[1], dtype=dtype)
    assert layer.init_identity_(x) is layer
    assert ulps(layer.eval()(x), x) <= 4
    assert ulps(layer.train()(x), x) <= 4
    assert layer.num_batches_tracked == 1


def test_the_pair_is_the_standard_deviation_and_the_mean():
    x = rng(2).standard_normal((50, 3))
    weight, bias = gpu_bn.identity_affine(x, eps=0.25)
    truth = oracle(make_problem(x))
    assert np.allclose(weight, np.sqrt(truth.var.astype(float) + 0.25), rtol=1e-14)
    assert np.allclose(bias, truth.mean.astype(float), rtol=1e-12)


def test_half_input_gives_a_float32_pair():
    weight, bias = gpu_bn.identity_affine(rng(3).standard_normal((50, 3)).astype(np.float16))
    assert weight.dtype == bias.dtype == np.float32


def test_channels_along_another_axis():
    x = rng(4).standard_normal((6, 7, 5))
    for got, expected in zip(
        gpu_bn.identity_affine(x, channel_axis=-1), gpu_bn.identity_affine(np.moveaxis(x, -1, 1)), strict=True
    ):
        assert np.allclose(got, expected, rtol=1e-14)


def test_weight_one_and_bias_zero_is_standardisation():
    y = gpu_bn.batch_norm(5 + 3 * rng(5).standard_normal((400, 3)), training=True, eps=1e-12)
    assert np.allclose(y.mean(axis=0), 0, atol=1e-12)
    assert np.allclose(y.var(axis=0), 1, atol=1e-10)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_a_layer_without_the_pair_is_refused(options):
    layer = gpu_bn.BatchNorm(3, **options)
    with pytest.raises(ValueError, match="an identity needs weight and bias, got BatchNorm"):
        layer.init_identity_(np.ones((4, 3)))


@pytest.mark.parametrize("x", [np.ones((4, 5)), np.ones((1, 3)), np.ones((0, 3))], ids=["channels", "one", "empty"])
def test_a_refused_batch_changes_nothing(x):
    layer = gpu_bn.BatchNorm(3)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"should contain 5 elements|more than 1 value per channel"):
        layer.init_identity_(x)
    assert all(np.array_equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("shared", [False, True], ids=["read-only", "shared"])
@pytest.mark.parametrize("name", ["bias", "running_mean", "running_var"])
def test_a_layer_that_may_not_be_written_stays_as_it_is(name, shared):
    layer = gpu_bn.BatchNorm(3)
    setattr(layer, name, layer.weight if shared else read_only(getattr(layer, name)))
    before = layer.state_dict()
    with pytest.raises(
        ValueError, match=f"weight is .* share memory with {name}" if shared else f"{name} is .* read-only"
    ):
        layer.init_identity_(rng(6).standard_normal((8, 3)))
    assert all(np.array_equal(value, before[name]) for name, value in layer.state_dict().items())


def test_numbers_that_float16_cannot_hold_change_all_or_nothing():
    layer, x = gpu_bn.BatchNorm(3, dtype=np.float16), 1e6 * rng(7).standard_normal((8, 3))
    before = layer.state_dict()
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        layer.init_identity_(x)
    assert all(np.array_equal(value, before[name]) for name, value in layer.state_dict().items())


def test_no_array_is_refused_as_in_a_call():
    with pytest.raises(TypeError, match=r"input should be an array .*, got builtins.list"):
        gpu_bn.BatchNorm(3).init_identity_([[1.0, 2.0, 3.0]])


def test_eps_zero_is_refused_as_in_training():
    with pytest.raises(ValueError, match="eps must be positive"):
        gpu_bn.identity_affine(np.ones((4, 3)), eps=0.0)
