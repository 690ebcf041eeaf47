"""Inputs of every layout: the memory format of results, special kinds of NumPy arrays, and untouched memory."""

import numpy as np
import pytest
from support import make_problem, rng, same_bits

import gpu_bn
from gpu_bn.testing import check
from gpu_bn.testing.cases import LAYOUTS, arrange

SHAPES = [(4, 6, 5, 7), (12, 8, 10, 11)]


def data(shape, dtype=np.float32, seed=0):
    return rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_every_layout_gives_the_same_numbers(shape, layout, activation):
    x, dy, residual = (arrange(data(shape, seed=seed), layout, 1) for seed in range(3))
    options = {"training": True, "activation": activation}
    y, saved = gpu_bn.batch_norm_forward(x, residual=residual, **options)
    grads = gpu_bn.batch_norm_backward(dy, saved)
    plain = [np.ascontiguousarray(array) for array in (x, dy, residual)]
    expected_y, saved = gpu_bn.batch_norm_forward(plain[0], residual=plain[2], **options)
    expected = gpu_bn.batch_norm_backward(plain[1], saved)
    for got, want in ((y, expected_y), (grads.dx, expected.dx), (grads.dresidual, expected.dresidual)):
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dy_layout", ["channels_last", "contiguous"])
def test_channels_last_stays_channels_last(shape, activation, dy_layout):
    x = arrange(data(shape), "channels_last", 1)
    dy = arrange(data(shape, seed=1), dy_layout, 1)
    y, saved = gpu_bn.batch_norm_forward(x, residual=dy, training=True, activation=activation)
    grads = gpu_bn.batch_norm_backward(dy, saved)
    for array in (y, grads.dx, grads.dresidual):
        assert np.moveaxis(array, 1, -1).flags.c_contiguous


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_contiguous_stays_contiguous(shape, activation):
    x, dy = data(shape), arrange(data(shape, seed=1), "channels_last", 1)
    y, saved = gpu_bn.batch_norm_forward(x, residual=dy, training=True, activation=activation)
    grads = gpu_bn.batch_norm_backward(dy, saved)
    assert all(array.flags.c_contiguous for array in (y, grads.dx, grads.dresidual))


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_gradients_share_no_memory_with_what_was_given(activation):
    x, dy, residual = (data((4, 3), seed=seed) for seed in range(3))
    y, saved = gpu_bn.batch_norm_forward(x, residual=residual, training=True, activation=activation)
    grads = gpu_bn.batch_norm_backward(dy, saved)
    arrays = [x, dy, residual, y, grads.dx, grads.dresidual]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_mapped_input_and_output(shape, tmp_path):
    values = data(shape)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    x[...] = values
    x.flush()
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=shape)
    out = np.memmap(tmp_path / "y", np.float32, "w+", shape=shape)
    expected = gpu_bn.batch_norm(values, training=True, activation="relu")
    assert np.array_equal(gpu_bn.batch_norm(x, training=True, activation="relu"), expected)
    gpu_bn.batch_norm(x, training=True, activation="relu", out=out)
    out.flush()
    assert np.array_equal(np.fromfile(tmp_path / "y", np.float32).reshape(shape), expected)


def test_a_subclass_of_ndarray_is_an_array():
    class Tagged(np.ndarray):
        pass

    x = data((4, 3))
    assert np.array_equal(gpu_bn.batch_norm(x.view(Tagged), training=True), gpu_bn.batch_norm(x, training=True))


def test_a_matrix_is_normalised_as_an_array_or_refused():
    x = data((6, 3))
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(x)
    try:
        y = gpu_bn.batch_norm(matrix, training=True)
    except TypeError as error:
        assert "should be an array" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert np.allclose(y, gpu_bn.batch_norm(x, training=True))


@pytest.mark.parametrize("layout", ["sliced", "sliced_channels", "negative_stride"])
def test_memory_between_the_elements_is_not_touched(layout):
    out = arrange(np.zeros((12, 8, 10, 11), np.float32), layout, 1)
    base = out
    while base.base is not None:
        base = base.base
    base[...] = 7
    gpu_bn.batch_norm(data(out.shape), training=True, out=out)
    untouched = int((base == 7).sum())
    assert untouched >= base.size - out.size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.one_in(5)
def test_the_other_byte_order(shape, dtype, activation):
    native = np.dtype(dtype).newbyteorder("=")
    x, dy, residual = (data(shape, native, seed) for seed in range(3))
    weight, running_mean, running_var = rng(5).uniform(1, 2, (3, shape[1]))
    arguments = x, running_mean, running_var, weight, None, True
    y, saved = gpu_bn.batch_norm_forward(*arguments, residual=residual, activation=activation)
    expected = gpu_bn.batch_norm_backward(dy, saved)
    arguments = x.astype(dtype), running_mean.astype(">f8"), running_var.astype(">f8"), weight.astype(">f8"), None, True
    swapped_y, saved = gpu_bn.batch_norm_forward(*arguments, residual=residual.astype(dtype), activation=activation)
    grads = gpu_bn.batch_norm_backward(dy.astype(dtype), saved)
    assert swapped_y.dtype == grads.dx.dtype == np.dtype(dtype)
    for got, want in ((swapped_y, y), *zip(grads, expected, strict=True)):
        assert (got is None and want is None) or np.allclose(
            got, want, rtol=2e-3 if native == np.float16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_misaligned_input(offset, shape):
    raw = np.zeros(4 * int(np.prod(shape)) + 4, np.uint8)[offset : offset + 4 * int(np.prod(shape))]
    x = raw.view(np.float32).reshape(shape)
    x[...] = data(shape)
    assert same_bits(gpu_bn.batch_norm(x, training=True), gpu_bn.batch_norm(data(shape), training=True))


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 1, 1, 40), (40, 1), (1, 3, 40, 1), (3, 1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes_of_size_one(shape, layout):
    training = np.prod(shape) > shape[1]
    running = {} if training else {"running_mean": data(shape[1]), "running_var": np.ones(shape[1])}
    x = arrange(data(shape), layout, 1)
    assert check(make_problem(x, training=training, activation=("relu", 0.0), **running))
