"""Merging statistics of parts: exact, empty-safe, and the same in every array library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import relative_error, rng, same_bits

from gpu_bn.merge import Pool, merge


def pool(x):
    """Return the statistics of data of shape (n, C)."""
    if not len(x):
        return Pool(np.zeros(1), np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    mean = x.mean(0)
    return Pool(np.array([float(len(x))]), mean, ((x - mean) ** 2).sum(0))


def stacked(pools):
    return Pool(*(np.stack(arrays) for arrays in zip(*pools, strict=True)))


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9), offset=st.sampled_from([0.0, 1e4, -1e6]))
def test_parts_merge_to_the_whole(sizes, offset):
    x = rng(sum(sizes)).standard_normal((sum(sizes), 3)) + offset
    merged = merge(stacked([pool(part) for part in np.split(x, np.cumsum(sizes)[:-1])]))
    assert merged.count == sum(sizes)
    if sum(sizes):
        assert relative_error(merged.mean, x.astype(np.longdouble).mean(0)) < 1e-14
        assert np.abs(merged.var - x.astype(np.longdouble).var(0)).max() < (1e-10 if offset else 1e-14)
    else:
        assert same_bits(np.stack(merged[1:]), np.zeros((2, 3)))


def test_nothing_cancels_and_counts_are_exact():
    far = Pool(np.full((2, 1), 2.0**52), np.array([[1e8], [1e8 + 2]]), np.zeros((2, 1)))
    merged = merge(far)
    assert merged.count == 2.0**53
    assert merged.mean == 1e8 + 1
    assert merged.var == 1
    assert merge(Pool(np.array([[2.0**24], [1.0]]), *np.zeros((2, 2, 1)))).count == 2**24 + 1


def test_an_empty_part_changes_no_bit():
    one = pool(rng().standard_normal((7, 4)))
    empty = pool(np.zeros((0, 4)))
    for parts in ([one], [one, empty], [empty, one], [empty, empty, one, empty]):
        merged = merge(stacked(parts))
        assert all(same_bits(a, b) for a, b in zip(merged, one, strict=True))


def test_variances_of_few_positions():
    merged = merge(stacked([pool(np.array([[3.0]])), pool(np.zeros((0, 1)))]))
    assert (merged.var, merged.unbiased) == (0, 0)
    pair = pool(np.array([[1.0], [3.0]]))
    assert (pair.var, pair.unbiased) == (1, 2)


def test_torch_gives_the_same():
    torch = pytest.importorskip("torch")
    parts = stacked([pool(rng(n).standard_normal((n, 5))) for n in (3, 0, 8, 1)])
    ours, theirs = merge(parts), merge(Pool(*map(torch.from_numpy, parts)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-15)
