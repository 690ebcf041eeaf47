"""The activations on NumPy arrays: values and exact gradients.

``name(z, parameter)`` replaces ``z`` by ``y``; ``name_gradient(z, dy, out, parameter)`` writes
``dz = dy * activation'(z)`` to ``out``, which may be ``z`` or ``dy`` itself. Both take floating-point arrays of any
shape, work in the arrays' precision and propagate NaN.

At a kink the gradient is the one-sided limit that torch takes: relu'(0) = 0, relu6'(0) = relu6'(6) = 0,
leaky_relu'(0) = negative_slope, elu'(0) = alpha, hardswish'(-3) = 0, hardswish'(3) = 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

Array = Any
SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
INV_SQRT_2PI = 0.3989422804014327
GELU_CUBIC = 0.044715
GELU_TANH_ENDS = 30.0
"""Beyond +-30 the gradient is 0 or 1 to rounding, even in float64, and its formula would compute 0 * infinity."""


# ---------------------------------------------------------------------------------------------- piecewise linear
def identity(z: Array, _: float) -> None:
    pass


def identity_gradient(_z: Array, dy: Array, out: Array, _: float) -> None:
    if out is not dy:
        np.copyto(out, dy)


def relu(z: Array, _: float) -> None:
    zeros = _zeros(z.dtype)
    for start in range(0, z.shape[-1], len(zeros)):
        part = z[..., start : start + len(zeros)]
        np.maximum(part, zeros[: part.shape[-1]], out=part)


def relu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    _identity_where(~(z <= 0), dy, out, 0.0)


def relu6(z: Array, _: float) -> None:
    relu(z, 0.0)
    np.minimum(z, z.dtype.type(6), out=z)


def relu6_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    _identity_where(~((z <= 0) | (z >= 6)), dy, out, 0.0)


def leaky_relu(z: Array, negative_slope: float) -> None:
    """Compute ``max(z, 0) + negative_slope * min(z, 0)``; one of the two terms is 0, so the sum is exact."""
    negative = np.negative(z)
    relu(negative, 0.0)
    negative *= -negative_slope
    relu(z, 0.0)
    z += negative


def leaky_relu_gradient(z: Array, dy: Array, out: Array, negative_slope: float) -> None:
    _identity_where(~(z <= 0), dy, out, negative_slope)


def hardswish(z: Array, _: float) -> None:
    gate = np.clip(z + 3, 0, 6)
    gate /= 6
    z *= gate
    np.copyto(z, 0, where=gate == 0)


def hardswish_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    slope = z / 3
    slope += 0.5
    np.copyto(slope, 0, where=z <= -3)
    np.copyto(slope, 1, where=z >= 3)
    np.multiply(dy, slope, out=out)


def _identity_where(keep: Array, dy: Array, out: Array, slope: float) -> None:
    """Write ``dy`` to ``out`` where ``keep``, else ``slope * dy``; a slope of 0 gives 0 even where ``dy`` is infinite.

    The values are selected by bit masks, for ``np.where`` takes several times longer on a random condition.
    """
    bits = np.dtype(f"i{dy.itemsize}")
    mask = keep.view(np.int8).astype(bits)
    np.negative(mask, out=mask)
    scaled = dy * dy.dtype.type(slope) if slope else None
    np.bitwise_and(dy.view(bits), mask, out=out.view(bits))
    if scaled is not None:
        np.invert(mask, out=mask)
        mask &= scaled.view(bits)
        np.bitwise_or(out.view(bits), mask, out=out.view(bits))


@lru_cache
def _zeros(dtype: np.dtype[Any]) -> Array:
    """Return zeros for ``np.maximum``, which is four times faster with two arrays than with an array and a scalar."""
    return np.zeros(32 << 10, dtype)


# ------------------------------------------------------------------------------------------------------- smooth
# Where possible exp gets a non-positive argument, so that the tails keep their relative accuracy.
def elu(z: Array, alpha: float) -> None:
    tail = np.expm1(np.minimum(z, 0))
    tail *= alpha
    np.copyto(z, tail, where=z <= 0)


def elu_gradient(z: Array, dy: Array, out: Array, alpha: float) -> None:
    slope = np.exp(np.minimum(z, 0))
    slope *= alpha
    np.copyto(slope, 1, where=z > 0)
    np.multiply(dy, slope, out=out)


def sigmoid(z: Array, _: float) -> None:
    np.negative(z, out=z)
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)


def sigmoid_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    tail = np.exp(-np.abs(z))
    slope = tail + 1
    slope *= slope
    np.divide(tail, slope, out=slope)
    np.multiply(dy, slope, out=out)


def silu(z: Array, _: float) -> None:
    denominator = np.exp(-z)
    denominator += 1
    z /= denominator


def silu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    """Compute ``dy * s * (1 + z * (1 - s))``, with ``s = sigmoid(z)`` and ``1 - s = sigmoid(-z)``."""
    slope = np.exp(z)
    slope += 1
    np.divide(z, slope, out=slope)
    slope += 1
    denominator = np.exp(-z)
    denominator += 1
    slope /= denominator
    np.multiply(dy, slope, out=out)


def tanh(z: Array, _: float) -> None:
    np.tanh(z, out=z)


def tanh_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    np.multiply(dy, _sech_squared(z), out=out)


def _sech_squared(z: Array) -> Array:
    """Compute ``1 - tanh(z)**2`` without cancellation."""
    tail = np.exp(-2 * np.abs(z))
    slope = tail + 1
    slope *= slope
    np.divide(tail, slope, out=slope)
    slope *= 4
    return slope


def gelu(z: Array, _: float) -> None:
    z *= normal_cdf(z)


def gelu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    """Compute ``dy * (Phi(z) + z * phi(z))``."""
    slope = np.square(z)
    slope *= -0.5
    np.exp(slope, out=slope)
    slope *= INV_SQRT_2PI
    slope *= z
    slope += normal_cdf(z)
    np.multiply(dy, slope, out=out)


def gelu_tanh(z: Array, _: float) -> None:
    """Compute ``z * sigmoid(2 * u)``, which equals ``z * 0.5 * (1 + tanh(u))`` but is accurate in the left tail."""
    gate = _gelu_tanh_argument(z)
    gate *= 2
    sigmoid(gate, 0.0)
    z *= gate


def gelu_tanh_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    z = np.clip(z, -GELU_TANH_ENDS, GELU_TANH_ENDS)
    argument = _gelu_tanh_argument(z)
    slope = _sech_squared(argument)
    slope *= 0.5 * SQRT_2_OVER_PI
    slope *= z
    slope *= 1 + 3 * GELU_CUBIC * np.square(z)
    argument *= 2
    sigmoid(argument, 0.0)
    slope += argument
    np.multiply(dy, slope, out=out)


def _gelu_tanh_argument(z: Array) -> Array:
    argument = np.square(z)
    argument *= GELU_CUBIC
    argument += 1
    argument *= z
    argument *= SQRT_2_OVER_PI
    return argument


# log(erfc(x) * exp(x**2) / t), t = 2 / (2 + x), x >= 0, as a Chebyshev series in 2 * t - 1: the method of Schonfelder
# (1978); the coefficients were computed to 40 digits from the definition and rounded.
ERFC_SERIES = (
    -0.6513268598908547,
    0.6419697923564902,
    0.019476473204185836,
    -0.009561514786808632,
    -0.0009465953444820369,
    0.00036683949785276145,
    4.252332480690777e-05,
    -2.0278578112534242e-05,
    -1.6242900046470256e-06,
    1.3036558355805232e-06,
    1.5626441722066142e-08,
    -8.523809591492654e-08,
    6.5290544390988515e-09,
    5.059343495551469e-09,
    -9.91364156493033e-10,
    -2.273651222931836e-10,
    9.646791102015527e-11,
    2.3940380830391146e-12,
    -6.886027526497553e-12,
    8.944879273090725e-13,
    3.130921399342958e-13,
    -1.1270822361367252e-13,
    3.810905255189232e-16,
    7.106097613609237e-15,
    -1.5230282014571043e-15,
    -9.457494571291233e-17,
    1.210237189224279e-16,
    -2.816663087747177e-17,
)


def normal_cdf(z: Array) -> Array:
    """Compute the standard normal distribution function, erfc(-z / sqrt(2)) / 2, in float64; return ``z``'s dtype.

    Where the result is a normal number, its relative error is below 1e-13, in the left tail too.
    """
    x = np.abs(z, dtype=np.float64)
    x *= SQRT_HALF
    t = 2 / (2 + x)
    twice_u = 4 * t - 2
    ahead = last = np.zeros_like(x)  # Clenshaw's recurrence
    for coefficient in ERFC_SERIES[:0:-1]:
        ahead, last = twice_u * ahead - last + coefficient, ahead
    half_erfc = 0.5 * t * np.exp(0.5 * twice_u * ahead - last + ERFC_SERIES[0] - x * x)
    return np.where(z > 0, 1 - half_erfc, half_erfc).astype(z.dtype, copy=False)
