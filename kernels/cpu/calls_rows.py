"""Calls on rows of columns; see :mod:`gpu_bn.kernels.cpu.calls`.

Tensors of shape ``(runs, channels, length)`` are rows of ``channels * length`` columns. ``folded`` adjacent rows may be
joined to one long row; the rows that are left form one shorter row. A chunk is a range of rows with its own float64
sums. ``width`` is the number of columns, plus those that a vector may read beyond the last one. ``scratch`` has

- 5 vectors of ``width`` numbers in the precision that x is computed in: centre, scale, shift, slope and offset of each
  column; in the first pass the first of them has the shifts,
- for each chunk 2 float64 vectors of sums, and for float64 elements 2 more with their rounding errors,
- 5 float64 vectors of length C: centre, scale, shift, slope and offset.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    START,
    SUM,
    WRITE,
    fill_parameter,
    finish_moments,
    finish_products,
    read_parameters,
    store_affine,
    store_slopes,
    sum_chunks,
    update_running,
    write_parameters,
)
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import (
    call_kernel,
    claim,
    clear,
    copy,
    load_double,
    load_parameter,
    store_double,
    two_sum,
)


@cold
def repeat_columns(tagged, period, columns):
    """Repeat the first ``period`` numbers of a vector at a tagged address until it has ``columns`` numbers."""
    size, start = 8 if tagged & 1 else 4, tagged & -2
    for at in range(period, columns, period):
        copy(start + at * size, start, min(period, columns - at) * size)


@cold
def spread_over_columns(vectors, count, channels, length, columns, width, tagged):
    """Copy the numbers of ``count`` per-channel vectors to the columns of their channels, in all joined rows."""
    period = channels * length
    for at in range(count):
        vector = vectors + 8 * at * channels
        if length == 1:
            write_parameters(0, channels, vector, tagged)
        else:
            for channel in range(channels):
                fill_parameter(channel * length, channel * length + length, tagged, load_double(vector, channel))
        repeat_columns(tagged, period, columns)
        tagged += 8 * width


@cold
def sum_columns(sums, channels, length, columns, width, chunks, result):
    """Add the sums of each channel's columns, in the order of chunks, which are ``width`` numbers apart."""
    if columns == channels:
        sum_chunks(0, channels, sums, 8 * width, chunks, result)
        return
    for channel in range(channels):
        total, error = 0.0, 0.0
        for chunk in range(chunks):
            for start in range(channel * length, columns, channels * length):
                for at in range(start, start + length):
                    total, error = two_sum(total, load_double(sums, chunk * width + at), error)
        store_double(result, channel, total + error)


@cold
def finish_statistics(sums, squares, shifts, channels, length, columns, width, chunks, count, values, mean, var):
    """Compute the mean and variance of channels from the sums of columns; return the number of variances set to -1."""
    sum_columns(sums, channels, length, columns, 2 * width, chunks, mean)
    sum_columns(squares, channels, length, columns, 2 * width, chunks, var)
    if length == 1:
        read_parameters(0, channels, shifts, values)
    else:
        for at in range(channels):
            store_double(values, at, load_parameter(shifts, at * length))
    finish_moments(0, channels, values, count, mean, var)
    uncertain = 0
    for at in range(channels):
        uncertain += 1 if load_double(var, at) == -1.0 else 0
    return uncertain


@cold
def recompute_statistics(
    deviations_again, x, x_step, size, rows, rest, channels, length, columns, width, scratch, sums, squares, values,
    count, mean, var,
):  # fmt: skip
    """Compute the statistics of the channels whose variance is -1 again: in float64, from sums around the means."""
    spread_over_columns(mean, 1, channels, length, columns, width, scratch + 1)
    clear(sums, 2 * width)
    call_kernel(deviations_again, (x, x_step, 0, rows, columns, scratch, sums, squares))
    if rest:
        call_kernel(deviations_again, (x + rows * columns * size, 0, 0, 1, rest, scratch, sums, squares))
    sum_columns(sums, channels, length, columns, width, 1, values)
    sum_columns(squares, channels, length, columns, width, 1, values + 8 * channels)
    for at in range(channels):
        if load_double(var, at) == -1.0:
            m = load_double(values, at) / count
            v = load_double(values, channels + at) / count - m * m
            store_double(mean, at, load_double(mean, at) + m)
            store_double(var, at, 0.0 if v < 0.0 else v)


@cold
def write_chunks(writer, tensors, steps, size, rows, columns, rest, scratch, width, chunks, p, nontemporal, counter):
    """Claim chunks and write their rows; the shorter row belongs to the last chunk."""
    while True:
        at = claim(counter)
        if at >= chunks:
            break
        vectors = (scratch, scratch + 8 * width, scratch + 16 * width, scratch + 24 * width, scratch + 32 * width)
        call_kernel(
            writer,
            tensors + steps + (rows * at // chunks, rows * (at + 1) // chunks, columns) + vectors + (p, nontemporal),
        )  # fmt: skip
        if rest and at == chunks - 1:
            skip = rows * columns * size
            x, residual, dy, out, dresidual = tensors
            last = (x + skip, residual + skip, dy + skip, out + skip, dresidual + skip)
            call_kernel(writer, last + steps + (0, 1, rest) + vectors + (p, 0))


@kernel
def forward(
    phases, shifts, deviations, deviations_again, writer, x, residual, y, x_step, residual_step, y_step, size, runs,
    channels, length, folded, weight, bias, running_mean, running_var, counter, mean, var, batch_stats, momentum, eps,
    p, double, nontemporal, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    row_step = x_step
    if folded > 1:
        x_step, residual_step, y_step = columns, columns, columns
    sums, squares = scratch + 40 * width, scratch + 48 * width
    pairs = 2 if double else 1  # pairs of vectors in a chunk
    values = sums + 16 * width * chunks * pairs
    count = float(runs * length)
    if phases & START:
        clear(counters, 2)
        if batch_stats:
            call_kernel(shifts, (x, row_step, runs, period, length, scratch))
            repeat_columns(scratch + double, period, columns)
            clear(sums, 2 * width * chunks * pairs)
    while phases & SUM and batch_stats:
        at = claim(counters)
        if at >= chunks:
            break
        skip = 16 * width * at * pairs
        low, high = rows * at // chunks, rows * (at + 1) // chunks
        call_kernel(deviations, (x, x_step, low, high, columns, scratch, sums + skip, squares + skip, 2 * width))
        if rest and at == chunks - 1:
            last = x + rows * columns * size
            call_kernel(deviations, (last, 0, 0, 1, rest, scratch, sums + skip, squares + skip, 2 * width))
    if phases & FINISH:
        uncertain = 0
        if batch_stats:
            uncertain = finish_statistics(
                sums, squares, scratch + double, channels, length, columns, width, chunks * pairs, count, values, mean,
                var,
            )  # fmt: skip
        else:
            read_parameters(0, channels, running_mean, mean)
            read_parameters(0, channels, running_var, var)
        if uncertain:
            recompute_statistics(
                deviations_again, x, x_step, size, rows, rest, channels, length, columns, width, scratch, sums,
                squares, values, count, mean, var,
            )  # fmt: skip
        scale, shift = values + 8 * channels, values + 16 * channels
        store_affine(0, channels, mean, var, eps, weight, bias, double, values, scale, shift)
        spread_over_columns(values, 3, channels, length, columns, width, scratch + double)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, rows, columns, rest, scratch,
            width, chunks, p, nontemporal, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        update_running(0, channels, running_mean, running_var, mean, var, count / max(count - 1.0, 1.0), momentum)
    if phases & END and counter:
        claim(counter)


@kernel
def backward(
    phases, keeps, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step,
    dresidual_step, size, runs, channels, length, folded, weight, bias, dweight, dbias, mean, var, dz, dz_xhat,
    training, count, eps, p, double, nontemporal, chunks, width, scratch, counters,
):  # fmt: skip
    period, rows = channels * length, runs // folded
    columns, rest = folded * period, (runs - rows * folded) * period
    steps = (x_step, residual_step, dy_step, dx_step, dresidual_step)
    if folded > 1:
        steps = (columns, columns, columns, columns, columns)
    x_step, residual_step, dy_step, dx_step, dresidual_step = steps
    kept, kept_step = (dresidual, dresidual_step) if dresidual else (dx, dx_step)
    dz_at, dz_step = (kept, kept_step) if keeps else (dy, dy_step)
    nontemporal = 0 if keeps and not dresidual else nontemporal
    sources = (x_step, residual_step, dy_step, kept_step)
    sums, squares = scratch + 40 * width, scratch + 48 * width
    pairs = 2 if double else 1  # pairs of vectors in a chunk
    values = sums + 16 * width * chunks * pairs
    scale, shift = values + 8 * channels, values + 16 * channels
    slope, offset = values + 24 * channels, values + 32 * channels
    if phases & START:
        clear(counters, 2)
        store_affine(0, channels, mean, var, eps, weight, bias, double, values, scale, shift)
        spread_over_columns(values, 3, channels, length, columns, width, scratch + double)
        clear(sums, 2 * width * chunks * pairs)
    while phases & SUM and products:
        at = claim(counters)
        if at >= chunks:
            break
        skip = 16 * width * at * pairs
        vectors = (scratch, scratch + 8 * width, scratch + 16 * width, sums + skip, squares + skip, 2 * width, p)
        low, high = rows * at // chunks, rows * (at + 1) // chunks
        call_kernel(products, (x, residual, dy, kept) + sources + (low, high, columns) + vectors)
        if rest and at == chunks - 1:
            skip = rows * columns * size
            last = (x + skip, residual + skip, dy + skip, kept + skip)
            call_kernel(products, last + sources + (0, 1, rest) + vectors)
    if phases & FINISH:
        if products:
            sum_columns(sums, channels, length, columns, 2 * width, chunks * pairs, dz)
            sum_columns(squares, channels, length, columns, 2 * width, chunks * pairs, dz_xhat)
            finish_products(0, channels, mean, var, eps, values, dz, dz_xhat)
        store_slopes(0, channels, mean, var, eps, values, dz, dz_xhat, training, count, slope, offset)
        spread_over_columns(slope, 2, channels, length, columns, width, scratch + 24 * width + double)
    if phases & WRITE and writer:
        write_chunks(
            writer, (x, residual, dz_at, dx, dresidual), (x_step, residual_step, dz_step, dx_step, dresidual_step),
            size, rows, columns, rest, scratch, width, chunks, p, nontemporal, counters + 8,
        )  # fmt: skip
    if phases & END:
        if dweight:
            write_parameters(0, channels, dz_xhat, dweight)
        if dbias:
            write_parameters(0, channels, dz, dbias)
