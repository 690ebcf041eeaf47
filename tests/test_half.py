"""Rounding to float16, against NumPy's own cast."""

import numpy as np

from gpu_bn.backends._half import to_float16


def same(values):
    with np.errstate(all="ignore"):
        got, want = to_float16(values), values.astype(np.float32).astype(np.float16)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


def test_every_float16_and_its_neighbours_midpoints():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    finite = halves[np.isfinite(halves)]
    same(halves)
    middle = (finite + np.roll(finite, 1)) / 2
    with np.errstate(all="ignore"):
        for step in (0, 2.0**-26, -(2.0**-26)):
            same(middle * (1 + step))


def test_extremes():
    tiny = np.finfo(np.float64).tiny
    same(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, -65520, 1e300, tiny, -tiny, 2**-25.0]))


def test_random_magnitudes():
    random = np.random.default_rng(0)
    same(random.standard_normal(200_000) * 10.0 ** random.uniform(-12, 7, 200_000))
