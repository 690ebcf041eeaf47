"""The functions that the expressions of activations call, for float32 and float64 blocks.

Each keeps its relative accuracy in the tails, has the right limits at infinity and propagates NaN. They are written
out because Triton's interpreter has no device library and ``tl.exp`` loses the low bits of large arguments.
"""

import triton
import triton.language as tl

from gpu_bn.activation_values import ERFC_SERIES, SQRT_HALF

LOG2E = tl.constexpr(1.44269502162933349609375)
LOG2E_REST = tl.constexpr(1.925963033500468e-08)
LN2 = tl.constexpr(0.6931471805599453)
SERIES = tl.constexpr(ERFC_SERIES)
ROOT = tl.constexpr(SQRT_HALF)


@triton.jit
def where(condition, then, otherwise):
    return tl.where(condition, then, otherwise)


@triton.jit
def abs(z):
    return tl.abs(z)


@triton.jit
def exp(z):
    """Return e**z; the part of z * log2(e) that float32 cannot hold is added to first order."""
    if z.dtype == tl.float64:
        return tl.exp(z)
    else:
        z = tl.where(z > 120.0, 120.0, tl.where(z < -120.0, -120.0, z))
        high = z * LOG2E
        low = tl.fma(z, LOG2E, -high) + z * LOG2E_REST
        power = tl.exp2(high)
        return tl.where(power < float("inf"), tl.fma(power, low * LN2, power), power)


@triton.jit
def expm1(z):
    """Return e**z - 1; where abs(z) < 1, by its Taylor series."""
    TERMS: tl.constexpr = 18 if z.dtype == tl.float64 else 11
    series = z * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        series = tl.fma(series, z * (1.0 / (TERMS - i)), 1.0)
    return tl.where(tl.abs(z) < 1.0, z * series, exp(z) - 1.0)


@triton.jit
def tanh(z):
    tail = expm1(-2.0 * tl.abs(z))
    size = tail / (-2.0 - tail)
    return tl.where(z < 0.0, -size, size)


@triton.jit
def sigmoid(z):
    tail = exp(-tl.abs(z))
    return tl.where(z < 0.0, tail, 1.0) / (1.0 + tail)


@triton.jit
def sigmoid_slope(z):
    """Return sigmoid(z) * (1 - sigmoid(z)), computed without overflow."""
    tail = exp(-tl.abs(z))
    whole = 1.0 / (1.0 + tail)
    return tail * whole * whole


@triton.jit
def normal_cdf(z):
    """Return the standard normal distribution function by the series of :func:`gpu_bn.activation_values.normal_cdf`.

    The result has a factor exp(-z * z / 2). The rounding error of z * z goes into a second factor.
    """
    TERMS: tl.constexpr = 28 if z.dtype == tl.float64 else 14
    size = tl.abs(z)
    size = tl.where(size > 40.0, 40.0, size)
    t = 2.0 / (2.0 + size * ROOT)
    twice_u = 4.0 * t - 2.0
    ahead = size * 0.0
    last = ahead
    for i in tl.static_range(TERMS - 1):
        following = tl.fma(twice_u, ahead, SERIES[TERMS - 1 - i] - last)
        last = ahead
        ahead = following
    series = tl.fma(0.5 * twice_u, ahead, SERIES[0] - last)
    square = size * size
    rest = tl.fma(size, size, -square)
    half_erfc = 0.5 * t * exp(-0.5 * square) * exp(series - 0.5 * rest)
    return tl.where(z > 0.0, 1.0 - half_erfc, half_erfc)
