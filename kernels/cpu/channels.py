"""Channels that lie in runs of adjacent elements: element ``i`` of run ``r`` is ``r * step + i``, a step a tensor.

float32 sums are taken around a shift near the mean, which x can store, so that x - shift is exact; every few hundred
elements they go over to float64. A variance that they may have got wrong is computed again, in float64 around the
mean: where the shift was far off, and where squares leave float32's range.
"""

from functools import cache

from gpu_bn.kernels.cpu.compiler import cold, inlined, kernel
from gpu_bn.kernels.cpu.points import plus, result, sum_rest, sum_vectors, write_pair, write_vectors
from gpu_bn.kernels.cpu.scalars import (
    add_double,
    elements,
    get,
    lanes,
    misaligned,
    moved,
    places,
    put,
    rounded,
    splats,
    splats_wide,
    total,
    two_sum,
    zeros_double,
)
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT64, MASKS, SIZES

ADDITIONS = 8
"""In a lane of a float32 sum, and so many of these in another, before it is added to a float64 one. Squares of coarse
numbers (odd ones are 1 modulo 8) are all rounded the same way, so that longer sums drift: 16 made the variance at
mean = 1e4 sd wrong by 3e-7 instead of 3e-8."""
FEW = 32
"""Elements of a channel up to which float64, twice, costs nothing."""
TRUSTED = 4.0
"""A variance is taken from sums around a shift while (mean - shift)**2 <= TRUSTED * variance, float64's while it is
at most the variance."""
SHORT, TOGETHER = 1024, 8
"""Elements of a run up to which adjacent channels of so many runs are summed in turn, in the order of memory: the
processor fetches ahead along a few streams, not from one short run to the next, far away one."""
DOUBLES = BYTES // 8
INFINITY = float("inf")
SMALLEST, LARGEST = 1e-30, 1e37
"""Mean squares of float32 numbers that have lost nothing, neither to underflow nor to infinity."""


@inlined
def run_sums(tensors, steps, runs, length, affine, which, p):
    """Sums over a channel's runs of dz and of dz * (x - centre), in float64; x - centre stands for dz without dy."""
    vectors, zeros = splats_wide(tensors[0], affine), splats_wide(tensors[0], (0.0, 0.0))
    wide, sums, blocks = lanes(vectors), zeros, 0
    steps_within = places(0, steps, wide)
    (total_dz, total_products), (lost_dz, lost_products) = (0.0, 0.0), (0.0, 0.0)
    for run in range(runs):
        for first in range(0, length, ADDITIONS * wide):
            count = min(ADDITIONS * wide, length - first)
            here = moved(tensors, places(run, steps, first))
            block = sum_vectors(zeros, here, steps_within, count // wide, None, vectors, which, p)
            if count % wide:
                rest = moved(here, places(0, steps, count // wide * wide))
                block = sum_rest(block, rest, count % wide, vectors, which, p)
            sums = plus(sums, block)
            blocks += 1
            if blocks == ADDITIONS:
                total_dz, lost_dz = two_sum(total_dz, total(sums[0]), lost_dz)
                total_products, lost_products = two_sum(total_products, total(sums[1]), lost_products)
                sums, blocks = zeros, 0
    return total_dz + (total(sums[0]) + lost_dz), total_products + (total(sums[1]) + lost_products)


@inlined
def mean_of_first(x, length):
    """The mean of a channel's first elements."""
    some = min(length, 8)
    mean = 0.0
    for i in range(some):
        mean += get(x, i)
    return mean / some


@cold
def moments_again(x, step, runs, length, shift):
    """Mean and variance of a channel, in float64 around a shift."""
    sums = zeros_double()
    for run in range(runs):
        for at in range(run * step, run * step + length, DOUBLES):
            sums = add_double(sums, x, at, run * step + length - at, shift)
    mean = (total(sums[0]) + total(sums[2])) / (runs * length)
    var = (total(sums[1]) + total(sums[3])) / (runs * length) - mean * mean
    return shift + mean, 0.0 if var < 0.0 else var


@cache
def moments(code):
    """The kernel that computes mean and variance of adjacent channels."""
    trusted = 1.0 if code == FLOAT64 else TRUSTED

    @kernel
    def moments_kernel(x, step, runs, length, channels, mean, var):
        x, mean, var = elements(x, code), elements(mean, FLOAT64), elements(var, FLOAT64)
        count = runs * length
        together = max(runs, 1) if length > SHORT else TOGETHER
        for first in range(0, runs if count > FEW else 0, together):
            for channel in range(channels):
                xc, some = moved((x, x), (channel * length, first * step + channel * length))
                k = rounded(x, mean_of_first(xc, length))
                some_runs = min(together, runs - first)
                s, q = run_sums((some, None, None), (step, 0, 0), some_runs, length, (k, 0.0, 0.0), 0, 0.0)
                put(mean, channel, s if first == 0 else get(mean, channel) + s)
                put(var, channel, q if first == 0 else get(var, channel) + q)
        for channel in range(channels):
            (xc,) = moved((x,), (channel * length,))
            m, v, k, good = 0.0, 0.0, get(xc, 0), False
            if count > FEW:
                k = rounded(x, mean_of_first(xc, length))
                m, q = get(mean, channel) / count, get(var, channel) / count
                v = q - m * m
                good = m * m <= trusted * v and v > SMALLEST and q < LARGEST
            m += k
            if not good:
                m, v = moments_again(xc, step, runs, length, m if abs(m) < LARGEST else k)
                if (code == FLOAT64 or count <= FEW) and abs(m) < INFINITY:
                    # Around a shift that is far off long sums lose digits that float64 has.
                    m, v = moments_again(xc, step, runs, length, m)
            put(mean, channel, m)
            put(var, channel, v)

    return moments_kernel


@cache
def products(code, which, has_residual, keeps):
    """The kernel that sums dz and dz * (x - centre) over adjacent channels, and may keep dz."""
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
        together = max(runs, 1) if length > SHORT else TOGETHER // 2  # of x and of dy
        for first in range(0, runs, together):
            for channel in range(channels):
                affine = (get(centre, channel), get(scale, channel), get(shift, channel))
                here = moved(tensors, places(first, steps, channel * length))
                s, q = run_sums(here, steps, min(together, runs - first), length, affine, which, p)
                put(sums, channel, s if first == 0 else get(sums, channel) + s)
                put(products, channel, q if first == 0 else get(products, channel) + q)

    return products_kernel


@inlined
def write_run(tensors, length, affine, which, p, past, by_mask):
    """Write a run. What is left of it is written ``by_mask``, or by a vector that overlaps the one before.

    Such a vector is computed first, for x may be overwritten.
    """
    width = lanes(affine)
    steps = (width, width, width, width, width)
    masked = length if length < width else misaligned(tensors[3], 0, affine) if past else 0
    if masked:
        write_vectors(tensors, steps, 1, masked, affine, which, p, 0)
    if length >= width:
        whole, rest = (length - masked) // width, (length - masked) % width
        here = moved(tensors, places(masked, (1, 1, 1, 1, 1), 0))
        if by_mask:
            write_vectors(here, steps, whole, None, affine, which, p, past)
            if rest:
                write_vectors(moved(here, places(whole, steps, 0)), steps, 1, rest, affine, which, p, 0)
        else:
            last = result(tensors, length - width, affine, which, p)
            write_vectors(here, steps, whole, None, affine, which, p, past)
            if rest:
                write_pair(tensors, length - width, last)


@cache
def writer(code, which, has_residual, backward, writes, adds):
    """The kernel that writes y, or what of dx (``writes``) and dresidual (``adds``) is wanted, of adjacent channels.

    ``by_run``: whether it goes through all channels of a run before the next run, in the order of memory.
    """
    codes = (code if has_residual else -1, code if backward else -1, code if writes else -1, code if adds else -1)
    residual_code, dy_code, out_code, dresidual_code = codes
    by_mask = MASKS and SIZES[code] > 2 and not backward  # half types are masked in pairs, and dx by two tensors

    @kernel
    def writer_kernel(
        x, residual, dy, out, dresidual, x_step, residual_step, dy_step, out_step, dresidual_step, runs, length,
        channels, centre, scale, shift, slope, offset, p, by_run, past,
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
                here = moved(tensors, places(run, steps, channel * length))
                write_run(here, length, splats(tensors[0], affine), which, p, past, by_mask)

    return writer_kernel
