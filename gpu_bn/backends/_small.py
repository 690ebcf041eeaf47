"""Tensors too small for tiles to pay: whole-array expressions in float64, and as few of them as can be.

The mean is always subtracted first, so that nothing need be checked. The functions are the phases of
:class:`gpu_bn.backends.protocol.Backend`; tensors are seen as (C, N * S).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_bn.backends._layout import Layout
from gpu_bn.backends.protocol import Moments, Saved, Sums

Array = NDArray[Any]

SMALL = 8 << 10
"""Elements: up to here these functions are the faster ones."""
FLOAT64 = np.dtype(np.float64)


def stats(layout: Layout, x: Array, hidden: Array | None, count: int) -> Moments:
    """Two-pass mean and variance, both corrected for the rounding of the first mean.

    ``hidden`` is :meth:`Layout.hidden`'s, ``count`` how many positions it leaves, at least 1.
    """
    wide = _read(layout, x)
    _clear(wide, hidden)
    mean = np.add.reduce(wide, 1)
    mean /= count
    wide -= mean[:, None]
    _clear(wide, hidden)
    remainder = np.add.reduce(wide, 1)
    remainder /= count
    np.multiply(wide, wide, out=wide)
    var = np.add.reduce(wide, 1)
    var /= count
    var -= remainder * remainder
    mean += remainder
    var[~(var < np.inf)] = np.nan  # an overflow must not look like a result
    return Moments(count, mean, np.maximum(var, 0.0, out=var))


def normalize(layout: Layout, saved: Saved, residual: Array | None, out: Array) -> None:
    """Write y."""
    z = _pre_activation(layout, saved, _centred(layout, saved), residual)
    if not saved.spec.activation.is_identity:
        saved.spec.activation.value(z)
    _clear(z, layout.hidden(saved.valid))
    _write(layout, out, z)


def backward_reduce(layout: Layout, saved: Saved, dy: Array, dz: Array | None) -> Sums:
    """Sum dz and dz * xhat."""
    centred = _centred(layout, saved)
    gradient = _gradient(layout, saved, centred, dy)
    if dz is not None:
        _write(layout, dz, gradient)
    centred *= gradient
    products = np.add.reduce(centred, 1)
    products *= saved.rstd
    return Sums(np.add.reduce(gradient, 1), products)


def backward_input(layout: Layout, saved: Saved, dy: Array, sums: Sums | None, out: Array) -> None:
    """Write dx."""
    centred = _centred(layout, saved)
    gradient = _gradient(layout, saved, centred, dy)
    rstd = saved.rstd
    if sums is not None:
        count = saved.positions
        centred *= (sums.dz_xhat * (rstd / count))[:, None]
        gradient -= centred
        gradient -= (sums.dz / count)[:, None]
    gradient *= (rstd if saved.weight is None else rstd * saved.weight)[:, None]
    _clear(gradient, layout.hidden(saved.valid))
    _write(layout, out, gradient)


def _read(layout: Layout, array: Array) -> Array:
    """A float64 copy as (C, N * S): NumPy sums pairwise along the last axis only."""
    by_channel = layout.read(array).transpose(1, 0, 2)
    return by_channel.astype(FLOAT64, order="C").reshape(layout.c, layout.count)


def _clear(array: Array, hidden: Array | None) -> None:
    """Put 0 where positions do not count."""
    if hidden is not None:
        np.copyto(array, 0, where=hidden.reshape(1, -1))


def _write(layout: Layout, out: Array, value: Array) -> None:
    layout.assign(out, value.reshape(layout.c, layout.n, layout.s).transpose(1, 0, 2))


def _centred(layout: Layout, saved: Saved) -> Array:
    centred = _read(layout, saved.x)
    centred -= saved.moments.mean[:, None]
    _clear(centred, layout.hidden(saved.valid))
    return centred


def _pre_activation(layout: Layout, saved: Saved, centred: Array, residual: Array | None) -> Array:
    rstd = saved.rstd
    z: Array = centred * (rstd if saved.weight is None else rstd * saved.weight)[:, None]
    if saved.bias is not None:
        z += saved.bias[:, None]
    if residual is not None:
        z += _read(layout, residual)
    return z


def _gradient(layout: Layout, saved: Saved, centred: Array, dy: Array) -> Array:
    """dz, in an array of its own."""
    gradient = _read(layout, dy)
    if not saved.spec.activation.is_identity:
        z = _pre_activation(layout, saved, centred, saved.residual)
        saved.spec.activation.gradient(z, gradient, gradient)
    _clear(gradient, layout.hidden(saved.valid))
    return gradient
