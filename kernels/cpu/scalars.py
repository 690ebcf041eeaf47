"""Intrinsics for what kernels do around vectors: places, numbers, sums of columns, and each other."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.activations import CHEAP, NAMES
from gpu_bn.kernels.cpu.compiler import inlined
from gpu_bn.kernels.cpu.memory import Tensor, integer, unpacked
from gpu_bn.kernels.cpu.vector import (
    BIT,
    BYTE,
    BYTES,
    DOUBLE,
    INT32,
    INT64,
    SINGLE,
    WIDE,
    Elements,
    Lanes,
    Vector,
    in_all,
    spread,
)
from gpu_bn.kernels.cpu.vector import (
    total as total_of,
)


@intrinsic(prefer_literal=True)
def elements(typing, address, code):
    """The elements at an address; ``None`` for a code below 0, which stands for a tensor that there is not."""
    if code.literal_value < 0:
        return types.none(types.int64, code), lambda context, builder, sig, args: context.get_dummy_value()
    return (
        Elements(code.literal_value)(types.int64, code),
        lambda context, builder, sig, args: builder.inttoptr(args[0], BYTE.as_pointer()),
    )


@intrinsic
def moved(typing, tensors, by):
    """A tuple of tensors from elements ``by`` on, each its own; a ``None`` stays ``None``."""

    def generate(context, builder, sig, args):
        result = args[0]
        for i, t in enumerate(tensors):
            if isinstance(t, Elements):
                one = memory.place(
                    builder, builder.extract_value(args[0], i), builder.extract_value(args[1], i), t.size, BYTE
                )
                result = builder.insert_value(result, one, i)
        return result

    return tensors(tensors, types.UniTuple(types.int64, len(tensors))), generate


@intrinsic
def places(typing, times, steps, more):
    """times * step + more, for each of a tuple of steps."""

    def generate(context, builder, sig, args):
        each = [
            builder.add(builder.mul(args[0], builder.extract_value(args[1], i)), args[2]) for i in range(len(steps))
        ]
        return context.make_tuple(builder, sig.return_type, each)

    integers = types.UniTuple(types.int64, len(steps))
    return integers(types.int64, integers, types.int64), generate


def _splats(vectors):
    @intrinsic
    def function(typing, source, numbers):
        vector = source.vector(vectors)
        result = types.UniTuple(vector, len(numbers))

        def generate(context, builder, sig, args):
            each = [builder.extract_value(args[1], i) for i in range(len(numbers))]
            return context.make_tuple(builder, result, [spread(builder, one, vector.ir).value for one in each])

        return result(source, types.UniTuple(types.float64, len(numbers))), generate

    return function


splats, splats_wide = _splats(1), _splats(WIDE)
"""A tuple of float64 numbers as vectors in which the elements are computed."""


@intrinsic(prefer_literal=True)
def zeros_to_write(typing, source, which):
    """Two vectors of zeros, as long as those that are written: wide ones, if the activation leaves registers."""
    vectors = WIDE if NAMES[which.literal_value] in CHEAP else 1
    two = types.UniTuple(source.vector(vectors), 2)
    return two(source, which), lambda context, builder, sig, args: ir.Constant(context.get_value_type(two), None)


@intrinsic
def zeros_double(typing):
    """Four float64 vectors of zeros: two sums, and what these lose."""
    four = types.UniTuple(Vector(True, BYTES // 8), 4)
    return four(), lambda context, builder, sig, args: ir.Constant(context.get_value_type(four), None)


@intrinsic
def lanes(typing, vectors):
    """How many lanes the vectors of a tuple have."""
    return types.int64(vectors), lambda context, builder, sig, args: INT64(vectors[0].lanes)


@intrinsic
def total(typing, vector):
    """The sum of the lanes, in float64."""
    return types.float64(vector), lambda context, builder, sig, args: total_of(Lanes(builder, args[0]))


@intrinsic
def get(typing, source, at):
    """One element, as float64."""

    def generate(context, builder, sig, args):
        one = Lanes(builder, ir.Constant(ir.VectorType(DOUBLE, 1), [0.0]))
        found = memory.load(builder, source, *args, None, one)
        return builder.extract_element(found.value, INT32(0))

    return types.float64(source, types.int64), generate


@intrinsic
def put(typing, target, at, value):
    """Write one element from float64."""

    def generate(context, builder, sig, args):
        memory.store(builder, target, *args[:2], None, Lanes(builder, in_all(builder, args[2], 1)))
        return context.get_dummy_value()

    return types.void(target, types.int64, types.float64), generate


@intrinsic
def number(typing, address, at):
    """An element of float64 numbers at an address."""

    def generate(context, builder, sig, args):
        return builder.load(memory.place(builder, at_address(builder, args[0]), args[1], 8, DOUBLE))

    return types.float64(types.int64, types.int64), generate


@intrinsic
def put_number(typing, address, at, value):
    """Write one."""

    def generate(context, builder, sig, args):
        builder.store(args[2], memory.place(builder, at_address(builder, args[0]), args[1], 8, DOUBLE))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), generate


# A tagged address is that of float32 numbers, or 1 more than that of float64 ones.
@intrinsic
def parameter(typing, tagged, at):
    """An element of the numbers at a tagged address."""

    def generate(context, builder, sig, args):
        start, found = untagged(builder, args[0]), cgutils.alloca_once(builder, DOUBLE)
        with builder.if_else(builder.trunc(args[0], BIT)) as (wide, narrow):
            with wide:
                builder.store(builder.load(memory.place(builder, start, args[1], 8, DOUBLE)), found)
            with narrow:
                single = builder.load(memory.place(builder, start, args[1], 4, SINGLE))
                builder.store(builder.fpext(single, DOUBLE), found)
        return builder.load(found)

    return types.float64(types.int64, types.int64), generate


def untagged(builder, address):
    return at_address(builder, builder.and_(address, INT64(-2)))


def at_address(builder, address):
    return builder.inttoptr(address, BYTE.as_pointer())


@intrinsic
def rounded(typing, source, value):
    """A float64 number as the elements can hold it."""

    def generate(context, builder, sig, args):
        bits = memory.narrow(Lanes(builder, in_all(builder, args[1], 1)), source.code)
        return builder.extract_element(
            memory.widen(builder, bits, source.code, ir.VectorType(DOUBLE, 1)).value, INT32(0)
        )

    return types.float64(source, types.float64), generate


@intrinsic
def add_double(typing, sums, x, at, count, shift):
    """Add to float64 sums those of x - shift and of its square, of up to ``count`` elements.

    ``shift`` is a number, or float64 elements. The third and fourth sum are of what the first two lose: many equal
    terms are all rounded the same way.
    """

    def generate(context, builder, sig, args):
        totals, tensor, at_, count_, k = unpacked(builder, sig.args, args)
        s, q, lost_s, lost_q = totals
        k = k.load(at_, count_, s.like(0.0)) if isinstance(k, Tensor) else spread(builder, k, s.value.type)
        d = tensor.load(at_, count_, k) - k
        (s, lost_s), (q, lost_q) = lossless(s, d, lost_s), lossless(q, d * d, lost_q)
        return context.make_tuple(builder, sums, [one.value for one in (s, q, lost_s, lost_q)])

    return sums(sums, x, types.int64, types.int64, shift), generate


def lossless(total, term, lost):
    """total + term, and ``lost`` with what that loses to rounding (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    after = total + term
    kept = after - total
    return after, lost + ((total - (after - kept)) + (term - kept))


two_sum = inlined(lossless)
"""The same in a kernel."""


@intrinsic
def vectors_at(typing, tensors, at, like):
    """The vectors that lie from element ``at`` of each of a tuple of tensors on, of the type of those in a tuple."""
    found = types.UniTuple(like[0], len(tensors))

    def generate(context, builder, sig, args):
        zero = Lanes(builder, builder.extract_value(args[2], 0))
        each = [memory.load(builder, t, builder.extract_value(args[0], i), args[1], None, zero).value
                for i, t in enumerate(tensors)]  # fmt: skip
        return context.make_tuple(builder, found, each)

    return found(tensors, types.int64, like), generate


@intrinsic
def add_to(typing, sums, at, count, vector, beside):
    """Add a vector, or its first ``count`` lanes, to float64 sums.

    What float64 vectors lose there, as in :func:`two_sum`, is added to sums that lie ``beside`` elements further, if
    it is not None. A float32 vector has lost more before it comes here.
    """

    def generate(context, builder, sig, args):
        target, at_, count_, lanes, by = unpacked(builder, sig.args, args)
        t = ir.VectorType(DOUBLE, vector.lanes)
        zero = Lanes(builder, ir.Constant(t, None))
        added = lanes if vector.double else Lanes(builder, builder.fpext(lanes.value, t))
        before = target.load(at_, count_, zero)
        if vector.double and by is not None:
            low = builder.add(at_, by)
            after, lost = lossless(before, added, target.load(low, count_, zero))
            target.store(low, count_, lost)
        else:
            after = before + added
        target.store(at_, count_, after)
        return context.get_dummy_value()

    return types.void(sums, types.int64, integer(count), vector, integer(beside)), generate


@intrinsic
def misaligned(typing, target, at, vectors):
    """How many elements there are from ``at`` to where a vector may be stored past the caches."""

    def generate(context, builder, sig, args):
        if isinstance(target, types.NoneType):
            return INT64(0)
        left = builder.neg(builder.ptrtoint(memory.place(builder, *args[:2], target.size, BYTE), INT64))
        return builder.udiv(builder.and_(left, INT64(vectors[0].lanes * target.size - 1)), INT64(target.size))

    return types.int64(target, types.int64, vectors), generate


# --------------------------------------------------------------------------------------------------- kernels, counters
@intrinsic
def claim(typing, counter):
    """The next number of a counter, an int64 at an address, that several threads share."""

    def generate(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], INT64.as_pointer()), INT64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def clear(typing, address, numbers):
    """Set float64 numbers to 0."""

    def generate(context, builder, sig, args):
        cgutils.memset(builder, at_address(builder, args[0]), builder.mul(args[1], INT64(8)), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy(typing, target, source, nbytes):
    """Copy bytes from an address to another; the two places share none."""

    def generate(context, builder, sig, args):
        cgutils.raw_memcpy(builder, at_address(builder, args[0]), at_address(builder, args[1]), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def restart(typing, counters):
    """Set two counters to 0."""

    def generate(context, builder, sig, args):
        for i in range(2):
            builder.store(INT64(0), memory.place(builder, at_address(builder, args[0]), INT64(i), 8, INT64))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def kernel_call(context, builder, address, values, kinds):
    """The code of :func:`call_kernel`, of values of Numba's types ``kinds``."""
    given = []
    for value, t in zip(values, kinds, strict=True):
        kind = types.float64 if isinstance(t, types.Float) else types.int64
        given.append(context.cast(builder, value, t, kind))
    kind = ir.FunctionType(ir.VoidType(), [v.type for v in given])
    builder.call(builder.inttoptr(address, kind.as_pointer()), given)


@intrinsic
def call_kernel(typing, address, arguments):
    """Call a kernel that returns nothing, by its address; what is no integer goes as float64."""

    def generate(context, builder, sig, args):
        values = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        kernel_call(context, builder, args[0], values, arguments)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate
