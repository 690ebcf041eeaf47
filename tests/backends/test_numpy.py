"""The NumPy backend: exact statistics, any order of the axes in memory, and blocks that cover a tensor."""

from fractions import Fraction

import numpy as np
import pytest
from support import make_problem, rng

import gpu_bn
from gpu_bn.backends.layout import block_sizes
from gpu_bn.backends.numpy import Blocks
from gpu_bn.testing import check

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")

COUNTS = [2, 7, 32, 1000, 1025, 8192, 100_000]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


# ------------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_statistics_of_neighbouring_numbers_are_exact(dtype, count):
    """Statistics are exact if all values lie within three units in the last place of each other."""
    spacing = float(ml_dtypes.finfo(dtype).eps)
    values = (1.7 + spacing * rng(count).integers(0, 4, (count, 1))).astype(dtype)
    values[0] = values.min() + np.array(2 * spacing, dtype)  # at least two values differ
    values[1] = values.min()
    moments = gpu_bn.batch_norm_forward(values, training=True, backend="numpy")[1].moments
    exact = [Fraction(float(value)) for value in values[:, 0]]
    mean = sum(exact) / count
    var = sum((value - mean) ** 2 for value in exact) / count
    assert abs(Fraction(moments.mean[0]) - mean) <= Fraction(1, 2**51)
    assert abs(Fraction(moments.var[0]) - var) <= var * Fraction(1, 10**12)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_channel_of_equal_numbers_becomes_the_bias(dtype, count):
    x, bias = np.full((count, 1), 0.1, dtype), np.array([0.7])
    y, saved = gpu_bn.batch_norm_forward(x, bias=bias, training=True, backend="numpy")
    assert (y == bias.astype(dtype)).all()
    assert saved.moments.mean == float(x[0, 0])
    assert gpu_bn.batch_norm_backward(np.ones_like(x), saved, backend="numpy").dbias == count


@pytest.mark.parametrize("first", [0.0, 1e30, -1e-30])
def test_a_first_sample_unlike_the_others(first):
    x = (1e4 + rng().standard_normal((70_000, 2))).astype(np.float32)
    x[0] = first
    assert check(make_problem(x), "numpy")


# ------------------------------------------------------------------------------------------------- any memory order
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.one_in(5)
def test_ghost_batches_whose_samples_are_not_outermost_in_memory(order, dtype, activation):
    """Each ghost batch has more elements than a block, in several orders of the axes in memory."""
    shape = (4, 24, 1500)

    def tensor(seed):
        dense = rng(seed).standard_normal([shape[axis] for axis in order]).astype(dtype)
        return dense.transpose(np.argsort(order))

    x, dy, residual = map(tensor, range(3))
    problem = make_problem(x, dy=dy, residual=residual, activation=(activation, 0.0), virtual_batch_size=2)
    assert check(problem, "numpy")


@pytest.mark.parametrize("shape", [(1, 2, 3, 2**31 + 5), (1, 2**31 + 5, 3), (4, 2**16 + 1, 2**15), (1, 5, 2**30)])
@pytest.mark.parametrize("axis", [1, 2])
def test_blocks_of_more_than_2_to_the_31_elements(shape, axis):
    steps = block_sizes(shape, tuple(range(len(shape))), (0, axis), 1 << 15, 1 << 11)
    assert all(1 <= step <= size for step, size in zip(steps, shape, strict=True))
    assert 1 << 9 <= np.prod(steps) <= 1 << 15


@pytest.mark.parametrize("shape", [(6, 5, 700, 31), (4096, 33), (2, 3, 40_000), (64, 5000)])
def test_blocks_cover_a_tensor_once(shape):
    blocks = Blocks(np.zeros(shape, np.float32), 1, 2, None, 1)
    seen = np.zeros(blocks.shape, np.int8)
    for channels in blocks.parts(blocks.kept):
        for block in blocks.parts(blocks.summed, channels):
            seen[block] += 1
    assert (seen == 1).all()
