"""Small helpers for the tests."""

import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from gpu_bn.testing import Problem

needs_a_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch's inductor compiles C++: it needs g++ and Python's headers (apt install g++ python3-dev)",
)


def rng(seed=0):
    return np.random.default_rng(seed)


def read_only(array):
    """The array, which can no longer be written to."""
    array.flags.writeable = False
    return array


def make_problem(x, **options):
    """A problem with random ``dy`` and ``training=True``; ``options`` are further fields."""
    fields = {
        "x": x,
        "dy": rng(7).standard_normal(x.shape).astype(x.dtype),
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "residual": None,
        "activation": ("identity", 0.0),
        "channel_axis": 1,
    }
    return Problem(**(fields | options))


def running_pair(channels, dtype=np.float32):
    """Fresh running statistics that are neither 0 nor 1."""
    return np.linspace(-1, 1, channels).astype(dtype), np.linspace(0.5, 3, channels).astype(dtype)


def same_bits(a, b):
    """Whether two arrays, or two dictionaries of arrays, agree in dtype, shape and every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def relative_error(got, exact):
    """The largest error as a share of the largest magnitude."""
    got, exact = np.asarray(got, np.longdouble), np.asarray(exact, np.longdouble)
    return float(np.abs(got - exact).max() / np.abs(exact).max())
