"""Calls on channels that lie in runs of adjacent elements; see :mod:`gpu_bn.kernels.cpu.calls`.

``group`` is how many channels are summed, then written, together. Of a call that is not fused, a part is so many
elements, ``part_length``, of ``part_runs`` runs of one channel, or, to be written, of ``part_channels``. ``scratch``
has 5 float64 vectors of the channels and then, where parts are summed, two numbers a part.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    START,
    SUM,
    WRITE,
    finish_sums,
    move,
    put_affine,
    put_slopes,
    read_parameters,
    write_parameters,
)
from gpu_bn.kernels.cpu.channels import SHORT
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import call_kernel, claim, number, put_number, restart


@cold
def part(at, runs, length, runs_each, length_each):
    """The runs, from and how many, and the elements of each, from and how many, of a part of a channel."""
    pieces = (length + length_each - 1) // length_each
    run, first = at // pieces * runs_each, at % pieces * length_each
    return run, min(runs_each, runs - run), first, min(length_each, length - first)


@cold
def merge(partial, channels, parts, runs, length, part_runs, part_length, mean, var):
    """Means and variances from those of the channels' parts, in order."""
    for channel in range(channels):
        count = m = squares = 0.0
        for at in range(parts):
            _, some, _, elements = part(at, runs, length, part_runs, part_length)
            more = float(some * elements)
            delta = number(partial, 2 * (channel * parts + at)) - m
            count += more
            m += delta * (more / count)
            squares += number(partial, 2 * (channel * parts + at) + 1) * more
            squares += delta * delta * (more * (count - more) / count)
        put_number(mean, channel, m)
        put_number(var, channel, squares / count)


@cold
def add_up(partial, channels, parts, dz, products):
    """Sums from those of the channels' parts, in order."""
    for channel in range(channels):
        first = second = 0.0
        for at in range(channel * parts, channel * parts + parts):
            first += number(partial, 2 * at)
            second += number(partial, 2 * at + 1)
        put_number(dz, channel, first)
        put_number(products, channel, second)


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
    weight, bias, running_mean, running_var, counter, mean, var, batch_stats, momentum, eps, p, double, past,
    group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    spacing = 8 * channels
    scale, shift, partial = scratch + spacing, scratch + 2 * spacing, scratch + 5 * spacing
    if phases & START:
        restart(counters)
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        some = min(group, channels - low)
        by, own = low * length * size, 8 * low
        call_kernel(moments, (x + by, x_step, runs, length, some, mean + own, var + own))
        if writer:
            put_affine(low, low + some, mean, var, eps, weight, bias, double, scratch, scale, shift)
            call_kernel(
                writer,
                (x + by, residual + by, 0, y + by, 0, x_step, residual_step, 0, y_step, 0, runs, length, some,
                 scratch + own, scale + own, shift + own, 0, 0, p, int(length <= SHORT), past),
            )  # fmt: skip
    while phases & SUM and batch_stats and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, some, first, elements = part(at % parts, runs, length, part_runs, part_length)
        where = x + (run * x_step + at // parts * length + first) * size
        call_kernel(moments, (where, x_step, some, elements, 1, partial + 16 * at, partial + 16 * at + 8))
    if phases & FINISH and not fused:
        if batch_stats:
            merge(partial, channels, parts, runs, length, part_runs, part_length, mean, var)
        else:
            read_parameters(0, channels, running_mean, mean)
            read_parameters(0, channels, running_var, var)
        put_affine(0, channels, mean, var, eps, weight, bias, double, scratch, scale, shift)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, runs, channels, length,
            part_runs, part_channels, part_length, scratch, p, past, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        count = float(runs * length)
        move(0, channels, running_mean, running_var, mean, var, count / max(count - 1.0, 1.0), momentum)
    if phases & END and counter:
        claim(counter)


@kernel
def backward(
    phases, fused, keeps, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step,
    dresidual_step, size, runs, channels, length, weight, bias, dweight, dbias, mean, var, dz, dz_xhat, training, count,
    eps, p, double, past, group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    spacing = 8 * channels
    scale, shift, slope = scratch + spacing, scratch + 2 * spacing, scratch + 3 * spacing
    offset, partial = scratch + 4 * spacing, scratch + 5 * spacing
    kept, kept_step = (dresidual, dresidual_step) if dresidual else (dx, dx_step)
    dz_at, dz_step, past = (kept, kept_step, past if dresidual else 0) if keeps else (dy, dy_step, past)
    if phases & START:
        restart(counters)
        put_affine(0, channels, mean, var, eps, weight, bias, double, scratch, scale, shift)
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        high = min(low + group, channels)
        by, own = low * length * size, 8 * low
        call_kernel(
            products,
            (x + by, residual + by, dy + by, kept + by, x_step, residual_step, dy_step, kept_step, runs, length,
             high - low, scratch + own, scale + own, shift + own, dz + own, dz_xhat + own, p),
        )  # fmt: skip
        finish_sums(low, high, mean, var, eps, scratch, dz, dz_xhat)
        if writer:
            put_slopes(low, high, mean, var, eps, scratch, dz, dz_xhat, training, count, slope, offset)
            call_kernel(
                writer,
                (x + by, residual + by, dz_at + by, dx + by, dresidual + by, x_step, residual_step, dz_step, dx_step,
                 dresidual_step, runs, length, high - low, scratch + own, scale + own, shift + own, slope + own,
                 offset + own, p, int(length <= SHORT), past),
            )  # fmt: skip
    while phases & SUM and products and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, some, first, elements = part(at % parts, runs, length, part_runs, part_length)
        channel = at // parts
        by, own = channel * length + first, 8 * channel
        call_kernel(
            products,
            (x + (run * x_step + by) * size, residual + (run * residual_step + by) * size,
             dy + (run * dy_step + by) * size, kept + (run * kept_step + by) * size, x_step, residual_step, dy_step,
             kept_step, some, elements, 1, scratch + own, scale + own, shift + own, partial + 16 * at,
             partial + 16 * at + 8, p),
        )  # fmt: skip
    if phases & FINISH and not fused:
        if products:
            add_up(partial, channels, parts, dz, dz_xhat)
            finish_sums(0, channels, mean, var, eps, scratch, dz, dz_xhat)
        put_slopes(0, channels, mean, var, eps, scratch, dz, dz_xhat, training, count, slope, offset)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, dz_at, dx, dresidual), (x_step, residual_step, dz_step, dx_step, dresidual_step),
            size, runs, channels, length, part_runs, part_channels, part_length, scratch, p, past, counters + 8,
        )  # fmt: skip
    if phases & END:
        if dweight:
            write_parameters(0, channels, dz_xhat, dweight)
        if dbias:
            write_parameters(0, channels, dz, dbias)
