"""Empty tensors: empty results, zero gradients of the parameters, statistics untouched."""

import numpy as np
import pytest
from support import running_pair, same_bits

import gpu_bn

SHAPES = [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 4, 0), (0, 3, 0, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_empty_batch(shape, training, activation, dtype):
    x = np.zeros(shape, dtype)
    running, weight = running_pair(3), np.ones(3, np.float16)
    y, saved = gpu_bn.batch_norm_forward(
        x, *running, weight, np.ones(3, np.float64), training, residual=x, activation=activation
    )
    assert y.shape == shape
    assert y.dtype == dtype
    assert same_bits(running[0], running_pair(3)[0])
    assert same_bits(running[1], running_pair(3)[1])
    grads = gpu_bn.batch_norm_backward(np.zeros(shape, dtype), saved)
    assert grads.dweight.dtype == np.float16
    assert grads.dbias.dtype == np.float64
    assert np.array_equal(grads.dweight, np.zeros(3))
    assert np.array_equal(grads.dbias, np.zeros(3))
    assert grads.dx.shape == grads.dresidual.shape == shape
    assert grads.dx.dtype == dtype


def test_gradients_are_zero_even_if_the_running_statistics_are_not_finite():
    running_mean, running_var = np.array([np.nan, np.inf, 1]), np.ones(3)
    x, ones = np.zeros((0, 3)), np.ones(3)
    _, saved = gpu_bn.batch_norm_forward(x, running_mean, running_var, ones, ones)
    grads = gpu_bn.batch_norm_backward(x, saved)
    assert np.array_equal(grads.dweight, np.zeros(3))
    assert np.array_equal(grads.dbias, np.zeros(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_running_statistics(shape):
    y, saved = gpu_bn.batch_norm_forward(np.zeros(shape), training=True)
    assert y.shape == shape
    assert gpu_bn.batch_norm_backward(np.zeros(shape), saved).dx.shape == shape


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 5, 5), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_no_channels(shape, training):
    none = np.zeros(0, np.float32)
    y, saved = gpu_bn.batch_norm_forward(np.zeros(shape, np.float32), none, none.copy(), none, none, training)
    grads = gpu_bn.batch_norm_backward(np.zeros(shape, np.float32), saved)
    assert y.shape == grads.dx.shape == shape
    assert grads.dweight.shape == grads.dbias.shape == (0,)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layer_counts_an_empty_batch(shape):
    layer = gpu_bn.BatchNorm(3)
    layer(np.zeros(shape, np.float32))
    assert layer.num_batches_tracked == 1
    assert not layer.running_mean.any()
    assert layer.backward(np.zeros(shape, np.float32)).shape == shape
    assert not layer.grad["weight"].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_torch(shape):
    torch = pytest.importorskip("torch")
    reference = torch.nn.functional.batch_norm(torch.zeros(shape), torch.zeros(3), torch.ones(3), training=True)
    assert gpu_bn.batch_norm(np.zeros(shape, np.float32), *running_pair(3), training=True).shape == tuple(
        reference.shape
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_empty_batch_has_no_identity_pair(shape):
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        gpu_bn.identity_affine(np.zeros(shape))
