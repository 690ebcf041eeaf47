"""Calls on rows of columns; see :mod:`gpu_bn.kernels.cpu.calls`.

``(runs, channels, length)`` tensors are rows of ``channels * length`` columns, of which ``folded`` rows may be joined
to one; what is left of a fold is one shorter row. A chunk is a range of rows with float64 sums of its own. ``scratch``
has 5 vectors of ``width`` numbers, of columns in the precision that x is computed in, then two of float64 a chunk (of
float64 elements two more, with what the first two have lost to rounding) and 5 float64 vectors of the channels;
``width`` is the number of columns and what a vector may read beyond.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    START,
    SUM,
    WRITE,
    add_chunks,
    fill,
    finish_sums,
    move,
    put_affine,
    put_moments,
    put_slopes,
    read_parameters,
    write_parameters,
)
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import (
    call_kernel,
    claim,
    clear,
    copy,
    number,
    parameter,
    put_number,
    restart,
    two_sum,
)


@cold
def repeat(tagged, period, columns):
    """Give the columns from ``period`` on what those before them have, in turn."""
    size, start = 8 if tagged & 1 else 4, tagged & -2
    for at in range(period, columns, period):
        copy(start + at * size, start, min(period, columns - at) * size)


@cold
def spread(values, how_many, channels, length, columns, width, tagged):
    """Give the channels' columns their values, of several vectors; joined rows have the same ones."""
    period = channels * length
    for vector in range(how_many):
        own = values + 8 * vector * channels
        if length == 1:
            write_parameters(0, channels, own, tagged)
        else:
            for channel in range(channels):
                fill(channel * length, channel * length + length, tagged, number(own, channel))
        repeat(tagged, period, columns)
        tagged += 8 * width


@cold
def gather(sums, channels, length, columns, width, chunks, found):
    """The channels' sums of their columns, in the order of chunks; ``width`` numbers lie between two chunks' sums."""
    if columns == channels:
        add_chunks(0, channels, sums, 8 * width, chunks, found)
        return
    for channel in range(channels):
        total, lost = 0.0, 0.0
        for chunk in range(chunks):
            for start in range(channel * length, columns, channels * length):
                for at in range(start, start + length):
                    total, lost = two_sum(total, number(sums, chunk * width + at), lost)
        put_number(found, channel, total + lost)


@cold
def merge(sums, squares, shifts, channels, length, columns, width, chunks, count, values, mean, var):
    """The channels' moments from their columns' sums; return how many variances are -1, because they are not exact."""
    gather(sums, channels, length, columns, 2 * width, chunks, mean)
    gather(squares, channels, length, columns, 2 * width, chunks, var)
    if length == 1:
        read_parameters(0, channels, shifts, values)
    else:
        for at in range(channels):
            put_number(values, at, parameter(shifts, at * length))
    put_moments(0, channels, values, count, mean, var)
    doubtful = 0
    for at in range(channels):
        doubtful += 1 if number(var, at) == -1.0 else 0
    return doubtful


@cold
def sum_again(
    again, x, x_step, size, rows, rest, channels, length, columns, width, scratch, sums, squares, values, count, mean,
    var,
):  # fmt: skip
    """Those variances that are -1 once more, and their means, in float64 around the means."""
    spread(mean, 1, channels, length, columns, width, scratch + 1)
    clear(sums, 2 * width)
    call_kernel(again, (x, x_step, 0, rows, columns, scratch, sums, squares))
    if rest:
        call_kernel(again, (x + rows * columns * size, 0, 0, 1, rest, scratch, sums, squares))
    gather(sums, channels, length, columns, width, 1, values)
    gather(squares, channels, length, columns, width, 1, values + 8 * channels)
    for at in range(channels):
        if number(var, at) == -1.0:
            m = number(values, at) / count
            v = number(values, channels + at) / count - m * m
            put_number(mean, at, number(mean, at) + m)
            put_number(var, at, 0.0 if v < 0.0 else v)


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
    length, folded, weight, bias, running_mean, running_var, counter, mean, var, batch_stats, momentum, eps, p, double,
    past, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    row_step = x_step
    if folded > 1:
        x_step, residual_step, y_step = columns, columns, columns
    sums, squares = scratch + 40 * width, scratch + 48 * width
    each = 2 if double else 1  # pairs of vectors a chunk
    values = sums + 16 * width * chunks * each
    count = float(runs * length)
    if phases & START:
        restart(counters)
        if batch_stats:
            call_kernel(shifts, (x, row_step, runs, period, length, scratch))
            repeat(scratch + double, period, columns)
            clear(sums, 2 * width * chunks * each)
    while phases & SUM and batch_stats:
        at = claim(counters)
        if at >= chunks:
            break
        by = 16 * width * at * each
        low, high = rows * at // chunks, rows * (at + 1) // chunks
        call_kernel(deviations, (x, x_step, low, high, columns, scratch, sums + by, squares + by, 2 * width))
        if rest and at == chunks - 1:
            last = x + rows * columns * size
            call_kernel(deviations, (last, 0, 0, 1, rest, scratch, sums + by, squares + by, 2 * width))
    if phases & FINISH:
        doubtful = 0
        if batch_stats:
            doubtful = merge(
                sums, squares, scratch + double, channels, length, columns, width, chunks * each, count, values, mean,
                var,
            )  # fmt: skip
        else:
            read_parameters(0, channels, running_mean, mean)
            read_parameters(0, channels, running_var, var)
        if doubtful:
            sum_again(
                again, x, x_step, size, rows, rest, channels, length, columns, width, scratch, sums, squares, values,
                count, mean, var,
            )  # fmt: skip
        scale, shifted = values + 8 * channels, values + 16 * channels
        put_affine(0, channels, mean, var, eps, weight, bias, double, values, scale, shifted)
        spread(values, 3, channels, length, columns, width, scratch + double)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, rows, columns, rest, scratch,
            width, chunks, p, past, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        move(0, channels, running_mean, running_var, mean, var, count / max(count - 1.0, 1.0), momentum)
    if phases & END and counter:
        claim(counter)


@kernel
def backward(
    phases, keeps, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step,
    dresidual_step, size, runs, channels, length, folded, weight, bias, dweight, dbias, mean, var, dz, dz_xhat,
    training, count, eps, p, double, past, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    steps = (x_step, residual_step, dy_step, dx_step, dresidual_step)
    if folded > 1:
        steps = (columns, columns, columns, columns, columns)
    x_step, residual_step, dy_step, dx_step, dresidual_step = steps
    kept, kept_step = (dresidual, dresidual_step) if dresidual else (dx, dx_step)
    dz_at, dz_step, past = (kept, kept_step, past if dresidual else 0) if keeps else (dy, dy_step, past)
    sources = (x_step, residual_step, dy_step, kept_step)
    sums, squares = scratch + 40 * width, scratch + 48 * width
    each = 2 if double else 1  # pairs of vectors a chunk
    values = sums + 16 * width * chunks * each
    scale, shift = values + 8 * channels, values + 16 * channels
    slope, offset = values + 24 * channels, values + 32 * channels
    if phases & START:
        restart(counters)
        put_affine(0, channels, mean, var, eps, weight, bias, double, values, scale, shift)
        spread(values, 3, channels, length, columns, width, scratch + double)
        clear(sums, 2 * width * chunks * each)
    while phases & SUM and products:
        at = claim(counters)
        if at >= chunks:
            break
        by = 16 * width * at * each
        own = (scratch, scratch + 8 * width, scratch + 16 * width, sums + by, squares + by, 2 * width, p)
        low, high = rows * at // chunks, rows * (at + 1) // chunks
        call_kernel(products, (x, residual, dy, kept) + sources + (low, high, columns) + own)
        if rest and at == chunks - 1:
            by = rows * columns * size
            call_kernel(products, (x + by, residual + by, dy + by, kept + by) + sources + (0, 1, rest) + own)
    if phases & FINISH:
        if products:
            gather(sums, channels, length, columns, 2 * width, chunks * each, dz)
            gather(squares, channels, length, columns, 2 * width, chunks * each, dz_xhat)
            finish_sums(0, channels, mean, var, eps, values, dz, dz_xhat)
        put_slopes(0, channels, mean, var, eps, values, dz, dz_xhat, training, count, slope, offset)
        spread(slope, 2, channels, length, columns, width, scratch + 24 * width + double)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, dz_at, dx, dresidual), (x_step, residual_step, dz_step, dx_step, dresidual_step),
            size, rows, columns, rest, scratch, width, chunks, p, past,
            counters + 8,
        )  # fmt: skip
    if phases & END:
        if dweight:
            write_parameters(0, channels, dz_xhat, dweight)
        if dbias:
            write_parameters(0, channels, dz, dbias)
