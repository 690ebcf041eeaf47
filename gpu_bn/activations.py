"""The table of activations that may follow the normalisation, one row for each.

A row has the functions for NumPy arrays (:mod:`gpu_bn.activation_values`) and, as ``device``, expressions for kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from gpu_bn import activation_values as values

Array = Any


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation, given by its name and its parameter.

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
            TypeError: the parameter is not a real number.
            ValueError: the parameter is NaN.
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
        """Return the activation of a name (``None`` is the identity); an ``Activation`` is returned unchanged.

        Raises:
            TypeError: ``activation`` is neither a name nor an ``Activation``.
            ValueError: the name is unknown.
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
        """The activation's row in :data:`ROWS`."""
        return ROWS[self.name]

    def value(self, z: Array) -> None:
        """Replace ``z`` by ``activation(z)``."""
        with np.errstate(all="ignore"):  # where exp overflows or underflows, the result is the right limit
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
    """An activation for kernels, as expressions that are valid in C++ and in Triton's Python.

    They may use ``z``, ``dy``, the parameter ``p``, numbers, arithmetic, comparisons, ``|`` between comparisons, and
    the functions ``where(condition, then, otherwise)``, ``abs``, ``exp``, ``expm1``, ``tanh``, ``sigmoid``,
    ``sigmoid_slope`` (sigmoid') and ``normal_cdf``. All values have the precision of the statistics.

    Attributes:
        value: ``y``, computed from ``z``.
        gradient: ``dz``, computed from ``z`` and ``dy``; empty if one bit of ``z`` decides.
        drop, dropped: if one bit decides, ``dz`` is ``dropped`` where the condition ``drop`` holds, else ``dy``.
        slope: if given, ``dz`` is ``slope * dy`` where ``drop`` holds, and ``dropped`` is empty.
    """

    value: str
    gradient: str = ""
    drop: str = ""
    dropped: str = ""
    slope: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One activation: its default, the name of its parameter, its functions for NumPy and its code for kernels.

    ``value_needs`` and ``gradient_needs`` are the numbers of temporary arrays of ``z``'s size that the functions for
    NumPy allocate; float64 arrays count twice.
    """

    default: Activation
    parameter: str
    value: Callable[[Array, float], None]
    value_needs: int
    gradient: Callable[[Array, Array, Array, float], None]
    gradient_needs: int
    device: DeviceCode


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Return the activation ``z`` where ``z > 0``, else ``negative_slope * z``.

    Args:
        negative_slope: a real number; the default is that of torch.

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
    return _with_parameter("leaky_relu", negative_slope)


def elu(alpha: float = 1.0) -> Activation:
    """Return the activation ``z`` where ``z > 0``, else ``alpha * (exp(z) - 1)``.

    Args:
        alpha: a real number; the default is that of torch.

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
    return _with_parameter("elu", alpha)


def _with_parameter(name: str, value: Any) -> Activation:
    """Return an activation with a parameter; a number of an array library, such as a 0-d tensor, serves too."""
    return replace(ROWS[name].default, parameter=float(value) if hasattr(value, "__float__") else value)


def make_activation(name: str, parameter: float) -> Activation:
    """Return the activation with a name and a parameter; for the default parameter, the one in the table."""
    default = ROWS[name].default
    return default if default.parameter == parameter else Activation(name, parameter)


IDENTITY = Activation("identity")

ENDS = values.GELU_TANH_ENDS

GELU_TANH_ARGUMENT = f"{2 * values.SQRT_2_OVER_PI} * z * (1 + {values.GELU_CUBIC} * z * z)"
"""Twice the argument of tanh in gelu_tanh."""
GELU_TANH_SLOPE = f"{2 * values.SQRT_2_OVER_PI} * (1 + {3 * values.GELU_CUBIC} * z * z)"
GELU_TANH_DERIVATIVE = f"sigmoid({GELU_TANH_ARGUMENT}) * (1 + z * sigmoid(-({GELU_TANH_ARGUMENT})) * {GELU_TANH_SLOPE})"

ROWS = {
    row.default.name: row
    for row in (
        Row(IDENTITY, "", values.identity, 0, values.identity_gradient, 0, DeviceCode("z", "dy")),
        Row(
            Activation("relu"), "", values.relu, 0, values.relu_gradient, 2,
            DeviceCode("where(z < 0, 0, z)", drop="z <= 0", dropped="0"),
        ),
        Row(
            Activation("relu6"), "", values.relu6, 0, values.relu6_gradient, 2,
            DeviceCode("where(z < 0, 0, where(z > 6, 6, z))", drop="(z <= 0) | (z >= 6)", dropped="0"),
        ),
        Row(
            Activation("leaky_relu", 0.01), "negative_slope", values.leaky_relu, 1, values.leaky_relu_gradient, 3,
            DeviceCode("where(z <= 0, p * z, z)", drop="z <= 0", slope="p"),
        ),
        Row(
            Activation("elu", 1.0), "alpha", values.elu, 2, values.elu_gradient, 2,
            DeviceCode("where(z <= 0, p * expm1(z), z)", "dy * where(z > 0, 1, p * exp(z))"),
        ),
        Row(
            Activation("silu"), "", values.silu, 1, values.silu_gradient, 2,
            DeviceCode("z * sigmoid(z)", "dy * sigmoid(z) * (1 + z * sigmoid(-z))"),
        ),
        Row(
            Activation("gelu"), "", values.gelu, 16, values.gelu_gradient, 18,
            DeviceCode("z * normal_cdf(z)", f"dy * (normal_cdf(z) + {values.INV_SQRT_2PI} * z * exp(-0.5 * z * z))"),
        ),
        Row(
            Activation("gelu_tanh"), "", values.gelu_tanh, 1, values.gelu_tanh_gradient, 5,
            DeviceCode(
                f"z * sigmoid({GELU_TANH_ARGUMENT})",
                f"dy * where(z < -{ENDS}, 0, where(z > {ENDS}, 1, {GELU_TANH_DERIVATIVE}))",
            ),
        ),
        Row(
            Activation("hardswish"), "", values.hardswish, 2, values.hardswish_gradient, 2,
            DeviceCode(
                "where(z <= -3, 0, where(z >= 3, z, z * ((z + 3) / 6)))",
                "where(z <= -3, 0, dy * where(z >= 3, 1, z / 3 + 0.5))",
            ),
        ),
        Row(
            Activation("sigmoid"), "", values.sigmoid, 0, values.sigmoid_gradient, 3,
            DeviceCode("sigmoid(z)", "dy * sigmoid_slope(z)"),
        ),
        Row(
            Activation("tanh"), "", values.tanh, 0, values.tanh_gradient, 3,
            DeviceCode("tanh(z)", "dy * 4 * sigmoid_slope(2 * z)"),
        ),
    )
}  # fmt: skip
