"""Tensors too small for tiles to pay: whole-array expressions in float64, and as few of them as can be.

The mean is always subtracted first, so that nothing need be checked. Tensors are seen as (C, N * S). ``stats``,
``normalize``, ``backward_reduce`` and ``backward_input`` are the phases of :class:`gpu_bn.backends.protocol.Backend`;
``forward`` and ``backward`` do all phases of a call without what the seams between them cost, and with the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_bn.activations import ROWS
from gpu_bn.backends._layout import Layout
from gpu_bn.backends.protocol import Moments, Saved, Sums

Array = NDArray[Any]

SMALL = 8 << 10
"""Elements: up to here these functions are the faster ones."""
LONG = 1 << 10
"""Positions: up to here sums are dot products, whose rounding grows with the length; beyond, NumPy's pairwise ones."""
FLOAT64 = np.dtype(np.float64)
INFINITY = np.array(np.inf)


class Affine(NamedTuple):
    """(C,) each, float64: what takes x to z. ``sd`` is sqrt(var + eps)."""

    mean: Array
    sd: Array
    weight: Array | None
    bias: Array | None

    @staticmethod
    def of(mean: Array, var: Array, eps: float, weight: Array | None, bias: Array | None) -> Affine:
        """From a call's statistics and parameters, in any precision."""
        sd = var + eps
        return Affine(mean, np.sqrt(sd, out=sd), _wide(weight), _wide(bias))

    @property
    def scale(self) -> Array:
        """(C, 1) what x - mean is multiplied by."""
        scale: Array = (1.0 if self.weight is None else self.weight) / self.sd
        return scale[:, None]


# ------------------------------------------------------------------------------------------------------ whole calls
@np.errstate(all="ignore")
def forward(
    layout: Layout,
    x: Array,
    running: tuple[Array, Array] | None,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameter: float,
    out: Array,
) -> tuple[Array, Array]:
    """Write y, move the running statistics in training, and return the mean and variance used."""
    wide = _read(layout, x)
    if batch_stats or running is None:
        mean, var, centred = _statistics(wide, None, layout.count, x.dtype)
    else:
        mean, var = running[0].astype(FLOAT64), running[1].astype(FLOAT64)
        centred = np.subtract(wide, mean[:, None], out=wide)
    z = _pre_activation(Affine.of(mean, var, eps, weight, bias), centred, residual, layout, centred)
    if activation != "identity":
        ROWS[activation].value(z, parameter)
    _write(layout, out, z)
    if batch_stats and running is not None:
        moved = running[0].astype(FLOAT64), running[1].astype(FLOAT64)
        move(*moved, mean, var, layout.count, momentum)
        running[0][...], running[1][...] = moved
    return mean, var


@np.errstate(all="ignore")
def backward(
    layout: Layout,
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    mean: Array,
    var: Array,
    batch_stats: bool,
    eps: float,
    activation: str,
    parameter: float,
    dx: Array | None,
    dresidual: Array | None,
    dweight_dtype: np.dtype[Any] | None,
    dbias_dtype: np.dtype[Any] | None,
) -> tuple[Array | None, Array | None]:
    """Write dx and dresidual where they are given, and return dweight and dbias where their dtypes are."""
    affine = Affine.of(mean, var, eps, weight, bias)
    centred = _read(layout, x)
    centred -= mean[:, None]
    gradient = _read(layout, dy)
    if activation != "identity":
        z = _pre_activation(affine, centred, residual, layout)
        ROWS[activation].gradient(z, gradient, gradient, parameter)
    if dresidual is not None:
        _write(layout, dresidual, gradient)
    sums = _reduce(affine, centred, gradient)
    if dx is not None:
        _write(layout, dx, _input_gradient(affine, centred, gradient, sums if batch_stats else None, layout.count))
    return (
        None if dweight_dtype is None else sums.dz_xhat.astype(dweight_dtype),
        None if dbias_dtype is None else sums.dz.astype(dbias_dtype),
    )


def move(mean: Array, var: Array, batch_mean: Array, batch_var: Array, count: float, momentum: float) -> None:
    """Move running statistics in float64 towards those of ``count`` positions, in place, with Bessel's correction."""
    mean *= 1 - momentum
    mean += momentum * batch_mean
    var *= 1 - momentum
    var += momentum * (count / max(count - 1, 1)) * batch_var


# ----------------------------------------------------------------------------------------------------------- phases
def stats(layout: Layout, x: Array, hidden: Array | None, count: int) -> Moments:
    """Two-pass mean and variance.

    ``hidden`` is :meth:`Layout.hidden`'s, ``count`` how many positions it leaves, at least 1.
    """
    return Moments(count, *_statistics(_read(layout, x), hidden, count, x.dtype)[:2])


def normalize(layout: Layout, saved: Saved, residual: Array | None, out: Array) -> None:
    """Write y."""
    centred = _centred(layout, saved)
    z = _pre_activation(_affine(saved), centred, residual, layout, centred)
    if not saved.spec.activation.is_identity:
        saved.spec.activation.value(z)
    _clear(z, layout.hidden(saved.valid))
    _write(layout, out, z)


def backward_reduce(layout: Layout, saved: Saved, dy: Array, dz: Array | None) -> Sums:
    """Sum dz and dz * xhat."""
    affine, centred = _affine(saved), _centred(layout, saved)
    gradient = _gradient(layout, saved, affine, centred, dy)
    if dz is not None:
        _write(layout, dz, gradient)
    return _reduce(affine, centred, gradient)


def backward_input(layout: Layout, saved: Saved, dy: Array, sums: Sums | None, out: Array) -> None:
    """Write dx."""
    affine, centred = _affine(saved), _centred(layout, saved)
    gradient = _gradient(layout, saved, affine, centred, dy)
    gradient = _input_gradient(affine, centred, gradient, sums, saved.positions)
    _clear(gradient, layout.hidden(saved.valid))
    _write(layout, out, gradient)


def _affine(saved: Saved) -> Affine:
    return Affine.of(saved.moments.mean, saved.moments.var, saved.spec.eps, saved.weight, saved.bias)


def _centred(layout: Layout, saved: Saved) -> Array:
    centred = _read(layout, saved.x)
    centred -= saved.moments.mean[:, None]
    _clear(centred, layout.hidden(saved.valid))
    return centred


def _gradient(layout: Layout, saved: Saved, affine: Affine, centred: Array, dy: Array) -> Array:
    """dz, in an array of its own."""
    gradient = _read(layout, dy)
    if not saved.spec.activation.is_identity:
        z = _pre_activation(affine, centred, saved.residual, layout)
        saved.spec.activation.gradient(z, gradient, gradient)
    _clear(gradient, layout.hidden(saved.valid))
    return gradient


# ------------------------------------------------------------------------------------------------------- expressions
def _statistics(wide: Array, hidden: Array | None, count: int, dtype: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Two-pass mean and variance, and what is left of ``wide`` when the mean is subtracted.

    Sums of shorter numbers are exact in float64 wherever the mean is large beside the deviations; those of float64
    are not, so that both results are corrected for the rounding of the first mean.
    """
    _clear(wide, hidden)
    mean = _sum(wide)
    mean /= count
    centred = wide - mean[:, None]
    _clear(centred, hidden)
    var = _sum_of_products(centred, centred)
    var /= count
    if dtype.itemsize == FLOAT64.itemsize:
        rest = _sum(centred)
        rest /= count
        mean += rest
        rest *= rest
        var -= rest
        np.fmod(var, INFINITY, out=var)  # NaN for infinity: an overflow must not look like a result
        np.subtract(wide, mean[:, None], out=centred)
    return mean, np.abs(var, out=var), centred  # what is below 0 is a 0 that was rounded


def _pre_activation(
    affine: Affine, centred: Array, residual: Array | None, layout: Layout, out: Array | None = None
) -> Array:
    z: Array = np.multiply(centred, affine.scale, out=out)
    if affine.bias is not None:
        z += affine.bias[:, None]
    if residual is not None:
        z += _read(layout, residual)
    return z


def _reduce(affine: Affine, centred: Array, gradient: Array) -> Sums:
    products = _sum_of_products(centred, gradient)
    products /= affine.sd
    return Sums(_sum(gradient), products)


def _input_gradient(affine: Affine, centred: Array, gradient: Array, sums: Sums | None, count: Any) -> Array:
    """dx, in the place of dz; ``centred`` is used up."""
    if sums is not None:
        centred *= (sums.dz_xhat / (affine.sd * count))[:, None]
        centred += (sums.dz / count)[:, None]
        gradient -= centred
    gradient *= affine.scale
    return gradient


def _sum(wide: Array) -> Array:
    positions = wide.shape[1]
    total: Array = wide.dot(_ones(positions)) if positions <= LONG else np.add.reduce(wide, 1)
    return total


def _sum_of_products(left: Array, right: Array) -> Array:
    total: Array = np.vecdot(left, right) if left.shape[1] <= LONG else np.add.reduce(left * right, 1)
    return total


@lru_cache(LONG)
def _ones(positions: int) -> Array:
    return np.ones(positions)


def _read(layout: Layout, array: Array) -> Array:
    """A float64 copy as (C, N * S)."""
    wide: Array = array.transpose(layout.by_channel).astype(FLOAT64, "C").reshape(layout.c, -1)
    return wide


def _write(layout: Layout, out: Array, value: Array) -> None:
    ordered = out.transpose(layout.by_channel)
    ordered[...] = value.reshape(ordered.shape)


def _wide(vector: Array | None) -> Array | None:
    return None if vector is None else vector.astype(FLOAT64)


def _clear(array: Array, hidden: Array | None) -> None:
    """Put 0 where positions do not count."""
    if hidden is not None:
        np.copyto(array, 0, where=hidden.reshape(1, -1))
