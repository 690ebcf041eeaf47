"""A reference kernel in Triton: the training forward pass for NCHW, one program per channel, three passes, any size."""

import triton
import triton.language as tl


@triton.jit
def bn_forward(x, y, weight, bias, save_mean, save_var, n, c, s, eps, BLOCK: tl.constexpr):
    """Normalise x of shape [n, c, s] into y, with statistics in float64.

    A null weight stands for ones, a null bias for zeros. With a null y only the statistics are computed.
    """
    channel = tl.program_id(0)
    total = n * s
    count = total.to(tl.float64)
    partial = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // s * c + channel) * s + i % s
        partial += tl.load(x + place, mask=i < total, other=0.0).to(tl.float64)
    mean = tl.sum(partial, 0) / count

    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (i // s * c + channel) * s + i % s
        loaded = tl.load(x + place, mask=i < total, other=0.0).to(tl.float64)
        deviation = tl.where(i < total, loaded - mean, 0.0)
        squares += deviation * deviation
    var = tl.sum(squares, 0) / count
    tl.store(save_mean + channel, mean)
    tl.store(save_var + channel, var)

    if y.to(tl.int64) != 0:
        scale = tl.load(weight + channel, mask=weight.to(tl.int64) != 0, other=1.0)
        scale *= (1.0 / tl.sqrt(var + eps)).to(tl.float32)
        offset = tl.load(bias + channel, mask=bias.to(tl.int64) != 0, other=0.0)
        for start in range(0, total, BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = (i // s * c + channel) * s + i % s
            loaded = tl.load(x + place, mask=i < total, other=0.0).to(tl.float64)
            result = (loaded - mean).to(tl.float32) * scale + offset
            tl.store(y + place, result.to(y.dtype.element_ty), mask=i < total)
