"""Compute the error allowed in each element of each result.

Let ``u`` be the unit roundoff of the lowest precision that a backend may compute in: 2**-24 for float16, bfloat16 and
float32 tensors, 2**-53 for float64. A result may differ from the exact one by one unit in the last place of its dtype,
plus the rounding errors of the operations that lead to it. The latter are propagated through the definition:

mean
    ``4 u`` times the sum of ``|x|``, divided by n.
var
    A relative error of ``16 u`` for any mean, because backends sum squared deviations from a shift near the mean and
    never compute ``E[x^2] - E[x]^2``. Merging partial moments may lose more as ``ratio = |mean| / sd`` grows. The
    contract allows a relative error of 1e-5 at a ratio of 1e4 in float32, hence ``1e-9 ratio``. In float64 it is
    ``2**-58 ratio``.
xhat
    ``2 u |xhat|`` for two rounding errors. ``x - mean`` may be computed as ``x * scale + shift`` while ``ratio`` is
    small, with an error of up to ``2 u * 2 ratio``. For larger ratios the error of the mean dominates. The contract
    allows 1e-4 at a ratio of 1e4 in float32, hence ``1e-8 ratio``, which is less than the error of a mean rounded to
    float32. In float64 it is twice the error of a mean rounded to float64, ``2 u ratio``. In training, the mean has an
    error of ``4 u`` times the mean of ``|xhat|``, as it is a sum of deviations from a shift. The relative error of rstd
    is ``4 u`` plus half that of var.
z
    The rounding errors of two products and two additions.
y
    The steepest slope of the activation near ``z`` times the error of ``z``, plus ``8 u`` times the value. For a
    smooth activation also ``2 u`` times ``min(|z|, 1)``, because ``1 + erf(z)`` cancels where it is nearly 0.
dz
    The change of the slope within the error of ``z`` (at a kink, either side is right if ``z`` is that close), plus
    ``8 u`` times the slope, which counts as at least 1 for a smooth activation.
dbias, dweight
    The sum of the errors of the terms, plus ``4 u`` times the sum of their absolute values, for blocked or pairwise
    sums.
dx
    The errors of its three terms, plus that of ``rstd``.

Masked elements must be exactly 0, and they enter no sum. Each ghost batch has its own allowed errors. Batch
renormalisation replaces xhat by ``xhat * r + d``, and the errors of mean and rstd affect r and d as well.

The bounds add up worst cases, so they are too large by a factor that grows slowly with n. A lost element, a biased
variance or a missing term exceeds them by orders of magnitude, as the tests with planted bugs show.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_bn.testing.oracle import (
    WIDE,
    Problem,
    Truth,
    by_channel,
    channel_sum,
    derivative,
    ghost_batches,
    masked,
    valid_count,
    valid_elements,
    wide,
)

Array = Any

ROUNDOFF = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
"""The unit roundoff ``u`` by the dtype of x."""
VAR_PER_RATIO = {"float16": 1e-9, "bfloat16": 1e-9, "float32": 1e-9, "float64": 2.0**-58}
MEAN_PER_RATIO = {"float16": 1e-8, "bfloat16": 1e-8, "float32": 1e-8, "float64": 2.0**-52}
"""The allowed errors of the variance (relative) and of xhat (absolute), divided by ``ratio``."""
FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}
"""The number of stored bits of the significand, and the exponent of the smallest normal number."""
PIECEWISE_LINEAR = ("identity", "relu", "relu6", "leaky_relu")


def tolerance(problem: Problem, truth: Truth) -> dict[str, Array]:
    """Return the error allowed in each quantity (see the top of the file), to which rounding may add one ulp."""
    with np.errstate(all="ignore"):
        if problem.virtual_batch_size is None or not problem.training:
            return _tolerance(problem, truth)
        return _join([_tolerance(*part) for part in ghost_batches(problem)], 1 - WIDE(problem.momentum))


def _join(parts: list[dict[str, Array]], keep: Array) -> dict[str, Array]:
    """Return the errors allowed in a call from those of its ghost batches.

    The errors of sums add up. An error of the running statistics is multiplied by ``keep`` in each later ghost batch.
    """
    allowed: dict[str, Array] = {}
    for name in parts[0]:
        errors = [part[name] for part in parts]
        if name.startswith("running"):
            allowed[name] = sum(keep ** (len(parts) - 1 - i) * error for i, error in enumerate(errors))
        else:
            allowed[name] = sum(errors) if name in ("dweight", "dbias") else np.concatenate(errors)
    return allowed


def _tolerance(problem: Problem, truth: Truth) -> dict[str, Array]:
    """Return the error allowed in each quantity of a call without ghost batches."""
    dtype = str(problem.x.dtype)
    u = WIDE(ROUNDOFF[dtype])
    valid, count = valid_elements(problem), max(valid_count(problem), 1)
    ratio = np.abs(truth.mean) * truth.rstd
    mean, var_relative = _moment_errors(problem, truth, u)
    rstd_relative = 4 * u + var_relative / 2

    size, split = np.abs(truth.xhat), by_channel(np.minimum(2 * ratio, 4), problem)
    mean_error = by_channel(WIDE(MEAN_PER_RATIO[dtype]) * ratio, problem)
    xhat = 2 * u * (size + split) + size * by_channel(rstd_relative, problem) + mean_error
    if problem.training:
        xhat = xhat + by_channel(4 * u * channel_sum(size, problem) / count, problem)
    weight = _magnitude(problem.weight, problem, default=1.0)
    corrected, error = size, xhat
    if problem.renorm is not None:  # xhat * r + d
        r, d = by_channel(truth.r, problem), by_channel(truth.d, problem)
        d_error = by_channel(mean / np.sqrt(wide(problem.running_var) + WIDE(problem.eps)), problem)
        corrected = r * size + np.abs(d)
        error = r * (xhat + size * by_channel(rstd_relative + 4 * u, problem)) + d_error + 8 * u * np.abs(d)
    terms = weight * corrected + _magnitude(problem.bias, problem)
    terms = terms + (0 if problem.residual is None else np.abs(masked(problem.residual, problem)))
    rounds = (weight > 0) | (problem.residual is not None)  # with a weight of 0 z is the bias exactly
    z = weight * error + 2 * u * terms * rounds

    y, dz = _activation_errors(problem, truth, z, u)
    size_dz = np.abs(truth.dz)
    dbias = channel_sum(dz + 4 * u * size_dz, problem)
    dweight = channel_sum(dz * size + size_dz * (xhat + 4 * u * size), problem)
    dweight_corrected = channel_sum(dz * corrected + size_dz * (error + 4 * u * corrected), problem)
    sum_dz, sum_dz_xhat = (np.abs(channel_sum(term, problem)) for term in (truth.dz, truth.dz * truth.xhat))
    inner = dz + 4 * u * size_dz
    if problem.training:
        inner = inner + by_channel((dbias + 4 * u * sum_dz) / count, problem)
        inner = inner + size * by_channel((dweight + 4 * u * sum_dz_xhat) / count, problem)
        inner = inner + xhat * by_channel(sum_dz_xhat / count, problem)
    scale = weight * by_channel(truth.rstd if truth.r is None else truth.rstd * truth.r, problem)
    if problem.renorm is not None:
        rstd_relative = 2 * rstd_relative + 4 * u
    dx = scale * inner + np.abs(truth.dx) * by_channel(rstd_relative, problem)

    allowed = {"y": y * valid, "mean": mean, "rstd": rstd_relative * truth.rstd, "dx": dx * valid}
    allowed |= {"dweight": dweight_corrected, "dbias": dbias, "dresidual": dz}
    if problem.running_mean is not None:
        allowed |= _running_errors(problem, truth, mean, var_relative * truth.var, u)
    return allowed


def _moment_errors(problem: Problem, truth: Truth, u: Array) -> tuple[Array, Array]:
    """Return the error allowed in the mean, and the relative error allowed in the variance."""
    if not problem.training:
        return np.zeros_like(truth.mean), np.zeros_like(truth.mean)
    mean = 4 * u * channel_sum(np.abs(masked(problem.x, problem)), problem) / max(valid_count(problem), 1)
    per_ratio = WIDE(VAR_PER_RATIO[str(problem.x.dtype)])
    var_relative = np.maximum(16 * u, per_ratio * np.abs(truth.mean) / np.sqrt(truth.var))
    return mean, np.where(truth.var > 0, var_relative, 16 * u)


def _activation_errors(problem: Problem, truth: Truth, z: Array, u: Array) -> tuple[Array, Array]:
    """Return the errors allowed in y and in dz; ``z`` is the error allowed in z."""
    here, below, above = (derivative(*problem.activation, truth.z + step * z) for step in (0, -1, 1))
    steepest = np.maximum(np.abs(here), np.maximum(np.abs(below), np.abs(above)))
    change = np.maximum(np.abs(below - here), np.abs(above - here))
    smooth = problem.activation[0] not in PIECEWISE_LINEAR
    y = steepest * z + 8 * u * np.abs(truth.y) + 2 * u * smooth * np.minimum(np.abs(truth.z), 1)
    if problem.activation[0] == "identity":
        return y, np.zeros_like(truth.dz)
    return y, np.abs(masked(problem.dy, problem)) * (change + 8 * u * np.maximum(np.abs(here), 1.0 * smooth))


def _running_errors(problem: Problem, truth: Truth, mean: Array, var: Array, u: Array) -> dict[str, Array]:
    """Return the errors allowed in the running statistics; ``mean`` and ``var`` are those allowed in the batch's."""
    valid = valid_count(problem)
    momentum = WIDE(problem.momentum if problem.training and valid else 0)
    bessel = max(valid, 1) / WIDE(max(valid - 1, 1))
    old_mean, old_var = np.abs(wide(problem.running_mean)), np.abs(wide(problem.running_var))
    return {
        "running_mean": momentum * (mean + 2 * u * np.abs(truth.mean)) + 2 * u * (1 - momentum) * old_mean,
        "running_var": momentum * bessel * (var + 2 * u * truth.var) + 2 * u * (1 - momentum) * old_var,
    }


def ulp(values: Array, dtype: str) -> Array:
    """Return one unit in the last place of each value in ``dtype``."""
    bits, smallest = FORMATS[dtype]
    exponent = np.frexp(np.abs(wide(values)))[1] - 1
    exponent = np.maximum(np.where(wide(values) == 0, smallest, exponent), smallest)
    return np.ldexp(WIDE(1), exponent - bits)


def _magnitude(vector: Array | None, problem: Problem, default: float = 0.0) -> Array:
    """Return the absolute values of a vector of the channels, to broadcast against x; ``default`` for ``None``."""
    return WIDE(default) if vector is None else np.abs(by_channel(wide(vector), problem))
