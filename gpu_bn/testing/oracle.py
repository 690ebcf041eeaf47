"""The truth: batch normalisation as the textbook has it, in extended precision, with no code of the library.

Everything is computed in ``numpy.longdouble`` (80 bits on x86, never less than float64), by the definition: the mean,
then the mean of the squared deviations from it. That is right for means 1e6 times the standard deviation and for
values near 1e18. It is slow and uses much memory, as a truth may.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
WIDE = np.longdouble


@dataclass(frozen=True)
class Problem:
    """One call and its backward call, as NumPy arrays in the dtypes and strides that the backend will be given.

    ``activation`` is a name and its parameter; other fields are as in :func:`gpu_bn.batch_norm`.
    """

    x: Array
    dy: Array
    running_mean: Array | None
    running_var: Array | None
    weight: Array | None
    bias: Array | None
    training: bool
    momentum: float
    eps: float
    residual: Array | None
    activation: tuple[str, float]
    channel_axis: int


@dataclass(frozen=True)
class Truth:
    """What a call should give, in ``WIDE``; ``mean``, ``var``, ``xhat`` and ``z`` are what led there."""

    mean: Array
    var: Array
    rstd: Array
    xhat: Array
    z: Array
    y: Array
    running_mean: Array | None
    running_var: Array | None
    dz: Array
    dx: Array
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


def wide(array: Array) -> Array:
    """An array in ``WIDE``, exactly."""
    array = np.asarray(array)
    return (array if array.dtype.kind == "f" else array.astype(np.float64)).astype(WIDE)


def by_channel(vector: Array, problem: Problem) -> Array:
    """A per-channel vector, shaped to broadcast against the tensor."""
    shape = [1] * problem.x.ndim
    shape[problem.channel_axis] = -1
    return vector.reshape(shape)


def channel_sum(tensor: Array, problem: Problem) -> Array:
    """Sum over all axes but the channels'."""
    channels = problem.x.shape[problem.channel_axis]
    rows: Array = np.moveaxis(tensor, problem.channel_axis, 0).reshape(channels, -1)
    return rows.sum(axis=1)


def oracle(problem: Problem) -> Truth:
    """Solve a problem, forward and backward."""
    with np.errstate(all="ignore"):
        return _solve(problem)


def _solve(problem: Problem) -> Truth:
    x, dy = wide(problem.x), wide(problem.dy)
    count = x.size // max(x.shape[problem.channel_axis], 1)
    if problem.training:
        mean = channel_sum(x, problem) / count
        mean = mean + channel_sum(x - by_channel(mean, problem), problem) / count
        var = channel_sum((x - by_channel(mean, problem)) ** 2, problem) / count
    else:
        mean, var = wide(problem.running_mean), wide(problem.running_var)
    running_mean = running_var = None
    if problem.running_mean is not None:
        running_mean, running_var = wide(problem.running_mean), wide(problem.running_var)
        if problem.training:
            keep, momentum = 1 - WIDE(problem.momentum), WIDE(problem.momentum)
            running_mean = keep * running_mean + momentum * mean
            running_var = keep * running_var + momentum * var * count / (count - 1)

    rstd = 1 / np.sqrt(var + WIDE(problem.eps))
    xhat = (x - by_channel(mean, problem)) * by_channel(rstd, problem)
    weight = np.ones_like(mean) if problem.weight is None else wide(problem.weight)
    z = by_channel(weight, problem) * xhat
    if problem.bias is not None:
        z = z + by_channel(wide(problem.bias), problem)
    if problem.residual is not None:
        z = z + wide(problem.residual)

    dz = dy * derivative(*problem.activation, z)
    dbias, dweight = channel_sum(dz, problem), channel_sum(dz * xhat, problem)
    inner = dz
    if problem.training:
        inner = dz - by_channel(dbias / count, problem) - xhat * by_channel(dweight / count, problem)
    return Truth(
        mean=mean,
        var=var,
        rstd=rstd,
        xhat=xhat,
        z=z,
        y=value(*problem.activation, z),
        running_mean=running_mean,
        running_var=running_var,
        dz=dz,
        dx=by_channel(weight * rstd, problem) * inner,
        dweight=None if problem.weight is None else dweight,
        dbias=None if problem.bias is None else dbias,
        dresidual=None if problem.residual is None else dz,
    )


# -------------------------------------------------------------------------------------------------- activations
def value(name: str, parameter: float, z: Array) -> Array:
    """``activation(z)``."""
    with np.errstate(all="ignore"):
        match name:
            case "identity":
                return z
            case "relu":
                return np.where(z < 0, 0, z)
            case "relu6":
                return np.clip(z, 0, 6)
            case "leaky_relu":
                return np.where(z > 0, z, WIDE(parameter) * z)
            case "elu":
                return np.where(z > 0, z, WIDE(parameter) * np.expm1(z))
            case "silu":
                return z * _logistic(z)
            case "gelu":
                return z * _normal(z)
            case "gelu_tanh":
                return z / 2 * (1 + np.tanh(_gelu_argument(z)))
            case "hardswish":
                return z * np.clip(z + 3, 0, 6) / 6
            case "sigmoid":
                return _logistic(z)
            case "tanh":
                return np.tanh(z)
    raise ValueError(f"the oracle knows no activation {name!r}")


def derivative(name: str, parameter: float, z: Array) -> Array:
    """``activation'(z)``; at a kink, the side that torch takes."""
    with np.errstate(all="ignore"):
        match name:
            case "identity":
                return np.ones_like(z)
            case "relu":
                return (z > 0).astype(WIDE)
            case "relu6":
                return ((z > 0) & (z < 6)).astype(WIDE)
            case "leaky_relu":
                return np.where(z > 0, WIDE(1), WIDE(parameter))
            case "elu":
                return np.where(z > 0, 1, WIDE(parameter) * np.exp(z))
            case "silu":
                gate = _logistic(z)
                return gate + z * gate * (1 - gate)
            case "gelu":
                return _normal(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * WIDE(np.pi))
            case "gelu_tanh":
                tanh = np.tanh(_gelu_argument(z))
                inner = np.sqrt(2 / WIDE(np.pi)) * (1 + 3 * WIDE("0.044715") * z * z)
                return (1 + tanh) / 2 + z / 2 * (1 - tanh * tanh) * inner
            case "hardswish":
                return np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6))
            case "sigmoid":
                gate = _logistic(z)
                return gate * (1 - gate)
            case "tanh":
                return 1 - np.tanh(z) ** 2
    raise ValueError(f"the oracle knows no activation {name!r}")


def _logistic(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _normal(z: Array) -> Array:
    """The standard normal distribution function; the C library's erfc is right to the last digits of float64."""
    flat = [math.erfc(-float(v) * math.sqrt(0.5)) / 2 for v in np.ravel(z)]
    return np.array(flat, WIDE).reshape(np.shape(z))


def _gelu_argument(z: Array) -> Array:
    return np.sqrt(2 / WIDE(np.pi)) * (z + WIDE("0.044715") * z**3)
