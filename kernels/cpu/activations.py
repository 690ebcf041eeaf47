"""Generate the activations of :mod:`gpu_bn.activations` on vectors.

The table there has their expressions, which all kernels share. This module defines the functions in the expressions.
"""

import math

from numpy import exp as exp_of
from numpy.polynomial.chebyshev import cheb2poly, chebinterpolate, chebval

from gpu_bn.activation_values import ERFC_SERIES, SQRT_HALF
from gpu_bn.activations import ROWS
from gpu_bn.kernels.cpu.vector import fma, power_of_two, where

OF_Y = " of y"
"""The end of an activation's name if its gradient is computed from y, which kernels then get as the residual."""
NAMES = (*ROWS, f"relu{OF_Y}")
"""Names of the activations. Kernels get an index into this tuple; index 0 is the identity."""
CHEAP = {"identity", "relu", "relu6", "leaky_relu", "hardswish", f"relu{OF_Y}"}
"""Names of the activations that need few instructions and registers."""
ENDS = (-87.0, 88.0), (-708.0, 709.0)
"""The ranges in which exp is a normal number, in float32 and in float64."""
MAGIC = 1.5 * 2.0**23 + 127, 1.5 * 2.0**52 + 1023
"""Numbers that round z to an integer n when added to it; the last bits of the sum are then the exponent of 2**n."""
LN2 = (0.693359375, -2.12194440e-4), (6.93147180369123816490e-01, 1.90821492927058770002e-10)
"""The natural logarithm of 2 as two numbers. The first has few bits, so that its products with integers are exact."""


def _interpolated(function, degree, low, high):
    """Return the coefficients, lowest power first, of a polynomial that interpolates a function on [low, high].

    Its variable is -1 at ``low`` and 1 at ``high``.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    return [float(c) for c in cheb2poly(chebinterpolate(lambda x: function(middle + half * x), degree))]


def _exp_rest(r):
    """Return (exp(r) - 1 - r) / r**2."""
    return sum(r**i / math.factorial(i + 2) for i in range(14))


HALF_LN2 = 0.3466
"""A little more than ln(2) / 2."""
EXP_REST = (
    [c / HALF_LN2**i for i, c in enumerate(_interpolated(_exp_rest, 4, -HALF_LN2, HALF_LN2))],
    [1 / math.factorial(i + 2) for i in range(12)],
)
"""Coefficients of ``_exp_rest``, for |r| <= ln(2) / 2; exp(r) has an error of 1e-8 in float32, 5e-18 in float64."""
TAIL_OFFSET = 3.8
TAIL_FIRST, TAIL_LAST = 1 / (14.5 + TAIL_OFFSET), 1 / TAIL_OFFSET
"""The range of r = 1 / (|z| + TAIL_OFFSET), from |z| = 14.5, where normal_cdf(-|z|) underflows in float32, to z = 0."""


def _scaled_tail(r):
    """Return normal_cdf(-|z|) * exp(z**2 / 2) / r."""
    t = 2 / (2 + (1 / r - TAIL_OFFSET) * SQRT_HALF)
    return t / 2 * exp_of(chebval(2 * t - 1, ERFC_SERIES)) / r


SCALED_TAIL = _interpolated(_scaled_tail, 8, TAIL_FIRST, TAIL_LAST)
"""Coefficients of ``_scaled_tail`` in float32, with an error of 5e-8; normal_cdf and its density share one exp."""


def _polynomial(coefficients, x):
    """Return the value of a polynomial at x by Horner's rule; the coefficient of the lowest power is first."""
    result = x.broadcast(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, coefficient)
    return result


def _split_exp(x):
    """Return (p, power) with exp(x) = (1 + p) * power. x is clamped to ``ENDS``."""
    (low, high), magic, (upper, lower) = ENDS[x.double], MAGIC[x.double], LN2[x.double]
    x = where(x > high, high, x)
    x = where(x < low, low, x)
    shifted = fma(x, math.log2(math.e), magic)
    n = shifted - magic
    r = fma(n, -lower, fma(n, -upper, x))
    return fma(_polynomial(EXP_REST[x.double], r) * r, r, r), power_of_two(shifted)


def exp(x):
    p, power = _split_exp(x)
    return fma(p, power, power)


def expm1(x):
    p, power = _split_exp(x)
    return fma(p, power, power - 1)


def sigmoid(z):
    return 1 / (exp(-z) + 1)


def sigmoid_slope(z):
    tail = exp(-abs(z))
    return tail / ((tail + 1) * (tail + 1))


def tanh(z):
    e = expm1(abs(z) * -2)
    t = -e / (e + 2)
    return where(z < 0, -t, t)


def normal_cdf(z):
    """Return the standard normal distribution function; see :func:`gpu_bn.activation_values.normal_cdf`."""
    if z.double:
        x = abs(z) * SQRT_HALF
        t = 2 / (x + 2)
        u = fma(t, 2.0, -1.0)
        b1 = b2 = z.broadcast(0.0)  # Clenshaw's recurrence
        for coefficient in ERFC_SERIES[:0:-1]:
            b1, b2 = fma(u * 2, b1, coefficient - b2), b1
        tail = t * 0.5 * exp(fma(-x, x, fma(u, b1, ERFC_SERIES[0] - b2)))
    else:
        r = 1 / (abs(z) + TAIL_OFFSET)
        u = fma(r, 2 / (TAIL_LAST - TAIL_FIRST), (TAIL_LAST + TAIL_FIRST) / (TAIL_FIRST - TAIL_LAST))
        tail = r * _polynomial(SCALED_TAIL, u) * exp(-0.5 * z * z)
    return where(z > 0, 1 - tail, tail)


FUNCTIONS = {
    function.__name__: function for function in (where, abs, exp, expm1, tanh, sigmoid, sigmoid_slope, normal_cdf)
}


def value(activation, z, p):
    """Return y for z."""
    return eval(ROWS[NAMES[activation]].device.value, FUNCTIONS, {"z": z, "p": p})  # from the table of this package


def gradient(activation, z, dy, p):
    """Return dz for dy and z, or for dy and ``z`` = y if the name of the activation ends with ``OF_Y``."""
    code = ROWS[NAMES[activation].removesuffix(OF_Y)].device
    chosen = f"where({code.drop}, {f'dy * {code.slope}' if code.slope else code.dropped}, dy)"
    return eval(code.gradient or chosen, FUNCTIONS, {"z": z, "dy": dy, "p": p})
