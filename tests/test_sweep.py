"""How tensors are cut: every element in one tile, every partial sum in one place, for any shape."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bn.backends._sweep import sweep

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([95, 96, 97, 511, 512, 513, 1024, 1031, 2049, 5000]))


@given(n=SIZES, c=SIZES, s=SIZES, itemsize=st.sampled_from([4, 8]), sums=st.booleans(), temporaries=st.integers(0, 5))
def test_tiles_cover_the_tensor_once(n, c, s, itemsize, sums, temporaries):
    plan = sweep(n, c, s, itemsize, sums=sums, temporaries=temporaries)
    volume = 0
    for tile in plan.tiles:
        sizes = [part.stop - part.start for part in tile.box]
        assert all(size > 0 for size in sizes)
        assert all(part.stop <= size for part, size in zip(tile.box, (n, c, s), strict=True))
        assert math.prod(sizes) == math.prod(tile.shape)
        volume += math.prod(sizes)
    assert volume == n * c * s
    starts = {tuple(part.start for part in tile.box) for tile in plan.tiles}
    assert len(starts) == len(plan.tiles)


@given(n=SIZES, c=SIZES, s=SIZES)
def test_sums_of_small_integers_are_exact(n, c, s):
    if n * c * s > 300_000:
        n = max(1, 300_000 // (c * s))
    plan = sweep(n, c, s, 8, sums=True, temporaries=0)
    x = (np.arange(n * c * s) % 7).astype(float).reshape(n, c, s)
    sums, squares = plan.partials(np.float64), plan.partials(np.float64)
    for tile in plan.tiles:
        piece = np.ascontiguousarray(x[tile.box]).reshape(tile.shape)
        plan.add(sums, tile, piece)
        plan.add(squares, tile, piece, piece)
    assert np.array_equal(plan.total(sums), x.sum(axis=(0, 2)))
    assert np.array_equal(plan.total(squares), (x * x).sum(axis=(0, 2)))


@pytest.mark.parametrize("shape", [(2, 3, 2**31 + 5), (2**31 + 5, 3, 1), (2**16 + 1, 2**15, 1), (5, 2**30, 1)], ids=str)
def test_tensors_of_more_than_2_to_the_31_elements(shape):
    plan = sweep(*shape, 4, sums=True, temporaries=1)
    assert sum(math.prod(part.stop - part.start for part in tile.box) for tile in plan.tiles) == math.prod(shape)
    assert plan.tiles[-1].box[0].stop == shape[0]
    sweep.cache_clear()
