"""Sums over a channel, its mean and variance, and the coefficients of z = (x - centre) * scale + shift.

Arithmetic on elements is in COMPUTE, on per-channel values in float64. Sums are added up in a fixed order.
"""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    Share,
    load_wide,
    masked,
    tile_at,
    valid_positions,
)
from gpu_bn.kernels.triton.per_channel import (
    SCALE_DOWN,
    SCALE_UP,
    TINY_SHIFT,
    TRUSTED_SHIFT,
    UNDERFLOW,
    Affine,
    Base,
    Sums,
    channel_sum,
    elements_of,
    reciprocal,
    reciprocal_from,
)


@triton.jit
def usable_shift(mean, ELEMENT: tl.constexpr, L: tl.constexpr):
    """Return the mean as a shift for deviations; 0 if it is not finite.

    For 16-bit elements it is rounded to their dtype, so that deviations have few digits and add up exactly.
    """
    if ELEMENT.primitive_bitwidth == 16:
        mean = mean.to(ELEMENT).to(L.COMPUTE)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def first_shift(x, share, strip, SAMPLES: tl.constexpr, L: tl.constexpr):
    """Return the mean of samples spread over a program's share; 0 if it is not finite or no sample is valid."""
    step = tl.maximum((share.last - share.first) // SAMPLES, 1)
    position = share.first + tl.arange(0, SAMPLES) * step
    tile = tile_at(position, share.last, strip, L)
    sample = tl.load(x + tile.offsets, mask=tile.loaded, other=0.0).to(L.COMPUTE)
    taken = tl.minimum((share.last - share.first + step - 1) // step, SAMPLES).to(L.COMPUTE)
    if strip.valid is not None or L.RAGGED:
        counted = tile.known if strip.valid is None else masked(tile, strip, L).counted
        sample = tl.where(counted, sample, 0.0)
        mean = channel_sum(sample, L).to(L.COMPUTE) / channel_sum(counted.to(L.COMPUTE), L).to(L.COMPUTE)
    elif L.COLUMNS:
        mean = tl.sum(sample, 0) / taken
    else:
        mean = tl.sum(tl.sum(sample, 1), 0) / (taken * L.VEC)
    return usable_shift(mean, x.dtype.element_ty, L)


@triton.jit
def deviations(value, base, L: tl.constexpr):
    """Return value * factor - shift. Without RANGE, factor is 1."""
    if L.RANGE:
        return tl.fma(value, base.factor, -base.shift)
    else:
        return value - base.shift


@triton.jit
def add_tiles(x, sums, base, share, strip, AT_ONCE: tl.constexpr, WHOLE: tl.constexpr, L: tl.constexpr):
    """Add deviations and their squares to each thread's sums; with a mask, count the elements that it keeps.

    AT_ONCE tiles are loaded before the first one is used. WHOLE: no tile reaches beyond the share.
    """
    count, total, squares = sums
    for begin in range(share.first, share.last, AT_ONCE * L.POSITIONS):
        values = ()
        for i in tl.static_range(AT_ONCE):
            tile = tile_at(begin + i * L.POSITIONS + tl.arange(0, L.POSITIONS), share.last, strip, L)
            values = values + (tl.load(x + tile.offsets, mask=tile.loaded, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            position = begin + i * L.POSITIONS + tl.arange(0, L.POSITIONS)
            d = deviations(values[i].to(L.COMPUTE), base, L)
            if strip.valid is not None:
                present = valid_positions(position, position < share.last, strip, L)
                d = tl.where(present[:, None] if L.COLUMNS else present, d, 0.0)
                count += present.to(tl.int32)
            elif L.RAGGED:
                d = tl.where(tile_at(position, share.last, strip, L).known, d, 0.0)
            elif not WHOLE:
                d = tl.where((position < share.last)[:, None], d, 0.0)
            total += d
            squares = tl.fma(d, d, squares)
    return Sums(count, total, squares)


@triton.jit
def add_share(x, sums, base, share, strip, AT_ONCE: tl.constexpr, L: tl.constexpr):
    """Add a share to each thread's sums: first the full tiles, in which all positions exist, then the rest."""
    TILES: tl.constexpr = AT_ONCE if strip.valid is None else (AT_ONCE + 1) // 2  # a mask needs registers too
    rest = share.last - (share.last - share.first) % (TILES * L.POSITIONS)
    sums = add_tiles(x, sums, base, Share(share.first, rest), strip, TILES, True, L)
    return add_tiles(x, sums, base, Share(rest, share.last), strip, TILES, False, L)


@triton.jit
def no_sums(L: tl.constexpr):
    """Return zeros for each thread's sums."""
    zeros = tl.zeros((L.POSITIONS, L.LANES * L.VEC), L.COMPUTE)
    if L.COLUMNS:
        return Sums(tl.zeros((L.POSITIONS,), tl.int32), zeros, zeros)
    else:
        return Sums(tl.zeros((L.POSITIONS, L.VEC), tl.int32), zeros, zeros)


@triton.jit
def count_of(block, L: tl.constexpr):
    """Return the sum of :func:`valid_positions` in float64: one number, the same for all channels."""
    if L.COLUMNS:
        return tl.sum(block, 0).to(tl.float64)
    else:
        return tl.sum(tl.sum(block, 1), 0).to(tl.float64)


@triton.jit
def streamed_sums(x, base, share, strip, CHAIN: tl.constexpr, AT_ONCE: tl.constexpr, L: tl.constexpr):
    """Return a channel's sums over a share, in chains of CHAIN additions (0: one chain); the count only with a mask."""
    none = no_sums(L)
    if CHAIN == 0:
        own = add_share(x, none, base, share, strip, AT_ONCE, L)
        return Sums(count_of(own.count, L), channel_sum(own.total, L), channel_sum(own.squares, L))
    else:
        total = base.shift.to(tl.float64) * 0.0
        squares = total
        count = count_of(none.count, L)
        for begin in range(share.first, share.last, CHAIN * L.POSITIONS):
            end = tl.minimum(begin + CHAIN * L.POSITIONS, share.last)
            own = add_share(x, none, base, Share(begin, end), strip, AT_ONCE, L)
            total += channel_sum(own.total, L)
            squares += channel_sum(own.squares, L)
            if strip.valid is not None:
                count += count_of(own.count, L)
        return Sums(count, total, squares)


@triton.jit
def held_sums(tiles, base, strip, TILES: tl.constexpr, L: tl.constexpr):
    """Return a channel's sums of deviations and of their squares, from TILES tiles in registers."""
    total = tl.zeros((L.POSITIONS, L.LANES * L.VEC), L.COMPUTE)
    squares = tl.zeros((L.POSITIONS, L.LANES * L.VEC), L.COMPUTE)
    for i in tl.static_range(TILES):
        known = tile_at(i * L.POSITIONS + tl.arange(0, L.POSITIONS), strip.positions, strip, L).known
        d = tl.where(known, deviations(tiles[i].to(L.COMPUTE), base, L), 0.0)
        total += d
        squares = tl.fma(d, d, squares)
    return channel_sum(total, L), channel_sum(squares, L)


@triton.jit
def nan_for_infinity(var):
    """Replace an infinite variance by NaN: squares that overflow must not look like a result."""
    return tl.where(var < float("inf"), var, float("nan"))


MOST_SWEEPS = tl.constexpr(3)
"""Most sweeps over a share: one whose squares leave the range, one with a bad shift, and the final one."""


@triton.jit
def assessed(total, squares, count, inverse, base, pending, L: tl.constexpr):
    """Return mean and variance, the base for another sweep, and which of the pending channels need one.

    A shift too far from the mean is moved to the mean. With RANGE, a channel whose squares left the range of float32
    gets a factor. Each channel is decided independently of the others.
    """
    shift, factor = base
    apart = total * inverse
    spread = squares * inverse - apart * apart
    spread = tl.where(spread < 0.0, 0.0, spread)
    found = shift.to(tl.float64) + apart
    mean = found
    var = spread
    if L.RANGE:
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
    return mean, var, Base(shift, factor), pending


# Each thread adds up the results that it loads. The threads' sums are added once, at the end: double precision is slow.
@triton.jit
def block_results(partials, plane, i, channels, L: tl.constexpr):
    """Load a plane of the results of blocks ``i``, 0 beyond the last: [CHUNK] or, in columns, [CHUNK, LANES * VEC]."""
    if L.COLUMNS:
        present = (i < partials.blocks)[:, None] & channels.known[None, :]
        place = i[:, None] * channels.count + channels.place[None, :]
    else:
        present = i < partials.blocks
        place = i * channels.count + channels.place
    return tl.load(partials.results + plane * partials.blocks * channels.count + place, mask=present, other=0.0)


@triton.jit
def block_counts(partials, i, channels, COUNTED: tl.constexpr, L: tl.constexpr):
    """Return the counts of blocks ``i``, which broadcast to their results; COUNTED: load them, or else compute them."""
    if COUNTED:
        return block_results(partials, 2, i, channels, L)
    else:
        share = partials.share
        n = tl.minimum(tl.maximum(partials.positions - i.to(tl.int64) * share, 0), share)
        if L.COLUMNS:
            return n[:, None].to(tl.float64)
        else:
            return (n * L.VEC).to(tl.float64)


@triton.jit
def no_results(channels, CHUNK: tl.constexpr, L: tl.constexpr):
    """Return zeros in the shape of :func:`block_results`."""
    if L.COLUMNS:
        return tl.zeros((CHUNK, channels.place.shape[0]), tl.float64)
    else:
        return tl.zeros((CHUNK,), tl.float64)


# For blocks with n_i elements, mean_i and var_i:
#     mean = sum(n_i * mean_i) / n        var = sum(n_i * (var_i + (mean_i - mean)**2)) / n
@triton.jit
def merged_moments(partials, channels, CHUNK: tl.constexpr, COUNTED: tl.constexpr, L: tl.constexpr):
    """Return mean, variance and count of a channel from those of its blocks.

    Means are taken relative to ``base``, so that only the last addition rounds at the size of the mean. ``base`` is the
    first block's mean. That block has at least n / blocks elements, so that shift**2, which cancels below, is at most
    ``blocks`` times the variance. COUNTED: the counts are in ``partials``. The first block's count may then be 0, and
    ``base`` is the mean of all blocks.
    """
    base = load_wide(partials.results, channels, 0.0)
    zeros = no_results(channels, CHUNK, L)
    if COUNTED:
        counts = zeros
        sums = zeros
        for start in range(0, partials.blocks, CHUNK):
            i = start + tl.arange(0, CHUNK)
            n = block_results(partials, 2, i, channels, L)
            counts += n
            sums = tl.fma(n, block_results(partials, 0, i, channels, L), sums)
        count = tl.sum(counts, 0)
        inverse = reciprocal_from(count, 1.0)
        base = tl.sum(sums, 0) * inverse
    else:
        count = elements_of(partials.positions, L)
        inverse = reciprocal(count)
    moved = zeros
    squares = zeros
    for start in range(0, partials.blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = block_counts(partials, i, channels, COUNTED, L)
        apart = block_results(partials, 0, i, channels, L) - base
        variances = block_results(partials, 1, i, channels, L)
        moved = tl.fma(n, apart, moved)
        squares = tl.fma(n, tl.fma(apart, apart, variances), squares)
        tl.debug_barrier()  # keeps the compiler from unrolling the loop, which has few iterations
    shift = tl.sum(moved, 0) * inverse
    var = tl.fma(-shift, shift, tl.sum(squares, 0) * inverse)
    return base + shift, nan_for_infinity(tl.where(var < 0.0, 0.0, var)), count


@triton.jit
def merged_sums(partials, channels, CHUNK: tl.constexpr, L: tl.constexpr):
    """Return a channel's sums of dz and of dz * (x - centre) from those of its blocks."""
    sums_dz = no_results(channels, CHUNK, L)
    sums_product = sums_dz
    for start in range(0, partials.blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        sums_dz += block_results(partials, 0, i, channels, L)
        sums_product += block_results(partials, 1, i, channels, L)
        tl.debug_barrier()  # keeps the compiler from unrolling the loop, which has few iterations
    return tl.sum(sums_dz, 0), tl.sum(sums_product, 0)


# ------------------------------------------------------------------------------------------------------------ affine
@triton.jit
def affine_of(values, eps, COMPUTE: tl.constexpr):
    """Return the coefficients of z = weight * (x - mean) / sqrt(var + eps) + bias = (x - centre) * scale + shift."""
    rstd = tl.rsqrt(values.var + eps)
    slope = values.weight * rstd
    centre = values.mean.to(COMPUTE)
    rest = values.mean - centre.to(tl.float64)
    return Affine(centre, slope.to(COMPUTE), (values.bias - rest * slope).to(COMPUTE), rest, rstd)


@triton.jit
def keep_affine(table, affine, statistic):
    """Write centre, scale and shift to the first three rows of a table of [rows, groups * channels]."""
    tl.store(table + statistic.place, affine.centre, mask=statistic.known)
    tl.store(table + statistic.count + statistic.place, affine.scale, mask=statistic.known)
    tl.store(table + 2 * statistic.count + statistic.place, affine.shift, mask=statistic.known)


@triton.jit
def load_row(table, row: tl.constexpr, statistic):
    """Load a row of a table, in COMPUTE."""
    return tl.load(table + row * statistic.count + statistic.place, mask=statistic.known, other=0.0)


@triton.jit
def load_affine(table, statistic):
    """Load what :func:`keep_affine` has written. The float64 fields are 0, because nothing is computed from them."""
    centre, scale, shift = load_row(table, 0, statistic), load_row(table, 1, statistic), load_row(table, 2, statistic)
    return Affine(centre, scale, shift, 0.0, 0.0)


@triton.jit
def pre_activation(value, residual, affine):
    """Return z = (x - centre) * scale + shift + residual, with the same roundings forward and backward."""
    z = tl.fma(value - affine.centre, affine.scale, affine.shift)
    if residual is not None:
        z = z + residual
    return z
