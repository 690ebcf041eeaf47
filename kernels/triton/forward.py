"""The forward pass: statistics and outputs in two or three launches, or in one that holds a strip in registers."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    Layout,
    PerChannel,
    Share,
    Strip,
    after,
    channels_of,
    group_of,
    load_once,
    load_wide,
    mask_of,
    masked,
    share_of,
    start_of,
    statistics_of,
    store_as,
    store_bits,
    store_tile,
    tile_at,
    wide,
)
from gpu_bn.kernels.triton.per_channel import (
    Base,
    Partials,
    any_channel,
    channel_sum,
    elements_in,
    reciprocal,
    reciprocal_from,
)
from gpu_bn.kernels.triton.statistics import (
    MOST_SWEEPS,
    affine_of,
    assessed,
    first_shift,
    held_sums,
    keep_affine,
    load_affine,
    merged_moments,
    pre_activation,
    streamed_sums,
    usable_shift,
)
from gpu_bn.kernels.triton.sums import leave_sums, moments_of_sums


class Outputs(NamedTuple):
    """Tensors that outputs are computed from or written to."""

    residual: Any
    y: Any
    mask: Any  # the sign bits for the backward pass


class Running(NamedTuple):
    """Running statistics, and the numbers for their update."""

    mean: Any
    var: Any
    counter: Any  # number of batches
    momentum: Any
    momentum_at: Any  # pointer to the momentum; None: it is given as a number
    bessel: Any  # n / (n - 1)


class Old(NamedTuple):
    """Running statistics before this batch, and the number of batches including it."""

    batches: Any
    mean: Any
    var: Any


# Ioffe & Szegedy 2015, Alg. 1, for the n elements of a channel in a block's share:
#     mean = sum(x) / n        var = sum((x - mean)**2) / n
@triton.jit
def bn_stats_kernel(
    x, valid, partials, channels, row, jump, magic, power, length, positions, share,
    SAMPLES: tl.constexpr, CHAIN: tl.constexpr, AT_ONCE: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Write mean and variance of each block's share of a strip to partials[2, blocks, groups * channels].

    With a mask and for ragged rows, also write the count, to a third plane. If ``partials`` has dtype float32, write
    sums instead: see :func:`leave_sums`.
    """
    L: tl.constexpr = Layout(LANES, VEC, COLUMNS, WIDE, GROUPS, POSITIONS, COMPUTE, RANGE, length is not None)
    number, group = group_of(tl.program_id(0), L)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    start = start_of(group, channels, row, positions, L)
    if valid is not None:
        valid = mask_of(valid, group, positions, L)
    strip = Strip(number, group, start, valid, channels, row, jump, magic, power, length, positions)
    own = share_of(block, share, strip, L)
    statistic = statistics_of(channels_of(number, channels, L), group, L)
    base = first_base(first_shift(x, own, strip, SAMPLES, L))
    pending = statistic.known & (base.factor > 0.0)
    found = Partials(partials, blocks)
    if partials.dtype.element_ty == tl.float32:
        leave_sums(x, found, block, base, pending, own, strip, statistic, AT_ONCE, L)
    else:
        leave_moments(x, found, block, base, pending, own, strip, statistic, CHAIN, AT_ONCE, L)


@triton.jit
def leave_moments(
    x, partials, block, base, pending, share, strip, statistic, CHAIN: tl.constexpr, AT_ONCE: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Write the pending channels' mean and variance after each sweep; with a mask or ragged rows, also the count."""
    count = elements_in(share, strip, L)
    inverse = reciprocal_from(count, 1.0) if L.RAGGED else reciprocal(count)
    results, blocks = partials.results, partials.blocks
    channels, place = statistic.count, statistic.place
    sweep = 0
    again = share.first < share.last
    while again:
        sums = streamed_sums(x, base, share, strip, CHAIN, AT_ONCE, L)
        if strip.valid is not None:
            count = sums.count
            inverse = reciprocal_from(count, 1.0)
        summed = pending
        mean, var, base, pending = assessed(sums.total, sums.squares, count, inverse, base, pending, L)
        tl.store(results + block * channels + place, mean, mask=summed)
        tl.store(results + (blocks + block) * channels + place, var, mask=summed)
        if strip.valid is not None or L.RAGGED:
            tl.store(results + (2 * blocks + block) * channels + place, count, mask=summed)
        sweep += 1
        again = any_channel(pending, L) & (sweep < MOST_SWEEPS)


@triton.jit
def first_base(shift):
    """Return the base for the first sweep, with a factor of 1."""
    return Base(shift, shift * 0.0 + 1.0)


# For blocks with n_i elements, mean_i and var_i:
#     mean = sum(n_i * mean_i) / n        var = sum(n_i * (var_i + (mean_i - mean)**2)) / n
@triton.jit
def bn_merge_moments_kernel(
    partials, saved, counts, table, weight, bias, eps, channels, positions, share, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of LANES channels' blocks into saved[2, groups * channels]; with a mask, also write counts.

    With a ``table``, also save weight and bias, and write centre, scale and shift to table[3, groups * channels].
    """
    L: tl.constexpr = Layout(LANES, 1, True, GROUPS=GROUPS)
    number, group = group_of(tl.program_id(0), L)
    channel = channels_of(number, channels, L)
    statistic = statistics_of(channel, group, L)
    found = Partials(partials, blocks, share, positions)
    if partials.dtype.element_ty == tl.float32:
        mean, var, count = moments_of_sums(found, statistic, CHUNK, RAGGED or counts is not None, counts is not None, L)
    else:
        mean, var, count = merged_moments(found, statistic, CHUNK, RAGGED or counts is not None, L)
    keep_count(counts, count, number, group, L)
    if table is None:
        tl.store(saved + statistic.place, mean, mask=statistic.known)
        tl.store(saved + statistic.count + statistic.place, var, mask=statistic.known)
    else:
        values = PerChannel(mean, var, load_wide(weight, channel, 1.0), load_wide(bias, channel, 0.0))
        keep_saved(values, channel, group, saved, L)
        keep_affine(table, affine_of(values, eps, COMPUTE), statistic)


@triton.jit
def keep_count(counts, count, number, group, L: tl.constexpr):
    """Write the count of each channel in a ghost batch, in the programs of its first strip; others write nothing."""
    if counts is not None:
        if number == 0:
            tl.store(counts + group, tl.max(count, 0) if L.COLUMNS else count)


@triton.jit
def load_old(running, channel):
    """Load the running statistics from before this batch."""
    batches = batches_of(running.counter)
    return Old(batches, load_wide(running.mean, channel, 0.0), load_wide(running.var, channel, 0.0))


@triton.jit
def batches_of(counter):
    """Return the number of batches including this one in the programs that write it, 1 in others; 0 without counter."""
    if counter is None:
        return 0
    else:
        return tl.load(counter, mask=tl.program_id(0) == 0, other=0) + 1


@triton.jit
def keep_saved(values, channel, group, saved, L: tl.constexpr):
    """Write mean, variance, weight and bias to saved[4, channels], for the backward pass.

    With ghost batches, mean and variance have shape [groups, channels] each.
    """
    channels, place, known = channel.count, channel.place, channel.known
    tl.store(saved + group * channels + place, values.mean, mask=known)
    tl.store(saved + (L.GROUPS + group) * channels + place, values.var, mask=known)
    first = group * channels + place < channels if L.GROUPS > 1 else known
    tl.store(saved + 2 * L.GROUPS * channels + place, values.weight, mask=first)
    tl.store(saved + (2 * L.GROUPS + 1) * channels + place, values.bias, mask=first)


#     running_mean = (1 - momentum) * running_mean + momentum * mean
#     running_var = (1 - momentum) * running_var + momentum * var * n / (n - 1)
@triton.jit
def keep_running(mean, var, channel, running, old):
    """Write the running statistics and the number of batches.

    All threads must have read the old ones and passed a barrier before one of them writes the new ones.
    """
    if running.counter is not None:
        tl.store(running.counter, old.batches, mask=tl.program_id(0) == 0)
    if running.mean is not None:
        place, known = channel.place, channel.known
        if running.momentum_at is not None:
            batch = wide(tl.load(running.momentum_at))
            store_as(running.mean + place, moved(old.mean, mean, batch), known)
            store_as(running.var + place, moved(old.var, var * running.bessel, batch), known)
        else:
            store_as(running.mean + place, moved(old.mean, mean, running.momentum), known)
            store_as(running.var + place, moved(old.var, var * running.bessel, running.momentum), known)


@triton.jit
def moved(old, new, momentum):
    """Return a running statistic, updated by that of the batch."""
    return (1.0 - momentum) * old + momentum * new


@triton.jit
def write_outputs(
    value, outputs, tile, strip, affine, parameter, VALUE: tl.constexpr, DROP: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Write y of one tile, 0 where the mask leaves an element out, and the sign bits for the backward pass."""
    added = None
    if outputs.residual is not None:
        added = tl.load(outputs.residual + tile.offsets, mask=tile.loaded, other=0.0).to(L.COMPUTE)
    z = pre_activation(value, added, affine)
    result = VALUE(z, parameter.to(L.COMPUTE))
    if strip.valid is not None:
        result = tl.where(tile.counted, result, 0.0)
    store_tile(outputs.y, result, tile, L)
    if outputs.mask is not None:
        store_bits(outputs.mask, DROP(z) == 0, tile, strip, L)


#     y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
@triton.jit
def bn_normalize_kernel(
    x, residual, y, mask, valid, mean, var, partials, table, weight, bias, saved, counts, running_mean, running_var,
    counter, momentum, momentum_at, bessel, eps, parameter,
    channels, row, jump, magic, power, length, positions, share,
    VALUE: tl.constexpr, DROP: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the outputs, from the end of the tensor to its start, because the cache still holds the end.

    Statistics come from ``partials``, or else from ``mean`` and ``var``. With a ``table``, an earlier launch has merged
    and saved them.
    """
    L: tl.constexpr = Layout(LANES, VEC, COLUMNS, WIDE, GROUPS, POSITIONS, COMPUTE, False, length is not None)
    blocks = tl.num_programs(1)
    number, group = group_of(tl.num_programs(0) - 1 - tl.program_id(0), L)
    start = start_of(group, channels, row, positions, L)
    if valid is not None:
        valid = mask_of(valid, group, positions, L)
    strip = Strip(number, group, start, valid, channels, row, jump, magic, power, length, positions)
    block = blocks - 1 - tl.program_id(1)
    own = share_of(block, share, strip, L)
    channel = channels_of(number, channels, L)
    statistic = statistics_of(channel, group, L)
    running = Running(running_mean, running_var, counter, momentum, momentum_at, bessel)
    if table is not None:
        affine = load_affine(table, statistic)
        if block == 0:
            mean_c, var_c = load_wide(saved, channel, 0.0), load_wide(saved + channels, channel, 1.0)
            move_running(mean_c, var_c, channel, running)
    else:
        if partials is not None:
            found = Partials(partials, blocks, share, positions)
            mean_c, var_c, count = merged_moments(found, statistic, CHUNK, L.RAGGED or valid is not None, L)
            if block == 0:
                keep_count(counts, count, number, group, L)
        else:
            mean_c = load_once(mean, statistic, L)
            var_c = load_wide(var, statistic, 1.0)
        values = PerChannel(mean_c, var_c, load_wide(weight, channel, 1.0), load_wide(bias, channel, 0.0))
        if partials is None:
            values = after(mean_c, values)
        if saved is not None:
            if block == 0:
                keep_saved(values, channel, group, saved, L)
                if partials is not None:
                    move_running(values.mean, values.var, channel, running)
        affine = affine_of(values, eps, COMPUTE)
    outputs = Outputs(residual, y, mask)
    tiles = (own.last - own.first + POSITIONS - 1) // POSITIONS
    for back in range(tiles):
        position = own.first + (tiles - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        tile = tile_at(position, own.last, strip, L)
        value = tl.load(x + tile.offsets, mask=tile.loaded, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        if valid is not None:
            tile = masked(tile, strip, L)
        write_outputs(value, outputs, tile, strip, affine, parameter, VALUE, DROP, L)


@triton.jit
def move_running(mean, var, channel, running):
    """Load the running statistics, and move them towards those of the batch."""
    old = load_old(running, channel)
    tl.debug_barrier()
    keep_running(mean, var, channel, running, old)


#     mean = sum(x) / n        var = sum((x - mean)**2) / n
#     y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
@triton.jit
def bn_forward_kernel(
    x, residual, y, mask, weight, bias, saved, running_mean, running_var, counter, momentum, momentum_at, bessel, eps,
    parameter, channels, row, jump, magic, power, length, positions,
    VALUE: tl.constexpr, DROP: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Compute the forward pass of one strip, which the program (or its cluster of blocks) holds in registers."""
    L: tl.constexpr = Layout(LANES, VEC, COLUMNS, WIDE, 1, POSITIONS, COMPUTE, RANGE, length is not None)
    strip = Strip(tl.program_id(0), 0, 0, None, channels, row, jump, magic, power, length, positions)
    channel = channels_of(strip.number, channels, L)
    running = Running(running_mean, running_var, counter, momentum, momentum_at, bessel)
    old = load_old(running, channel)
    held = ()
    total = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    for i in tl.static_range(TILES):
        tile = tile_at(i * POSITIONS + tl.arange(0, POSITIONS), positions, strip, L)
        value = tl.load(x + tile.offsets, mask=tile.loaded, other=0.0)
        held = held + (value,)
        total += tl.where(tile.known, value.to(COMPUTE), 0.0) if L.RAGGED else value.to(COMPUTE)
    count = elements_in(Share(0, positions), strip, L)
    inverse = reciprocal(count)
    base = first_base(usable_shift((channel_sum(total, L) * inverse).to(COMPUTE), x.dtype.element_ty, L))
    pending = channel.known & (base.factor > 0.0)
    mean = base.shift.to(tl.float64)
    var = mean
    sweep = 0
    again = positions > 0
    while again:
        total_c, squares = held_sums(held, base, strip, TILES, L)
        summed = pending
        found_mean, found_var, base, pending = assessed(total_c, squares, count, inverse, base, pending, L)
        mean = tl.where(summed, found_mean, mean)
        var = tl.where(summed, found_var, var)
        sweep += 1
        again = any_channel(pending, L) & (sweep < MOST_SWEEPS)

    weight_c = load_wide(weight, channel, 1.0)
    bias_c = load_wide(bias, channel, 0.0)
    values = PerChannel(mean, var, weight_c, bias_c)
    tl.debug_barrier()
    keep_saved(values, channel, 0, saved, L)
    keep_running(mean, var, channel, running, old)
    affine = affine_of(values, eps, COMPUTE)
    outputs = Outputs(residual, y, mask)
    for i in tl.static_range(TILES):
        tile = tile_at(i * POSITIONS + tl.arange(0, POSITIONS), positions, strip, L)
        write_outputs(held[i].to(COMPUTE), outputs, tile, strip, affine, parameter, VALUE, DROP, L)
