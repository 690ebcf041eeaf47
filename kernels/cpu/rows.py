"""Kernels for rows of columns. Element c of row r is at ``r * step + c``; each tensor has its own step, and each column
its own parameters, in the precision that x is computed in.

A tile is the columns of a wide vector in a few rows. Its float32 sums are added to the float64 sums of the columns. For
float64 elements there are further numbers ``error_offset`` elements after the sums: their rounding errors.
"""

from functools import cache

from gpu_bn.kernels.cpu.compiler import inlined, kernel
from gpu_bn.kernels.cpu.points import add_pairs, sum_vectors, write_vectors
from gpu_bn.kernels.cpu.scalars import (
    accumulate,
    add_double,
    advance,
    elements,
    get,
    lane_count,
    load_vectors,
    offsets,
    output_zeros,
    put,
    round_to,
    splat_all_wide,
    zeros_double,
)
from gpu_bn.kernels.cpu.vector import DOUBLES, FLOAT32, FLOAT64

FEW, ROWS = 8, 16
"""The numbers of rows in one float32 sum, and in the sum of two of these, which is added to a float64 sum."""
FIRST = 8
"""The number of rows whose mean is the shift."""
NARROW, TALL, FLAT = 256, 64, 16
"""The parameters of some columns stay in registers for ``TALL`` rows if there are at most ``NARROW`` columns, else for
``FLAT`` rows."""


def compute_code(code):
    """Return the code of the dtype that x is computed in."""
    return FLOAT64 if code == FLOAT64 else FLOAT32


@inlined
def sum_rows(tensors, steps, low, high, columns, parameters, sums, products, error_offset, activation, p):
    """Add dz and dz * (x - centre) of some rows to the columns' float64 sums; without dy, x - centre is dz."""
    zeros = splat_all_wide(tensors[0], (0.0, 0.0))
    wide = lane_count(zeros)
    for first in range(low, high, ROWS):
        rows = min(ROWS, high - first)
        for c in range(0, columns, wide):
            affine = load_vectors(parameters, c, zeros)
            pointers = advance(tensors, offsets(first, steps, c))
            few = min(FEW, rows)
            rest = advance(pointers, offsets(few, steps, 0))
            if c + wide <= columns:
                tile = sum_vectors(zeros, pointers, steps, few, None, affine, activation, p)
                tile = add_pairs(tile, sum_vectors(zeros, rest, steps, rows - few, None, affine, activation, p))
                accumulate(sums, c, None, tile[0], error_offset)
                accumulate(products, c, None, tile[1], error_offset)
            else:
                tile = sum_vectors(zeros, pointers, steps, few, columns - c, affine, activation, p)
                tile = add_pairs(tile, sum_vectors(zeros, rest, steps, rows - few, columns - c, affine, activation, p))
                accumulate(sums, c, columns - c, tile[0], error_offset)
                accumulate(products, c, columns - c, tile[1], error_offset)


@cache
def shifts(code):
    """Return the kernel that computes the shifts: means of the first rows, rounded to the dtype of x.

    All ``length`` columns of a channel have the shift of the first one.
    """
    wide = compute_code(code)

    @kernel
    def shifts_kernel(x, step, rows, columns, length, shift):
        x, shift = elements(x, code), elements(shift, wide)
        first_rows = min(rows, FIRST)
        for c in range(0, columns, length):
            mean = 0.0
            for r in range(first_rows):
                mean += get(x, r * step + c)
            mean = round_to(x, mean / first_rows)
            for i in range(c, c + length):
                put(shift, i, mean)

    return shifts_kernel


@cache
def deviations(code):
    """Return the kernel that adds x - shift and (x - shift)**2 of rows ``low`` to ``high`` to the columns' sums."""
    wide = compute_code(code)

    @kernel
    def deviations_kernel(x, step, low, high, columns, shift, sums, products, error_offset):
        x, shift = elements(x, code), elements(shift, wide)
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        around = (shift, shift, shift)
        sum_rows((x, None, None), (step, 0, 0), low, high, columns, around, sums, products, error_offset, 0, 0.0)

    return deviations_kernel


@cache
def deviations_again(code):
    """Return the kernel that adds x - mean and (x - mean)**2 to the columns' sums in float64, with float64 means."""

    @kernel
    def again_kernel(x, step, low, high, columns, mean, sums, products):
        x, mean = elements(x, code), elements(mean, FLOAT64)
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        for first in range(low, high, ROWS):
            for c in range(0, columns, DOUBLES):
                tile = zeros_double()
                for r in range(first, min(first + ROWS, high)):
                    (row,) = advance((x,), (r * step + c,))
                    (means,) = advance((mean,), (c,))
                    tile = add_double(tile, row, 0, columns - c, means)
                accumulate(sums, c, columns - c, tile[0], None)
                accumulate(products, c, columns - c, tile[1], None)

    return again_kernel


@cache
def products(code, activation, has_residual, keeps):
    """Return the kernel that adds dz and dz * (x - centre) of rows ``low`` to ``high`` to the columns' sums.

    It stores dz if ``keeps``.
    """
    residual_code, kept_code, wide = code if has_residual else -1, code if keeps else -1, compute_code(code)

    @kernel
    def products_kernel(
        x, residual, dy, kept, x_step, residual_step, dy_step, kept_step, low, high, columns, centre, scale, shift,
        sums, products, error_offset, p,
    ):  # fmt: skip
        tensors = (elements(x, code), elements(residual, residual_code), elements(dy, code), elements(kept, kept_code))
        affine = (elements(centre, wide), elements(scale, wide), elements(shift, wide))
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        steps = (x_step, residual_step, dy_step, kept_step)
        sum_rows(tensors, steps, low, high, columns, affine, sums, products, error_offset, activation, p)

    return products_kernel


@inlined
def write_rows(tensors, steps, low, high, columns, parameters, activation, p, nontemporal):
    """Write rows ``low`` to ``high``."""
    zeros = output_zeros(tensors[0], activation)
    width = lane_count(zeros)
    block = TALL if columns <= NARROW else FLAT
    for first in range(low, high, block):
        rows = min(block, high - first)
        for c in range(0, columns, width):
            affine = load_vectors(parameters, c, zeros)
            pointers = advance(tensors, offsets(first, steps, c))
            if c + width <= columns:
                write_vectors(pointers, steps, rows, None, affine, activation, p, nontemporal)
            else:
                write_vectors(pointers, steps, rows, columns - c, affine, activation, p, 0)


@cache
def writer(code, activation, has_residual, backward, writes_out, writes_dresidual):
    """Return the kernel that writes the outputs of rows ``low`` to ``high``: y, or dx and dresidual if ``backward``.

    ``writes_out`` tells whether y or dx is written, ``writes_dresidual`` whether dresidual is.
    """
    residual_code, dy_code = code if has_residual else -1, code if backward else -1
    out_code, dresidual_code = code if writes_out else -1, code if writes_dresidual else -1
    wide = compute_code(code)

    @kernel
    def writer_kernel(
        x, residual, dy, out, dresidual, x_step, residual_step, dy_step, out_step, dresidual_step, low, high, columns,
        centre, scale, shift, slope, offset, p, nontemporal,
    ):  # fmt: skip
        tensors = (
            elements(x, code), elements(residual, residual_code), elements(dy, dy_code), elements(out, out_code),
            elements(dresidual, dresidual_code),
        )  # fmt: skip
        steps = (x_step, residual_step, dy_step, out_step, dresidual_step)
        affine = (elements(centre, wide), elements(scale, wide), elements(shift, wide))
        if backward:
            affine = affine + (elements(slope, wide), elements(offset, wide))
        write_rows(tensors, steps, low, high, columns, affine, activation, p, nontemporal)

    return writer_kernel
