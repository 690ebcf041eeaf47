"""What kernels keep of a channel, and sums over a block in float64."""

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
"""Mean squares below this may have lost float32's small numbers."""
TINY_SHIFT = tl.constexpr(1e-6)
"""The deviations from a larger shift are zero or have squares above UNDERFLOW."""
TRUSTED_SHIFT = tl.constexpr(64.0)
"""A shift serves within 8 standard deviations of the mean."""


class Base(NamedTuple):
    """What deviations are taken from: value * factor - shift."""

    shift: Any
    factor: Any  # 1 unless squares left float32's range


class Sums(NamedTuple):
    """Of deviations: each thread's own, or in float64 those of a channel."""

    count: Any  # with a mask, how many they are
    total: Any
    squares: Any


class Partials(NamedTuple):
    """What the blocks of a strip have found: planes of [blocks, statistics]."""

    results: Any
    blocks: Any
    share: Any = None  # positions of a block
    positions: Any = None  # of all


class Affine(NamedTuple):
    """z = (x - centre) * scale + shift, these in COMPUTE; the rest is in float64."""

    centre: Any
    scale: Any
    shift: Any
    rest: Any  # mean - centre
    rstd: Any  # 1 / sqrt(var + eps)


@triton.jit
def channel_sum(block, L: tl.constexpr):
    """The sum of a block for each channel, in float64."""
    if L.COLUMNS:
        return one_each(tl.sum(block, 0), L).to(tl.float64)
    else:
        return tl.sum(tl.sum(block, 1), 0).to(tl.float64)


@triton.jit
def elements_of(positions, L: tl.constexpr):
    """The elements that a channel has in so many positions, in float64."""
    return tl.cast(positions, tl.float64) * (1 if L.COLUMNS else L.VEC)


@triton.jit
def elements_in(share, strip, L: tl.constexpr):
    """The elements that a channel has in a share, in float64."""
    if L.RAGGED:
        return (elements_before(share.last, strip, L) - elements_before(share.first, strip, L)).to(tl.float64)
    else:
        return elements_of(share.last - share.first, L)


@triton.jit
def reciprocal(count):
    """1 / count of a float64 count: two steps of Newton's method, where a division would be a call."""
    guess = (1.0 / count.to(tl.float32)).to(tl.float64)
    guess = guess * tl.fma(-count, guess, 2.0)
    return guess * tl.fma(-count, guess, 2.0)


@triton.jit
def reciprocal_from(count, least: tl.constexpr):
    """1 / count, of a count of at least ``least`` if that is not 0."""
    if least == 0.0:
        return reciprocal(count)
    else:
        return reciprocal(tl.maximum(count, least))


@triton.jit
def any_channel(flag, L: tl.constexpr):
    if L.COLUMNS:
        return tl.max(flag.to(tl.int32), 0) > 0
    else:
        return flag
