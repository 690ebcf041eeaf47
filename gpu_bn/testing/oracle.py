"""Compute batch normalisation by its definition, in extended precision, without code of any backend.

Everything is computed in ``numpy.longdouble`` (80 bits on x86, never less than float64): the mean, then the mean of
the squared deviations from it. This is accurate for means of 1e6 times the standard deviation and for values near
1e18. It is slow and needs much memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

Array = Any
WIDE = np.longdouble
"""The dtype of the oracle."""


@dataclass(frozen=True)
class Problem:
    """One call and its backward call. The NumPy arrays have the dtypes and strides that the backend is given.

    ``activation`` is a name and a parameter. Other fields are as in :func:`gpu_bn.batch_norm`.
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
    mask: Array | None = None
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None


@dataclass(frozen=True)
class Truth:
    """The exact results of a call and its backward call in ``WIDE``, and intermediate values such as ``xhat``.

    ``mean``, ``var`` and ``rstd`` of ghost batches are concatenated. ``r`` and ``d`` are the constants of batch
    renormalisation.
    """

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
    r: Array | None = None
    d: Array | None = None


def wide(array: Array) -> Array:
    """Convert an array to ``WIDE`` exactly."""
    array = np.asarray(array)
    return (array if array.dtype.kind == "f" else array.astype(np.float64)).astype(WIDE)


def by_channel(vector: Array, problem: Problem) -> Array:
    """Reshape a vector of the channels so that it broadcasts against x."""
    shape = [1] * problem.x.ndim
    shape[problem.channel_axis] = -1
    return vector.reshape(shape)


def channel_sum(tensor: Array, problem: Problem) -> Array:
    """Sum a tensor over all axes but that of the channels."""
    channels = problem.x.shape[problem.channel_axis]
    rows: Array = np.moveaxis(tensor, problem.channel_axis, 0).reshape(channels, -1)
    return rows.sum(axis=1)


def oracle(problem: Problem) -> Truth:
    """Compute the exact results of a problem, forward and backward."""
    if problem.activation[0] not in ACTIVATIONS:
        raise ValueError(f"the oracle knows no activation {problem.activation[0]!r}")
    with np.errstate(all="ignore"):
        parts = [truth for _, truth in ghost_batches(problem)]
    return parts[0] if len(parts) == 1 else _join(parts)


def ghost_batches(problem: Problem) -> Iterator[tuple[Problem, Truth]]:
    """Yield each ghost batch of a call in order, and its results; the call itself if it has none."""
    size = problem.virtual_batch_size
    if size is None or not problem.training:
        yield problem, _solve(problem)
        return
    running: dict[str, Any] = {"running_mean": problem.running_mean, "running_var": problem.running_var}
    valid = None if problem.mask is None else valid_elements(problem)
    for first in range(0, len(problem.x), size):
        tensors = {name: getattr(problem, name) for name in ("x", "dy", "residual")} | {"mask": valid}
        sliced: dict[str, Any] = {
            name: None if array is None else array[first : first + size] for name, array in tensors.items()
        }
        part = replace(problem, virtual_batch_size=None, **sliced, **running)
        truth = _solve(part)
        running = {name: getattr(truth, name) for name in running}
        yield part, truth


def _join(parts: list[Truth]) -> Truth:
    """Merge the results of ghost batches: add sums, keep the last running statistics, concatenate the others."""
    values: dict[str, Any] = {}
    for field in fields(Truth):
        each = [getattr(part, field.name) for part in parts]
        if each[0] is None or field.name.startswith("running"):
            values[field.name] = each[-1]
        else:
            values[field.name] = sum(each) if field.name in ("dweight", "dbias") else np.concatenate(each)
    return Truth(**values)


def valid_elements(problem: Problem) -> Array:
    """Return the mask as booleans in the shape of x: ``True`` for elements that count."""
    if problem.mask is None:
        return np.ones(problem.x.shape, bool)
    mask = problem.mask
    if mask.ndim < problem.x.ndim:
        mask = np.expand_dims(mask, problem.channel_axis % problem.x.ndim)
    return np.broadcast_to(mask != 0, problem.x.shape)


def valid_count(problem: Problem) -> int:
    """Return the number of valid elements in each channel."""
    channels = problem.x.shape[problem.channel_axis]
    valid: int = int(valid_elements(problem).sum()) // max(channels, 1)
    return valid


def masked(tensor: Array, problem: Problem) -> Array:
    """Convert a tensor to ``WIDE``, with 0 for masked elements."""
    return np.where(valid_elements(problem), wide(tensor), WIDE(0))


def _solve(problem: Problem) -> Truth:
    """Compute the exact results of a call without ghost batches."""
    x, dy, valid = masked(problem.x, problem), masked(problem.dy, problem), valid_elements(problem)
    count = valid_count(problem) if problem.mask is None else max(valid_count(problem), 1)
    if problem.training:
        mean = channel_sum(x, problem) / count
        mean = mean + channel_sum(valid * (x - by_channel(mean, problem)), problem) / count
        var = channel_sum(valid * (x - by_channel(mean, problem)) ** 2, problem) / count
    else:
        mean, var = wide(problem.running_mean), wide(problem.running_var)
    running_mean, running_var = _running(problem, mean, var, count)

    rstd = 1 / np.sqrt(var + WIDE(problem.eps))
    xhat = valid * (x - by_channel(mean, problem)) * by_channel(rstd, problem)
    weight = np.ones_like(mean) if problem.weight is None else wide(problem.weight)
    r, d = _renormalisation(problem, mean, rstd)
    corrected = valid * (xhat * by_channel(r, problem) + by_channel(d, problem))
    z = by_channel(weight, problem) * corrected
    if problem.bias is not None:
        z = z + by_channel(wide(problem.bias), problem)
    if problem.residual is not None:
        z = z + masked(problem.residual, problem)

    dz = dy * derivative(*problem.activation, z)
    dbias, dweight = channel_sum(dz, problem), channel_sum(dz * corrected, problem)
    inner = dz
    if problem.training:
        along = channel_sum(dz * xhat, problem) / count
        inner = valid * (dz - by_channel(dbias / count, problem) - xhat * by_channel(along, problem))
    return Truth(
        mean=mean,
        var=var,
        rstd=rstd,
        xhat=xhat,
        z=z,
        y=valid * value(*problem.activation, z),
        running_mean=running_mean,
        running_var=running_var,
        dz=dz,
        dx=by_channel(weight * r * rstd, problem) * inner,
        dweight=None if problem.weight is None else dweight,
        dbias=None if problem.bias is None else dbias,
        dresidual=None if problem.residual is None else dz,
        r=r,
        d=d,
    )


def _running(problem: Problem, mean: Array, var: Array, count: int) -> tuple[Array | None, Array | None]:
    """Return the running statistics after the call. They do not change in evaluation or without a valid element."""
    if problem.running_mean is None:
        return None, None
    old_mean, old_var = wide(problem.running_mean), wide(problem.running_var)
    if not problem.training or (problem.mask is not None and not valid_count(problem)):
        return old_mean, old_var
    keep, momentum = 1 - WIDE(problem.momentum), WIDE(problem.momentum)
    unbiased = var * count / (count - 1 if count > 1 else 1)
    return keep * old_mean + momentum * mean, keep * old_var + momentum * unbiased


def _renormalisation(problem: Problem, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """Return r and d of Ioffe 2017, Alg. 1, with sd = sqrt(var + eps); 1 and 0 without batch renormalisation."""
    if problem.renorm is None:
        return np.ones_like(mean), np.zeros_like(mean)
    r_max, d_max = map(WIDE, problem.renorm)
    sd = np.sqrt(wide(problem.running_var) + WIDE(problem.eps))
    r = np.minimum(np.maximum(1 / (rstd * sd), 1 / r_max), r_max)
    return r, np.minimum(np.maximum((mean - wide(problem.running_mean)) / sd, -d_max), d_max)


# -------------------------------------------------------------------------------------------------- activations
def value(name: str, parameter: float, z: Array) -> Array:
    """Compute ``activation(z)``."""
    with np.errstate(all="ignore"):
        return ACTIVATIONS[name][0](z, WIDE(parameter))


def derivative(name: str, parameter: float, z: Array) -> Array:
    """Compute ``activation'(z)``; at a kink, the one-sided derivative that torch takes."""
    with np.errstate(all="ignore"):
        return ACTIVATIONS[name][1](z, WIDE(parameter))


def _logistic(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _normal(z: Array) -> Array:
    """Compute the normal distribution function by ``math.erfc``, which is accurate to the last digits of float64."""
    flat = [math.erfc(-float(v) * math.sqrt(0.5)) / 2 for v in np.ravel(z)]
    return np.array(flat, WIDE).reshape(np.shape(z))


def _gelu_argument(z: Array) -> Array:
    return np.sqrt(2 / WIDE(np.pi)) * (z + WIDE("0.044715") * z**3)


def _gelu_tanh_derivative(z: Array, _: Array) -> Array:
    tanh = np.tanh(_gelu_argument(z))
    inner = np.sqrt(2 / WIDE(np.pi)) * (1 + 3 * WIDE("0.044715") * z * z)
    return (1 + tanh) / 2 + z / 2 * (1 - tanh * tanh) * inner


ACTIVATIONS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {
    "identity": (lambda z, _: z, lambda z, _: np.ones_like(z)),
    "relu": (lambda z, _: np.where(z < 0, 0, z), lambda z, _: (z > 0).astype(WIDE)),
    "relu6": (lambda z, _: np.clip(z, 0, 6), lambda z, _: ((z > 0) & (z < 6)).astype(WIDE)),
    "leaky_relu": (lambda z, a: np.where(z > 0, z, a * z), lambda z, a: np.where(z > 0, WIDE(1), a)),
    "elu": (lambda z, a: np.where(z > 0, z, a * np.expm1(z)), lambda z, a: np.where(z > 0, 1, a * np.exp(z))),
    "silu": (lambda z, _: z * _logistic(z), lambda z, _: (gate := _logistic(z)) + z * gate * (1 - gate)),
    "gelu": (
        lambda z, _: z * _normal(z),
        lambda z, _: _normal(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * WIDE(np.pi)),
    ),
    "gelu_tanh": (lambda z, _: z / 2 * (1 + np.tanh(_gelu_argument(z))), _gelu_tanh_derivative),
    "hardswish": (
        lambda z, _: z * np.clip(z + 3, 0, 6) / 6,
        lambda z, _: np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6)),
    ),
    "sigmoid": (lambda z, _: _logistic(z), lambda z, _: (gate := _logistic(z)) * (1 - gate)),
    "tanh": (lambda z, _: np.tanh(z), lambda z, _: 1 - np.tanh(z) ** 2),
}
"""The value and the derivative of each activation, as functions of ``z`` and the parameter ``a`` in ``WIDE``."""
