"""Small kernels with the constructs that Triton kernels of a batch norm use. Their PTX must run in the emulator."""

import triton
import triton.language as tl


@triton.jit
def maths(y, x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, tl.exp(v) + tl.erf(v) + tl.sigmoid(v) + tl.rsqrt(v * v + 1), mask=i < n)


@triton.jit
def _merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    count = count_a + count_b
    share = tl.where(count == 0, 0.0, count_b / count)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def welford(out, x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    count = (i < n).to(tl.float32)
    count, mean, m2 = tl.reduce((count, v, tl.zeros((BLOCK,), tl.float32)), 0, _merge)
    tl.store(out, mean)
    tl.store(out + 1, m2 / count)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def scan(y, x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, tl.associative_scan(v, 0, _plus), mask=i < n)


@triton.jit
def ticket(out, partials, counter, x, n, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Add the partial sums of all programs in the last one to take a ticket."""
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    tl.store(partials + p, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(partials + tl.arange(0, PROGRAMS)), 0))


@triton.jit
def staged(out, x, rows, BLOCK: tl.constexpr):
    """Add rows in a loop whose loads become asynchronous copies."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(rows, num_stages=4):
        total += tl.load(x + row * BLOCK + i, eviction_policy="evict_first").to(tl.float32)
    tl.store(out, tl.sum(total, 0))
