"""The forward pass: statistics and outputs in two launches, or in one that keeps a channel in registers."""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    after,
    channels_of,
    group_of,
    known_elements,
    load_once,
    load_wide,
    mask_of,
    offsets_of,
    share_of,
    start_of,
    store_as,
    store_bits,
    valid_elements,
    vectors_at,
    wide,
)
from gpu_bn.kernels.triton.statistics import (
    MOST_SWEEPS,
    affine,
    any_channel,
    assessed,
    channel_sum,
    first_shift,
    held_sums,
    merged_moments,
    pre_activation,
    reciprocal,
    reciprocal_from,
    streamed_sums,
    usable_shift,
)


# Ioffe & Szegedy 2015, Alg. 1, for a block's share of the n positions:
#     mean = sum(x) / n        var = sum((x - mean)**2) / n
@triton.jit
def bn_stats_kernel(
    x, valid, partials, channels, row, jump, magic, power, positions, share,
    SAMPLES: tl.constexpr, CHAIN: tl.constexpr, AT_ONCE: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each block's share of a strip, to partials[2, blocks, groups * channels].

    With a mask also the count, to a third plane.
    """
    program, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    strip, group = group_of(program, GROUPS)
    start = start_of(group, channels, row, positions, GROUPS, COLUMNS, WIDE)
    if valid is not None:
        valid = mask_of(valid, group, positions, VEC, COLUMNS, WIDE)
    first, last = share_of(block, share, positions, WIDE)
    channel, known = channels_of(strip, channels, LANES, VEC, COLUMNS)
    shift = first_shift(
        x, valid, first, last, strip, row, jump, magic, power, start, SAMPLES, LANES, VEC, COLUMNS, WIDE, COMPUTE
    )
    channel += group * channels
    channels *= GROUPS
    if valid is not None:
        count = (last - first).to(tl.float64)
    else:
        count = (last - first).to(tl.float64) if COLUMNS else (last - first).to(tl.float64) * VEC
    inverse = reciprocal(count)
    factor = shift * 0.0 + 1.0
    pending = known & (factor > 0.0)
    sweep = 0
    again = first < last
    while again:
        counted, total, squares = streamed_sums(
            x, valid, shift, factor, first, last, strip, row, jump, magic, power, start,
            CHAIN, AT_ONCE, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE, RANGE,
        )  # fmt: skip
        if valid is not None:
            count = counted
            inverse = reciprocal_from(count, 1.0)
        summed = pending
        mean, var, shift, factor, pending = assessed(total, squares, count, inverse, shift, factor, pending, RANGE)
        tl.store(partials + block * channels + channel, mean, mask=summed)
        tl.store(partials + (blocks + block) * channels + channel, var, mask=summed)
        if valid is not None:
            tl.store(partials + (2 * blocks + block) * channels + channel, count, mask=summed)
        sweep += 1
        again = any_channel(pending, COLUMNS) & (sweep < MOST_SWEEPS)


# Of blocks with n_i, mean_i and var_i:
#     mean = sum(n_i * mean_i) / n        var = sum(n_i * (var_i + (mean_i - mean)**2)) / n
@triton.jit
def bn_merge_moments_kernel(
    partials, saved, counts, channels, positions, share, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The statistics of each channel from those of its blocks, to saved[2, groups * channels] and, masked, counts."""
    strip, group = group_of(tl.program_id(0), GROUPS)
    channel, known = channels_of(strip, channels, LANES, VEC, COLUMNS)
    channel += group * channels
    channels *= GROUPS
    mean, var, count = merged_moments(
        partials, positions, share, blocks, channel, known, channels, CHUNK, VEC, COLUMNS, counts is not None
    )
    tl.store(saved + channel, mean, mask=known)
    tl.store(saved + channels + channel, var, mask=known)
    keep_count(counts, count, strip, group, COLUMNS)


@triton.jit
def keep_count(counts, count, strip, group, COLUMNS: tl.constexpr):
    """The number of a ghost batch's valid positions, by the programs of its first strip."""
    if counts is not None:
        if strip == 0:
            tl.store(counts + group, tl.max(count, 0) if COLUMNS else count)


#     running = (1 - momentum) * running + momentum * batch,  the variance by n / (n - 1)
@triton.jit
def keep_statistics(
    mean, var, weight, bias, old_mean, old_var, channel, known, channels, saved, running_mean, running_var, counter,
    batches, momentum, momentum_at, bessel, TRAINING: tl.constexpr, group=0, GROUPS: tl.constexpr = 1,
):  # fmt: skip
    """Write what the backward pass needs, to saved[4, channels], the running statistics, and the number of batches.

    Of ghost batches, the first two parts of ``saved`` are as long as there are statistics.

    All threads have read the old ones, and a barrier has passed, before one writes the new ones.
    """
    if saved is not None:
        tl.store(saved + group * channels + channel, mean, mask=known)
        tl.store(saved + (GROUPS + group) * channels + channel, var, mask=known)
        first = group * channels + channel < channels if GROUPS > 1 else known
        tl.store(saved + 2 * GROUPS * channels + channel, weight, mask=first)
        tl.store(saved + (2 * GROUPS + 1) * channels + channel, bias, mask=first)
    if TRAINING:
        if counter is not None:
            tl.store(counter, batches, mask=tl.program_id(0) == 0)
        if running_mean is not None:
            if momentum_at is not None:
                batch = wide(tl.load(momentum_at))
                store_as(running_mean + channel, moved(old_mean, mean, batch), known)
                store_as(running_var + channel, moved(old_var, var * bessel, batch), known)
            else:
                store_as(running_mean + channel, moved(old_mean, mean, momentum), known)
                store_as(running_var + channel, moved(old_var, var * bessel, momentum), known)


@triton.jit
def batches_of(counter):
    """The number of batches with this one, for the programs of one strip, which count it."""
    if counter is None:
        return 0
    else:
        return tl.load(counter, mask=tl.program_id(0) == 0, other=0) + 1


@triton.jit
def moved(old, new, momentum):
    """A running statistic after the batch's has come."""
    return (1.0 - momentum) * old + momentum * new


@triton.jit
def write_outputs(
    value, residual, y, mask, vector, position, last, strip, row, known, centre, scale, shift, parameter,
    VALUE: tl.constexpr, DROP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr, counted=None,
):  # fmt: skip
    """y of one tile, 0 where a mask says so, and its bits for the backward pass."""
    offsets = offsets_of(vector, LANES, VEC)
    added = None
    if residual is not None:
        added = tl.load(residual + offsets, mask=known, other=0.0).to(COMPUTE)
    z = pre_activation(value, added, centre, scale, shift)
    places = y + offsets
    result = VALUE(z, parameter.to(COMPUTE))
    if counted is not None:
        result = tl.where(counted, result, 0.0)
    store_as(places, result, known)
    if mask is not None:
        store_bits(mask, DROP(z) == 0, vector, position, last, strip, row, LANES, VEC, COLUMNS)


#     y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
@triton.jit
def bn_normalize_kernel(
    x, residual, y, mask, valid, mean, var, partials, weight, bias, saved, counts, running_mean, running_var, counter,
    momentum, momentum_at, bessel, eps, parameter, channels, row, jump, magic, power, positions, share,
    VALUE: tl.constexpr, DROP: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Outputs, from the end of the tensor to its start, with statistics from ``partials`` or else ``mean``, ``var``."""
    blocks = tl.num_programs(1)
    strip, group = group_of(tl.num_programs(0) - 1 - tl.program_id(0), GROUPS)
    start = start_of(group, channels, row, positions, GROUPS, COLUMNS, WIDE)
    if valid is not None:
        valid = mask_of(valid, group, positions, VEC, COLUMNS, WIDE)
    block = blocks - 1 - tl.program_id(1)
    first, last = share_of(block, share, positions, WIDE)
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    place = channel + group * channels
    TRAINING: tl.constexpr = partials is not None
    if TRAINING:
        mean_c, var_c, count = merged_moments(
            partials, positions, share, blocks, place, known_channels, channels * GROUPS, CHUNK, VEC, COLUMNS,
            valid is not None,
        )  # fmt: skip
        if block == 0:
            keep_count(counts, count, strip, group, COLUMNS)
    else:
        mean_c = load_once(mean, place, known_channels, COLUMNS)
        var_c = load_wide(var, place, known_channels, 1.0)
    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    if not TRAINING:
        mean_c, var_c, weight_c, bias_c = after(mean_c, mean_c, var_c, weight_c, bias_c)
    if block == 0:
        batches = batches_of(counter)
        old_mean = load_wide(running_mean, channel, known_channels, 0.0)
        old_var = load_wide(running_var, channel, known_channels, 0.0)
        tl.debug_barrier()
        keep_statistics(
            mean_c, var_c, weight_c, bias_c, old_mean, old_var, channel, known_channels, channels, saved,
            running_mean, running_var, counter, batches, momentum, momentum_at, bessel, TRAINING, group, GROUPS,
        )  # fmt: skip
    centre, scale, shift, _, _ = affine(mean_c, var_c, weight_c, bias_c, eps, COMPUTE)
    tiles = (last - first + POSITIONS - 1) // POSITIONS
    for back in range(tiles):
        position = first + (tiles - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE, start)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        value = tl.load(x + offsets_of(vector, LANES, VEC), mask=known, other=0.0, eviction_policy="evict_first")
        counted = None
        if valid is not None:
            counted = valid_elements(valid, known, position, last, VEC, COLUMNS)
        write_outputs(
            value.to(COMPUTE), residual, y, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, VALUE, DROP, LANES, VEC, COLUMNS, COMPUTE, counted,
        )  # fmt: skip


#     mean = sum(x) / n        var = sum((x - mean)**2) / n
#     y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
@triton.jit
def bn_forward_kernel(
    x, residual, y, mask, weight, bias, saved, running_mean, running_var, counter, momentum, momentum_at, bessel, eps,
    parameter, channels, row, jump, magic, power, positions,
    VALUE: tl.constexpr, DROP: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of one strip, which the program (or its cluster of blocks) holds in registers."""
    strip = tl.program_id(0)
    last = positions
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    batches = batches_of(counter)
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
    guess = usable_shift((channel_sum(total, COLUMNS) * reciprocal(count)).to(COMPUTE), x.dtype.element_ty, COMPUTE)
    inverse = reciprocal(count)
    shift_c = guess
    factor = guess * 0.0 + 1.0
    pending = known_channels & (factor > 0.0)
    mean = guess.to(tl.float64)
    var = mean
    sweep = 0
    again = last > 0
    while again:
        total_c, squares = held_sums(
            held, shift_c, factor, last, strip, row, TILES, POSITIONS, LANES, VEC, COLUMNS, COMPUTE, RANGE
        )
        summed = pending
        found_mean, found_var, shift_c, factor, pending = assessed(
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
        running_var, counter, batches, momentum, momentum_at, bessel, True,
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
