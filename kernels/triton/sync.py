"""Statistics of several processes: merge their reports, add up their sums, update running statistics, one launch each.

Packets have shape [parts, processes, HEADER + ROOM] and dtype float64. Each has a header, which all processes compare,
and a part of a process's report ``[0, count, means, variances]`` or of its sums. Every process writes the same results.
"""

import triton
import triton.language as tl

from gpu_bn.kernels.triton.accesses import (
    Channels,
    load_wide,
    store_as,
    wide,
)
from gpu_bn.kernels.triton.per_channel import (
    reciprocal,
    reciprocal_from,
)


@triton.jit
def places_of(packets, process, at, processes, HEADER: tl.constexpr, ROOM: tl.constexpr):
    """Return the addresses of number ``at`` of each process's report."""
    return packets + (at // ROOM * processes + process) * (HEADER + ROOM) + HEADER + at % ROOM


@triton.jit
def headers_that_differ(
    packets, processes, parts, HEADER: tl.constexpr, ROOM: tl.constexpr, UNKNOWN: tl.constexpr, CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Return the number of faults in headers: a field has two known values or NaN, or field 0 reports a mistake."""
    field = tl.arange(0, FIELDS)
    found = tl.zeros((FIELDS,), tl.int32)
    for part in range(parts):
        least = tl.full((FIELDS,), float("inf"), tl.float64)
        most = -least
        for start in range(0, processes, CHUNK):
            process = start + tl.arange(0, CHUNK)
            there = (process < processes)[:, None] & (field < HEADER)[None, :]
            places = packets + (part * processes + process[:, None]) * (HEADER + ROOM) + field[None, :]
            head = tl.load(places, mask=there, other=UNKNOWN)
            least = tl.minimum(least, tl.min(tl.where(head == UNKNOWN, float("inf"), head), 0))
            most = tl.maximum(most, tl.max(tl.where(head == UNKNOWN, float("-inf"), head), 0))
            wrong = there & ((head != head) | ((field == 0)[None, :] & (head != 0.0)))
            found += tl.sum(wrong.to(tl.int32), 0)
        found += (least < most).to(tl.int32)
    return tl.sum(found, 0)


# For processes with n_i elements, mean_i and var_i:
#     N = sum(n_i)        mean = sum(mean_i * n_i / N)        var = sum(n_i * (var_i + (mean_i - mean)**2)) / N
@triton.jit
def bn_sync_merge_kernel(
    packets, count, mean, var, channels, processes, parts,
    HEADER: tl.constexpr, ROOM: tl.constexpr, UNKNOWN: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the reports of all processes; mean and variance are NaN if the headers have a fault."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    counts = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, processes, CHUNK):
        process = start + tl.arange(0, CHUNK)
        place = places_of(packets, process, 1, processes, HEADER, ROOM)
        counts += tl.load(place, mask=process < processes, other=0.0)
    total = tl.sum(counts, 0)
    inverse = reciprocal_from(total, 1.0)
    mean_c = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, processes, CHUNK):
        process = start + tl.arange(0, CHUNK)
        present = (process < processes)[:, None] & known[None, :]
        n = tl.load(places_of(packets, process, 1, processes, HEADER, ROOM), mask=process < processes, other=0.0)
        place = places_of(packets, process[:, None], 2 + channel[None, :], processes, HEADER, ROOM)
        mean_c += tl.sum(tl.load(place, mask=present, other=0.0) * (n * inverse)[:, None], 0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, processes, CHUNK):
        process = start + tl.arange(0, CHUNK)
        present = (process < processes)[:, None] & known[None, :]
        n = tl.load(places_of(packets, process, 1, processes, HEADER, ROOM), mask=process < processes, other=0.0)
        place = places_of(packets, process[:, None], 2 + channel[None, :], processes, HEADER, ROOM)
        apart = tl.load(place, mask=present, other=0.0) - mean_c[None, :]
        place = places_of(packets, process[:, None], 2 + channels + channel[None, :], processes, HEADER, ROOM)
        variance = tl.load(place, mask=present, other=0.0)
        squares += tl.sum(n[:, None] * (variance + apart * apart), 0)
    wrong = headers_that_differ(packets, processes, parts, HEADER, ROOM, UNKNOWN, CHUNK, FIELDS)
    poison = tl.where(wrong > 0, float("nan"), 0.0)
    tl.store(mean + channel, mean_c + poison, mask=known)
    tl.store(var + channel, squares * inverse + poison, mask=known)
    if tl.program_id(0) == 0:
        tl.store(count, total)


#     sum(g) = sum(sum_i(g))        sum(g * xhat) = sum(sum_i(g * xhat))        over all processes i
@triton.jit
def bn_sync_sum_kernel(
    packets, sums, length, processes, parts,
    HEADER: tl.constexpr, ROOM: tl.constexpr, UNKNOWN: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all processes; they are NaN if the headers have a fault."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, processes, CHUNK):
        process = start + tl.arange(0, CHUNK)
        present = (process < processes)[:, None] & (at < length)[None, :]
        place = places_of(packets, process[:, None], at[None, :], processes, HEADER, ROOM)
        total += tl.sum(tl.load(place, mask=present, other=0.0), 0)
    wrong = headers_that_differ(packets, processes, parts, HEADER, ROOM, UNKNOWN, CHUNK, FIELDS)
    tl.store(sums + at, total + tl.where(wrong > 0, float("nan"), 0.0), mask=at < length)


#     running_mean = (1 - momentum) * running_mean + momentum * mean
#     running_var = (1 - momentum) * running_var + momentum * var * N / (N - 1)
@triton.jit
def bn_sync_update_kernel(
    running_mean, running_var, counter, count, mean, var, momentum, momentum_at, channels,
    CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the running statistics, unless the batch is empty, and count the batch.

    CUMULATIVE: the momentum is 1 / the number of batches. One program does all, to read the counter before writing it.
    """
    total = tl.load(count)
    bessel = total * reciprocal_from(total - 1.0, 1.0)
    if CUMULATIVE:
        batches = tl.load(counter) + 1
        weighs = reciprocal(batches.to(tl.float64))
    elif momentum_at is not None:
        weighs = wide(tl.load(momentum_at))
    else:
        weighs = momentum
    if running_mean is not None:
        for start in range(0, channels, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            known = (channel < channels) & (total > 0.0)
            of_these = Channels(channel, known, channels)
            old_mean = load_wide(running_mean, of_these, 0.0)
            old_var = load_wide(running_var, of_these, 0.0)
            mean_c = tl.load(mean + channel, mask=known, other=0.0)
            var_c = tl.load(var + channel, mask=known, other=0.0)
            tl.debug_barrier()
            store_as(running_mean + channel, (1.0 - weighs) * old_mean + weighs * mean_c, known)
            store_as(running_var + channel, (1.0 - weighs) * old_var + weighs * (var_c * bessel), known)
    if counter is not None:
        batches = tl.load(counter) + 1
        tl.debug_barrier()
        tl.store(counter, batches)
