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
CHEAP = {"identity", "relu", "relu6", "leaky_relu", "hardswish", f"relu{OF_Y}"}
"""Names of activations that take few instructions and registers."""
ENDS = (-87.0, 88.0), (-708.0, 709.0)
"""Between these exp is a normal number, in float32 and in float64."""
MAGIC = 1.5 * 2.0**23 + 127, 1.5 * 2.0**52 + 1023
"""Added to a number, it rounds to an integer n; the last bits of the sum are the exponent of 2**n."""
LN2 = (0.693359375, -2.12194440e-4), (6.93147180369123816490e-01, 1.90821492927058770002e-10)
"""In two parts, of which the first has few bits, so that its products with integers are exact."""


def _interpolated(function, degree, low, high):
    """Coefficients, those of low powers first, of a polynomial that is nearly a function between two numbers.

    Its variable is -1 at ``low`` and 1 at ``high``.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    return [float(one) for one in cheb2poly(chebinterpolate(lambda x: function(middle + half * x), degree))]


def _exp_rest(r):
    """(exp(r) - 1 - r) / r**2."""
    return sum(r**i / math.factorial(i + 2) for i in range(14))


HALF_LN2 = 0.3466
"""A little more than ln(2) / 2."""
EXP_REST = (
    [one / HALF_LN2**i for i, one in enumerate(_interpolated(_exp_rest, 4, -HALF_LN2, HALF_LN2))],
    [1 / math.factorial(i + 2) for i in range(12)],
)
"""The same as polynomials in r, |r| <= ln(2) / 2, which make exp(r) right to 1e-8 in float32, 5e-18 in float64."""
BEYOND = 3.8
FIRST, LAST = 1 / (14.5 + BEYOND), 1 / BEYOND
"""r = 1 / (|z| + BEYOND) where the normal distribution's tail is too small for float32, and where z = 0."""


def _scaled_tail(r):
    """normal_cdf(-|z|) * exp(z**2 / 2) / r."""
    t = 2 / (2 + (1 / r - BEYOND) * SQRT_HALF)
    return t / 2 * exp_of(chebval(2 * t - 1, ERFC_SERIES)) / r


SCALED_TAIL = _interpolated(_scaled_tail, 8, FIRST, LAST)
"""To 5e-8, for float32, which so takes one exponential for the distribution and its density."""


def _polynomial(coefficients, x):
    result = x.like(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, coefficient)
    return result


def _reduced(x):
    """(p, power): exp(x) = (1 + p) * power, for x between the ends."""
    (low, high), magic, (upper, lower) = ENDS[x.double], MAGIC[x.double], LN2[x.double]
    x = where(x > high, high, x)
    x = where(x < low, low, x)
    shifted = fma(x, math.log2(math.e), magic)
    n = shifted - magic
    r = fma(n, -lower, fma(n, -upper, x))
    return fma(_polynomial(EXP_REST[x.double], r) * r, r, r), power_of_two(shifted)


def exp(x):
    p, power = _reduced(x)
    return fma(p, power, power)


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
    if z.double:
        x = abs(z) * SQRT_HALF
        t = 2 / (x + 2)
        u = fma(t, 2.0, -1.0)
        ahead = last = z.like(0.0)  # Clenshaw's recurrence
        for coefficient in ERFC_SERIES[:0:-1]:
            ahead, last = fma(u * 2, ahead, coefficient - last), ahead
        half = t * 0.5 * exp(fma(-x, x, fma(u, ahead, ERFC_SERIES[0] - last)))
    else:
        r = 1 / (abs(z) + BEYOND)
        u = fma(r, 2 / (LAST - FIRST), (LAST + FIRST) / (FIRST - LAST))
        half = r * _polynomial(SCALED_TAIL, u) * exp(-0.5 * z * z)
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
