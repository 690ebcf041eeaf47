"""Per-channel values that kernels keep, and sums over a block in float64."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    elements_before,
    one_each,
)

SCALE_DOWN = tl.constexpr(2.0**-80)
SCALE_UP = tl.constexpr(2.0**80)
UNDERFLOW = tl.constexpr(1e-30)
"""A mean of squares below this may have lost terms to underflow in float32."""
TINY_SHIFT = tl.constexpr(1e-6)
"""Deviations from a shift larger than this are zero or have squares above UNDERFLOW."""
TRUSTED_SHIFT = tl.constexpr(64.0)
"""Largest (mean - shift)**2 / variance with accurate sums: the shift is within 8 standard deviations of the mean."""


class Base(NamedTuple):
    """Shift and factor of deviations: value * factor - shift."""

    shift: Any
    factor: Any  # 1 unless squares left the range of float32


class Sums(NamedTuple):
    """Sums of deviations: those of each thread, or of a whole channel."""

    count: Any  # number of elements that the mask keeps; float_sums also counts without a mask
    total: Any
    squares: Any


class Partials(NamedTuple):
    """Partial results of a strip's blocks, in planes of shape [blocks, statistics]."""

    results: Any
    blocks: Any
    share: Any = None  # positions of a block
    positions: Any = None  # positions of all blocks


class Affine(NamedTuple):
    """Coefficients of z = (x - centre) * scale + shift."""

    centre: Any  # the mean, rounded to COMPUTE
    scale: Any  # in COMPUTE
    shift: Any  # in COMPUTE
    rest: Any  # mean - centre, in float64
    rstd: Any  # 1 / sqrt(var + eps), in float64


@triton.jit
def channel_sum(block, L: tl.constexpr):
    """Return the sum of a block for each channel, in float64."""
    if L.COLUMNS:
        return one_each(tl.sum(block, 0), L).to(tl.float64)
    else:
        return tl.sum(tl.sum(block, 1), 0).to(tl.float64)


@triton.jit
def elements_of(positions, L: tl.constexpr):
    """Return the number of elements that a channel has at ``positions`` positions, in float64."""
    return tl.cast(positions, tl.float64) * (1 if L.COLUMNS else L.VEC)


@triton.jit
def elements_in(share, strip, L: tl.constexpr):
    """Return the number of elements that a channel has in a share, in float64."""
    if L.RAGGED:
        return (elements_before(share.last, strip, L) - elements_before(share.first, strip, L)).to(tl.float64)
    else:
        return elements_of(share.last - share.first, L)


@triton.jit
def reciprocal(count):
    """Return 1 / count of a float64 count by two steps of Newton's method; a division would be a function call."""
    guess = (1.0 / count.to(tl.float32)).to(tl.float64)
    guess = guess * tl.fma(-count, guess, 2.0)
    return guess * tl.fma(-count, guess, 2.0)


@triton.jit
def reciprocal_from(count, least: tl.constexpr):
    """Return 1 / max(count, least); if ``least`` is 0, 1 / count."""
    if least == 0.0:
        return reciprocal(count)
    else:
        return reciprocal(tl.maximum(count, least))


@triton.jit
def any_channel(flag, L: tl.constexpr):
    """Tell whether the flag of any channel of the strip is set."""
    if L.COLUMNS:
        return tl.max(flag.to(tl.int32), 0) > 0
    else:
        return flag
