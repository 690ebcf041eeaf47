"""The activations of :mod:`gpu_bn.activations` on vectors, in code that is being generated.

Their expressions are the table's, one for all kernels; here are the functions that the expressions know.
"""

import math

from numpy import exp as exp_of
from numpy.polynomial.chebyshev import cheb2poly, chebinterpolate, chebval

from gpu_bn.activation_values import ERFC_SERIES, SQRT_HALF
from gpu_bn.activations import ROWS
from gpu_bn.kernels.cpu.vector import fma, power_of_two, where

OF_Y = " of y"
"""Ends the name of an activation whose gradient is told from y, which kernels then get in the residual's place."""
NAMES = (*ROWS, f"relu{OF_Y}")
"""Kernels know an activation by its place in here; the first is the identity."""
ENDS = (-87.0, 88.0), (-708.0, 709.0)
"""Between these exp is a normal number, in float32 and in float64."""
MAGIC = 1.5 * 2.0**23, 1.5 * 2.0**52
"""Added to a number, it rounds to an integer."""
LN2 = (0.693359375, -2.12194440e-4), (6.93147180369123816490e-01, 1.90821492927058770002e-10)
"""In two parts, of which the first has few bits, so that its products with integers are exact."""
TERMS = 7, 13
"""Of the exponential series, for |r| <= ln(2) / 2."""


def _scaled_erfc(u):
    """erfc(x) * exp(x**2) / t at u = 2 * t - 1."""
    return exp_of(chebval(u, ERFC_SERIES))


HALF_ERFC = cheb2poly(chebinterpolate(_scaled_erfc, 10)) / 2
"""erfc(x) * exp(x**2) / (2 * t) as a polynomial in 2 * t - 1, to 3e-8: for float32, which so takes one exponential for
the distribution and its density."""


def _reduced(x):
    """(p, power): exp(x) = (1 + p) * power, for x between the ends."""
    (low, high), magic, (upper, lower) = ENDS[x.double], MAGIC[x.double], LN2[x.double]
    x = where(x < low, low, where(x > high, high, x))
    shifted = fma(x, math.log2(math.e), magic)
    n = shifted - magic
    r = fma(n, -lower, fma(n, -upper, x))
    p = r.like(1.0 / math.factorial(TERMS[x.double]))
    for i in range(TERMS[x.double] - 1, 1, -1):
        p = fma(p, r, 1.0 / math.factorial(i))
    return fma(p * r, r, r), power_of_two(shifted)


def exp(x):
    p, power = _reduced(x)
    return (p + 1) * power


def expm1(x):
    p, power = _reduced(x)
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
    """The standard normal distribution function; see :func:`gpu_bn.activation_values.normal_cdf`."""
    x = abs(z) * SQRT_HALF
    t = 2 / (x + 2)
    u = fma(t, 2.0, -1.0)
    if z.double:
        ahead = last = z.like(0.0)  # Clenshaw's recurrence
        for coefficient in ERFC_SERIES[:0:-1]:
            ahead, last = fma(u * 2, ahead, coefficient - last), ahead
        half = t * 0.5 * exp(fma(-x, x, fma(u, ahead, ERFC_SERIES[0] - last)))
    else:
        scaled = z.like(0.0)
        for coefficient in HALF_ERFC[::-1]:
            scaled = fma(scaled, u, float(coefficient))
        half = t * scaled * exp(-0.5 * z * z)
    return where(z > 0, 1 - half, half)


FUNCTIONS = {
    function.__name__: function for function in (where, abs, exp, expm1, tanh, sigmoid, sigmoid_slope, normal_cdf)
}


def value(which, z, p):
    """``y`` from ``z``."""
    return eval(ROWS[NAMES[which]].device.value, FUNCTIONS, {"z": z, "p": p})  # an expression of the package's table


def gradient(which, z, dy, p):
    """``dz`` from ``z``, or from ``y`` where the name says so, and ``dy``."""
    code = ROWS[NAMES[which].removesuffix(OF_Y)].device
    chosen = f"where({code.drop}, {f'dy * {code.slope}' if code.slope else code.dropped}, dy)"
    return eval(code.gradient or chosen, FUNCTIONS, {"z": z, "dy": dy, "p": p})
