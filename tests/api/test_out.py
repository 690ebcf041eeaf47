"""``out=``: equal to an input, overlapping one, or of any strides; and running statistics of any strides."""

import numpy as np
import pytest
from support import rng, running_pair, same_bits

import gpu_bn
from gpu_bn.testing.cases import LAYOUTS, arrange

SHAPES = [(4, 6, 5, 7), (12, 8, 10, 11), (300, 41)]
WRITABLE = [layout for layout in LAYOUTS if layout not in ("broadcast", "overlapping", "read_only")]


def data(shape, dtype=np.float32):
    return rng(shape[0]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_out_of_any_strides_gets_the_result(shape, layout, dtype, activation):
    x = data(shape, dtype)
    expected = gpu_bn.batch_norm(x, training=True, activation=activation)
    out = arrange(np.full(shape, np.nan, dtype), layout, 1)
    assert gpu_bn.batch_norm(x, training=True, activation=activation, out=out) is out
    assert same_bits(np.ascontiguousarray(out), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("target", ["x", "residual", "both"])
@pytest.mark.parametrize("mean", [0, 50])
def test_out_may_be_the_input_or_the_residual_itself(shape, layout, mode, target, mean):
    running_mean, running_var = running_pair(shape[1])
    options = {"running_mean": running_mean, "running_var": running_var, "training": mode == "train", "momentum": 0.0}
    x, residual = arrange(mean + data(shape), layout, 1), arrange(data(shape[::-1]).reshape(shape), layout, 1)
    residual = x if target == "both" else residual
    expected = gpu_bn.batch_norm(x, residual=residual, activation="silu", **options)
    out = residual if target == "residual" else x
    y = gpu_bn.batch_norm(x, residual=residual, activation="silu", **options, out=out)
    assert y is out
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "negative_stride"])
def test_out_may_be_another_view_of_exactly_the_input(layout):
    x = arrange(data((12, 8, 10, 11)), layout, 1)
    expected = gpu_bn.batch_norm(x, training=True)
    assert np.array_equal(gpu_bn.batch_norm(x, training=True, out=x[:]), expected)


@pytest.mark.parametrize("target", ["input", "residual"])
def test_out_that_overlaps_is_refused_and_unchanged(target):
    base = data((5, 3))
    before = base.copy()
    overlapped, out = base[:4], base[1:]
    arguments = {"x": overlapped} if target == "input" else {"x": data((4, 3)), "residual": overlapped}
    running_mean, running_var = running_pair(3)
    with pytest.raises(ValueError, match=f"out should be the {target} itself or share no memory with it"):
        gpu_bn.batch_norm(**arguments, running_mean=running_mean, running_var=running_var, training=True, out=out)
    assert same_bits(base, before)
    assert same_bits(running_mean, running_pair(3)[0])


def test_out_that_is_the_input_reversed_is_refused():
    x = data((4, 3))
    with pytest.raises(ValueError, match="share no memory"):
        gpu_bn.batch_norm(x, training=True, out=x[::-1])


def test_out_beside_the_input_in_one_buffer_is_fine():
    base = data((8, 3))
    expected = gpu_bn.batch_norm(base[:4], training=True)
    assert same_bits(gpu_bn.batch_norm(base[:4], training=True, out=base[4:]), expected)


def test_out_shares_memory_with_a_parameter():
    base = data((9000, 4))
    with pytest.raises(ValueError, match="out is written to, so it may not share memory with weight"):
        gpu_bn.batch_norm(data((8999, 4)), weight=base[1], training=True, out=base[1:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_statistics_of_any_strides_are_updated_in_place(shape):
    channels = shape[1]
    plain = running_pair(channels)
    gpu_bn.batch_norm(data(shape), *plain, training=True)
    for stride in (-1, 3, -2):
        odd = []
        for start in running_pair(channels):
            base = np.full(3 * channels, np.nan, np.float32)
            view = base[::stride][:channels]
            view[...] = start
            odd.append((base, view))
        gpu_bn.batch_norm(data(shape), *(view for _, view in odd), training=True)
        for (base, view), expected in zip(odd, plain, strict=True):
            assert np.array_equal(view, expected)
            assert np.isnan(base).sum() == 2 * channels


def test_running_statistics_in_one_buffer():
    plain = running_pair(6)
    gpu_bn.batch_norm(data((4, 6)), *plain, training=True)
    rows = np.stack(running_pair(6), axis=1)
    gpu_bn.batch_norm(data((4, 6)), rows[:, 0], rows[:, 1], training=True)
    assert np.array_equal(rows, np.stack(plain, axis=1))


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=lambda dtype: dtype.__name__)
def test_running_statistics_keep_their_dtype(dtype):
    running = running_pair(6, dtype)
    gpu_bn.batch_norm(data((40, 6)), *running, training=True, momentum=1.0)
    assert running[0].dtype == dtype
    assert np.allclose(running[0], data((40, 6)).mean(axis=0), atol=2e-3)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:], lambda x: x[::-1]], ids=["itself", "same", "reversed"])
def test_a_forward_for_backward_keeps_its_input(view):
    x = rng().standard_normal((300, 41)).astype(np.float32)
    before = x.copy()
    with pytest.raises(ValueError, match="the backward call reads it"):
        gpu_bn.batch_norm_forward(x, training=True, out=view(x))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("call", [gpu_bn.batch_norm, gpu_bn.batch_norm_forward])
def test_autograd_notices_what_is_written(call):
    torch = pytest.importorskip("torch")
    factor, x = torch.ones(4, 3, requires_grad=True), torch.from_numpy(data((4, 3)))
    for written in ("out", "running_mean", "running_var"):
        tensors = {"out": torch.ones(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        z = (factor * tensors[written]).sum()
        call(x, training=False, **(tensors | {"out": None}))
        assert [tensor._version for tensor in tensors.values()] == [0, 0, 0]
        call(x, training=True, **tensors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()
