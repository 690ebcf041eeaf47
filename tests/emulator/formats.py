"""Convert between PTX register bits and NumPy values; compute operations with one rounding, as hardware does.

f16 and bf16 operations are computed in float32, then rounded. float32 has at least twice their bits of significand plus
two, and so for + - * the second rounding changes nothing. fma is computed in float64 with rounding to odd, so that the
final rounding gives the correctly rounded result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any
"""An array, or a NumPy scalar for a value that is the same in all lanes; mypy cannot tell them apart."""
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
VALUE: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float32, "bf16": np.float32, "f32": np.float32, "f64": np.float64,
    "f16x2": np.uint32, "bf16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")
_SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}
_F16_VALUES = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def is_float(type_: str) -> bool:
    return type_.removesuffix("x2") in FLOATS


def decode(bits: Array, type_: str) -> Array:
    """Convert unsigned bits of the type's size to values, exactly."""
    if type_ == "f16":
        return _F16_VALUES.take(bits)
    if type_ == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(VALUE[type_])


def encode(values: Array, type_: str) -> Array:
    """Convert values to unsigned bits of the type, rounded to nearest even."""
    values = np.asarray(values)
    if type_ == "f16":
        return values.astype(np.float16).view(np.uint16)
    if type_ == "bf16":
        bits = _to_float32_odd(values).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
    value_type = VALUE[type_]
    same = values.astype(value_type, copy=False)
    return same if type_ == "pred" else same.view(RAW[same.dtype.itemsize])


def flush_subnormals(values: Array, type_: str) -> Array:
    """Replace subnormal values by zero of the same sign (.ftz)."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL[type_], np.copysign(values.dtype.type(0), values), values)


# -------------------------------------------------------------------- exact sums and products


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the rounded sum and its exact error."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the rounded float64 product and its exact error (Dekker's splitting)."""

    def split(x: Array) -> tuple[Array, Array]:
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def odd(total: Array, error: Array) -> Array:
    """Round to odd in float64: move an inexact even result to its odd neighbour in the direction of the error."""
    even = (total.view(np.int64) & 1) == 0
    step = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even & np.isfinite(total), step, total)


def _to_float32_odd(values: Array) -> Array:
    """Convert float64 to float32, rounded to odd; return float32 unchanged."""
    if values.dtype == np.float32:
        return values
    near = values.astype(np.float32)
    wide = near.astype(np.float64)
    even = (near.view(np.uint32) & 1) == 0
    step = np.nextafter(near, np.where(values > wide, np.float32(np.inf), np.float32(-np.inf)))
    return np.where((wide != values) & even & np.isfinite(near), step, near)


def fma(a: Array, b: Array, c: Array, type_: str) -> Array:
    """Return a * b + c with one rounding to f32 or f64; for other types in float64, for the caller to round."""
    if type_ == "f64":
        return _fma_double(a, b, c)
    product, c = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = np.asarray(product + c)
    # For f32, rounding twice differs only if the first result is half-way between two floats, or is tiny.
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if type_ != "f32" or (halfway | (np.abs(total) < 2.0**-125)).any():
        total = np.where(np.isfinite(total), odd(*two_sum(product, c)), total)
    return total.astype(np.float32) if type_ == "f32" else total


def _fma_double(a: Array, b: Array, c: Array) -> Array:
    """Compute a float64 fma by error-free transformations (Boldo and Melquiond), or fractions outside their range."""
    plain = np.asarray(a * b + c)
    high, low = two_product(a, b)
    sum_low, error_low = two_sum(c, low)
    sum_high, error_high = two_sum(high, sum_low)
    exact = np.asarray(sum_high + odd(*two_sum(error_low, error_high)))
    lost = (np.abs(high) < 2.0**-960) | ~np.isfinite(exact)
    if not lost.any():
        return exact
    result = np.where(np.isfinite(exact), exact, plain)
    lost &= (a != 0) & (b != 0) & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for i in np.flatnonzero(lost):
        x, y, z = (Fraction(float(v.reshape(-1)[i])) for v in np.broadcast_arrays(a, b, c))
        if value := x * y + z:
            result.reshape(-1)[i] = _nearest_double(value)
    return result


def _nearest_double(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def round_directed(values: Array, type_: str, mode: str) -> Array:
    """Round float values to a narrower float type towards zero (rz), minus (rm) or plus infinity (rp)."""
    bits = encode(values, type_)
    rounded, wide = decode(bits, type_).astype(np.float64), values.astype(np.float64)
    down = (rounded > wide) & ((mode == "rm") | ((mode == "rz") & (wide > 0)))
    up = (rounded < wide) & ((mode == "rp") | ((mode == "rz") & (wide < 0)))
    # The bits are a sign and a magnitude: adding or subtracting 1 gives the neighbouring value.
    negative, one = np.signbit(rounded), bits.dtype.type(1)
    grow, shrink = np.where(negative, down, up), np.where(negative, up, down)
    return decode(np.where(grow, bits + one, np.where(shrink, bits - one, bits)), type_)


# -------------------------------------------------------------------- functions


def minimum(a: Array, b: Array) -> Array:
    """Compute min as PTX does: a number wins over NaN, and -0 is below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    """Compute max as PTX does: a number wins over NaN, and +0 is above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def nan_wins(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a + b, function(a, b))


def relu(a: Array) -> Array:
    """Replace negative values by zero; NaN stays NaN."""
    return np.where((a > 0) | np.isnan(a), a, a.dtype.type(0))


def saturate(a: Array) -> Array:
    """Clamp to [0, 1]; replace NaN by zero."""
    return np.where(a > 0, np.minimum(a, a.dtype.type(1)), a.dtype.type(0))


def coarse(a: Array, digits: int) -> Array:
    """Round to a number of significant bits."""
    fraction, exponent = np.frexp(a)
    return np.where(np.isfinite(a), np.ldexp(np.rint(fraction * 2.0**digits) / 2.0**digits, exponent), a)


def _in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return a model of an approximate instruction: its float64 value, rounded to the operand's type."""
    return lambda values: function(values.astype(np.float64)).astype(values.dtype)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
    "rsqrt": _in_double(lambda x: 1.0 / np.sqrt(x)),
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": lambda x: coarse(np.tanh(x.astype(np.float64)), 11).astype(x.dtype),  # hardware gives 11 bits
}
