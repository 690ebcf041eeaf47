"""The backward pass: sums and the input's gradient in two launches, or in one that keeps a channel in registers."""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    after,
    channels_of,
    group_of,
    known_elements,
    load_bits,
    load_once,
    load_wide,
    mask_of,
    offsets_of,
    share_of,
    start_of,
    store_as,
    valid_elements,
    vectors_at,
)
from gpu_bn.kernels.triton.statistics import (
    affine,
    channel_sum,
    merged_sums,
    pre_activation,
    reciprocal_from,
)


@triton.jit
def gradient_of(
    value, dy, residual, mask, vector, position, last, strip, row, known, centre, scale, shift, parameter,
    GRADIENT: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
    counted=None,
):  # fmt: skip
    """dz of one tile, from the forward pass's bits or from z computed again; 0 where a mask says so."""
    if mask is not None:
        keep = load_bits(mask, vector, position, last, strip, row, LANES, VEC, COLUMNS)
        dz = GRADIENT(keep, dy, parameter.to(COMPUTE))
    else:
        added = None
        if residual is not None:
            added = tl.load(residual + offsets_of(vector, LANES, VEC), mask=known, other=0.0).to(COMPUTE)
        dz = GRADIENT(pre_activation(value, added, centre, scale, shift), dy, parameter.to(COMPUTE))
    if counted is not None:
        known = counted
    return tl.where(known, dz, 0.0)


@triton.jit
def reduce_tiles(
    x, dy, residual, mask, valid, dz, dx, dz_here, product_here, centre, scale, shift, parameter, first, last, strip,
    row, jump, magic, power, start,
    GRADIENT: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add dz and dz * (x - centre), tile by tile, and write what is asked for."""
    for begin in range(first, last, POSITIONS):
        position = begin + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE, start)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        offsets = offsets_of(vector, LANES, VEC)
        value = tl.load(x + offsets, mask=known, other=0.0).to(COMPUTE)
        given = tl.load(dy + offsets, mask=known, other=0.0).to(COMPUTE)
        counted = None
        if valid is not None:
            counted = valid_elements(valid, known, position, last, VEC, COLUMNS)
            value = tl.where(counted, value, 0.0)  # what a mask leaves out may be infinite
        gradient = gradient_of(
            value, given, residual, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, GRADIENT, LANES, VEC, COLUMNS, COMPUTE, counted,
        )  # fmt: skip
        if dz is not None:
            store_as(dz + offsets, gradient, known)
        if dx is not None:
            store_as(dx + offsets, gradient * scale, known)
        dz_here += gradient
        product_here = tl.fma(gradient, value - centre, product_here)
    return dz_here, product_here


# For a block's share, with z as in the forward pass:
#     dz = dy * activation'(z)        sums of dz and of dz * (x - mean)
@triton.jit
def bn_backward_reduce_kernel(
    x, dy, residual, mask, valid, dz, dx, mean, var, weight, bias, partials, eps, parameter,
    channels, row, jump, magic, power, positions, share,
    GRADIENT: tl.constexpr, CHAIN: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * (x - centre) over each block's share, to partials[2, blocks, groups * channels].

    Also writes dz, and with frozen statistics dx, where they are asked for.
    """
    program, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    strip, group = group_of(program, GROUPS)
    start = start_of(group, channels, row, positions, GROUPS, COLUMNS, WIDE)
    if valid is not None:
        valid = mask_of(valid, group, positions, VEC, COLUMNS, WIDE)
    first, last = share_of(block, share, positions, WIDE)
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    place = channel + group * channels
    mean_c = load_once(mean, place, known_channels, COLUMNS)
    var_c = load_wide(var, place, known_channels, 1.0)
    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    mean_c, var_c, weight_c, bias_c = after(mean_c, mean_c, var_c, weight_c, bias_c)
    centre, scale, shift, _, _ = affine(mean_c, var_c, weight_c, bias_c, eps, COMPUTE)
    zeros = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    if CHAIN == 0:
        dz_here, product_here = reduce_tiles(
            x, dy, residual, mask, valid, dz, dx, zeros, zeros, centre, scale, shift, parameter, first, last, strip,
            row, jump, magic, power, start, GRADIENT, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE,
        )  # fmt: skip
        sum_dz = channel_sum(dz_here, COLUMNS)
        sum_product = channel_sum(product_here, COLUMNS)
    else:
        sum_dz = load_wide(None, channel, known_channels, 0.0)
        sum_product = sum_dz
        for begin in range(first, last, CHAIN * POSITIONS):
            end = tl.minimum(begin + CHAIN * POSITIONS, last)
            dz_here, product_here = reduce_tiles(
                x, dy, residual, mask, valid, dz, dx, zeros, zeros, centre, scale, shift, parameter, begin, end, strip,
                row, jump, magic, power, start, GRADIENT, POSITIONS, LANES, VEC, COLUMNS, WIDE, COMPUTE,
            )  # fmt: skip
            sum_dz += channel_sum(dz_here, COLUMNS)
            sum_product += channel_sum(product_here, COLUMNS)
    if partials is not None:
        channels *= GROUPS
        tl.store(partials + block * channels + place, sum_dz, mask=known_channels)
        tl.store(partials + (blocks + block) * channels + place, sum_product, mask=known_channels)


@triton.jit
def write_sums(dweight, dbias, sum_dz, sum_dz_xhat, channel, known):
    """The parameters' gradients, in the parameters' dtypes."""
    if dweight is not None:
        store_as(dweight + channel, sum_dz_xhat, known)
    if dbias is not None:
        store_as(dbias + channel, sum_dz, known)


#     dbias = sum(dz)        dweight = sum(dz * (x - mean)) / sqrt(var + eps)
@triton.jit
def bn_merge_sums_kernel(
    partials, mean, var, dweight, dbias, eps, channels, blocks,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients from the blocks' sums."""
    strip, group = group_of(tl.program_id(0), GROUPS)
    channel, known = channels_of(strip, channels, LANES, VEC, COLUMNS)
    channel += group * channels
    channels *= GROUPS
    sum_dz, sum_product = merged_sums(partials, blocks, channel, known, channels, CHUNK, COLUMNS)
    mean_c = load_wide(mean, channel, known, 0.0)
    var_c = load_wide(var, channel, known, 1.0)
    _, _, _, rest, rstd = affine(mean_c, var_c, 1.0, 0.0, eps, COMPUTE)
    write_sums(dweight, dbias, sum_dz, (sum_product - rest * sum_dz) * rstd, channel, known)


@triton.jit
def input_coefficients(sum_dz, sum_dz_xhat, rest, rstd, inverse_count, COMPUTE: tl.constexpr):
    """dx = ((x - centre) * slope + dz + offset) * scale."""
    slope = -sum_dz_xhat * rstd * inverse_count
    offset = -sum_dz * inverse_count - slope * rest
    return slope.to(COMPUTE), offset.to(COMPUTE)


# With xhat = (x - mean) / sqrt(var + eps):
#     dx = weight / sqrt(var + eps) * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n)      (batch statistics)
#     dx = weight / sqrt(var + eps) * dz                                                  (frozen statistics)
@triton.jit
def bn_backward_input_kernel(
    x, dy, residual, mask, valid, dz, dx, mean, var, weight, bias, partials, sum_dz, sum_dz_xhat, dweight, dbias, eps,
    parameter, inverse_count, counts, channels, row, jump, magic, power, positions, share,
    GRADIENT: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """dx (and dz), from the end of the tensor to its start.

    The sums come from ``partials``, or else from ``sum_dz`` and ``sum_dz_xhat``; with frozen statistics there are none.
    ``counts``, if given, has the counts of the ghost batches, in place of ``inverse_count``.
    """
    blocks = tl.num_programs(1)
    strip, group = group_of(tl.num_programs(0) - 1 - tl.program_id(0), GROUPS)
    start = start_of(group, channels, row, positions, GROUPS, COLUMNS, WIDE)
    if valid is not None:
        valid = mask_of(valid, group, positions, VEC, COLUMNS, WIDE)
    block = blocks - 1 - tl.program_id(1)
    first, last = share_of(block, share, positions, WIDE)
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    place = channel + group * channels
    var_c = load_wide(var, place, known_channels, 1.0)
    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    FROZEN: tl.constexpr = partials is None and sum_dz is None
    if partials is not None:
        mean_c = load_wide(mean, place, known_channels, 0.0)
        dz_c, product_c = merged_sums(partials, blocks, place, known_channels, channels * GROUPS, CHUNK, COLUMNS)
        mean_c, var_c, weight_c, bias_c = after(dz_c, mean_c, var_c, weight_c, bias_c)
    else:
        mean_c = load_once(mean, place, known_channels, COLUMNS)
        mean_c, var_c, weight_c, bias_c = after(mean_c, mean_c, var_c, weight_c, bias_c)
    centre, scale, shift, rest, rstd = affine(mean_c, var_c, weight_c, bias_c, eps, COMPUTE)
    if partials is not None:
        dz_xhat_c = (product_c - rest * dz_c) * rstd
        if block == 0:
            write_sums(dweight, dbias, dz_c, dz_xhat_c, place, known_channels)
    elif not FROZEN:
        dz_c = load_wide(sum_dz, place, known_channels, 0.0)
        dz_xhat_c = load_wide(sum_dz_xhat, place, known_channels, 0.0)
    if not FROZEN:
        if counts is not None:
            inverse_count = reciprocal_from(tl.load(counts + group), 1.0)
        slope, offset = input_coefficients(dz_c, dz_xhat_c, rest, rstd, inverse_count, COMPUTE)
    tiles = (last - first + POSITIONS - 1) // POSITIONS
    for back in range(tiles):
        position = first + (tiles - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE, start)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        offsets = offsets_of(vector, LANES, VEC)
        value = tl.load(x + offsets, mask=known, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        given = tl.load(dy + offsets, mask=known, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        counted = None
        if valid is not None:
            counted = valid_elements(valid, known, position, last, VEC, COLUMNS)
        gradient = gradient_of(
            value, given, residual, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, GRADIENT, LANES, VEC, COLUMNS, COMPUTE, counted,
        )  # fmt: skip
        if dz is not None:
            store_as(dz + offsets, gradient, known)
        if dx is not None:
            places = dx + offsets
            if FROZEN:
                result = gradient * scale
            else:
                result = (tl.fma(value - centre, slope, gradient) + offset) * scale
            if valid is not None:
                result = tl.where(counted, result, 0.0)
            store_as(places, result, known)


#     dz = dy * activation'(z)        dbias = sum(dz)        dweight = sum(dz * xhat)
#     dx = weight / sqrt(var + eps) * (dz - dbias / n - xhat * dweight / n)
@triton.jit
def bn_backward_kernel(
    x, dy, residual, mask, dz, dx, mean, var, weight, bias, dweight, dbias, eps, parameter, inverse_count,
    channels, row, jump, magic, power, positions,
    GRADIENT: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of one strip; the program (or its cluster of blocks) holds its x and dz in registers."""
    strip = tl.program_id(0)
    last = positions
    channel, known_channels = channels_of(strip, channels, LANES, VEC, COLUMNS)
    mean_c = load_once(mean, channel, known_channels, COLUMNS)
    var_c = load_wide(var, channel, known_channels, 1.0)
    weight_c = load_wide(weight, channel, known_channels, 1.0)
    bias_c = load_wide(bias, channel, known_channels, 0.0)
    if COLUMNS:
        mean_c, var_c, weight_c, bias_c = after(mean_c, mean_c, var_c, weight_c, bias_c)
    centre, scale, shift, rest, rstd = affine(mean_c, var_c, weight_c, bias_c, eps, COMPUTE)
    values = ()
    gradients = ()
    sum_dz = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    sum_product = tl.zeros((POSITIONS, LANES * VEC), COMPUTE)
    for i in tl.static_range(TILES):
        position = i * POSITIONS + tl.arange(0, POSITIONS)
        vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE)
        known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
        offsets = offsets_of(vector, LANES, VEC)
        held = tl.load(x + offsets, mask=known, other=0.0)
        value = held.to(COMPUTE)
        given = tl.load(dy + offsets, mask=known, other=0.0).to(COMPUTE)
        gradient = gradient_of(
            value, given, residual, mask, vector, position, last, strip, row, known, centre, scale, shift,
            parameter, GRADIENT, LANES, VEC, COLUMNS, COMPUTE,
        )  # fmt: skip
        if dz is not None:
            store_as(dz + offsets, gradient, known)
        sum_dz += gradient
        sum_product = tl.fma(gradient, tl.where(known, value - centre, 0.0), sum_product)
        values = values + (held,)
        gradients = gradients + (gradient,)
    dz_c = channel_sum(sum_dz, COLUMNS)
    dz_xhat_c = (channel_sum(sum_product, COLUMNS) - rest * dz_c) * rstd
    write_sums(dweight, dbias, dz_c, dz_xhat_c, channel, known_channels)
    if dx is not None:
        slope, offset = input_coefficients(dz_c, dz_xhat_c, rest, rstd, inverse_count, COMPUTE)
        for i in tl.static_range(TILES):
            position = i * POSITIONS + tl.arange(0, POSITIONS)
            vector = vectors_at(position, strip, row, jump, magic, power, LANES, COLUMNS, WIDE)
            known = known_elements(position, last, strip, row, LANES, VEC, COLUMNS)
            value = values[i].to(COMPUTE) - centre
            result = (tl.fma(value, slope, gradients[i]) + offset) * scale
            store_as(dx + offsets_of(vector, LANES, VEC), result, known)
