"""How far a result may be from the truth, element by element, and why.

Let ``u`` be the unit roundoff of the precision a backend must at least compute in: 2**-24 for float16, bfloat16 and
float32 tensors, 2**-53 for float64. A result may differ from the truth by one unit in the last place of its own dtype
plus what the operations that lead to it may lose in that precision. The second part is carried along the definition:

mean
    ``4 u`` of what is summed, divided by n.
var
    A relative ``16 u``, whatever the mean: squares are summed of deviations from a shift near the mean, never
    ``E[x^2] - E[x]^2``. Merging partial moments may lose more as ``ratio = |mean| / sd`` grows; the contract allows
    1e-5 at 1e4 in float32, so ``1e-9 ratio`` (and as many ``u`` in float64).
xhat
    ``x - mean`` may be split as ``x * scale + shift`` while ``ratio`` is small, which loses up to ``u`` of 2 ratios;
    beyond, what counts is how well the mean itself is kept: the contract allows 1e-4 at 1e4 in float32, so
    ``1e-8 ratio``. This is less than a mean rounded to float32 would cost. In float64 a mean rounded to float64 costs
    ``u ratio``. The batch's mean is a sum of deviations from a shift, known to ``4 u`` of their mean magnitude. An
    error of the variance enters with one half of it.
z
    The roundings of two products and two additions.
y
    The slope of the activation around ``z``, times the error of ``z``, and ``8 u`` of the value. A smooth
    activation may also lose ``2 u`` of ``min(|z|, 1)``, as ``1 + erf(z)`` does where it nearly vanishes.
dz
    The slope's change within the error of ``z``: at a kink, either side is right if ``z`` is that close. And ``8 u``
    of the slope; of at least 1 for a smooth activation.
dbias, dweight
    The sum of the terms' errors, and ``4 u`` of the sum of their absolute values: blocked or pairwise sums.
dx
    The errors of its three terms, and that of ``rstd``.

Positions that a mask leaves out are 0 to the last bit, and in no sum. Of ghost batches each is allowed its own. Batch
renormalisation puts ``xhat * r + d`` in the place of xhat, and adds what the errors of mean and rstd do to r and d.

Where an error bound sums worst cases it is generous by a factor that grows slowly with n; a lost element, a biased
variance or a missing term exceeds it by orders of magnitude, which the planted-bug tests show.
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
    positions,
    valid_count,
    wide,
)

Array = Any

ROUNDOFF = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
VAR_PER_RATIO = {"float16": 1e-9, "bfloat16": 1e-9, "float32": 1e-9, "float64": 2.0**-58}
MEAN_PER_RATIO = {"float16": 1e-8, "bfloat16": 1e-8, "float32": 1e-8, "float64": 2.0**-52}
FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}
"""Stored bits of the significand, and the smallest normal exponent."""
PIECEWISE_LINEAR = ("identity", "relu", "relu6", "leaky_relu")


def tolerance(problem: Problem, truth: Truth) -> dict[str, Array]:
    """Return the error allowed in each quantity, before it is rounded to its dtype; see this module's text.

    :func:`ulp` of the quantity's dtype comes on top.
    """
    with np.errstate(all="ignore"):
        if problem.virtual_batch_size is None or not problem.training:
            return _tolerance(problem, truth)
        return _joined([_tolerance(*part) for part in ghost_batches(problem)], 1 - WIDE(problem.momentum))


def _joined(parts: list[dict[str, Array]], keep: Array) -> dict[str, Array]:
    """Return what is allowed in a call of ghost batches: errors of sums add up, of running statistics they fade."""
    allowed: dict[str, Array] = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if name.startswith("running"):
            allowed[name] = sum(keep ** (len(parts) - 1 - at) * one for at, one in enumerate(each))
        else:
            allowed[name] = sum(each) if name in ("dweight", "dbias") else np.concatenate(each)
    return allowed


def _tolerance(problem: Problem, truth: Truth) -> dict[str, Array]:
    dtype = str(problem.x.dtype)
    u = WIDE(ROUNDOFF[dtype])
    there, count = positions(problem), max(valid_count(problem), 1)
    ratio = np.abs(truth.mean) * truth.rstd
    mean, var_relative = _moments(problem, truth, u)
    rstd_relative = 4 * u + var_relative / 2

    size, split = np.abs(truth.xhat), by_channel(np.minimum(2 * ratio, 4), problem)
    lost_mean = by_channel(WIDE(MEAN_PER_RATIO[dtype]) * ratio, problem)
    xhat = 2 * u * (size + split) + size * by_channel(rstd_relative, problem) + lost_mean
    if problem.training:
        xhat = xhat + by_channel(4 * u * channel_sum(size, problem) / count, problem)
    weight = _magnitude(problem.weight, problem, default=1.0)
    corrected, off = size, xhat
    if problem.renorm is not None:  # xhat * r + d
        r, d = by_channel(truth.r, problem), by_channel(truth.d, problem)
        off_d = by_channel(mean / np.sqrt(wide(problem.running_var) + WIDE(problem.eps)), problem)
        corrected = r * size + np.abs(d)
        off = r * (xhat + size * by_channel(rstd_relative + 4 * u, problem)) + off_d + 8 * u * np.abs(d)
    terms = weight * corrected + _magnitude(problem.bias, problem)
    terms = terms + (0 if problem.residual is None else np.abs(masked(problem.residual, problem)))
    rounds = (weight > 0) | (problem.residual is not None)  # a weight of 0 leaves the bias as it is
    z = weight * off + 2 * u * terms * rounds

    y, dz = _activated(problem, truth, z, u)
    size_dz = np.abs(truth.dz)
    dbias = channel_sum(dz + 4 * u * size_dz, problem)
    dweight = channel_sum(dz * size + size_dz * (xhat + 4 * u * size), problem)
    dweight_corrected = channel_sum(dz * corrected + size_dz * (off + 4 * u * corrected), problem)
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

    allowed = {"y": y * there, "mean": mean, "rstd": rstd_relative * truth.rstd, "dx": dx * there}
    allowed |= {"dweight": dweight_corrected, "dbias": dbias, "dresidual": dz}
    if problem.running_mean is not None:
        allowed |= _running(problem, truth, mean, var_relative * truth.var, u)
    return allowed


def _moments(problem: Problem, truth: Truth, u: Array) -> tuple[Array, Array]:
    """Return what is allowed in the mean, and in the variance as a share of it."""
    if not problem.training:
        return np.zeros_like(truth.mean), np.zeros_like(truth.mean)
    mean = 4 * u * channel_sum(np.abs(masked(problem.x, problem)), problem) / max(valid_count(problem), 1)
    per_ratio = WIDE(VAR_PER_RATIO[str(problem.x.dtype)])
    var_relative = np.maximum(16 * u, per_ratio * np.abs(truth.mean) / np.sqrt(truth.var))
    return mean, np.where(truth.var > 0, var_relative, 16 * u)


def _activated(problem: Problem, truth: Truth, z: Array, u: Array) -> tuple[Array, Array]:
    """Return what is allowed in y and in dz, where ``z`` is allowed in z."""
    here, below, above = (derivative(*problem.activation, truth.z + step * z) for step in (0, -1, 1))
    steepest = np.maximum(np.abs(here), np.maximum(np.abs(below), np.abs(above)))
    change = np.maximum(np.abs(below - here), np.abs(above - here))
    smooth = problem.activation[0] not in PIECEWISE_LINEAR
    y = steepest * z + 8 * u * np.abs(truth.y) + 2 * u * smooth * np.minimum(np.abs(truth.z), 1)
    if problem.activation[0] == "identity":
        return y, np.zeros_like(truth.dz)
    return y, np.abs(masked(problem.dy, problem)) * (change + 8 * u * np.maximum(np.abs(here), 1.0 * smooth))


def _running(problem: Problem, truth: Truth, mean: Array, var: Array, u: Array) -> dict[str, Array]:
    """Return what is allowed in the running statistics, where ``mean`` and ``var`` are allowed in the batch's."""
    valid = valid_count(problem)
    momentum = WIDE(problem.momentum if problem.training and valid else 0)
    bessel = max(valid, 1) / WIDE(max(valid - 1, 1))
    old_mean, old_var = np.abs(wide(problem.running_mean)), np.abs(wide(problem.running_var))
    return {
        "running_mean": momentum * (mean + 2 * u * np.abs(truth.mean)) + 2 * u * (1 - momentum) * old_mean,
        "running_var": momentum * bessel * (var + 2 * u * truth.var) + 2 * u * (1 - momentum) * old_var,
    }


def ulp(values: Array, dtype: str) -> Array:
    """Return one unit in the last place of each value, rounded to ``dtype``."""
    bits, smallest = FORMATS[dtype]
    exponent = np.frexp(np.abs(wide(values)))[1] - 1
    exponent = np.maximum(np.where(wide(values) == 0, smallest, exponent), smallest)
    return np.ldexp(WIDE(1), exponent - bits)


def _magnitude(vector: Array | None, problem: Problem, default: float = 0.0) -> Array:
    return WIDE(default) if vector is None else np.abs(by_channel(wide(vector), problem))
