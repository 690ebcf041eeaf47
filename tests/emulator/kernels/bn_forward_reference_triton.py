"""Batch-norm training forward in Triton, NCHW: one program per channel, three passes, any size."""

import triton
import triton.language as tl


@triton.jit
def bn_forward(x, y, weight, bias, save_mean, save_rstd, n, c, s, eps, BLOCK: tl.constexpr):
    """x and y are [n, c, s]; statistics in fp32, the second pass compensated."""
    channel = tl.program_id(0)
    total = n * s
    count = total.to(tl.float32)
    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // s * c + channel) * s + i % s
        partial += tl.load(x + place, mask=i < total, other=0.0).to(tl.float32)
    shift = tl.div_rn(tl.sum(partial, 0), count)

    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // s * c + channel) * s + i % s
        loaded = tl.load(x + place, mask=i < total, other=0.0).to(tl.float32)
        deviation = tl.where(i < total, loaded - shift, 0.0)
        first += deviation
        second += deviation * deviation
    e1 = tl.sum(first, 0)
    correction = tl.div_rn(e1, count)
    mean = shift + correction
    var = tl.div_rn(tl.maximum(tl.sum(second, 0) - e1 * correction, 0.0), count)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    tl.store(save_mean + channel, mean)
    tl.store(save_rstd + channel, rstd)

    scale = tl.load(weight + channel) * rstd
    offset = tl.load(bias + channel)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // s * c + channel) * s + i % s
        loaded = tl.load(x + place, mask=i < total, other=0.0).to(tl.float32)
        result = (loaded - mean) * scale + offset
        tl.store(y + place, result.to(y.dtype.element_ty), mask=i < total)
