"""The activations that batch normalisation can end with: one row each, value and exact gradient side by side.

A row's ``value(z)`` replaces ``z`` by ``y``; ``gradient(z, dy, out)`` writes ``dz = dy * activation'(z)``, where
``out`` may be ``z`` or ``dy`` itself. Both work on floating-point arrays of any shape, in the arrays' precision, and
propagate NaN. ``value_needs`` and ``gradient_needs`` count the temporary arrays of ``z``'s size each makes
(float64 ones count twice). ``device`` is the same for kernels.

At a kink the gradient is the one-sided limit that torch takes: relu'(0) = 0, relu6'(0) = relu6'(6) = 0,
leaky_relu'(0) = negative_slope, elu'(0) = alpha, hardswish'(-3) = 0, hardswish'(3) = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

Array = Any
SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
INV_SQRT_2PI = 0.3989422804014327
GELU_CUBIC = 0.044715
GELU_TANH_ENDS = 30.0
"""Beyond, in float64 too, the gradient is 0 on the left and 1 on the right; its factors would be 0 times infinity."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Name an activation and its parameter.

    Attributes:
        name: one of ``identity``, ``relu``, ``relu6``, ``leaky_relu``, ``elu``, ``silu``, ``gelu``, ``gelu_tanh``,
            ``hardswish``, ``sigmoid`` and ``tanh``. The spelling is torch's; ``gelu`` is the erf form, ``gelu_tanh``
            torch's ``approximate="tanh"``.
        parameter: ``negative_slope`` of ``leaky_relu``, ``alpha`` of ``elu``; unused by the others.

    Examples:
        >>> import gpu_bn
        >>> gpu_bn.Activation("leaky_relu", 0.2) == gpu_bn.leaky_relu(0.2)
        True
    """

    name: str
    parameter: float = 0.0

    def __post_init__(self) -> None:
        """Check the parameter.

        Raises:
            TypeError: it is not a real number.
            ValueError: it is NaN.
        """
        if not isinstance(self.parameter, (Real, np.number)) or isinstance(self.parameter, np.complexfloating):
            kind = type(self.parameter).__name__
            raise TypeError(f"the parameter of {self.name} should be a number, got {kind}: {self.parameter!r}")
        if self.parameter != self.parameter:
            raise ValueError(f"the parameter of {self.name} should be a number, got {self.parameter}")
        if type(self.parameter) is not float:  # kernels are compiled for floats
            object.__setattr__(self, "parameter", float(self.parameter))

    @staticmethod
    def of(activation: Activation | str | None) -> Activation:
        """The activation that a name stands for (``None`` is the identity); an ``Activation`` is returned as it is.

        Raises:
            TypeError: neither a name nor an ``Activation``.
            ValueError: an unknown name.
        """
        if activation is None:
            return IDENTITY
        if not isinstance(activation, (str, Activation)):
            raise TypeError(
                f"activation should be a name or an Activation, got {type(activation).__name__}: {activation!r}"
            )
        name = activation if isinstance(activation, str) else activation.name
        if name not in ROWS:
            raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ROWS)}")
        return ROWS[name].default if isinstance(activation, str) else activation

    @property
    def is_identity(self) -> bool:
        """Whether ``y = z``."""
        return self.name == "identity"

    @property
    def row(self) -> Row:
        """The row of the table below."""
        return ROWS[self.name]

    def value(self, z: Array) -> None:
        """Replace ``z`` by ``activation(z)``."""
        with np.errstate(all="ignore"):  # an exp that overflows or underflows is on its way to the right limit
            ROWS[self.name].value(z, self.parameter)

    def gradient(self, z: Array, dy: Array, out: Array) -> None:
        """Write ``dy * activation'(z)`` to ``out``, which may be ``z`` or ``dy``."""
        with np.errstate(all="ignore"):
            ROWS[self.name].gradient(z, dy, out, self.parameter)

    def __repr__(self) -> str:
        row = ROWS.get(self.name)
        return f"{self.name}({row.parameter}={self.parameter})" if row and row.parameter else self.name


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """An activation for kernels, in expressions that are C++ and Triton's Python alike.

    They know ``z``, ``dy``, the parameter ``p``, numbers, arithmetic, comparisons, ``|`` between comparisons, and the
    functions ``where(condition, then, otherwise)``, ``abs``, ``exp``, ``expm1``, ``tanh``, ``sigmoid``,
    ``sigmoid_slope`` (sigmoid') and ``normal_cdf``. All are in the precision of the statistics.

    Attributes:
        value: ``y`` from ``z``.
        gradient: ``dz`` from ``z`` and ``dy``, if the activation is smooth.
        drop, dropped: ``dz`` is ``dropped`` where ``drop`` holds and ``dy`` elsewhere, if one bit of ``z`` decides.
        slope: in place of ``dropped``, what ``dy`` is multiplied by.
    """

    value: str
    gradient: str = ""
    drop: str = ""
    dropped: str = ""
    slope: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One activation: its default form, its parameter's name, its code for NumPy and for kernels."""

    default: Activation
    parameter: str
    value: Callable[[Array, float], None]
    value_needs: int
    gradient: Callable[[Array, Array, Array, float], None]
    gradient_needs: int
    device: DeviceCode


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Make the activation that is ``z`` where ``z > 0``, else ``negative_slope * z``.

    Args:
        negative_slope: a real number; torch's default.

    Returns:
        An ``Activation`` for the argument ``activation=``.

    Raises:
        TypeError: the slope is not a real number.
        ValueError: the slope is NaN.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0], [3.0]])
        >>> gpu_bn.batch_norm(x, training=True, activation=gpu_bn.leaky_relu(0.2)).round(3)
        array([[-0.2],
               [ 1. ]])

    Source: Maas, Hannun & Ng 2013.
    """
    return replace(ROWS["leaky_relu"].default, parameter=float(negative_slope))


def elu(alpha: float = 1.0) -> Activation:
    """Make the activation that is ``z`` where ``z > 0``, else ``alpha * (exp(z) - 1)``.

    Args:
        alpha: a real number; torch's default.

    Returns:
        An ``Activation`` for the argument ``activation=``.

    Raises:
        TypeError: ``alpha`` is not a real number.
        ValueError: ``alpha`` is NaN.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0], [3.0]])
        >>> gpu_bn.batch_norm(x, training=True, activation=gpu_bn.elu(0.5)).round(3)
        array([[-0.316],
               [ 1.   ]])

    Source: Clevert, Unterthiner & Hochreiter 2016.
    """
    return replace(ROWS["elu"].default, parameter=float(alpha))


# ---------------------------------------------------------------------------------------------- piecewise linear
def _identity(z: Array, _: float) -> None:
    pass


def _identity_gradient(_z: Array, dy: Array, out: Array, _: float) -> None:
    if out is not dy:
        np.copyto(out, dy)


def _relu(z: Array, _: float) -> None:
    zeros = _zeros(z.dtype)
    for start in range(0, z.shape[-1], len(zeros)):
        part = z[..., start : start + len(zeros)]
        np.maximum(part, zeros[: part.shape[-1]], out=part)


def _relu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    _identity_where(~(z <= 0), dy, out, 0.0)


def _relu6(z: Array, _: float) -> None:
    _relu(z, 0.0)
    np.minimum(z, z.dtype.type(6), out=z)


def _relu6_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    _identity_where(~((z <= 0) | (z >= 6)), dy, out, 0.0)


def _leaky_relu(z: Array, negative_slope: float) -> None:
    """max(z, 0) + negative_slope * min(z, 0): one of the two is exact, the other zero."""
    negative = np.negative(z)
    _relu(negative, 0.0)
    negative *= -negative_slope
    _relu(z, 0.0)
    z += negative


def _leaky_relu_gradient(z: Array, dy: Array, out: Array, negative_slope: float) -> None:
    _identity_where(~(z <= 0), dy, out, negative_slope)


def _hardswish(z: Array, _: float) -> None:
    gate = np.clip(z + 3, 0, 6)
    gate /= 6
    z *= gate
    np.copyto(z, 0, where=gate == 0)


def _hardswish_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    slope = z / 3
    slope += 0.5
    np.copyto(slope, 0, where=z <= -3)
    np.copyto(slope, 1, where=z >= 3)
    np.multiply(dy, slope, out=out)


def _identity_where(keep: Array, dy: Array, out: Array, slope: float) -> None:
    """``dy`` where ``keep``, else ``slope * dy``; a slope of 0 gives 0 even where ``dy`` is infinite.

    Selects by masks of bits: NumPy's ``where`` takes several times longer on a random condition.
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
    """Zeros to compare with: NumPy's loop over two arrays is four times faster than with a scalar."""
    return np.zeros(32 << 10, dtype)


# ------------------------------------------------------------------------------------------------------- smooth
# Each is written with exp of a non-positive number where it can be, so that no tail loses its relative accuracy.
def _elu(z: Array, alpha: float) -> None:
    tail = np.expm1(np.minimum(z, 0))
    tail *= alpha
    np.copyto(z, tail, where=z <= 0)


def _elu_gradient(z: Array, dy: Array, out: Array, alpha: float) -> None:
    slope = np.exp(np.minimum(z, 0))
    slope *= alpha
    np.copyto(slope, 1, where=z > 0)
    np.multiply(dy, slope, out=out)


def _sigmoid(z: Array, _: float) -> None:
    np.negative(z, out=z)
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)


def _sigmoid_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    tail = np.exp(-np.abs(z))
    slope = tail + 1
    slope *= slope
    np.divide(tail, slope, out=slope)
    np.multiply(dy, slope, out=out)


def _silu(z: Array, _: float) -> None:
    denominator = np.exp(-z)
    denominator += 1
    z /= denominator


def _silu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    """silu' = s * (1 + z * (1 - s)), with s = sigmoid(z) and 1 - s = sigmoid(-z)."""
    slope = np.exp(z)
    slope += 1
    np.divide(z, slope, out=slope)
    slope += 1
    denominator = np.exp(-z)
    denominator += 1
    slope /= denominator
    np.multiply(dy, slope, out=out)


def _tanh(z: Array, _: float) -> None:
    np.tanh(z, out=z)


def _tanh_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    np.multiply(dy, _sech_squared(z), out=out)


def _sech_squared(z: Array) -> Array:
    """1 - tanh(z)**2 without its cancellation."""
    tail = np.exp(-2 * np.abs(z))
    slope = tail + 1
    slope *= slope
    np.divide(tail, slope, out=slope)
    slope *= 4
    return slope


def _gelu(z: Array, _: float) -> None:
    z *= normal_cdf(z)


def _gelu_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    """gelu' = Phi(z) + z * phi(z)."""
    slope = np.square(z)
    slope *= -0.5
    np.exp(slope, out=slope)
    slope *= INV_SQRT_2PI
    slope *= z
    slope += normal_cdf(z)
    np.multiply(dy, slope, out=out)


def _gelu_tanh(z: Array, _: float) -> None:
    """0.5 * (1 + tanh(u)) is sigmoid(2 * u), which keeps the left tail."""
    gate = _gelu_tanh_argument(z)
    gate *= 2
    _sigmoid(gate, 0.0)
    z *= gate


def _gelu_tanh_gradient(z: Array, dy: Array, out: Array, _: float) -> None:
    z = np.clip(z, -GELU_TANH_ENDS, GELU_TANH_ENDS)
    argument = _gelu_tanh_argument(z)
    slope = _sech_squared(argument)
    slope *= 0.5 * SQRT_2_OVER_PI
    slope *= z
    slope *= 1 + 3 * GELU_CUBIC * np.square(z)
    argument *= 2
    _sigmoid(argument, 0.0)
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
    """The standard normal distribution function, erfc(-z / sqrt(2)) / 2, in ``z``'s precision.

    Computed in float64, with a relative error below 1e-13 in the left tail as far as it is a normal number.
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


IDENTITY = Activation("identity")

GELU_TANH_ARGUMENT = f"{2 * SQRT_2_OVER_PI} * z * (1 + {GELU_CUBIC} * z * z)"
"""Twice the argument of gelu_tanh's tanh."""
GELU_TANH_SLOPE = f"{2 * SQRT_2_OVER_PI} * (1 + {3 * GELU_CUBIC} * z * z)"
GELU_TANH_DERIVATIVE = f"sigmoid({GELU_TANH_ARGUMENT}) * (1 + z * sigmoid(-({GELU_TANH_ARGUMENT})) * {GELU_TANH_SLOPE})"

ROWS = {
    row.default.name: row
    for row in (
        Row(IDENTITY, "", _identity, 0, _identity_gradient, 0, DeviceCode("z", "dy")),
        Row(
            Activation("relu"), "", _relu, 0, _relu_gradient, 2,
            DeviceCode("where(z < 0, 0, z)", drop="z <= 0", dropped="0"),
        ),
        Row(
            Activation("relu6"), "", _relu6, 0, _relu6_gradient, 2,
            DeviceCode("where(z < 0, 0, where(z > 6, 6, z))", drop="(z <= 0) | (z >= 6)", dropped="0"),
        ),
        Row(
            Activation("leaky_relu", 0.01), "negative_slope", _leaky_relu, 1, _leaky_relu_gradient, 3,
            DeviceCode("where(z <= 0, p * z, z)", drop="z <= 0", slope="p"),
        ),
        Row(
            Activation("elu", 1.0), "alpha", _elu, 2, _elu_gradient, 2,
            DeviceCode("where(z <= 0, p * expm1(z), z)", "dy * where(z > 0, 1, p * exp(z))"),
        ),
        Row(
            Activation("silu"), "", _silu, 1, _silu_gradient, 2,
            DeviceCode("z * sigmoid(z)", "dy * sigmoid(z) * (1 + z * sigmoid(-z))"),
        ),
        Row(
            Activation("gelu"), "", _gelu, 16, _gelu_gradient, 18,
            DeviceCode("z * normal_cdf(z)", f"dy * (normal_cdf(z) + {INV_SQRT_2PI} * z * exp(-0.5 * z * z))"),
        ),
        Row(
            Activation("gelu_tanh"), "", _gelu_tanh, 1, _gelu_tanh_gradient, 5,
            DeviceCode(
                f"z * sigmoid({GELU_TANH_ARGUMENT})",
                f"dy * where(z < -{GELU_TANH_ENDS}, 0, where(z > {GELU_TANH_ENDS}, 1, {GELU_TANH_DERIVATIVE}))",
            ),
        ),
        Row(
            Activation("hardswish"), "", _hardswish, 2, _hardswish_gradient, 2,
            DeviceCode(
                "where(z <= -3, 0, where(z >= 3, z, z * ((z + 3) / 6)))",
                "where(z <= -3, 0, dy * where(z >= 3, 1, z / 3 + 0.5))",
            ),
        ),
        Row(
            Activation("sigmoid"), "", _sigmoid, 0, _sigmoid_gradient, 3,
            DeviceCode("sigmoid(z)", "dy * sigmoid_slope(z)"),
        ),
        Row(
            Activation("tanh"), "", _tanh, 0, _tanh_gradient, 3,
            DeviceCode("tanh(z)", "dy * 4 * sigmoid_slope(2 * z)"),
        ),
    )
}  # fmt: skip
