"""What whole calls have in common: their phases, and per-channel numbers, of eight channels at a time.

Calls are for all dtypes and activations: what is particular to these are kernels that come as addresses. A call has
phases, bits of ``phases``: ``START``, ``SUM`` and ``FINISH`` make the statistics, or the sums of a backward call;
``WRITE`` writes tensors, ``END`` per-channel results, last. In ``SUM`` and ``WRITE`` parts are claimed from a counter
each, so that several threads may run them at the same time; the parts depend on shapes alone. A ``fused`` call does the
first four in ``SUM``, group after group of channels, so that the second pass finds a group in the cache.

All arguments are addresses, counts of elements, and numbers. Addresses of parameters' vectors are tagged: 1 more than
the address for float64, else of float32. Other per-channel vectors are float64. An affine map is ``z = (x - centre) *
scale + shift``, where ``centre`` is the mean as x is computed in, ``double`` for float64; ``dx = (dz + slope * (x -
centre) + offset) * scale``.
"""

from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.vector import (
    BIT,
    BYTE,
    DOUBLE,
    FLOAT32,
    FLOAT64,
    INT64,
    SINGLE,
    Elements,
    Lanes,
    fma,
    spread,
    where,
)

START, SUM, FINISH, WRITE, END = 1, 2, 4, 8, 16
LINE = 64
"""Bytes that the counters of parts take, before the scratch memory."""
TRUSTED = 4.0
"""A variance is taken from sums around a shift while (mean - shift)**2 <= TRUSTED * variance."""
SMALLEST, LARGEST = 1e-30, 1e37
"""Mean squares of float32 numbers that have lost nothing, neither to underflow nor to infinity."""
LANES = 8
VECTOR = ir.VectorType(DOUBLE, LANES)
SINGLES, DOUBLES = Elements(FLOAT32), Elements(FLOAT64)


# ------------------------------------------------------------------------------------------------- generating the code
class Numbers:
    """Per-channel vectors while code for some channels of them is generated."""

    def __init__(self, builder, at, count):
        self.builder, self.at, self.count = builder, at, count

    def constant(self, value):
        return Lanes(self.builder, ir.Constant(VECTOR, [value] * LANES))

    def spread(self, number):
        return spread(self.builder, number, VECTOR)

    def load(self, address):
        pointer = self.builder.inttoptr(address, BYTE.as_pointer())
        return memory.load(self.builder, DOUBLES, pointer, self.at, self.count, self.constant(1.0))

    def store(self, address, lanes):
        pointer = self.builder.inttoptr(address, BYTE.as_pointer())
        memory.store(self.builder, DOUBLES, pointer, self.at, self.count, lanes)

    def parameter(self, tagged, absent):
        """A vector at a tagged address; ``absent`` for the address 0."""
        builder = self.builder
        found = cgutils.alloca_once(builder, VECTOR)
        builder.store(self.constant(absent).value, found)
        pointer = builder.inttoptr(builder.and_(tagged, INT64(-2)), BYTE.as_pointer())
        given, double = builder.icmp_signed("!=", tagged, INT64(0)), builder.trunc(tagged, BIT)
        with builder.if_then(given), builder.if_else(double) as branches:
            for branch, elements in zip(branches, (DOUBLES, SINGLES), strict=True):
                with branch:
                    lanes = memory.load(builder, elements, pointer, self.at, self.count, self.constant(1.0))
                    builder.store(lanes.value, found)
        return Lanes(builder, builder.load(found))

    def put_parameter(self, tagged, lanes):
        builder = self.builder
        pointer = builder.inttoptr(builder.and_(tagged, INT64(-2)), BYTE.as_pointer())
        with builder.if_else(builder.trunc(tagged, BIT)) as branches:
            for branch, elements in zip(branches, (DOUBLES, SINGLES), strict=True):
                with branch:
                    memory.store(builder, elements, pointer, self.at, self.count, lanes)

    def rstd(self, var, eps):
        return 1 / (self.load(var) + self.spread(eps)).called("sqrt")


@contextmanager
def channels_between(builder, low, high):
    """A loop over channels, eight at a time."""
    with cgutils.for_range_slice(builder, low, high, INT64(LANES), intp=INT64) as (at, _):
        yield Numbers(builder, at, builder.sub(high, at))


def per_channel(arguments):
    """An intrinsic of a function that generates the code for some channels, of numbers and of int64 and float64."""

    def decorated(generate):
        result = types.void(types.int64, types.int64, *arguments)

        def code(context, builder, sig, args):
            with channels_between(builder, *args[:2]) as numbers:
                generate(numbers, *args[2:])
            return context.get_dummy_value()

        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope = {"result": result, "code": code}
        exec(f"def intrinsic_(typing, low, high, {names}):\n    return result, code", scope)
        return intrinsic(scope["intrinsic_"])

    return decorated


I, F = types.int64, types.float64  # noqa: E741


@per_channel((I, I, F, I, I, I, I, I, I))
def put_affine(numbers, mean, var, eps, weight, bias, double, centre, scale, shift):
    """The affine map from statistics and parameters."""
    builder, m = numbers.builder, numbers.load(mean)
    single = builder.fpext(builder.fptrunc(m.value, ir.VectorType(SINGLE, LANES)), VECTOR)
    c = Lanes(builder, builder.select(builder.icmp_signed("!=", double, INT64(0)), m.value, single))
    a = numbers.rstd(var, eps) * numbers.parameter(weight, 1.0)
    numbers.store(centre, c)
    numbers.store(scale, a)
    numbers.store(shift, fma(c - m, a, numbers.parameter(bias, 0.0)))


@per_channel((I, I, I, I))
def add_chunks(numbers, sums, stride, chunks, found):
    """The sums of chunks, in order; a chunk's are ``stride`` bytes from those of the one before."""
    builder = numbers.builder
    total = cgutils.alloca_once_value(builder, numbers.constant(0.0).value)
    with cgutils.for_range(builder, chunks) as loop:
        more = numbers.load(builder.add(sums, builder.mul(loop.index, stride)))
        builder.store((Lanes(builder, builder.load(total)) + more).value, total)
    numbers.store(found, Lanes(builder, builder.load(total)))


@per_channel((I, F, I, I))
def put_moments(numbers, shift, count, mean, var):
    """In the place of sums of x - shift and of its square, mean and variance: -1 where that may be wrong."""
    n, k = numbers.spread(count), numbers.load(shift)
    m, q = numbers.load(mean) / n, numbers.load(var) / n
    v = q - m * m
    good = (m * m <= v * TRUSTED) & (v > SMALLEST) & (q < LARGEST)
    numbers.store(mean, where(good | (abs(k + m) < LARGEST), k + m, k))
    numbers.store(var, where(good, v, numbers.constant(-1.0)))


@per_channel((I, I, F, I, I, I))
def finish_sums(numbers, mean, var, eps, centre, dz, products):
    """In the place of sums of dz * (x - centre), those of dz * xhat."""
    rest = numbers.load(mean) - numbers.load(centre)
    numbers.store(products, fma(-rest, numbers.load(dz), numbers.load(products)) * numbers.rstd(var, eps))


@per_channel((I, I, F, I, I, I, I, F, I, I))
def put_slopes(numbers, mean, var, eps, centre, dz, dz_xhat, training, count, slope, offset):
    """What the sums make of dx: nothing with frozen statistics."""
    builder, n = numbers.builder, numbers.spread(count)
    k = -numbers.rstd(var, eps) * numbers.load(dz_xhat) / n
    o = fma(-k, numbers.load(mean) - numbers.load(centre), -numbers.load(dz) / n)
    trains = builder.icmp_signed("!=", training, INT64(0))
    for vector, lanes in ((slope, k), (offset, o)):
        numbers.store(vector, Lanes(builder, builder.select(trains, lanes.value, numbers.constant(0.0).value)))


@per_channel((I, I, I, I, F, F))
def move(numbers, running_mean, running_var, mean, var, bessel, momentum):
    """Move the running statistics; ``bessel`` is what makes the variance unbiased."""
    m = numbers.spread(momentum)
    for running, now in (
        (running_mean, numbers.load(mean)),
        (running_var, numbers.load(var) * numbers.spread(bessel)),
    ):
        numbers.put_parameter(running, fma(m, now, (1 - m) * numbers.parameter(running, 0.0)))


@per_channel((I, F))
def fill(numbers, tagged, value):
    numbers.put_parameter(tagged, numbers.spread(value))


@per_channel((I, I))
def read_parameters(numbers, tagged, vector):
    numbers.store(vector, numbers.parameter(tagged, 0.0))


@per_channel((I, I))
def write_parameters(numbers, vector, tagged):
    numbers.put_parameter(tagged, numbers.load(vector))
