"""Small tensors: what is exact there, and sums that are dot products or not."""

from fractions import Fraction

import numpy as np
import pytest
from support import rng

import gpu_bn
from gpu_bn.backends import _small
from gpu_bn.backends._layout import Layout

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")

COUNTS = [2, 7, 32, 1000, _small.LONG, _small.LONG + 1, _small.SMALL]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_statistics_of_neighbouring_numbers_are_exact(dtype, count):
    """The hardest there are: all values within three units in the last place of a large mean."""
    spacing = float(ml_dtypes.finfo(dtype).eps)
    values = (1.7 + spacing * rng(count).integers(0, 4, (count, 1))).astype(dtype)
    values[0] = values.min() + np.array(2 * spacing, dtype)  # not all are the same
    values[1] = values.min()
    moments = _small.stats(Layout.of(values, 1), values, None, count)
    exact = [Fraction(float(value)) for value in values[:, 0]]
    mean = sum(exact) / count
    var = sum((value - mean) ** 2 for value in exact) / count
    assert abs(Fraction(moments.mean[0]) - mean) <= Fraction(1, 2**52)
    assert abs(Fraction(moments.var[0]) - var) <= var * Fraction(1, 10**13)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_channel_of_equal_numbers_becomes_the_bias(dtype, count):
    x, bias = np.full((count, 1), 0.1, dtype), np.array([0.7])
    y, saved = gpu_bn.batch_norm_forward(x, bias=bias, training=True)
    assert (y == bias.astype(dtype)).all()
    assert saved.moments.mean == float(x[0, 0])
    assert gpu_bn.batch_norm_backward(np.ones_like(x), saved).dbias == count


@pytest.mark.parametrize("count", COUNTS)
def test_sums_of_any_length_agree_with_exact_ones(count):
    left, right = rng(1).standard_normal((2, 3, count))
    rows = list(zip(left, right, strict=True))
    products = [sum(Fraction(a) * Fraction(b) for a, b in zip(*pair, strict=True)) for pair in rows]
    for got, exact in (
        (_small._sum(left), [sum(map(Fraction, row)) for row in left]),
        (_small._sum_of_products(left, right), products),
    ):
        for mine, other in zip(got, exact, strict=True):
            assert abs(Fraction(mine) - other) <= Fraction(count, 2**52)
