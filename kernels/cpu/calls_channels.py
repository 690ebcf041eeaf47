"""Calls on channels that are runs of adjacent elements; see :mod:`gpu_bn.kernels.cpu.calls`.

A fused call sums and writes ``group`` channels together. Any other call is cut into parts. A part to sum is
``part_length`` elements of each of ``part_runs`` runs of one channel; a part to write has ``part_channels`` channels.
``scratch`` has 5 float64 vectors of length C (centre, scale, shift, slope, offset) and then, if parts are summed, two
numbers for each part.
"""

from gpu_bn.kernels.cpu.calls import (
    END,
    FINISH,
    START,
    SUM,
    WRITE,
    finish_products,
    read_parameters,
    store_affine,
    store_slopes,
    update_running,
    write_parameters,
)
from gpu_bn.kernels.cpu.channels import SHORT
from gpu_bn.kernels.cpu.compiler import cold, kernel
from gpu_bn.kernels.cpu.scalars import call_kernel, claim, clear, load_double, store_double


@cold
def part_bounds(part, runs, length, part_runs, part_length):
    """Return the first run of a part of a channel and its number of runs, then the same for the elements of a run."""
    pieces = (length + part_length - 1) // part_length
    run, first = part // pieces * part_runs, part % pieces * part_length
    return run, min(part_runs, runs - run), first, min(part_length, length - first)


@cold
def merge_parts(partial, channels, parts, runs, length, part_runs, part_length, mean, var):
    """Compute the means and variances of channels from those of their parts, in order (Chan et al. 1979)."""
    for channel in range(channels):
        count = m = squares = 0.0
        for at in range(parts):
            _, run_count, _, elements = part_bounds(at, runs, length, part_runs, part_length)
            more = float(run_count * elements)
            delta = load_double(partial, 2 * (channel * parts + at)) - m
            count += more
            m += delta * (more / count)
            squares += load_double(partial, 2 * (channel * parts + at) + 1) * more
            squares += delta * delta * (more * (count - more) / count)
        store_double(mean, channel, m)
        store_double(var, channel, squares / count)


@cold
def sum_parts(partial, channels, parts, dz, products):
    """Compute the sums of channels from those of their parts, in order."""
    for channel in range(channels):
        first = second = 0.0
        for at in range(channel * parts, channel * parts + parts):
            first += load_double(partial, 2 * at)
            second += load_double(partial, 2 * at + 1)
        store_double(dz, channel, first)
        store_double(products, channel, second)


@cold
def write_parts(
    writer, tensors, steps, size, runs, channels, length, part_runs, part_channels, part_length, scratch, p,
    nontemporal, counter,
):  # fmt: skip
    """Claim parts and write them, in the order of memory."""
    x, residual, dy, out, dresidual = tensors
    x_step, residual_step, dy_step, out_step, dresidual_step = steps
    blocks = (channels + part_channels - 1) // part_channels
    pieces = (length + part_length - 1) // part_length
    while True:
        at = claim(counter)
        if at // (blocks * pieces) * part_runs >= runs:
            break
        run, run_count, first, elements = part_bounds(
            at // (blocks * pieces) * pieces + at % pieces, runs, length, part_runs, part_length
        )
        channel = at // pieces % blocks * part_channels
        skip = channel * length + first
        vectors = scratch + 8 * channel
        call_kernel(
            writer,
            (x + (run * x_step + skip) * size, residual + (run * residual_step + skip) * size,
             dy + (run * dy_step + skip) * size, out + (run * out_step + skip) * size,
             dresidual + (run * dresidual_step + skip) * size, x_step, residual_step, dy_step, out_step, dresidual_step,
             run_count, elements, min(part_channels, channels - channel), vectors, vectors + 8 * channels,
             vectors + 16 * channels, vectors + 24 * channels, vectors + 32 * channels, p, 1, nontemporal),
        )  # fmt: skip


@kernel
def forward(
    phases, fused, moments, writer, x, residual, y, x_step, residual_step, y_step, size, runs, channels, length,
    weight, bias, running_mean, running_var, counter, mean, var, batch_stats, momentum, eps, p, double, nontemporal,
    group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    spacing = 8 * channels
    scale, shift, partial = scratch + spacing, scratch + 2 * spacing, scratch + 5 * spacing
    if phases & START:
        clear(counters, 2)
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        channel_count = min(group, channels - low)
        skip, vskip = low * length * size, 8 * low  # bytes before the group, in a tensor and in a vector
        call_kernel(moments, (x + skip, x_step, runs, length, channel_count, mean + vskip, var + vskip))
        if writer:
            store_affine(low, low + channel_count, mean, var, eps, weight, bias, double, scratch, scale, shift)
            call_kernel(
                writer,
                (x + skip, residual + skip, 0, y + skip, 0, x_step, residual_step, 0, y_step, 0, runs, length,
                 channel_count, scratch + vskip, scale + vskip, shift + vskip, 0, 0, p, int(length <= SHORT),
                 nontemporal),
            )  # fmt: skip
    while phases & SUM and batch_stats and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, run_count, first, elements = part_bounds(at % parts, runs, length, part_runs, part_length)
        start = x + (run * x_step + at // parts * length + first) * size
        call_kernel(moments, (start, x_step, run_count, elements, 1, partial + 16 * at, partial + 16 * at + 8))
    if phases & FINISH and not fused:
        if batch_stats:
            merge_parts(partial, channels, parts, runs, length, part_runs, part_length, mean, var)
        else:
            read_parameters(0, channels, running_mean, mean)
            read_parameters(0, channels, running_var, var)
        store_affine(0, channels, mean, var, eps, weight, bias, double, scratch, scale, shift)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, 0, y, 0), (x_step, residual_step, 0, y_step, 0), size, runs, channels, length,
            part_runs, part_channels, part_length, scratch, p, nontemporal, counters + 8,
        )  # fmt: skip
    if phases & END and running_mean and batch_stats:
        count = float(runs * length)
        update_running(0, channels, running_mean, running_var, mean, var, count / max(count - 1.0, 1.0), momentum)
    if phases & END and counter:
        claim(counter)


@kernel
def backward(
    phases, fused, keeps, products, writer, x, residual, dy, dx, dresidual, x_step, residual_step, dy_step, dx_step,
    dresidual_step, size, runs, channels, length, weight, bias, dweight, dbias, mean, var, dz, dz_xhat, training, count,
    eps, p, double, nontemporal, group, part_runs, part_channels, part_length, scratch, counters,
):  # fmt: skip
    parts = ((runs + part_runs - 1) // part_runs) * ((length + part_length - 1) // part_length)
    spacing = 8 * channels
    scale, shift, slope = scratch + spacing, scratch + 2 * spacing, scratch + 3 * spacing
    offset, partial = scratch + 4 * spacing, scratch + 5 * spacing
    kept, kept_step = (dresidual, dresidual_step) if dresidual else (dx, dx_step)
    dz_at, dz_step = (kept, kept_step) if keeps else (dy, dy_step)
    nontemporal = 0 if keeps and not dresidual else nontemporal
    if phases & START:
        clear(counters, 2)
        store_affine(0, channels, mean, var, eps, weight, bias, double, scratch, scale, shift)
    while phases & SUM and fused:
        low = claim(counters) * group
        if low >= channels:
            break
        high = min(low + group, channels)
        skip, vskip = low * length * size, 8 * low  # bytes before the group, in a tensor and in a vector
        call_kernel(
            products,
            (x + skip, residual + skip, dy + skip, kept + skip, x_step, residual_step, dy_step, kept_step, runs, length,
             high - low, scratch + vskip, scale + vskip, shift + vskip, dz + vskip, dz_xhat + vskip, p),
        )  # fmt: skip
        finish_products(low, high, mean, var, eps, scratch, dz, dz_xhat)
        if writer:
            store_slopes(low, high, mean, var, eps, scratch, dz, dz_xhat, training, count, slope, offset)
            call_kernel(
                writer,
                (x + skip, residual + skip, dz_at + skip, dx + skip, dresidual + skip, x_step, residual_step, dz_step,
                 dx_step, dresidual_step, runs, length, high - low, scratch + vskip, scale + vskip, shift + vskip,
                 slope + vskip, offset + vskip, p, int(length <= SHORT), nontemporal),
            )  # fmt: skip
    while phases & SUM and products and not fused:
        at = claim(counters)
        if at >= channels * parts:
            break
        run, run_count, first, elements = part_bounds(at % parts, runs, length, part_runs, part_length)
        channel = at // parts
        skip, vskip = channel * length + first, 8 * channel
        call_kernel(
            products,
            (x + (run * x_step + skip) * size, residual + (run * residual_step + skip) * size,
             dy + (run * dy_step + skip) * size, kept + (run * kept_step + skip) * size, x_step, residual_step, dy_step,
             kept_step, run_count, elements, 1, scratch + vskip, scale + vskip, shift + vskip, partial + 16 * at,
             partial + 16 * at + 8, p),
        )  # fmt: skip
    if phases & FINISH and not fused:
        if products:
            sum_parts(partial, channels, parts, dz, dz_xhat)
            finish_products(0, channels, mean, var, eps, scratch, dz, dz_xhat)
        store_slopes(0, channels, mean, var, eps, scratch, dz, dz_xhat, training, count, slope, offset)
    if phases & WRITE and writer and not fused:
        write_parts(
            writer, (x, residual, dz_at, dx, dresidual), (x_step, residual_step, dz_step, dx_step, dresidual_step),
            size, runs, channels, length, part_runs, part_channels, part_length, scratch, p, nontemporal, counters + 8,
        )  # fmt: skip
    if phases & END:
        if dweight:
            write_parameters(0, channels, dz_xhat, dweight)
        if dbias:
            write_parameters(0, channels, dz, dbias)
