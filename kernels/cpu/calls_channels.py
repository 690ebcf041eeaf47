"""Calls on channels that lie in runs of adjacent elements; see :mod:`gpu_bn.kernels.cpu.calls`.

``group`` is how many channels are summed, then written, together. Of a call that is not fused, a part is so many
elements, ``part_length``, of ``part_runs`` runs of one channel, or, to be written, of ``part_channels``. ``scratch``
has 5 float64 vectors of the channels and then two numbers a part.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    START,
    SUM,
    WRITE,
    affine,
    copy_running,
    move,
    part,
    slopes,
)
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import call_kernel, claim, number, put_number, put_parameter, restart


@cold
def merged(scratch, channel, parts, runs, length, part_runs, part_length):
    """Mean and variance from those of a channel's parts, in order."""
    count = mean = squares = 0.0
    for at in range(parts):
        _, some, _, elements = part(at, runs, length, part_runs, part_length)
        more = float(some * elements)
        delta = number(scratch, 2 * (channel * parts + at)) - mean
        count += more
        mean += delta * (more / count)
        squares += number(scratch, 2 * (channel * parts + at) + 1) * more + delta * delta * (
            more * (count - more) / count
        )
    return mean, squares / count


@cold
def put_affine(scratch, channels, at, mean, var, eps, weight, bias, double):
    """A channel's numbers to the vectors in scratch."""
    centre, scale, shift, rstd, rest = affine(mean, var, eps, weight, bias, double, at)
    put_number(scratch, at, centre)
    put_number(scratch, channels + at, scale)
    put_number(scratch, 2 * channels + at, shift)
    return rstd, rest


@cold
def write_parts(
    writer, tensors, steps, size, runs, channels, length, part_runs, part_channels, part_length, scratch, p, past,
    counter,
):  # fmt: skip
    """Write part after part, in the order of memory."""
    x, residual, dy, out, dresidual = tensors
    x_step, residual_step, dy_step, out_step, dresidual_step = steps
    blocks = (channels + part_channels - 1) // part_channels
    pieces = (length + part_length - 1) // part_length
    while True:
        at = claim(counter)
        if at // (blocks * pieces) * part_runs >= runs:
            break
        run, some, first, elements = part(
            at // (blocks * pieces) * pieces + at % pieces, runs, length, part_runs, part_length
        )
        channel = at // pieces % blocks * part_channels
        by = channel * length + first
        vectors = scratch + 8 * channel
        call_kernel(
            writer,
            (x + (run * x_step + by) * size, residual + (run * residual_step + by) * size,
             dy + (run * dy_step + by) * size, out + (run * out_step + by) * size,
             dresidual + (run * dresidual_step + by) * size, x_step, residual_step, dy_step, out_step, dresidual_step,
             some, elements, min(part_channels, channels - channel), vectors, vectors + 8 * channels,
             vectors + 16 * channels, vectors + 24 * channels, vectors + 32 * channels, p, 1, past),
        )  # fmt: skip


@kernel
def forward(
    phases, fused, moments, writer, x, residual, y, x_step, residual_step, y_step, size, runs, channels, length,
    weight, bias, running_mean, running_var, mean, var, batch_stats, momentum, eps, p, double, past,
    group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    partial = scratch + 40 * channels
    if phases & START:
        restart(counters)
    count = runs * length
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        some = min(group, channels - low)
        by, vectors = low * length * size, scratch + 8 * low
        call_kernel(moments, (x + by, x_step, runs, length, some, mean + 8 * low, var + 8 * low))
        for at in range(low, low + some):
            put_affine(scratch, channels, at, mean, var, eps, weight, bias, double)
        call_kernel(
            writer,
            (x + by, residual + by, 0, y + by, 0, x_step, residual_step, 0, y_step, 0, runs, length, some, vectors,
             vectors + 8 * channels, vectors + 16 * channels, 0, 0, p, 0, past),
        )  # fmt: skip
    while phases & SUM and batch_stats and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, some, first, elements = part(at % parts, runs, length, part_runs, part_length)
        where = x + (run * x_step + at // parts * length + first) * size
        call_kernel(moments, (where, x_step, some, elements, 1, partial + 16 * at, partial + 16 * at + 8))
    if phases & FINISH and not fused:
        if not batch_stats:
            copy_running(running_mean, running_var, mean, var, channels)
        for at in range(channels):
            if batch_stats:
                m, v = merged(partial, at, parts, runs, length, part_runs, part_length)
                put_number(mean, at, m)
                put_number(var, at, v)
            put_affine(scratch, channels, at, mean, var, eps, weight, bias, double)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, runs, channels, length,
            part_runs, part_channels, part_length, scratch, p, past, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        move(running_mean, running_var, mean, var, channels, count, momentum)


@cold
def finish_sums(mean, var, eps, double, at, dz, dz_xhat, sum_dz, sum_products):
    """A channel's sums of dz and dz * xhat from those of dz and dz * (x - centre)."""
    _, _, _, rstd, rest = affine(mean, var, eps, 0, 0, double, at)
    put_number(dz, at, sum_dz)
    put_number(dz_xhat, at, (sum_products - rest * sum_dz) * rstd)


@cold
def put_slopes(scratch, channels, at, mean, var, eps, weight, bias, double, dz, dz_xhat, training, count):
    """What a channel's sums make of dx, to the vectors in scratch."""
    rstd, rest = put_affine(scratch, channels, at, mean, var, eps, weight, bias, double)
    slope = offset = 0.0
    if training:
        slope, offset = slopes(rstd, rest, number(dz, at), number(dz_xhat, at), count)
    put_number(scratch, 3 * channels + at, slope)
    put_number(scratch, 4 * channels + at, offset)


@kernel
def backward(
    phases, fused, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step,
    dresidual_step, size, runs, channels, length, weight, bias, dweight, dbias, mean, var,
    dz, dz_xhat, training, count, eps, p, double, past, group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    partial = scratch + 40 * channels
    if phases & START:
        restart(counters)
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        some = min(group, channels - low)
        by, vectors = low * length * size, scratch + 8 * low
        scale, shift, slope, offset = (
            vectors + 8 * channels, vectors + 16 * channels, vectors + 24 * channels, vectors + 32 * channels
        )  # fmt: skip
        for at in range(low, low + some):
            put_affine(scratch, channels, at, mean, var, eps, weight, bias, double)
        call_kernel(
            products,
            (x + by, residual + by, dy + by, x_step, residual_step, dy_step, runs, length, some, vectors, scale, shift,
             dz + 8 * low, dz_xhat + 8 * low, p),
        )  # fmt: skip
        for at in range(low, low + some):
            finish_sums(mean, var, eps, double, at, dz, dz_xhat, number(dz, at), number(dz_xhat, at))
            put_slopes(scratch, channels, at, mean, var, eps, weight, bias, double, dz, dz_xhat, training, count)
        if writer:
            call_kernel(
                writer,
                (x + by, residual + by, dy + by, dx + by, dresidual + by, x_step, residual_step, dy_step, dx_step,
                 dresidual_step, runs, length, some, vectors, scale, shift, slope, offset, p, 0, past),
            )  # fmt: skip
    if phases & START and not fused:
        for at in range(channels):
            put_affine(scratch, channels, at, mean, var, eps, weight, bias, double)
    while phases & SUM and products and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, some, first, elements = part(at % parts, runs, length, part_runs, part_length)
        channel = at // parts
        by, vectors = channel * length + first, scratch + 8 * channel
        call_kernel(
            products,
            (x + (run * x_step + by) * size, residual + (run * residual_step + by) * size,
             dy + (run * dy_step + by) * size, x_step, residual_step, dy_step, some, elements, 1, vectors,
             vectors + 8 * channels, vectors + 16 * channels, partial + 16 * at, partial + 16 * at + 8, p),
        )  # fmt: skip
    if phases & FINISH and not fused:
        for at in range(channels):
            if products:
                sum_dz = sum_products = 0.0
                for i in range(at * parts, at * parts + parts):
                    sum_dz += number(partial, 2 * i)
                    sum_products += number(partial, 2 * i + 1)
                finish_sums(mean, var, eps, double, at, dz, dz_xhat, sum_dz, sum_products)
            put_slopes(scratch, channels, at, mean, var, eps, weight, bias, double, dz, dz_xhat, training, count)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, dy, dx, dresidual), (x_step, residual_step, dy_step, dx_step, dresidual_step), size,
            runs, channels, length, part_runs, part_channels, part_length, scratch, p, past, counters + 8,
        )  # fmt: skip
    if phases & END:
        for at in range(channels):
            if dweight:
                put_parameter(dweight, at, number(dz_xhat, at))
            if dbias:
                put_parameter(dbias, at, number(dz, at))
