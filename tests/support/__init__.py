"""Provide small helpers to the tests."""

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
    """Return the first two numbers of an installed package's version."""
    found = importlib.metadata.version(package) if importlib.util.find_spec(package) else "0.0"
    return tuple(int(number) for number in found.split(".")[:2])


as_torch_2_13 = pytest.mark.skipif(
    version("torch") < (2, 12),
    reason="layers of torch 2.11 have no bias=, and word errors about eps otherwise: ours are as those of torch 2.13",
)


def rng(seed=0):
    return np.random.default_rng(seed)


def read_only(array):
    """Return the array, made read-only."""
    array.flags.writeable = False
    return array


def make_problem(x, **options):
    """Make a problem with random ``dy`` and ``training=True``; ``options`` are further fields."""
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
    """Make a problem with frozen statistics and ``z`` up to where exp overflows and beyond."""
    problem = build(Case((1, 1, 1024), activation=activation, mode="eval"))
    z = np.concatenate([np.linspace(-120, 120, 1019), [-1e30, -1e4, 0, 1e4, 1e30]]).astype(np.float32)
    numbers = {"running_mean": 0, "running_var": 1, "weight": 1, "bias": 0}
    return replace(problem, x=z.reshape(1, 1, -1), **{k: np.full(1, v, np.float32) for k, v in numbers.items()})


def running_pair(channels, dtype=np.float32):
    """Make running statistics that are neither 0 nor 1."""
    return np.linspace(-1, 1, channels).astype(dtype), np.linspace(0.5, 3, channels).astype(dtype)


def same_bits(a, b):
    """Tell whether two arrays, or two dictionaries of arrays, agree in dtype, shape and every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def relative_error(got, exact):
    """Return the largest error as a share of the largest magnitude."""
    got, exact = np.asarray(got, np.longdouble), np.asarray(exact, np.longdouble)
    return float(np.abs(got - exact).max() / np.abs(exact).max())
