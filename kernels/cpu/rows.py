"""Rows of columns: element ``c`` of row ``r`` is ``r * step + c``, a step a tensor; each column has parameters of its
own, in the precision that x is computed in.

Sums are of tiles of a wide vector's columns and a few rows, and go over to float64 columns after each. Those of float64
elements have more columns ``beside`` them, for what the first ones lose.
"""

from functools import cache

from gpu_bn.kernels.cpu.compiler import inlined, kernel
from gpu_bn.kernels.cpu.points import plus, sum_vectors, write_vectors
from gpu_bn.kernels.cpu.scalars import (
    add_double,
    add_to,
    elements,
    get,
    lanes,
    moved,
    places,
    put,
    rounded,
    splats_wide,
    vectors_at,
    zeros_double,
    zeros_to_write,
)
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT32, FLOAT64

FEW, ROWS = 8, 16
"""Rows in one float32 sum, and in a sum of such, which is added to a float64 one."""
FIRST = 8
"""Rows whose mean is the shift that sums are taken around."""
NARROW, TALL, FLAT = 256, 64, 16
"""Up to so many columns parameters stay in registers for ``TALL`` rows, beyond for ``FLAT`` ones."""
DOUBLES = BYTES // 8


def computed(code):
    """The code of the dtype that x is computed in."""
    return FLOAT64 if code == FLOAT64 else FLOAT32


@inlined
def sum_rows(tensors, steps, low, high, columns, parameters, sums, products, beside, which, p):
    """Add to the columns' float64 sums dz and dz * (x - centre) of some rows; x - centre stands for dz without dy."""
    zeros = splats_wide(tensors[0], (0.0, 0.0))
    wide = lanes(zeros)
    for first in range(low, high, ROWS):
        rows = min(ROWS, high - first)
        for c in range(0, columns, wide):
            affine = vectors_at(parameters, c, zeros)
            here = moved(tensors, places(first, steps, c))
            few = min(FEW, rows)
            rest = moved(here, places(few, steps, 0))
            if c + wide <= columns:
                tile = sum_vectors(zeros, here, steps, few, None, affine, which, p)
                tile = plus(tile, sum_vectors(zeros, rest, steps, rows - few, None, affine, which, p))
                add_to(sums, c, None, tile[0], beside)
                add_to(products, c, None, tile[1], beside)
            else:
                tile = sum_vectors(zeros, here, steps, few, columns - c, affine, which, p)
                tile = plus(tile, sum_vectors(zeros, rest, steps, rows - few, columns - c, affine, which, p))
                add_to(sums, c, columns - c, tile[0], beside)
                add_to(products, c, columns - c, tile[1], beside)


@cache
def shifts(code):
    """The kernel that takes the means of the first rows as shifts, as x can store them.

    The columns of a channel, ``length`` of them, have the first one's.
    """

    wide = computed(code)

    @kernel
    def shifts_kernel(x, step, rows, columns, length, shift):
        x, shift = elements(x, code), elements(shift, wide)
        some = min(rows, FIRST)
        for c in range(0, columns, length):
            mean = 0.0
            for r in range(some):
                mean += get(x, r * step + c)
            mean = rounded(x, mean / some)
            for i in range(c, c + length):
                put(shift, i, mean)

    return shifts_kernel


@cache
def deviations(code):
    """The kernel that adds to the columns' sums x - shift and its square of the rows from ``low`` to ``high``."""

    wide = computed(code)

    @kernel
    def deviations_kernel(x, step, low, high, columns, shift, sums, products, beside):
        x, shift = elements(x, code), elements(shift, wide)
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        around = (shift, shift, shift)
        sum_rows((x, None, None), (step, 0, 0), low, high, columns, around, sums, products, beside, 0, 0.0)

    return deviations_kernel


@cache
def deviations_again(code):
    """The same in float64, around means in float64."""

    @kernel
    def again_kernel(x, step, low, high, columns, mean, sums, products):
        x, mean = elements(x, code), elements(mean, FLOAT64)
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        for first in range(low, high, ROWS):
            for c in range(0, columns, DOUBLES):
                tile = zeros_double()
                for r in range(first, min(first + ROWS, high)):
                    (row,) = moved((x,), (r * step + c,))
                    (means,) = moved((mean,), (c,))
                    tile = add_double(tile, row, 0, columns - c, means)
                add_to(sums, c, columns - c, tile[0], None)
                add_to(products, c, columns - c, tile[1], None)

    return again_kernel


@cache
def products(code, which, has_residual, keeps):
    """The kernel that adds to the columns' sums dz and dz * (x - centre) of the rows from ``low`` to ``high``.

    It may keep dz.
    """
    residual_code, kept_code, wide = code if has_residual else -1, code if keeps else -1, computed(code)

    @kernel
    def products_kernel(
        x, residual, dy, kept, x_step, residual_step, dy_step, kept_step, low, high, columns, centre, scale, shift,
        sums, products, beside, p,
    ):  # fmt: skip
        tensors = (elements(x, code), elements(residual, residual_code), elements(dy, code), elements(kept, kept_code))
        affine = (elements(centre, wide), elements(scale, wide), elements(shift, wide))
        sums, products = elements(sums, FLOAT64), elements(products, FLOAT64)
        steps = (x_step, residual_step, dy_step, kept_step)
        sum_rows(tensors, steps, low, high, columns, affine, sums, products, beside, which, p)

    return products_kernel


@inlined
def write_rows(tensors, steps, low, high, columns, parameters, which, p, past):
    """Write some rows."""
    zeros = zeros_to_write(tensors[0], which)
    width = lanes(zeros)
    block = TALL if columns <= NARROW else FLAT
    for first in range(low, high, block):
        rows = min(block, high - first)
        for c in range(0, columns, width):
            affine = vectors_at(parameters, c, zeros)
            here = moved(tensors, places(first, steps, c))
            if c + width <= columns:
                write_vectors(here, steps, rows, None, affine, which, p, past)
            else:
                write_vectors(here, steps, rows, columns - c, affine, which, p, 0)


@cache
def writer(code, which, has_residual, backward, writes, adds):
    """The kernel that writes y, or what of dx (``writes``) and dresidual (``adds``) is wanted, of some rows."""
    codes = (code if has_residual else -1, code if backward else -1, code if writes else -1, code if adds else -1)
    residual_code, dy_code, out_code, dresidual_code = codes
    wide = computed(code)

    @kernel
    def writer_kernel(
        x, residual, dy, out, dresidual, x_step, residual_step, dy_step, out_step, dresidual_step, low, high, columns,
        centre, scale, shift, slope, offset, p, past,
    ):  # fmt: skip
        tensors = (
            elements(x, code), elements(residual, residual_code), elements(dy, dy_code), elements(out, out_code),
            elements(dresidual, dresidual_code),
        )  # fmt: skip
        steps = (x_step, residual_step, dy_step, out_step, dresidual_step)
        affine = (elements(centre, wide), elements(scale, wide), elements(shift, wide))
        if backward:
            affine = affine + (elements(slope, wide), elements(offset, wide))
        write_rows(tensors, steps, low, high, columns, affine, which, p, past)

    return writer_kernel
