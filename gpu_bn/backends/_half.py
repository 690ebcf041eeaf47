"""Rounding to float16 in integer arithmetic: NumPy's own cast is slow, and twenty times slower for small numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIGN, INFINITY, NAN = np.uint16(0x8000), np.uint32(0x7C00), np.uint32(0x7E00)
FLOAT32_INFINITY = np.uint32(0x7F800000)
SMALLEST_NORMAL = np.uint32(0x38800000)
"""2**-14 as float32 bits."""
REBIAS = np.uint32(0x38000000 - 0xFFF)
"""What the exponents' biases differ by, less what rounds half up when the last 13 bits are dropped."""


def to_float16(value: Array) -> Array:
    """Round to nearest, ties to even, by way of float32."""
    single = value.astype(np.float32)
    bits = single.view(np.uint32)
    sign = (bits >> np.uint32(16)).astype(np.uint16)
    sign &= SIGN
    np.abs(single, out=single)
    half = bits >> np.uint32(13)
    half &= np.uint32(1)
    half += bits
    half -= REBIAS
    half >>= np.uint32(13)
    np.minimum(half, INFINITY, out=half)
    small, nan = bits < SMALLEST_NORMAL, bits > FLOAT32_INFINITY
    if small.any():
        # Adding 0.5 leaves the subnormal's bits, rounded, at the end of the significand.
        subnormal = (single[small] + np.float32(0.5)).view(np.uint32)
        half[small] = subnormal - np.uint32(0x3F000000)
    if nan.any():
        half[nan] = NAN
    result = half.astype(np.uint16)
    result |= sign
    return result.view(np.float16)
