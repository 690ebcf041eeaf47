"""Calls on rows of columns; see :mod:`gpu_bn.kernels.cpu.calls`.

``(runs, channels, length)`` tensors are rows of ``channels * length`` columns, of which ``folded`` rows may be joined
to one; what is left of a fold is one shorter row. A chunk is a range of rows with float64 sums of its own. ``scratch``
has 5 vectors of ``width`` numbers, of columns in the precision that x is computed in, then two of float64 a chunk;
``width`` is the number of columns and what a vector may read beyond.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    LARGEST,
    SMALLEST,
    START,
    SUM,
    TRUSTED,
    WRITE,
    affine,
    copy_running,
    move,
    slopes,
)
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import call_kernel, claim, number, parameter, put_number, put_parameter, restart


@cold
def spread(column, channel, length, period, columns, value):
    """Give all columns of a channel a value."""
    for start in range(channel * length, columns, period):
        for at in range(start, start + length):
            put_parameter(column, at, value)


@cold
def gathered(sums, channel, length, period, columns, width, chunks):
    """A channel's sum of its columns, in the order of chunks."""
    found = 0.0
    for chunk in range(chunks):
        for start in range(channel * length, columns, period):
            for at in range(start, start + length):
                found += number(sums, 2 * chunk * width + at)
    return found


@cold
def clear(sums, numbers):
    for at in range(numbers):
        put_number(sums, at, 0.0)


@cold
def spread_affine(scratch, width, mean, var, eps, weight, bias, double, channel, length, period, columns):
    centre, scale, shift, rstd, rest = affine(mean, var, eps, weight, bias, double, channel)
    spread(scratch + double, channel, length, period, columns, centre)
    spread(scratch + 8 * width + double, channel, length, period, columns, scale)
    spread(scratch + 16 * width + double, channel, length, period, columns, shift)
    return rstd, rest


@cold
def write_chunks(writer, tensors, steps, size, rows, columns, rest, scratch, width, chunks, p, past, counter):
    """Write chunk after chunk; the shorter row comes with the last."""
    while True:
        at = claim(counter)
        if at >= chunks:
            break
        vectors = (scratch, scratch + 8 * width, scratch + 16 * width, scratch + 24 * width, scratch + 32 * width)
        call_kernel(
            writer,
            tensors + steps + (rows * at // chunks, rows * (at + 1) // chunks, columns) + vectors + (p, past),
        )  # fmt: skip
        if rest and at == chunks - 1:
            by = rows * columns * size
            x, residual, dy, out, dresidual = tensors
            last = (x + by, residual + by, dy + by, out + by, dresidual + by)
            call_kernel(writer, last + steps + (0, 1, rest) + vectors + (p, 0))


@kernel
def forward(
    phases, shifts, deviations, again, writer, x, residual, y, x_step, residual_step, y_step, size, runs, channels,
    length, folded, weight, bias, running_mean, running_var, mean, var, batch_stats, momentum, eps, p, double,
    past, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    if folded > 1:
        x_step, residual_step, y_step = columns, columns, columns
    sums, squares = scratch + 40 * width, scratch + 48 * width
    if phases & START:
        restart(counters)
    count = runs * length
    if phases & START and batch_stats:
        call_kernel(shifts, (x, period if folded > 1 else x_step, runs, period, length, scratch))
        for start in range(period, columns, period):
            for at in range(period):
                put_parameter(scratch + double, start + at, parameter(scratch + double, at))
        clear(sums, 2 * width * chunks)
    while phases & SUM and batch_stats:
        at = claim(counters)
        if at >= chunks:
            break
        by = 16 * width * at
        call_kernel(
            deviations,
            (x, x_step, rows * at // chunks, rows * (at + 1) // chunks, columns, scratch, sums + by, squares + by),
        )
        if rest and at == chunks - 1:
            call_kernel(deviations, (x + rows * columns * size, 0, 0, 1, rest, scratch, sums + by, squares + by))
    if phases & FINISH:
        if batch_stats:
            doubtful = 0
            for at in range(channels):
                shift = parameter(scratch + double, at * length)
                m = gathered(sums, at, length, period, columns, width, chunks) / count
                q = gathered(squares, at, length, period, columns, width, chunks) / count
                v = q - m * m
                good = m * m <= TRUSTED * v and v > SMALLEST and q < LARGEST
                doubtful += 0 if good else 1
                put_number(mean, at, shift + m if good or abs(shift + m) < LARGEST else shift)
                put_number(var, at, v if good else -1.0)
            if doubtful:
                sum_again(
                    again, x, x_step, size, rows, columns, rest, channels, length, mean, var, count, width, scratch
                )
        else:
            copy_running(running_mean, running_var, mean, var, channels)
        for at in range(channels):
            spread_affine(scratch, width, mean, var, eps, weight, bias, double, at, length, period, columns)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, rows, columns, rest, scratch,
            width, chunks, p, past, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        move(running_mean, running_var, mean, var, channels, count, momentum)


@cold
def sum_again(again, x, x_step, size, rows, columns, rest, channels, length, mean, var, count, width, scratch):
    """Compute in float64, around the means, those variances that are -1."""
    period = channels * length
    means, sums, squares = scratch, scratch + 40 * width, scratch + 48 * width
    for at in range(channels):
        spread(means + 1, at, length, period, columns, number(mean, at))
    clear(sums, 2 * width)
    call_kernel(again, (x, x_step, 0, rows, columns, means, sums, squares))
    if rest:
        call_kernel(again, (x + rows * columns * size, 0, 0, 1, rest, means, sums, squares))
    for at in range(channels):
        if number(var, at) == -1.0:
            m = gathered(sums, at, length, period, columns, width, 1) / count
            v = gathered(squares, at, length, period, columns, width, 1) / count - m * m
            put_number(mean, at, number(mean, at) + m)
            put_number(var, at, 0.0 if v < 0.0 else v)


@kernel
def backward(
    phases, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step, dresidual_step,
    size, runs, channels, length, folded, weight, bias, dweight, dbias, mean, var, dz,
    dz_xhat, training, count, eps, p, double, past, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    steps = (x_step, residual_step, dy_step, dx_step, dresidual_step)
    if folded > 1:
        steps = (columns, columns, columns, columns, columns)
    sums, squares = scratch + 40 * width, scratch + 48 * width
    if phases & START:
        restart(counters)
        for at in range(channels):
            spread_affine(scratch, width, mean, var, eps, weight, bias, double, at, length, period, columns)
        clear(sums, 2 * width * chunks)
    while phases & SUM and products:
        at = claim(counters)
        if at >= chunks:
            break
        vectors = (
            scratch,
            scratch + 8 * width,
            scratch + 16 * width,
            sums + 16 * width * at,
            squares + 16 * width * at,
            p,
        )
        call_kernel(
            products,
            (x, residual, dy) + steps[:3] + (rows * at // chunks, rows * (at + 1) // chunks, columns) + vectors,
        )
        if rest and at == chunks - 1:
            by = rows * columns * size
            call_kernel(products, (x + by, residual + by, dy + by) + steps[:3] + (0, 1, rest) + vectors)
    if phases & FINISH:
        for at in range(channels):
            _, _, _, rstd, rest_of_mean = affine(mean, var, eps, weight, bias, double, at)
            if products:
                sum_dz = gathered(sums, at, length, period, columns, width, chunks)
                sum_products = gathered(squares, at, length, period, columns, width, chunks)
                put_number(dz, at, sum_dz)
                put_number(dz_xhat, at, (sum_products - rest_of_mean * sum_dz) * rstd)
            slope = offset = 0.0
            if training:
                slope, offset = slopes(rstd, rest_of_mean, number(dz, at), number(dz_xhat, at), count)
            spread(scratch + 24 * width + double, at, length, period, columns, slope)
            spread(scratch + 32 * width + double, at, length, period, columns, offset)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, dy, dx, dresidual), steps, size, rows, columns, rest, scratch, width, chunks, p, past,
            counters + 8,
        )  # fmt: skip
    if phases & END:
        for at in range(channels):
            if dweight:
                put_parameter(dweight, at, number(dz_xhat, at))
            if dbias:
                put_parameter(dbias, at, number(dz, at))
