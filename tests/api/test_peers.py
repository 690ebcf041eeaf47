"""Defects found in other implementations, a test for each. Other files test SyncBatchNorm, DDP and converters."""

import numpy as np
import pytest
from support import make_problem, relative_error, rng, running_pair, same_bits

import gpu_bn
from gpu_bn.testing import check, oracle, run


@pytest.mark.parametrize("shape", [(2049, 3, 7), (2050, 4), (4100, 2, 3, 3), (2500, 5, 33)], ids=str)
def test_welford_lane_count_when_no_block_divides_the_spatial_size(shape, backend):
    x = rng().standard_normal(shape).astype(np.float32)
    running_mean, running_var = running_pair(shape[1])
    assert check(make_problem(x, running_mean=running_mean, running_var=running_var), backend)


@pytest.mark.parametrize("shape", [(64, 7), (40, 8, 9, 9)], ids=str)
def test_variance_at_mean_10000_is_neither_negative_nor_cancelled(shape, backend):
    x = (1e4 + rng().standard_normal(shape)).astype(np.float32)
    problem = make_problem(x)
    results = run(problem, backend)
    assert np.isfinite(results["y"]).all()
    assert relative_error(1 / results["rstd"] ** 2 - 1e-5, oracle(problem).var) < 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (16, 8, 12, 12)], ids=str)
def test_training_without_running_statistics_leaves_the_input_alone(shape, backend):
    x = rng().standard_normal(shape).astype(np.float32)
    before = x.copy()
    results = run(make_problem(x, weight=np.ones(shape[1], np.float32)), backend)
    assert same_bits(x, before)
    assert "running_mean" not in results


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (12, 8, 10, 11)], ids=str)
def test_backward_of_channels_last_x_with_channels_first_dy(activation, shape, backend):
    dy, values = rng().standard_normal((2, *shape)).astype(np.float32)
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
    mixed = run(make_problem(x, dy=dy, activation=(activation, 0.0)), backend)
    assert check(make_problem(x, dy=dy, activation=(activation, 0.0)), backend)
    plain = run(make_problem(values, dy=dy, activation=(activation, 0.0)), backend)
    assert relative_error(mixed["dx"], plain["dx"]) < 1e-6


def test_saved_rstd_is_not_taken_for_a_variance(backend):
    x = (5 * rng().standard_normal((50, 3))).astype(np.float32)
    running_mean, running_var = np.zeros(3, np.float32), np.full(3, 25.0, np.float32)
    for training in (True, False):
        problem = make_problem(x, running_mean=running_mean, running_var=running_var, training=training)
        results = run(problem, backend)
        assert np.allclose(results["rstd"], 0.2, rtol=0.3)
        assert relative_error(results["dx"], oracle(problem).dx) < 1e-5
        assert np.allclose(results["y"].std(axis=0), 1, rtol=0.3)


def test_two_forwards_before_one_backward():
    layer = gpu_bn.BatchNorm(3)
    first, second, dy = rng().standard_normal((3, 8, 3)).astype(np.float32)
    alone = gpu_bn.BatchNorm(3)
    alone(first)
    expected = alone.backward(dy)
    _, saved = layer.forward_saving(first)
    layer.forward_saving(second)
    layer.weight *= 5
    layer.running_var += 1
    assert same_bits(layer.backward(dy, saved), expected)


def test_frozen_backward_does_not_read_running_statistics_changed_since():
    layer = gpu_bn.BatchNorm(3).eval()
    x, dy = rng().standard_normal((2, 8, 3)).astype(np.float32)
    expected = layer.backward(dy, layer.forward_saving(x)[1])
    _, saved = layer.forward_saving(x)
    layer.train()
    layer.running_var *= 9
    layer.weight[...] = 0
    assert same_bits(layer.backward(dy, saved), expected)


def test_backward_does_not_update_the_statistics_again():
    layer = gpu_bn.BatchNorm(3)
    x, dy = rng().standard_normal((2, 8, 3)).astype(np.float32)
    _, saved = layer.forward_saving(x)
    state = layer.state_dict()
    layer.backward(dy, saved)
    layer.backward(dy, saved)
    assert same_bits(layer.state_dict(), state)


@pytest.mark.parametrize("shape", [(1, 13, 150, 151), (2, 7, 131, 127), (1, 1000, 33, 3)], ids=str)
def test_channels_not_a_power_of_two_with_a_large_image(shape, backend):
    x = rng().standard_normal(shape).astype(np.float32)
    assert check(make_problem(x, activation=("relu", 0.0)), backend)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_a_channel_is_refused_and_running_var_is_not_nan(shape):
    running_mean, running_var = running_pair(3)
    before = running_var.copy()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        gpu_bn.batch_norm(np.ones(shape, np.float32), running_mean, running_var, training=True)
    assert same_bits(running_var, before)


def test_a_batch_of_many_rows_counts_exactly(backend):
    """Counts are exact for batches of more than 2048 rows; a count in half precision would stop at 2048."""
    x = np.zeros((5000, 2), np.float16)
    x[:2500] = 2
    running = {"running_mean": np.zeros(2, np.float32), "running_var": np.zeros(2, np.float32)}
    results = run(make_problem(x, momentum=1.0, **running), backend)
    assert np.allclose(results["running_mean"], 1, rtol=1e-6)
    assert np.allclose(results["running_var"], 5000 / 4999, rtol=1e-6)


def test_a_layer_keeps_its_fused_activation():
    x = rng().standard_normal((8, 3)).astype(np.float32)
    fused, plain = gpu_bn.BatchNorm(3, activation=gpu_bn.leaky_relu(0.25)), gpu_bn.BatchNorm(3)
    fused.load_state_dict(plain.state_dict())
    y = plain(x)
    assert np.array_equal(fused(x), np.where(y > 0, y, np.float32(0.25) * y))
