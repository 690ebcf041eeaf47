"""Phases of a whole call, and the computations on per-channel vectors, eight channels at a time.

The kernels of whole calls serve all dtypes and activations: they get the addresses of kernels that are specific to
these. A call runs the phases in the bits of ``phases``. ``START`` resets the counters; ``SUM`` and ``FINISH`` compute
the statistics, or the sums of a backward call; ``WRITE`` writes the tensors, and ``END`` the per-channel results.
``SUM`` and ``WRITE`` claim one part after the other from a counter, so that several threads can run them at the same
time. The parts depend on shapes alone. A ``fused`` call does the work of ``FINISH`` and ``WRITE`` in ``SUM``, for one
group of channels after the other, so that the second pass finds the group in the cache.

All arguments are addresses, counts of elements, and numbers. The addresses of vectors of parameters and of running
statistics are tagged: the address of float32 numbers, or 1 more than the address of float64 numbers. All other
per-channel vectors are float64. The forward pass is ``z = (x - centre) * scale + shift``, where ``centre`` is the mean,
rounded to float32 unless ``double`` says that x is float64; the backward pass is
``dx = (dz + slope * (x - centre) + offset) * scale``.
"""

from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.memory import as_pointer
from gpu_bn.kernels.cpu.vector import BIT, DOUBLE, FLOAT32, FLOAT64, INT64, SINGLE, Elements, Lanes, fma, splat, where

START, SUM, FINISH, WRITE, END = 1, 2, 4, 8, 16
LINE = 64
"""Bytes of a cache line. The counters of parts take one, before the scratch memory."""
TRUSTED = 4.0
"""A variance from sums around a shift is exact enough if (mean - shift)**2 <= TRUSTED * variance."""
SMALLEST, LARGEST = 1e-30, 1e37
"""The range of a variance and of a mean square of float32 numbers in which nothing has underflowed or overflowed."""
LANES = 8
"""The number of channels that are computed at a time."""
VECTOR = ir.VectorType(DOUBLE, LANES)
SINGLES, DOUBLES = Elements(FLOAT32), Elements(FLOAT64)


# ------------------------------------------------------------------------------------------------- generating the code
class ChannelBlock:
    """Up to eight channels, from channel ``at`` on, for loads from per-channel vectors and stores to them."""

    def __init__(self, builder, at, count):
        self.builder, self.at, self.count = builder, at, count

    def constant(self, value):
        return Lanes(self.builder, ir.Constant(VECTOR, [value] * LANES))

    def splat(self, number):
        return splat(self.builder, number, VECTOR)

    def load(self, address, elements=DOUBLES):
        pointer = as_pointer(self.builder, address)
        return memory.load(self.builder, elements, pointer, self.at, self.count, self.constant(1.0))

    def store(self, address, lanes, elements=DOUBLES):
        memory.store(self.builder, elements, as_pointer(self.builder, address), self.at, self.count, lanes)

    def load_parameter(self, tagged, absent):
        """Load from a vector at a tagged address; return ``absent`` in all lanes for the address 0."""
        builder, address = self.builder, self.builder.and_(tagged, INT64(-2))
        loaded = cgutils.alloca_once(builder, VECTOR)
        builder.store(self.constant(absent).value, loaded)
        present, double = builder.icmp_signed("!=", tagged, INT64(0)), builder.trunc(tagged, BIT)
        with builder.if_then(present), builder.if_else(double) as branches:
            for branch, elements in zip(branches, (DOUBLES, SINGLES), strict=True):
                with branch:
                    builder.store(self.load(address, elements).value, loaded)
        return Lanes(builder, builder.load(loaded))

    def store_parameter(self, tagged, lanes):
        """Store to a vector at a tagged address."""
        address = self.builder.and_(tagged, INT64(-2))
        with self.builder.if_else(self.builder.trunc(tagged, BIT)) as branches:
            for branch, elements in zip(branches, (DOUBLES, SINGLES), strict=True):
                with branch:
                    self.store(address, lanes, elements)

    def rstd(self, var, eps):
        """Return 1 / sqrt(var + eps)."""
        return 1 / (self.load(var) + self.splat(eps)).intrinsic("sqrt")


@contextmanager
def channel_blocks(builder, low, high):
    """Generate a loop over the channels from ``low`` to ``high``, and yield the :class:`ChannelBlock` of its body."""
    with cgutils.for_range_slice(builder, low, high, INT64(LANES), intp=INT64) as (at, _):
        yield ChannelBlock(builder, at, builder.sub(high, at))


def per_channel(arguments):
    """Return a decorator that makes an intrinsic of a function on a :class:`ChannelBlock` and arguments of these types.

    The arguments of the intrinsic are the first channel, the end of the channels, and those of the function.
    """
    signature = types.void(types.int64, types.int64, *arguments)

    def decorate(generate):
        def code(context, builder, sig, args):
            with channel_blocks(builder, *args[:2]) as block:
                generate(block, *args[2:])
            return context.get_dummy_value()

        return intrinsic(lambda typing, *given: (signature, code))

    return decorate


I, F = types.int64, types.float64  # noqa: E741


@per_channel((I, I, F, I, I, I, I, I, I))
def store_affine(block, mean, var, eps, weight, bias, double, centre, scale, shift):
    """Compute the affine map: scale = weight * rstd, and shift = bias + (centre - mean) * scale."""
    builder, m = block.builder, block.load(mean)
    single = builder.fpext(builder.fptrunc(m.value, ir.VectorType(SINGLE, LANES)), VECTOR)
    c = Lanes(builder, builder.select(builder.icmp_signed("!=", double, INT64(0)), m.value, single))
    a = block.rstd(var, eps) * block.load_parameter(weight, 1.0)
    block.store(centre, c)
    block.store(scale, a)
    block.store(shift, fma(c - m, a, block.load_parameter(bias, 0.0)))


@per_channel((I, I, I, I))
def sum_chunks(block, sums, stride, chunks, result):
    """Add the sums of all chunks, in order. The sums of two consecutive chunks lie ``stride`` bytes apart."""
    builder = block.builder
    total = cgutils.alloca_once_value(builder, block.constant(0.0).value)
    with cgutils.for_range(builder, chunks) as loop:
        more = block.load(builder.add(sums, builder.mul(loop.index, stride)))
        builder.store((Lanes(builder, builder.load(total)) + more).value, total)
    block.store(result, Lanes(builder, builder.load(total)))


@per_channel((I, F, I, I))
def finish_moments(block, shift, count, mean, var):
    """Replace the sums of x - shift and (x - shift)**2 in ``mean`` and ``var`` by mean and variance.

    A variance is set to -1 where cancellation, underflow or overflow may have made it wrong.
    """
    n, k = block.splat(count), block.load(shift)
    m, q = block.load(mean) / n, block.load(var) / n
    v = q - m * m
    good = (m * m <= v * TRUSTED) & (v > SMALLEST) & (q < LARGEST)
    block.store(mean, where(good | (abs(k + m) < LARGEST), k + m, k))
    block.store(var, where(good, v, block.constant(-1.0)))


@per_channel((I, I, F, I, I, I))
def finish_products(block, mean, var, eps, centre, dz, products):
    """Replace the sums of dz * (x - centre) in ``products`` by the sums of dz * xhat."""
    deviation = block.load(mean) - block.load(centre)
    block.store(products, fma(-deviation, block.load(dz), block.load(products)) * block.rstd(var, eps))


@per_channel((I, I, F, I, I, I, I, F, I, I))
def store_slopes(block, mean, var, eps, centre, dz, dz_xhat, training, count, slope, offset):
    """Compute slope and offset of dx from the sums of dz and dz * xhat; both are 0 if the statistics are frozen.

    slope = -rstd * dz_xhat / count, and offset = slope * (centre - mean) - dz / count.
    """
    builder, n = block.builder, block.splat(count)
    k = -block.rstd(var, eps) * block.load(dz_xhat) / n
    o = fma(-k, block.load(mean) - block.load(centre), -block.load(dz) / n)
    trains = builder.icmp_signed("!=", training, INT64(0))
    for vector, lanes in ((slope, k), (offset, o)):
        block.store(vector, Lanes(builder, builder.select(trains, lanes.value, block.constant(0.0).value)))


@per_channel((I, I, I, I, F, F))
def update_running(block, running_mean, running_var, mean, var, bessel, momentum):
    """Update the running statistics; ``bessel`` is the factor that makes the variance unbiased."""
    m = block.splat(momentum)
    for running, new in ((running_mean, block.load(mean)), (running_var, block.load(var) * block.splat(bessel))):
        block.store_parameter(running, fma(m, new, (1 - m) * block.load_parameter(running, 0.0)))


@per_channel((I, F))
def fill_parameter(block, tagged, value):
    """Fill a vector at a tagged address with a number."""
    block.store_parameter(tagged, block.splat(value))


@per_channel((I, I))
def read_parameters(block, tagged, vector):
    """Copy a vector at a tagged address to a float64 vector; the address 0 gives zeros."""
    block.store(vector, block.load_parameter(tagged, 0.0))


@per_channel((I, I))
def write_parameters(block, vector, tagged):
    """Copy a float64 vector to a vector at a tagged address."""
    block.store_parameter(tagged, block.load(vector))
