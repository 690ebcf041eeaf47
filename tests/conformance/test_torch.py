"""The public functions with torch tensors on the CPU: any strides, and no copies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_problem, rng
from support.views import random_views

import gpu_bn
from gpu_bn.testing import check

torch = pytest.importorskip("torch")


@given(data=st.data())
@settings(max_examples=60)
def test_random_strides(data):
    shape = (*data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)), data.draw(st.sampled_from([2, 3, 130])))
    axis = data.draw(st.integers(0, len(shape) - 2))
    x, dy, residual = (data.draw(random_views(shape, "float32")) for _ in range(3))
    problem = make_problem(x, dy=dy, residual=residual, activation=("relu", 0.0), channel_axis=axis)
    assert check(problem, "torch")


@given(data=st.data())
@settings(max_examples=60)
def test_strides_are_those_of_empty_like(data):
    """Outputs have the strides of ``torch.empty_like``, which fake implementations return, for any input strides."""
    shape = (*data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)), 6)
    x = torch.from_numpy(data.draw(random_views(shape, "float32")).copy("K"))
    repeated = data.draw(st.integers(0, x.ndim - 1))
    for tensor in (x, x.narrow(repeated, 0, 1).expand(x.shape), x.unfold(-1, 3, 1)[..., 0, :]):
        y, saved = gpu_bn.batch_norm_forward(tensor, training=True)
        grads = gpu_bn.batch_norm_backward(y, saved)
        expected = torch.empty_like(tensor).stride()
        assert y.stride() == expected
        assert grads.dx.stride() == expected


def test_an_input_whose_elements_overlap_is_normalised_right():
    windows = torch.from_numpy(rng().standard_normal((4, 3, 12))).unfold(-1, 5, 2)
    assert windows.stride()[-2:] == (2, 1)
    for x in (windows, windows.transpose(-1, -2), windows[:, :, :1].expand(4, 3, 6, 5)):
        y, saved = gpu_bn.batch_norm_forward(x, training=True)
        expected = gpu_bn.batch_norm_forward(x.numpy().copy(), training=True)
        assert np.allclose(y, expected[0], rtol=1e-12, atol=1e-12)
        dx = gpu_bn.batch_norm_backward(y.cos(), saved).dx
        assert np.allclose(dx, gpu_bn.batch_norm_backward(np.cos(y.numpy()), expected[1]).dx, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [5, 60])
def test_nothing_is_copied(size, monkeypatch):
    """The NumPy backend reads and writes the memory of the tensors."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 on NumPy needs the package ml_dtypes")
    from gpu_bn.backends import torch_cpu

    seen = []
    normalize = torch_cpu.NUMPY.normalize
    monkeypatch.setattr(
        torch_cpu.NUMPY,
        "normalize",
        lambda saved, residual, out: seen.append((saved.x, out)) or normalize(saved, residual, out),
    )
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(4, 3, size, size).to(dtype, memory_format=torch.channels_last)
        y = gpu_bn.batch_norm(x, training=True, backend="numpy")
        ((read, written),) = seen
        assert (read.ctypes.data, written.ctypes.data) == (x.data_ptr(), y.data_ptr())
        seen.clear()


def test_without_ml_dtypes_only_bfloat16_is_refused(monkeypatch):
    from gpu_bn.backends import torch_cpu

    torch_cpu._bfloat16.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    assert gpu_bn.batch_norm(torch.randn(4, 3), training=True, backend="numpy").shape == (4, 3)
    with pytest.raises(ImportError, match="bfloat16 tensors on the CPU need the package ml_dtypes"):
        gpu_bn.batch_norm(torch.randn(4, 3).bfloat16(), training=True, backend="numpy")


def test_squares_beyond_float32_are_right_in_the_backward_pass_too():
    values, dy = (1e20 * rng().standard_normal((12, 8, 10, 11))).astype(np.float32), rng(1).random((12, 8, 10, 11), "f")
    x = torch.from_numpy(values).requires_grad_()
    y = gpu_bn.batch_norm(x, training=True, activation="relu")
    y.backward(torch.from_numpy(dy))
    plain, saved = gpu_bn.batch_norm_forward(values, training=True, activation="relu")
    assert np.array_equal(plain, y.detach().numpy())
    assert np.array_equal(gpu_bn.batch_norm_backward(dy, saved).dx, x.grad.numpy())
