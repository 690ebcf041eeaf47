"""Kernels for channels that are runs of adjacent elements. Element i of run r is at ``r * step + i``; each tensor has
its own step.

float32 sums are of x - shift, where the shift is near the mean and of the dtype of x, so that x - shift is exact. Every
few hundred elements they are added to float64 sums. If a variance may be inexact, it is computed again, in float64
around the mean: where the shift is far from the mean, or where squares underflow or overflow in float32.
"""

from functools import cache

from gpu_bn.kernels.cpu.calls import LARGEST, SMALLEST, TRUSTED
from gpu_bn.kernels.cpu.compiler import cold, inlined, kernel
from gpu_bn.kernels.cpu.points import add_pairs, compute_outputs, sum_tail, sum_vectors, write_outputs, write_vectors
from gpu_bn.kernels.cpu.scalars import (
    add_double,
    advance,
    elements,
    get,
    lane_count,
    lane_sum,
    offsets,
    put,
    round_to,
    splat_all,
    splat_all_wide,
    two_sum,
    unaligned_count,
    zeros_double,
)
from gpu_bn.kernels.cpu.vector import DOUBLES, FLOAT64, MASKS, SIZES

ADDITIONS = 8
"""Additions in a lane of a float32 sum, and the number of such sums that are added in float32 before they are added to
a float64 sum. Squares of coarse numbers (odd ones are 1 modulo 8) are all rounded in the same direction, so that longer
sums drift: with 16 the error of the variance at mean = 1e4 sd was 3e-7 instead of 3e-8."""
FEW = 32
"""The most elements of a channel for which the statistics are always computed in float64, twice: that costs nothing."""
SHORT, TOGETHER = 1024, 8
"""If runs have at most ``SHORT`` elements, ``TOGETHER`` runs of one channel are summed, then those of the next channel,
in the order of memory: the CPU prefetches along a few streams, but not from a short run to another that is far away."""
INFINITY = float("inf")


@inlined
def run_sums(tensors, steps, runs, length, affine, activation, p):
    """Return the float64 sums of dz and dz * (x - centre) over the runs of a channel; without dy, x - centre is dz."""
    vectors, zeros = splat_all_wide(tensors[0], affine), splat_all_wide(tensors[0], (0.0, 0.0))
    wide, sums, blocks = lane_count(vectors), zeros, 0
    steps_within = offsets(0, steps, wide)
    (total_dz, total_products), (dz_error, products_error) = (0.0, 0.0), (0.0, 0.0)
    for run in range(runs):
        for first in range(0, length, ADDITIONS * wide):
            count = min(ADDITIONS * wide, length - first)
            pointers = advance(tensors, offsets(run, steps, first))
            block = sum_vectors(zeros, pointers, steps_within, count // wide, None, vectors, activation, p)
            if count % wide:
                rest = advance(pointers, offsets(0, steps, count // wide * wide))
                block = sum_tail(block, rest, count % wide, vectors, activation, p)
            sums = add_pairs(sums, block)
            blocks += 1
            if blocks == ADDITIONS:
                total_dz, dz_error = two_sum(total_dz, lane_sum(sums[0]), dz_error)
                total_products, products_error = two_sum(total_products, lane_sum(sums[1]), products_error)
                sums, blocks = zeros, 0
    return total_dz + (lane_sum(sums[0]) + dz_error), total_products + (lane_sum(sums[1]) + products_error)


@inlined
def mean_of_first(x, length):
    """Return the mean of the first elements of a run, at most 8."""
    count = min(length, 8)
    mean = 0.0
    for i in range(count):
        mean += get(x, i)
    return mean / count


@cold
def moments_float64(x, step, runs, length, shift):
    """Return the mean and variance of a channel, computed in float64 from sums around a shift."""
    sums = zeros_double()
    for run in range(runs):
        for at in range(run * step, run * step + length, DOUBLES):
            sums = add_double(sums, x, at, run * step + length - at, shift)
    mean = (lane_sum(sums[0]) + lane_sum(sums[2])) / (runs * length)
    var = (lane_sum(sums[1]) + lane_sum(sums[3])) / (runs * length) - mean * mean
    return shift + mean, 0.0 if var < 0.0 else var


@cache
def moments(code):
    """Return the kernel that computes the mean and variance of adjacent channels of the dtype ``code``.

    For float64 elements a variance is trusted while (mean - shift)**2 is at most the variance.
    """
    trusted = 1.0 if code == FLOAT64 else TRUSTED

    @kernel
    def moments_kernel(x, step, runs, length, channels, mean, var):
        x, mean, var = elements(x, code), elements(mean, FLOAT64), elements(var, FLOAT64)
        count = runs * length
        together = max(runs, 1) if length > SHORT else TOGETHER
        for first in range(0, runs if count > FEW else 0, together):
            for channel in range(channels):
                xc, start = advance((x, x), (channel * length, first * step + channel * length))
                k = round_to(x, mean_of_first(xc, length))
                run_count = min(together, runs - first)
                s, q = run_sums((start, None, None), (step, 0, 0), run_count, length, (k, 0.0, 0.0), 0, 0.0)
                put(mean, channel, s if first == 0 else get(mean, channel) + s)
                put(var, channel, q if first == 0 else get(var, channel) + q)
        for channel in range(channels):
            (xc,) = advance((x,), (channel * length,))
            m, v, k, good = 0.0, 0.0, get(xc, 0), False
            if count > FEW:
                k = round_to(x, mean_of_first(xc, length))
                m, q = get(mean, channel) / count, get(var, channel) / count
                v = q - m * m
                good = m * m <= trusted * v and v > SMALLEST and q < LARGEST
            m += k
            if not good:
                m, v = moments_float64(xc, step, runs, length, m if abs(m) < LARGEST else k)
                if (code == FLOAT64 or count <= FEW) and abs(m) < INFINITY:
                    # If the shift was far from the mean, long sums have lost digits that float64 can hold.
                    m, v = moments_float64(xc, step, runs, length, m)
            put(mean, channel, m)
            put(var, channel, v)

    return moments_kernel


@cache
def products(code, activation, has_residual, keeps):
    """Return the kernel that sums dz and dz * (x - centre) over adjacent channels; it stores dz if ``keeps``."""
    residual_code, kept_code = code if has_residual else -1, code if keeps else -1

    @kernel
    def products_kernel(
        x, residual, dy, kept, x_step, residual_step, dy_step, kept_step, runs, length, channels, centre, scale, shift,
        sums, products, p,
    ):  # fmt: skip
        tensors = (elements(x, code), elements(residual, residual_code), elements(dy, code), elements(kept, kept_code))
        steps = (x_step, residual_step, dy_step, kept_step)
        centre, scale, shift = elements(centre, FLOAT64), elements(scale, FLOAT64), elements(shift, FLOAT64)
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        together = max(runs, 1) if length > SHORT else TOGETHER // 2  # of two tensors, x and dy
        for first in range(0, runs, together):
            for channel in range(channels):
                affine = (get(centre, channel), get(scale, channel), get(shift, channel))
                pointers = advance(tensors, offsets(first, steps, channel * length))
                s, q = run_sums(pointers, steps, min(together, runs - first), length, affine, activation, p)
                put(sums, channel, s if first == 0 else get(sums, channel) + s)
                put(products, channel, q if first == 0 else get(products, channel) + q)

    return products_kernel


@inlined
def write_run(tensors, length, affine, activation, p, nontemporal, by_mask):
    """Write one run: a masked vector up to the first aligned address if ``nontemporal``, full vectors, and the rest.

    The rest is written by a masked vector if ``by_mask``, else by a full vector that overlaps the one before it. That
    vector is computed before any other is written, because the outputs may overwrite x.
    """
    width = lane_count(affine)
    steps = (width, width, width, width, width)
    head = length if length < width else unaligned_count(tensors[3], 0, affine) if nontemporal else 0
    if head:
        write_vectors(tensors, steps, 1, head, affine, activation, p, 0)
    if length >= width:
        full, rest = (length - head) // width, (length - head) % width
        pointers = advance(tensors, offsets(head, (1, 1, 1, 1, 1), 0))
        if by_mask:
            write_vectors(pointers, steps, full, None, affine, activation, p, nontemporal)
            if rest:
                write_vectors(advance(pointers, offsets(full, steps, 0)), steps, 1, rest, affine, activation, p, 0)
        else:
            last = compute_outputs(tensors, length - width, affine, activation, p)
            write_vectors(pointers, steps, full, None, affine, activation, p, nontemporal)
            if rest:
                write_outputs(tensors, length - width, last)


@cache
def writer(code, activation, has_residual, backward, writes_out, writes_dresidual):
    """Return the kernel that writes the outputs of adjacent channels: y, or dx and dresidual if ``backward``.

    ``writes_out`` tells whether y or dx is written, ``writes_dresidual`` whether dresidual is. If the kernel's argument
    ``by_run`` is 1, all channels of one run are written before the next run, in the order of memory.
    """
    residual_code, dy_code = code if has_residual else -1, code if backward else -1
    out_code, dresidual_code = code if writes_out else -1, code if writes_dresidual else -1
    by_mask = MASKS and SIZES[code] > 2 and not backward  # slow for half types (masks of pairs) and dx (two loads)

    @kernel
    def writer_kernel(
        x, residual, dy, out, dresidual, x_step, residual_step, dy_step, out_step, dresidual_step, runs, length,
        channels, centre, scale, shift, slope, offset, p, by_run, nontemporal,
    ):  # fmt: skip
        tensors = (
            elements(x, code), elements(residual, residual_code), elements(dy, dy_code), elements(out, out_code),
            elements(dresidual, dresidual_code),
        )  # fmt: skip
        steps = (x_step, residual_step, dy_step, out_step, dresidual_step)
        centre, scale, shift = elements(centre, FLOAT64), elements(scale, FLOAT64), elements(shift, FLOAT64)
        slope, offset = elements(slope, FLOAT64), elements(offset, FLOAT64)
        outer, inner = (runs, channels) if by_run else (channels, runs)
        for i in range(outer):
            for j in range(inner):
                run, channel = (i, j) if by_run else (j, i)
                affine = (get(centre, channel), get(scale, channel), get(shift, channel))
                if backward:
                    affine = affine + (get(slope, channel), get(offset, channel))
                pointers = advance(tensors, offsets(run, steps, channel * length))
                write_run(pointers, length, splat_all(tensors[0], affine), activation, p, nontemporal, by_mask)

    return writer_kernel
