"""A block's sums as they are in float32, for a launch that makes moments of them, once for each strip.

So blocks have nothing in double precision, where that is slow. Sums are of shares that are no longer than a chain of
additions in float32 may be; so their counts are exact. The planes of what blocks leave are of [blocks, statistics].
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
"""The planes; the last with a mask and of ragged rows."""


@triton.jit
def float_sum(block, L: tl.constexpr):
    """The sum of a block for each channel."""
    if L.COLUMNS:
        return tl.sum(block, 0)
    else:
        return tl.sum(tl.sum(block, 1), 0)


@triton.jit
def float_count(block, share, strip, L: tl.constexpr):
    """The elements that a channel has in a share: with a mask the sum of ``block``."""
    if strip.valid is not None:
        return (tl.sum(block, 0) if L.COLUMNS else tl.sum(tl.sum(block, 1), 0)).to(tl.float32)
    elif L.RAGGED:
        return (elements_before(share.last, strip, L) - elements_before(share.first, strip, L)).to(tl.float32)
    else:
        return (tl.cast(share.last - share.first, tl.int32) * (1 if L.COLUMNS else L.VEC)).to(tl.float32)


@triton.jit
def float_sums(x, base, share, strip, AT_ONCE: tl.constexpr, L: tl.constexpr):
    """A channel's count, and its sums of deviations over a share."""
    own = add_share(x, no_sums(L), base, share, strip, AT_ONCE, L)
    return Sums(float_count(own.count, share, strip, L), float_sum(own.total, L), float_sum(own.squares, L))


@triton.jit
def next_base(sums, base, pending, L: tl.constexpr):
    """What the pending channels that a sweep has not served are summed with again, and which these are.

    As in ``assessed``, but in float32: finite squares, of which there are at least some, have means whose squares are.
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
    """Where a block's results are."""
    return partials.results + (plane * partials.blocks + block) * channels.count + channels.place


@triton.jit
def leave_sums(
    x, partials, block, base, pending, share, strip, statistic, AT_ONCE: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Write what each sweep finds of the pending channels: sums, what they are of, the count where that may differ."""
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
    """1 / factor of a block's deviations, in float64; where there is no block, 1."""
    one = tl.full((), 1.0, tl.float64)
    return tl.where(factor == SCALE_DOWN, one * 2.0**80, tl.where(factor == SCALE_UP, one * 2.0**-80, one))


@triton.jit
def counts_of(partials, i, channels, COUNTED: tl.constexpr, L: tl.constexpr):
    """The counts of the blocks ``i``, in float64."""
    if COUNTED:
        return block_results(partials, COUNTS, i, channels, L).to(tl.float64)
    else:
        return block_counts(partials, i, channels, False, L)


@triton.jit
def shifts_of(partials, i, channels, base, L: tl.constexpr):
    """The shifts of the blocks ``i`` from ``base``, in float64, and the units of their deviations."""
    units = unit_of(block_results(partials, FACTORS, i, channels, L))
    return tl.fma(block_results(partials, SHIFTS, i, channels, L).to(tl.float64), units, -base), units


@triton.jit
def first_of(partials, plane: tl.constexpr, channels):
    """What the first block has left."""
    return tl.load(place_of(partials, plane, 0, channels), mask=channels.known, other=0.0)


@triton.jit
def mean_shift(partials, channels, CHUNK: tl.constexpr, L: tl.constexpr):
    """The mean of the blocks' shifts, by their counts."""
    counts = no_results(channels, CHUNK, L)
    sums = counts
    for start in range(0, partials.blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = counts_of(partials, i, channels, True, L)
        counts += n
        sums = tl.fma(n, shifts_of(partials, i, channels, 0.0 * n, L)[0], sums)
        tl.debug_barrier()  # not unrolled, so: there is one turn, or few
    return tl.sum(sums, 0) * reciprocal_from(tl.sum(counts, 0), 1.0)


# Of blocks with n_i elements, whose deviations from shift_i have the sums t_i and q_i, and b_i = shift_i - base:
#     sum(x - base) = sum(t_i + n_i * b_i)        sum((x - base)**2) = sum(q_i + b_i * (t_i + (t_i + n_i * b_i)))
@triton.jit
def moments_of_sums(
    partials, channels, CHUNK: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Mean and variance of a channel, and its count, from the sums of its blocks, in a fixed order.

    ``base`` is the first block's shift; as it may be of nothing where there is a mask, it is the mean shift there.
    A block's shift is within 8 standard deviations of its mean. See :func:`merged_moments` for what is lost.
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
        tl.debug_barrier()  # not unrolled, so: there is one turn, or few
    count = tl.sum(counts, 0) if COUNTED else elements_of(partials.positions, L)
    inverse = reciprocal_from(count, 1.0) if COUNTED else reciprocal(count)
    shift = tl.sum(moved, 0) * inverse
    var = tl.fma(-shift, shift, tl.sum(squares, 0) * inverse)
    return base + shift, nan_for_infinity(tl.where(var < 0.0, 0.0, var)), count
