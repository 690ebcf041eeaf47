"""The backward pass: sums and the gradient of x in two or three launches, or in one that holds a strip in registers."""

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
    load_bits,
    load_once,
    load_wide,
    mask_of,
    masked,
    share_of,
    start_of,
    statistics_of,
    store_as,
    store_tile,
    tile_at,
)
from gpu_bn.kernels.triton.per_channel import (
    Partials,
    channel_sum,
    reciprocal_from,
)
from gpu_bn.kernels.triton.statistics import (
    affine_of,
    keep_affine,
    load_affine,
    load_row,
    merged_sums,
    pre_activation,
)


class Tensors(NamedTuple):
    """Tensors of a backward call; None if not given or not asked for."""

    x: Any
    dy: Any
    residual: Any
    mask: Any  # the forward pass's sign bits
    dz: Any
    dx: Any


@triton.jit
def gradient_of(
    value, dy, tensors, tile, strip, affine, parameter, GRADIENT: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Return dz of one tile, from the sign bits or from z computed again; 0 for elements that do not count."""
    if tensors.mask is not None:
        keep = load_bits(tensors.mask, tile, strip, L)
        dz = GRADIENT(keep, dy, parameter.to(L.COMPUTE))
    else:
        added = None
        if tensors.residual is not None:
            added = tl.load(tensors.residual + tile.offsets, mask=tile.loaded, other=0.0).to(L.COMPUTE)
        dz = GRADIENT(pre_activation(value, added, affine), dy, parameter.to(L.COMPUTE))
    return tl.where(tile.counted, dz, 0.0)


@triton.jit
def reduce_tiles(tensors, sums, share, strip, affine, parameter, GRADIENT: tl.constexpr, L: tl.constexpr):
    """Add dz and dz * (x - centre) to each thread's sums, tile by tile, and write dz and dx if they are asked for."""
    sum_dz, sum_product = sums
    for begin in range(share.first, share.last, L.POSITIONS):
        tile = tile_at(begin + tl.arange(0, L.POSITIONS), share.last, strip, L)
        value = tl.load(tensors.x + tile.offsets, mask=tile.loaded, other=0.0).to(L.COMPUTE)
        given = tl.load(tensors.dy + tile.offsets, mask=tile.loaded, other=0.0).to(L.COMPUTE)
        if strip.valid is not None:
            tile = masked(tile, strip, L)
        if strip.valid is not None or L.RAGGED:
            value = tl.where(tile.counted, value, 0.0)  # elements that do not count may be infinite
        gradient = gradient_of(value, given, tensors, tile, strip, affine, parameter, GRADIENT, L)
        if tensors.dz is not None:
            store_tile(tensors.dz, gradient, tile, L)
        if tensors.dx is not None:
            store_tile(tensors.dx, gradient * affine.scale, tile, L)
        sum_dz += gradient
        sum_product = tl.fma(gradient, value - affine.centre, sum_product)
    return sum_dz, sum_product


# For the elements of a channel in a block's share, with z as in the forward pass:
#     dz = dy * activation'(z)        sum(dz)        sum(dz * (x - centre))
@triton.jit
def bn_backward_reduce_kernel(
    x, dy, residual, mask, valid, dz, dx, mean, var, weight, bias, partials, eps, parameter,
    channels, row, jump, magic, power, length, positions, share,
    GRADIENT: tl.constexpr, CHAIN: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the two sums of each block's share to partials[2, blocks, groups * channels].

    Also write dz, and with frozen statistics dx = dz * weight / sqrt(var + eps), if they are asked for.
    """
    L: tl.constexpr = Layout(LANES, VEC, COLUMNS, WIDE, GROUPS, POSITIONS, COMPUTE, False, length is not None)
    number, group = group_of(tl.program_id(0), L)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    start = start_of(group, channels, row, positions, L)
    if valid is not None:
        valid = mask_of(valid, group, positions, L)
    strip = Strip(number, group, start, valid, channels, row, jump, magic, power, length, positions)
    own = share_of(block, share, strip, L)
    channel = channels_of(number, channels, L)
    statistic = statistics_of(channel, group, L)
    mean_c = load_once(mean, statistic, L)
    values = PerChannel(
        mean_c, load_wide(var, statistic, 1.0), load_wide(weight, channel, 1.0), load_wide(bias, channel, 0.0)
    )
    affine = affine_of(after(mean_c, values), eps, COMPUTE)
    tensors = Tensors(x, dy, residual, mask, dz, dx)
    zeros = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    if CHAIN == 0:
        dz_here, product_here = reduce_tiles(tensors, (zeros, zeros), own, strip, affine, parameter, GRADIENT, L)
        sum_dz = channel_sum(dz_here, L)
        sum_product = channel_sum(product_here, L)
    else:
        sum_dz = load_wide(None, channel, 0.0)
        sum_product = sum_dz
        for begin in range(own.first, own.last, CHAIN * POSITIONS):
            part = Share(begin, tl.minimum(begin + CHAIN * POSITIONS, own.last))
            dz_here, product_here = reduce_tiles(tensors, (zeros, zeros), part, strip, affine, parameter, GRADIENT, L)
            sum_dz += channel_sum(dz_here, L)
            sum_product += channel_sum(product_here, L)
    if partials is not None:
        channels, place = statistic.count, statistic.place
        tl.store(partials + block * channels + place, sum_dz, mask=statistic.known)
        tl.store(partials + (blocks + block) * channels + place, sum_product, mask=statistic.known)


@triton.jit
def write_sums(dweight, dbias, sum_dz, sum_dz_xhat, channel):
    """Write the gradients of weight and bias, in the dtypes of the pointers."""
    if dweight is not None:
        store_as(dweight + channel.place, sum_dz_xhat, channel.known)
    if dbias is not None:
        store_as(dbias + channel.place, sum_dz, channel.known)


#     dbias = sum(dz)        dweight = sum(dz * (x - mean)) / sqrt(var + eps)
@triton.jit
def bn_merge_sums_kernel(
    partials, mean, var, weight, bias, dweight, dbias, table, eps, inverse_count, counts, channels, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the parameters' gradients of LANES channels from the blocks' sums, and the coefficients of dx.

    The coefficients are centre, scale, shift, slope and offset, in table[5, groups * channels].
    """
    L: tl.constexpr = Layout(LANES, 1, True, GROUPS=GROUPS)
    number, group = group_of(tl.program_id(0), L)
    channel = channels_of(number, channels, L)
    statistic = statistics_of(channel, group, L)
    sum_dz, sum_product = merged_sums(Partials(partials, blocks), statistic, CHUNK, L)
    mean_c, var_c = load_wide(mean, statistic, 0.0), load_wide(var, statistic, 1.0)
    values = PerChannel(mean_c, var_c, load_wide(weight, channel, 1.0), load_wide(bias, channel, 0.0))
    affine = affine_of(values, eps, COMPUTE)
    sum_dz_xhat = (sum_product - affine.rest * sum_dz) * affine.rstd
    write_sums(dweight, dbias, sum_dz, sum_dz_xhat, statistic)
    if table is not None:
        inverse = inverse_of(inverse_count, counts, group)
        slope, offset = input_coefficients(sum_dz, sum_dz_xhat, affine, inverse, COMPUTE)
        keep_affine(table, affine, statistic)
        tl.store(table + 3 * statistic.count + statistic.place, slope, mask=statistic.known)
        tl.store(table + 4 * statistic.count + statistic.place, offset, mask=statistic.known)


@triton.jit
def inverse_of(inverse_count, counts, group):
    """Return 1 / count of a ghost batch, from ``counts`` if they are given, or else ``inverse_count``."""
    if counts is None:
        return inverse_count
    else:
        return reciprocal_from(tl.load(counts + group), 1.0)


@triton.jit
def input_coefficients(sum_dz, sum_dz_xhat, affine, inverse_count, COMPUTE: tl.constexpr):
    """Return slope and offset of dx = ((x - centre) * slope + dz + offset) * scale."""
    slope = -sum_dz_xhat * affine.rstd * inverse_count
    offset = -sum_dz * inverse_count - slope * affine.rest
    return slope.to(COMPUTE), offset.to(COMPUTE)


# With xhat = (x - mean) / sqrt(var + eps):
#     dx = weight / sqrt(var + eps) * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n)      (batch statistics)
#     dx = weight / sqrt(var + eps) * dz                                                  (frozen statistics)
@triton.jit
def bn_backward_input_kernel(
    x, dy, residual, mask, valid, dz, dx, mean, var, weight, bias, partials, table, sum_dz, sum_dz_xhat, dweight,
    dbias, eps, parameter, inverse_count, counts, channels, row, jump, magic, power, length, positions, share,
    GRADIENT: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write dx (and dz), from the end of the tensor to its start, because the cache still holds the end.

    The sums come from ``partials``, or else from ``sum_dz`` and ``sum_dz_xhat``; frozen statistics need none. With a
    ``table``, an earlier launch has merged them. ``counts``, if given, are the counts of the ghost batches and replace
    ``inverse_count``.
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
    FROZEN: tl.constexpr = partials is None and table is None and sum_dz is None
    if table is not None:
        affine = load_affine(table, statistic)
        slope, offset = load_row(table, 3, statistic), load_row(table, 4, statistic)
    else:
        var_c = load_wide(var, statistic, 1.0)
        weight_c = load_wide(weight, channel, 1.0)
        bias_c = load_wide(bias, channel, 0.0)
        if partials is not None:
            mean_c = load_wide(mean, statistic, 0.0)
            dz_c, product_c = merged_sums(Partials(partials, blocks), statistic, CHUNK, L)
            values = after(dz_c, PerChannel(mean_c, var_c, weight_c, bias_c))
        else:
            mean_c = load_once(mean, statistic, L)
            values = after(mean_c, PerChannel(mean_c, var_c, weight_c, bias_c))
        affine = affine_of(values, eps, COMPUTE)
        if partials is not None:
            dz_xhat_c = (product_c - affine.rest * dz_c) * affine.rstd
            if block == 0:
                write_sums(dweight, dbias, dz_c, dz_xhat_c, statistic)
        elif not FROZEN:
            dz_c = load_wide(sum_dz, statistic, 0.0)
            dz_xhat_c = load_wide(sum_dz_xhat, statistic, 0.0)
        if not FROZEN:
            inverse = inverse_of(inverse_count, counts, group)
            slope, offset = input_coefficients(dz_c, dz_xhat_c, affine, inverse, COMPUTE)
    tensors = Tensors(x, dy, residual, mask, dz, dx)
    tiles = (own.last - own.first + POSITIONS - 1) // POSITIONS
    for back in range(tiles):
        position = own.first + (tiles - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        tile = tile_at(position, own.last, strip, L)
        value = tl.load(x + tile.offsets, mask=tile.loaded, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        given = tl.load(dy + tile.offsets, mask=tile.loaded, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        if valid is not None:
            tile = masked(tile, strip, L)
        gradient = gradient_of(value, given, tensors, tile, strip, affine, parameter, GRADIENT, L)
        if dz is not None:
            store_tile(dz, gradient, tile, L)
        if dx is not None:
            if FROZEN:
                result = gradient * affine.scale
            else:
                result = (tl.fma(value - affine.centre, slope, gradient) + offset) * affine.scale
            if valid is not None:
                result = tl.where(tile.counted, result, 0.0)
            store_tile(dx, result, tile, L)


#     dz = dy * activation'(z)        dbias = sum(dz)        dweight = sum(dz * xhat)
#     dx = weight / sqrt(var + eps) * (dz - dbias / n - xhat * dweight / n)
@triton.jit
def bn_backward_kernel(
    x, dy, residual, mask, dz, dx, mean, var, weight, bias, dweight, dbias, eps, parameter, inverse_count,
    channels, row, jump, magic, power, length, positions,
    GRADIENT: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the backward pass of one strip; the program (or its cluster of blocks) holds x and dz in registers."""
    L: tl.constexpr = Layout(LANES, VEC, COLUMNS, WIDE, 1, POSITIONS, COMPUTE, False, length is not None)
    strip = Strip(tl.program_id(0), 0, 0, None, channels, row, jump, magic, power, length, positions)
    channel = channels_of(strip.number, channels, L)
    mean_c = load_once(mean, channel, L)
    values_c = PerChannel(
        mean_c, load_wide(var, channel, 1.0), load_wide(weight, channel, 1.0), load_wide(bias, channel, 0.0)
    )
    if COLUMNS:
        values_c = after(mean_c, values_c)
    affine = affine_of(values_c, eps, COMPUTE)
    tensors = Tensors(x, dy, residual, mask, dz, dx)
    values = ()
    gradients = ()
    sum_dz = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    sum_product = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    for i in tl.static_range(TILES):
        tile = tile_at(i * POSITIONS + tl.arange(0, POSITIONS), positions, strip, L)
        held = tl.load(x + tile.offsets, mask=tile.loaded, other=0.0)
        value = held.to(COMPUTE)
        given = tl.load(dy + tile.offsets, mask=tile.loaded, other=0.0).to(COMPUTE)
        gradient = gradient_of(value, given, tensors, tile, strip, affine, parameter, GRADIENT, L)
        if dz is not None:
            store_tile(dz, gradient, tile, L)
        sum_dz += gradient
        sum_product = tl.fma(gradient, tl.where(tile.known, value - affine.centre, 0.0), sum_product)
        values = values + (held,)
        gradients = gradients + (gradient,)
    dz_c = channel_sum(sum_dz, L)
    dz_xhat_c = (channel_sum(sum_product, L) - affine.rest * dz_c) * affine.rstd
    write_sums(dweight, dbias, dz_c, dz_xhat_c, channel)
    if dx is not None:
        slope, offset = input_coefficients(dz_c, dz_xhat_c, affine, inverse_count, COMPUTE)
        for i in tl.static_range(TILES):
            tile = tile_at(i * POSITIONS + tl.arange(0, POSITIONS), positions, strip, L)
            value = values[i].to(COMPUTE) - affine.centre
            result = (tl.fma(value, slope, gradients[i]) + offset) * affine.scale
            store_tile(dx, result, tile, L)
