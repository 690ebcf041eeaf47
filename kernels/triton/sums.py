"""Partial results as float32 sums, from which a second launch computes mean and variance once for each strip.

The blocks of the first launch then need no double precision, which is slow on most GPUs. A share is no longer than a
chain of additions in float32 may be, so its count is exact. Each plane of partial results has shape
[blocks, statistics].
"""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import elements_before
from gpu_bn.kernels.triton.per_channel import (
    SCALE_DOWN,
    SCALE_UP,
    TINY_SHIFT,
    TRUSTED_SHIFT,
    UNDERFLOW,
    Base,
    Sums,
    any_channel,
    elements_of,
    reciprocal,
    reciprocal_from,
)
from gpu_bn.kernels.triton.statistics import (
    MOST_SWEEPS,
    add_share,
    block_counts,
    block_results,
    nan_for_infinity,
    no_results,
    no_sums,
)

TOTALS = tl.constexpr(0)
SQUARE_SUMS = tl.constexpr(1)
SHIFTS = tl.constexpr(2)
FACTORS = tl.constexpr(3)
COUNTS = tl.constexpr(4)
"""Planes of the partial results; COUNTS is used with a mask and for ragged rows."""


@triton.jit
def float_sum(block, L: tl.constexpr):
    """Return the sum of a block for each channel, in the dtype of the block."""
    if L.COLUMNS:
        return tl.sum(block, 0)
    else:
        return tl.sum(tl.sum(block, 1), 0)


@triton.jit
def float_count(block, share, strip, L: tl.constexpr):
    """Return the number of elements that a channel has in a share; with a mask, the sum of ``block``."""
    if strip.valid is not None:
        return (tl.sum(block, 0) if L.COLUMNS else tl.sum(tl.sum(block, 1), 0)).to(tl.float32)
    elif L.RAGGED:
        return (elements_before(share.last, strip, L) - elements_before(share.first, strip, L)).to(tl.float32)
    else:
        return (tl.cast(share.last - share.first, tl.int32) * (1 if L.COLUMNS else L.VEC)).to(tl.float32)


@triton.jit
def float_sums(x, base, share, strip, AT_ONCE: tl.constexpr, L: tl.constexpr):
    """Return a channel's count and its sums of deviations and of their squares over a share."""
    own = add_share(x, no_sums(L), base, share, strip, AT_ONCE, L)
    return Sums(float_count(own.count, share, strip, L), float_sum(own.total, L), float_sum(own.squares, L))


@triton.jit
def next_base(sums, base, pending, L: tl.constexpr):
    """Return the base for another sweep, and which of the pending channels need one.

    The conditions are those of :func:`assessed`, in float32. ``apart * apart`` is finite where ``squares`` is, because
    mean(d)**2 <= mean(d**2).
    """
    shift, factor = base
    inverse = 1.0 / tl.maximum(sums.count, 1.0)
    apart = sums.total * inverse
    spread = sums.squares * inverse - apart * apart
    spread = tl.where(spread < 0.0, 0.0, spread)
    moved = pending & (apart * apart > TRUSTED_SHIFT * spread)
    if L.RANGE:
        whole = pending & (factor == 1.0)
        overflow = whole & ((sums.squares < float("inf")) == 0)
        underflow = whole & (sums.squares < sums.count * UNDERFLOW) & (tl.abs(shift) < TINY_SHIFT)
        lost = overflow | underflow
        moved = moved & (lost == 0)
        scale = tl.where(overflow, SCALE_DOWN, tl.where(underflow, SCALE_UP, 1.0)).to(tl.float32)
        shift = tl.where(moved, shift + apart, shift * scale)
        factor = factor * scale
        pending = moved | lost
    else:
        shift = tl.where(moved, shift + apart, shift)
        pending = moved
    return Base(shift, factor), pending


@triton.jit
def place_of(partials, plane: tl.constexpr, block, channels):
    """Return the addresses of a block's results in a plane."""
    return partials.results + (plane * partials.blocks + block) * channels.count + channels.place


@triton.jit
def leave_sums(
    x, partials, block, base, pending, share, strip, statistic, AT_ONCE: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Write sums, shift and factor of the pending channels after each sweep; with a mask or ragged rows, counts too."""
    sweep = 0
    again = share.first < share.last
    while again:
        sums = float_sums(x, base, share, strip, AT_ONCE, L)
        tl.store(place_of(partials, TOTALS, block, statistic), sums.total, mask=pending)
        tl.store(place_of(partials, SQUARE_SUMS, block, statistic), sums.squares, mask=pending)
        tl.store(place_of(partials, SHIFTS, block, statistic), base.shift, mask=pending)
        tl.store(place_of(partials, FACTORS, block, statistic), base.factor, mask=pending)
        if strip.valid is not None or L.RAGGED:
            tl.store(place_of(partials, COUNTS, block, statistic), sums.count, mask=pending)
        base, pending = next_base(sums, base, pending, L)
        sweep += 1
        again = any_channel(pending, L) & (sweep < MOST_SWEEPS)


@triton.jit
def unit_of(factor):
    """Return 1 / factor of a block's deviations, in float64; 1 beyond the last block, whose factor is loaded as 0."""
    one = tl.full((), 1.0, tl.float64)
    return tl.where(factor == SCALE_DOWN, one * 2.0**80, tl.where(factor == SCALE_UP, one * 2.0**-80, one))


@triton.jit
def counts_of(partials, i, channels, COUNTED: tl.constexpr, L: tl.constexpr):
    """Return the counts of the blocks ``i``, in float64; COUNTED: load them from their plane."""
    if COUNTED:
        return block_results(partials, COUNTS, i, channels, L).to(tl.float64)
    else:
        return block_counts(partials, i, channels, False, L)


@triton.jit
def shifts_of(partials, i, channels, base, L: tl.constexpr):
    """Return the shifts of the blocks ``i`` relative to ``base``, and the units of their deviations, in float64."""
    units = unit_of(block_results(partials, FACTORS, i, channels, L))
    return tl.fma(block_results(partials, SHIFTS, i, channels, L).to(tl.float64), units, -base), units


@triton.jit
def first_of(partials, plane: tl.constexpr, channels):
    """Load the first block's results of a plane."""
    return tl.load(place_of(partials, plane, 0, channels), mask=channels.known, other=0.0)


@triton.jit
def mean_shift(partials, channels, CHUNK: tl.constexpr, L: tl.constexpr):
    """Return the mean of the blocks' shifts, weighted by their counts."""
    counts = no_results(channels, CHUNK, L)
    sums = counts
    for start in range(0, partials.blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = counts_of(partials, i, channels, True, L)
        counts += n
        sums = tl.fma(n, shifts_of(partials, i, channels, 0.0 * n, L)[0], sums)
        tl.debug_barrier()  # keeps the compiler from unrolling the loop, which has few iterations
    return tl.sum(sums, 0) * reciprocal_from(tl.sum(counts, 0), 1.0)


# For blocks with n_i elements, t_i = sum(x - shift_i), q_i = sum((x - shift_i)**2) and b_i = shift_i - base:
#     sum(x - base) = sum(t_i + n_i * b_i)        sum((x - base)**2) = sum(q_i + b_i * (t_i + (t_i + n_i * b_i)))
@triton.jit
def moments_of_sums(
    partials, channels, CHUNK: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Return mean, variance and count of a channel from the sums of its blocks.

    ``base`` is the first block's shift. With a mask that block may have no element, and ``base`` is the mean shift.
    A block's shift is within 8 standard deviations of its mean. See :func:`merged_moments` for the accuracy.
    """
    if MASKED:
        base = mean_shift(partials, channels, CHUNK, L)
    else:
        base = first_of(partials, SHIFTS, channels).to(tl.float64) * unit_of(first_of(partials, FACTORS, channels))
    zeros = no_results(channels, CHUNK, L)
    counts, moved, squares = zeros, zeros, zeros
    for start in range(0, partials.blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = counts_of(partials, i, channels, COUNTED, L)
        apart, units = shifts_of(partials, i, channels, base, L)
        total = block_results(partials, TOTALS, i, channels, L).to(tl.float64) * units
        own_squares = block_results(partials, SQUARE_SUMS, i, channels, L).to(tl.float64) * units
        together = tl.fma(n, apart, total)
        moved += together
        squares = tl.fma(own_squares, units, tl.fma(apart, total + together, squares))
        if COUNTED:
            counts += n
        tl.debug_barrier()  # keeps the compiler from unrolling the loop, which has few iterations
    count = tl.sum(counts, 0) if COUNTED else elements_of(partials.positions, L)
    inverse = reciprocal_from(count, 1.0) if COUNTED else reciprocal(count)
    shift = tl.sum(moved, 0) * inverse
    var = tl.fma(-shift, shift, tl.sum(squares, 0) * inverse)
    return base + shift, nan_for_infinity(tl.where(var < 0.0, 0.0, var)), count
