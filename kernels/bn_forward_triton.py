"""The forward pass: statistics and outputs in two launches, or in one that keeps a channel in registers."""

import triton
import triton.language as tl

from gpu_bn.kernels.common_triton import (
    MOST_SWEEPS,
    affine,
    any_channel,
    channel_sum,
    channels_of,
    first_shift,
    held_sums,
    judged,
    known_elements,
    load_wide,
    merged_moments,
    offsets_of,
    pre_activation,
    reciprocal,
    share_of,
    store_as,
    store_bits,
    streamed_sums,
    vectors_at,
    wide,
)


@triton.jit
def bn_stats_kernel(
    x, partials, channels, row, jump, magic, power, positions, share,
    SAMPLES: tl.constexpr, CHAIN: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each block's share of a strip, to partials[2, blocks, channels]."""
    strip, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, last = share_of(block, share, positions, WIDE)
    channel, known = channels_of(strip, channels, LANES, VEC, COLUMNS)
    shift = first_shift(x, first, last, strip, row, jump, magic, power, SAMPLES, LANES, VEC, COLUMNS, WIDE, COMPUTE)
    count = (last - first).to(tl.float64) if COLUMNS else (last - first).to(tl.float64) * VEC
    inverse = reciprocal(count)
    factor = shift * 0.0 + 1.0
    pending = factor > 0.0
    sweep = 0
    again = first < last
    while again:
        total, squares = streamed_sums(
            x, shift, factor, first, last, strip, row, jump, magic, power,
            CHAIN, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE,
        )  # fmt: skip
        summed = pending & known
        mean, var, shift, factor, pending = judged(total, squares, count, inverse, shift, factor, pending, RANGE)
        tl.store(partials + block * channels + channel, mean, mask=summed)
        tl.store(partials + (blocks + block) * channels + channel, var, mask=summed)
        sweep += 1
        again = any_channel(pending, COLUMNS) & (sweep < MOST_SWEEPS)


@triton.jit
def bn_merge_moments_kernel(
    partials, saved, channels, positions, share, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The statistics of each channel from those of its blocks, to saved[2, channels]."""
    strip = tl.program_id(0)
    channel, known = channels_of(strip, channels, LANES, VEC, COLUMNS)
    mean, var = merged_moments(partials, positions, share, blocks, channel, known, channels, CHUNK, VEC, COLUMNS)
    tl.store(saved + channel, mean, mask=known)
    tl.store(saved + channels + channel, var, mask=known)


@triton.jit
def keep_statistics(
    mean, var, weight, bias, old_mean, old_var, channel, known, channels, saved, running_mean, running_var, momentum,
    momentum_at, bessel, TRAINING: tl.constexpr,
):  # fmt: skip
    """Write what the backward pass needs, to saved[4, channels], and the running statistics.

    All threads have read the old ones, and a barrier has passed, before one writes the new ones.
    """
    if saved is not None:
        tl.store(saved + channel, mean, mask=known)
        tl.store(saved + channels + channel, var, mask=known)
        tl.store(saved + 2 * channels + channel, weight, mask=known)
        tl.store(saved + 3 * channels + channel, bias, mask=known)
    if TRAINING:
        if running_mean is not None:
            if momentum_at is not None:
                batch = wide(tl.load(momentum_at))
                store_as(running_mean + channel, moved(old_mean, mean, batch), known)
                store_as(running_var + channel, moved(old_var, var * bessel, batch), known)
            else:
                store_as(running_mean + channel, moved(old_mean, mean, momentum), known)
                store_as(running_var + channel, moved(old_var, var * bessel, momentum), known)


@triton.jit
def moved(old, new, momentum):
    """A running statistic after the batch's has come."""
    return (1.0 - momentum) * old + momentum * new


@triton.jit
def write_outputs(
    value, residual, y, mask, vector, position, last, strip, row, known, centre, scale, shift, parameter,
    VALUE: tl.constexpr, DROP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """y of one tile, and its bits for the backward pass."""
    offsets = offsets_of(vector, LANES, VEC)
    added = None
    if residual is not None:
        added = tl.load(residual + offsets, mask=known, other=0.0).to(COMPUTE)
    z = pre_activation(value, added, centre, scale, shift)
    store_as(y + offsets, VALUE(z, parameter.to(COMPUTE)), known)
    if mask is not None:
        store_bits(mask, DROP(z) == 0, vector, position, last, strip, row, LANES, VEC, COLUMNS)


@triton.jit
def bn_normalize_kernel(
    x, residual, y, mask, mean, var, partials, weight, bias, saved, running_mean, running_var, momentum, momentum_at,
    bessel, eps, parameter, channels, row, jump, magic, power, positions, share,
    VALUE: tl.constexpr, DROP: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Outputs, from the end of the tensor to its start, with statistics from ``partials`` or else ``mean``, ``var``."""
    blocks = tl.num_programs(1)
    strip = tl.num_programs(0) - 1 - tl.program_id(0)
    block = blocks - 1 - tl.program_id(1)
    first, last = share_of(block, share, positions, WIDE)
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    TRAINING: tl.constexpr = partials is not None
    if TRAINING:
        mean_c, var_c = merged_moments(
            partials, positions, share, blocks, channel, known_channels, channels, CHUNK, VEC, COLUMNS
        )
    else:
        mean_c = load_wide(mean, channel, known_channels, 0.0)
        var_c = load_wide(var, channel, known_channels, 1.0)
    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    if block == 0:
        old_mean = load_wide(running_mean, channel, known_channels, 0.0)
        old_var = load_wide(running_var, channel, known_channels, 0.0)
        tl.debug_barrier()
        keep_statistics(
            mean_c, var_c, weight_c, bias_c, old_mean, old_var, channel, known_channels, channels, saved,
            running_mean, running_var, momentum, momentum_at, bessel, TRAINING,
        )  # fmt: skip
    centre, scale, shift, _, _ = affine(mean_c, var_c, weight_c, bias_c, eps, COMPUTE)
    tiles = (last - first + POSITIONS - 1) // POSITIONS
    for back in range(tiles):
        position = first + (tiles - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        value = tl.load(x + offsets_of(vector, LANES, VEC), mask=known, other=0.0, eviction_policy="evict_first")
        write_outputs(
            value.to(COMPUTE), residual, y, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, VALUE, DROP, LANES, VEC, COLUMNS, COMPUTE,
        )  # fmt: skip


@triton.jit
def bn_forward_kernel(
    x, residual, y, mask, weight, bias, saved, running_mean, running_var, momentum, momentum_at, bessel, eps, parameter,
    channels, row, jump, magic, power, positions,
    VALUE: tl.constexpr, DROP: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of one strip, which the program (or its cluster of blocks) holds in registers."""
    strip = tl.program_id(0)
    last = positions
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    old_mean = load_wide(running_mean, channel, known_channels, 0.0)
    old_var = load_wide(running_var, channel, known_channels, 0.0)
    held = ()
    total = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    for i in tl.static_range(TILES):
        position = i * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        value = tl.load(x + offsets_of(vector, LANES, VEC), mask=known, other=0.0)
        held = held + (value,)
        total += value.to(COMPUTE)
    count = tl.cast(positions, tl.float64) if COLUMNS else tl.cast(positions, tl.float64) * VEC
    guess = (channel_sum(total, COLUMNS) * reciprocal(count)).to(COMPUTE)
    guess = tl.where(tl.abs(guess) < float("inf"), guess, 0.0)
    inverse = reciprocal(count)
    shift_c = guess
    factor = guess * 0.0 + 1.0
    pending = factor > 0.0
    mean = guess.to(tl.float64)
    var = mean
    sweep = 0
    again = last > 0
    while again:
        total_c, squares = held_sums(
            held, shift_c, factor, last, strip, row, TILES, POSITIONS, LANES, VEC, COLUMNS, COMPUTE, RANGE
        )
        summed = pending
        found_mean, found_var, shift_c, factor, pending = judged(
            total_c, squares, count, inverse, shift_c, factor, pending, RANGE
        )
        mean = tl.where(summed, found_mean, mean)
        var = tl.where(summed, found_var, var)
        sweep += 1
        again = any_channel(pending, COLUMNS) & (sweep < MOST_SWEEPS)

    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    tl.debug_barrier()
    keep_statistics(
        mean, var, weight_c, bias_c, old_mean, old_var, channel, known_channels, channels, saved, running_mean,
        running_var, momentum, momentum_at, bessel, True,
    )  # fmt: skip
    centre, scale, shift, _, _ = affine(mean, var, weight_c, bias_c, eps, COMPUTE)
    for i in tl.static_range(TILES):
        position = i * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        write_outputs(
            held[i].to(COMPUTE), residual, y, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, VALUE, DROP, LANES, VEC, COLUMNS, COMPUTE,
        )  # fmt: skip
