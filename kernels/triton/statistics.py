"""Sums over a channel, its mean and variance, and what they make of an element.

Elements are computed in COMPUTE, per-channel values in float64, all of them in one fixed order.
"""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    known_elements,
    load_wide,
    offsets_of,
    one_each,
    valid_elements,
    valid_positions,
    vectors_at,
)

SCALE_DOWN = tl.constexpr(2.0**-80)
SCALE_UP = tl.constexpr(2.0**80)
UNDERFLOW = tl.constexpr(1e-30)
"""Mean squares below this may have lost float32's small numbers."""
TINY_SHIFT = tl.constexpr(1e-6)
"""The deviations from a larger shift are zero or have squares above UNDERFLOW."""
TRUSTED_SHIFT = tl.constexpr(64.0)
"""A shift serves within 8 standard deviations of the mean."""


@triton.jit
def channel_sum(block, COLUMNS: tl.constexpr):
    """The sum of a block for each channel, in float64."""
    if COLUMNS:
        return one_each(tl.sum(block, 0), COLUMNS).to(tl.float64)
    else:
        return tl.sum(tl.sum(block, 1), 0).to(tl.float64)


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
def any_channel(flag, COLUMNS: tl.constexpr):
    if COLUMNS:
        return tl.max(flag.to(tl.int32), 0) > 0
    else:
        return flag


# -------------------------------------------------------------------------------------------------------- statistics
@triton.jit
def usable_shift(mean, ELEMENT: tl.constexpr, COMPUTE: tl.constexpr):
    """A mean to take deviations from; 0 if it is not finite.

    Of 16-bit elements it is one itself: then deviations have few digits, and they add up exactly.
    """
    if ELEMENT.primitive_bitwidth == 16:
        mean = mean.to(ELEMENT).to(COMPUTE)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def first_shift(
    x, valid, first, last, strip, row, jump, magic, power, start,
    SAMPLES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The mean of samples spread over a program's share; 0 if it is not finite, or nothing of them is valid."""
    step = tl.maximum((last - first) // SAMPLES, 1)
    position = first + tl.arange(0, SAMPLES) * step
    vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE, start)
    known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
    sample = tl.load(x + offsets_of(vector, LANES, VEC), mask=known, other=0.0).to(COMPUTE)
    taken = tl.minimum((last - first + step - 1) // step, SAMPLES).to(COMPUTE)
    if valid is not None:
        present = valid_elements(valid, known, position, last, VEC, COLUMNS)
        sample = tl.where(present, sample, 0.0)
        mean = channel_sum(sample, COLUMNS).to(COMPUTE) / channel_sum(present.to(COMPUTE), COLUMNS).to(COMPUTE)
    elif COLUMNS:
        mean = tl.sum(sample, 0) / taken
    else:
        mean = tl.sum(tl.sum(sample, 1), 0) / (taken * VEC)
    return usable_shift(mean, x.dtype.element_ty, COMPUTE)


@triton.jit
def deviations(value, shift, factor, RANGE: tl.constexpr):
    """value * factor - shift. Without RANGE, factor is 1."""
    if RANGE:
        return tl.fma(value, factor, -shift)
    else:
        return value - shift


@triton.jit
def add_tiles(
    x, valid, d0, d1, d2, shift, factor, first, last, strip, row, jump, magic, power, start,
    AT_ONCE: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add deviations to d1 and their squares to d2; with a mask, count in d0 what they are of.

    AT_ONCE tiles are loaded before one is used. WHOLE: none of them goes beyond ``last``.
    """
    for begin in range(first, last, AT_ONCE * POSITIONS):
        values = ()
        for i in tl.static_range(AT_ONCE):
            position = begin + i * POSITIONS + tl.arange(0, POSITIONS)
            vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE, start)
            known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
            values = values + (tl.load(x + offsets_of(vector, LANES, VEC), mask=known, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            position = begin + i * POSITIONS + tl.arange(0, POSITIONS)
            d = deviations(values[i].to(COMPUTE), shift, factor, RANGE)
            if valid is not None:
                present = valid_positions(valid, position, last, VEC, COLUMNS)
                d = tl.where(present[:, None] if COLUMNS else present, d, 0.0)
                d0 += present.to(tl.int32)
            elif not WHOLE:
                d = tl.where((position < last)[:, None], d, 0.0)
            d1 += d
            d2 = tl.fma(d, d, d2)
    return d0, d1, d2


@triton.jit
def add_share(
    x, valid, d0, d1, d2, shift, factor, first, last, strip, row, jump, magic, power, start,
    AT_ONCE: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """The same of a share: of its whole tiles, whose elements all count, and then of the last ones."""
    TILES: tl.constexpr = AT_ONCE if valid is None else (AT_ONCE + 1) // 2  # a mask takes registers too
    rest = last - (last - first) % (TILES * POSITIONS)
    d0, d1, d2 = add_tiles(
        x, valid, d0, d1, d2, shift, factor, first, rest, strip, row, jump, magic, power, start,
        TILES, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE, True,
    )  # fmt: skip
    return add_tiles(
        x, valid, d0, d1, d2, shift, factor, rest, last, strip, row, jump, magic, power, start,
        TILES, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE, False,
    )  # fmt: skip


@triton.jit
def counts_of_none(POSITIONS: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    if COLUMNS:
        return tl.zeros((POSITIONS,), tl.int32)
    else:
        return tl.zeros((POSITIONS, VEC), tl.int32)


@triton.jit
def count_of(block, COLUMNS: tl.constexpr):
    """The sum of :func:`valid_positions`, in float64: one number, the same for all channels."""
    if COLUMNS:
        return tl.sum(block, 0).to(tl.float64)
    else:
        return tl.sum(tl.sum(block, 1), 0).to(tl.float64)


@triton.jit
def streamed_sums(
    x, valid, shift, factor, first, last, strip, row, jump, magic, power, start,
    CHAIN: tl.constexpr, AT_ONCE: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Sums of the deviations and of their squares over a share, in chains of CHAIN additions (0: it is short).

    And, with a mask, their number.
    """
    zeros = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    none = counts_of_none(POSITIONS, VEC, COLUMNS)
    if CHAIN == 0:
        d0, d1, d2 = add_share(
            x, valid, none, zeros, zeros, shift, factor, first, last, strip, row, jump, magic, power, start,
            AT_ONCE, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE,
        )  # fmt: skip
        return count_of(d0, COLUMNS), channel_sum(d1, COLUMNS), channel_sum(d2, COLUMNS)
    else:
        total = shift.to(tl.float64) * 0.0
        squares = total
        count = count_of(none, COLUMNS)
        for begin in range(first, last, CHAIN * POSITIONS):
            end = tl.minimum(begin + CHAIN * POSITIONS, last)
            d0, d1, d2 = add_share(
                x, valid, none, zeros, zeros, shift, factor, begin, end, strip, row, jump, magic, power, start,
                AT_ONCE, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE,
            )  # fmt: skip
            total += channel_sum(d1, COLUMNS)
            squares += channel_sum(d2, COLUMNS)
            if valid is not None:
                count += count_of(d0, COLUMNS)
        return count, total, squares


@triton.jit
def held_sums(
    tiles, shift, factor, last, strip, row,
    TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """The same of TILES tiles in registers."""
    d1 = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    d2 = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    for i in tl.static_range(TILES):
        known = known_elements(i * POSITIONS + tl.arange(0, POSITIONS), last, strip, row, LANES, VEC, COLUMNS)
        d = tl.where(known, deviations(tiles[i].to(COMPUTE), shift, factor, RANGE), 0.0)
        d1 += d
        d2 = tl.fma(d, d, d2)
    return channel_sum(d1, COLUMNS), channel_sum(d2, COLUMNS)


@triton.jit
def nan_for_infinity(var):
    """A variance; float64 squares that overflow must not look like a result."""
    return tl.where(var < float("inf"), var, float("nan"))


MOST_SWEEPS = tl.constexpr(3)
"""Up to three: one that loses the range, one with a bad shift, and the final one."""


@triton.jit
def assessed(total, squares, count, inverse, shift, factor, pending, RANGE: tl.constexpr):
    """Mean and variance of the pending channels, and how to sum again those that this sweep has not served.

    A shift too far from the mean is moved there. Where squares left float32's range (RANGE: whether the dtype lets
    them) the channel gets a factor. What becomes of a channel depends on that channel alone.
    """
    apart = total * inverse
    spread = squares * inverse - apart * apart
    spread = tl.where(spread < 0.0, 0.0, spread)
    found = shift.to(tl.float64) + apart
    mean = found
    var = spread
    if RANGE:
        unit = tl.where(factor == SCALE_DOWN, 2.0**80, tl.where(factor == SCALE_UP, 2.0**-80, 1.0)).to(tl.float64)
        mean = found * unit
        var = spread * unit * unit
        whole = pending & (factor == 1.0)
        overflow = whole & ((squares < float("inf")) == 0)
        underflow = whole & (squares < count * UNDERFLOW) & (tl.abs(shift) < TINY_SHIFT)
        lost = overflow | underflow
        moved = pending & (lost == 0) & (apart * apart > TRUSTED_SHIFT * spread)
        scale = tl.where(overflow, SCALE_DOWN, tl.where(underflow, SCALE_UP, 1.0)).to(tl.float32)
        shift = tl.where(moved, found.to(tl.float32), shift * scale)
        factor = factor * scale
        pending = moved | lost
    else:
        var = nan_for_infinity(spread)
        moved = pending & (apart * apart > TRUSTED_SHIFT * spread)
        shift = tl.where(moved, found.to(shift.dtype), shift)
        pending = moved
    return mean, var, shift, factor, pending


# A thread adds what it reads itself, and all threads do so together once, at the end: double precision is slow.
@triton.jit
def block_results(partials, plane, i, blocks, channel, known, channels, COLUMNS: tl.constexpr):
    """[CHUNK] or, in columns, [CHUNK, LANES * VEC]: what the blocks ``i`` have found; 0 where there are none."""
    if COLUMNS:
        present = (i < blocks)[:, None] & known[None, :]
        place = i[:, None] * channels + channel[None, :]
    else:
        present = i < blocks
        place = i * channels + channel
    return tl.load(partials + plane * blocks * channels + place, mask=present, other=0.0)


@triton.jit
def block_counts(
    partials, positions, share, i, blocks, channel, known, channels, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The blocks' counts, in the shape of their results or one that broadcasts to it."""
    if MASKED:
        return block_results(partials, 2, i, blocks, channel, known, channels, COLUMNS)
    else:
        n = tl.minimum(tl.maximum(positions - i.to(tl.int64) * share, 0), share)
        if COLUMNS:
            return n[:, None].to(tl.float64)
        else:
            return (n * VEC).to(tl.float64)


@triton.jit
def no_results(channel, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the shape of blocks' results."""
    if COLUMNS:
        return tl.zeros((CHUNK, channel.shape[0]), tl.float64)
    else:
        return tl.zeros((CHUNK,), tl.float64)


# Of blocks with n_i, mean_i and var_i:
#     mean = sum(n_i * mean_i) / n        var = sum(n_i * (var_i + (mean_i - mean)**2)) / n
@triton.jit
def merged_moments(
    partials, positions, share, blocks, channel, known, channels,
    CHUNK: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a channel, and its count, from those of its blocks, in a fixed order.

    Deviations are taken from ``base``, so that only the last addition rounds at the means' size. That is the first
    block's mean; its weight bounds what the difference below loses, to the number of blocks. MASKED: the blocks'
    counts come from ``partials`` too. As the first block's may be 0, ``base`` is the mean of all.
    """
    base = load_wide(partials, channel, known, 0.0)
    zeros = no_results(channel, CHUNK, COLUMNS)
    if MASKED:
        counts = zeros
        sums = zeros
        for start in range(0, blocks, CHUNK):
            i = start + tl.arange(0, CHUNK)
            n = block_results(partials, 2, i, blocks, channel, known, channels, COLUMNS)
            counts += n
            sums = tl.fma(n, block_results(partials, 0, i, blocks, channel, known, channels, COLUMNS), sums)
        count = tl.sum(counts, 0)
        inverse = reciprocal_from(count, 1.0)
        base = tl.sum(sums, 0) * inverse
    else:
        count = tl.cast(positions, tl.float64) * (1 if COLUMNS else VEC)
        inverse = reciprocal(count)
    moved = zeros
    squares = zeros
    for start in range(0, blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = block_counts(partials, positions, share, i, blocks, channel, known, channels, VEC, COLUMNS, MASKED)
        apart = block_results(partials, 0, i, blocks, channel, known, channels, COLUMNS) - base
        variances = block_results(partials, 1, i, blocks, channel, known, channels, COLUMNS)
        moved = tl.fma(n, apart, moved)
        squares = tl.fma(n, tl.fma(apart, apart, variances), squares)
        tl.debug_barrier()  # not unrolled, so: there is one turn, or few
    shift = tl.sum(moved, 0) * inverse
    var = tl.fma(-shift, shift, tl.sum(squares, 0) * inverse)
    return base + shift, nan_for_infinity(tl.where(var < 0.0, 0.0, var)), count


@triton.jit
def merged_sums(
    partials, blocks, channel, known, channels, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sums of dz and of dz * (x - centre), from those of a channel's blocks, in a fixed order."""
    sums_dz = no_results(channel, CHUNK, COLUMNS)
    sums_product = sums_dz
    for start in range(0, blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        sums_dz += block_results(partials, 0, i, blocks, channel, known, channels, COLUMNS)
        sums_product += block_results(partials, 1, i, blocks, channel, known, channels, COLUMNS)
        tl.debug_barrier()  # not unrolled, so: there is one turn, or few
    return tl.sum(sums_dz, 0), tl.sum(sums_product, 0)


# ------------------------------------------------------------------------------------------------------------ affine
@triton.jit
def affine(mean, var, weight, bias, eps, COMPUTE: tl.constexpr):
    """z = (x - centre) * scale + shift, and mean - centre, 1 / sqrt(var + eps)."""
    rstd = tl.rsqrt(var + eps)
    slope = weight * rstd
    centre = mean.to(COMPUTE)
    rest = mean - centre.to(tl.float64)
    return centre, slope.to(COMPUTE), (bias - rest * slope).to(COMPUTE), rest, rstd


@triton.jit
def pre_activation(value, residual, centre, scale, shift):
    """z, with the same roundings forward and backward."""
    z = tl.fma(value - centre, scale, shift)
    if residual is not None:
        z = z + residual
    return z
