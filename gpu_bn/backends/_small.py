"""Tensors too small for tiles to pay: whole-array expressions in float64, and as few of them as can be.

The mean is always subtracted first, so that nothing need be checked. The functions are the phases of
:class:`gpu_bn.backends.protocol.Backend`, on tensors seen as (N, C, S).
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
POSITIONS = (0, 2)
FLOAT64 = np.dtype(np.float64)


def stats(layout: Layout, x: Array) -> Moments:
    """Two-pass mean and variance."""
    count = layout.count
    wide = layout.read(x).astype(FLOAT64)
    mean = np.add.reduce(wide, POSITIONS)
    mean /= count
    wide -= mean[:, None]
    np.multiply(wide, wide, out=wide)
    var = np.add.reduce(wide, POSITIONS)
    var /= count
    return Moments(count, mean, var)


def normalize(layout: Layout, saved: Saved, residual: Array | None, out: Array) -> None:
    """Write y."""
    z = _pre_activation(layout, saved, _centred(layout, saved), residual)
    saved.spec.activation.value(z)
    layout.assign(out, z)


def backward_reduce(layout: Layout, saved: Saved, dy: Array, dz: Array | None) -> Sums:
    """Sum dz and dz * xhat."""
    centred = _centred(layout, saved)
    gradient = _gradient(layout, saved, centred, dy)
    if dz is not None:
        layout.assign(dz, gradient)
    centred *= gradient
    products = np.add.reduce(centred, POSITIONS)
    products *= saved.rstd
    return Sums(np.add.reduce(gradient, POSITIONS), products)


def backward_input(layout: Layout, saved: Saved, dy: Array, sums: Sums | None, out: Array) -> None:
    """Write dx."""
    centred = _centred(layout, saved)
    gradient = _gradient(layout, saved, centred, dy)
    rstd = saved.rstd
    if sums is not None:
        centred *= (sums.dz_xhat * (rstd / layout.count))[:, None]
        gradient -= centred
        gradient -= (sums.dz / layout.count)[:, None]
    gradient *= (rstd if saved.weight is None else rstd * saved.weight)[:, None]
    layout.assign(out, gradient)


def _centred(layout: Layout, saved: Saved) -> Array:
    centred = layout.read(saved.x).astype(FLOAT64)
    centred -= saved.moments.mean[:, None]
    return centred


def _pre_activation(layout: Layout, saved: Saved, centred: Array, residual: Array | None) -> Array:
    rstd = saved.rstd
    z: Array = centred * (rstd if saved.weight is None else rstd * saved.weight)[:, None]
    if saved.bias is not None:
        z += saved.bias[:, None]
    if residual is not None:
        z += layout.read(residual)
    return z


def _gradient(layout: Layout, saved: Saved, centred: Array, dy: Array) -> Array:
    """dz, in an array of its own."""
    gradient = layout.read(dy).astype(FLOAT64)
    if not saved.spec.activation.is_identity:
        z = _pre_activation(layout, saved, centred, saved.residual)
        saved.spec.activation.gradient(z, gradient, gradient)
    return gradient
