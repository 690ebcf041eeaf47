"""Provide small helpers for the tests."""

import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpu_bn.testing import Case, Problem, build

needs_a_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch's inductor compiles C++: it needs g++ and Python's headers (apt install g++ python3-dev)",
)


def version(package):
    """Return the first two numbers of the version of a package; (0, 0) if it is not installed."""
    text = importlib.metadata.version(package) if importlib.util.find_spec(package) else "0.0"
    return tuple(int(number) for number in text.split(".")[:2])


as_torch_2_13 = pytest.mark.skipif(
    version("torch") < (2, 12),
    reason="layers of torch 2.11 have no bias= and other messages about eps; gpu_bn follows torch 2.13",
)


def rng(seed=0):
    return np.random.default_rng(seed)


def read_only(array):
    """Make an array read-only and return it."""
    array.flags.writeable = False
    return array


def make_problem(x, **options):
    """Build a problem with random ``dy`` in training. ``options`` replace other fields."""
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


def far_from_zero(activation):
    """Build a problem in evaluation mode whose values of ``z`` range beyond the overflow of exp."""
    problem = build(Case((1, 1, 1024), activation=activation, mode="eval"))
    z = np.concatenate([np.linspace(-120, 120, 1019), [-1e30, -1e4, 0, 1e4, 1e30]]).astype(np.float32)
    numbers = {"running_mean": 0, "running_var": 1, "weight": 1, "bias": 0}
    return replace(problem, x=z.reshape(1, 1, -1), **{k: np.full(1, v, np.float32) for k, v in numbers.items()})


def running_pair(channels, dtype=np.float32):
    """Return a running mean and a running variance with different values for each channel."""
    return np.linspace(-1, 1, channels).astype(dtype), np.linspace(0.5, 3, channels).astype(dtype)


def same_bits(a, b):
    """Tell whether two arrays, or two dictionaries of arrays, are equal in dtype, shape and every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def relative_error(got, exact):
    """Return the largest error divided by the largest exact magnitude."""
    got, exact = np.asarray(got, np.longdouble), np.asarray(exact, np.longdouble)
    return float(np.abs(got - exact).max() / np.abs(exact).max())
