"""Intrinsics that kernels use around vectors: pointers, single numbers, sums of columns, counters, calls of kernels."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu import memory
from gpu_bn.kernels.cpu.activations import CHEAP, NAMES
from gpu_bn.kernels.cpu.compiler import inlined
from gpu_bn.kernels.cpu.memory import Tensor, as_pointer, count_type, wrap
from gpu_bn.kernels.cpu.vector import (
    BIT,
    BYTE,
    DOUBLE,
    DOUBLES,
    INT32,
    INT64,
    SINGLE,
    WIDE,
    Elements,
    Lanes,
    Vector,
    fill_lanes,
    reduce_add,
    splat,
)


@intrinsic(prefer_literal=True)
def elements(typing, address, code):
    """Return a pointer to elements of the dtype ``code`` at an address; ``None`` for a negative code: no tensor."""
    if code.literal_value < 0:
        return types.none(types.int64, code), lambda context, builder, sig, args: context.get_dummy_value()
    return (
        Elements(code.literal_value)(types.int64, code),
        lambda context, builder, sig, args: builder.inttoptr(args[0], BYTE.as_pointer()),
    )


@intrinsic
def advance(typing, tensors, offsets):
    """Return the pointers of a tuple, each moved by its own offset in elements; ``None`` stays ``None``."""

    def generate(context, builder, sig, args):
        result = args[0]
        for i, t in enumerate(tensors):
            if isinstance(t, Elements):
                pointer, offset = (builder.extract_value(one, i) for one in args)
                result = builder.insert_value(result, memory.element_pointer(builder, pointer, offset, t.size, BYTE), i)
        return result

    return tensors(tensors, types.UniTuple(types.int64, len(tensors))), generate


@intrinsic
def offsets(typing, index, steps, extra):
    """Return index * step + extra for each of a tuple of steps."""

    def generate(context, builder, sig, args):
        each = [
            builder.add(builder.mul(args[0], builder.extract_value(args[1], i)), args[2]) for i in range(len(steps))
        ]
        return context.make_tuple(builder, sig.return_type, each)

    integers = types.UniTuple(types.int64, len(steps))
    return integers(types.int64, integers, types.int64), generate


def _splat_all(vectors):
    @intrinsic
    def function(typing, source, numbers):
        vector = source.vector(vectors)
        result = types.UniTuple(vector, len(numbers))

        def generate(context, builder, sig, args):
            each = [builder.extract_value(args[1], i) for i in range(len(numbers))]
            return context.make_tuple(builder, result, [splat(builder, one, vector.ir).value for one in each])

        return result(source, types.UniTuple(types.float64, len(numbers))), generate

    return function


splat_all, splat_all_wide = _splat_all(1), _splat_all(WIDE)
"""Return a tuple of vectors, or of wide vectors, each with one of a tuple of float64 numbers in all lanes."""


@intrinsic(prefer_literal=True)
def output_zeros(typing, source, activation):
    """Return two zero vectors of the length that is written at a time: wide if the activation needs few registers."""
    vectors = WIDE if NAMES[activation.literal_value] in CHEAP else 1
    two = types.UniTuple(source.vector(vectors), 2)
    return two(source, activation), lambda context, builder, sig, args: ir.Constant(context.get_value_type(two), None)


@intrinsic
def zeros_double(typing):
    """Return four zero vectors of float64: two sums, and their rounding errors."""
    four = types.UniTuple(Vector(True, DOUBLES), 4)
    return four(), lambda context, builder, sig, args: ir.Constant(context.get_value_type(four), None)


@intrinsic
def lane_count(typing, vectors):
    """Return the number of lanes of the vectors in a tuple."""
    return types.int64(vectors), lambda context, builder, sig, args: INT64(vectors[0].lanes)


@intrinsic
def lane_sum(typing, vector):
    """Return the sum of the lanes in float64."""
    return types.float64(vector), lambda context, builder, sig, args: reduce_add(Lanes(builder, args[0]))


@intrinsic
def get(typing, source, at):
    """Load one element as float64."""

    def generate(context, builder, sig, args):
        zero = Lanes(builder, ir.Constant(ir.VectorType(DOUBLE, 1), [0.0]))
        return builder.extract_element(memory.load(builder, source, *args, None, zero).value, INT32(0))

    return types.float64(source, types.int64), generate


@intrinsic
def put(typing, target, at, value):
    """Store a float64 number as one element."""

    def generate(context, builder, sig, args):
        memory.store(builder, target, *args[:2], None, Lanes(builder, fill_lanes(builder, args[2], 1)))
        return context.get_dummy_value()

    return types.void(target, types.int64, types.float64), generate


@intrinsic
def load_double(typing, address, at):
    """Load number ``at`` of the float64 numbers at an address."""

    def generate(context, builder, sig, args):
        return builder.load(memory.element_pointer(builder, as_pointer(builder, args[0]), args[1], 8, DOUBLE))

    return types.float64(types.int64, types.int64), generate


@intrinsic
def store_double(typing, address, at, value):
    """Store number ``at`` of the float64 numbers at an address."""

    def generate(context, builder, sig, args):
        builder.store(args[2], memory.element_pointer(builder, as_pointer(builder, args[0]), args[1], 8, DOUBLE))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), generate


@intrinsic
def load_parameter(typing, tagged, at):
    """Load number ``at`` as float64 from a tagged address: that of float32 numbers, or 1 more than of float64 ones."""

    def generate(context, builder, sig, args):
        start, loaded = as_pointer(builder, builder.and_(args[0], INT64(-2))), cgutils.alloca_once(builder, DOUBLE)
        with builder.if_else(builder.trunc(args[0], BIT)) as (wide, narrow):
            with wide:
                builder.store(builder.load(memory.element_pointer(builder, start, args[1], 8, DOUBLE)), loaded)
            with narrow:
                single = builder.load(memory.element_pointer(builder, start, args[1], 4, SINGLE))
                builder.store(builder.fpext(single, DOUBLE), loaded)
        return builder.load(loaded)

    return types.float64(types.int64, types.int64), generate


@intrinsic
def round_to(typing, source, value):
    """Return a float64 number, rounded to the dtype of the elements."""

    def generate(context, builder, sig, args):
        bits = memory.narrow(Lanes(builder, fill_lanes(builder, args[1], 1)), source.code)
        rounded = memory.widen(builder, bits, source.code, ir.VectorType(DOUBLE, 1))
        return builder.extract_element(rounded.value, INT32(0))

    return types.float64(source, types.float64), generate


@intrinsic
def add_double(typing, sums, x, at, count, shift):
    """Add x - shift and (x - shift)**2 of one vector, or its first ``count`` elements, to two float64 sums.

    ``shift`` is a number, or a pointer to a float64 number for each element. The third and the fourth sum collect the
    rounding errors of the first two, which do not cancel: many equal terms are all rounded the same way.
    """

    def generate(context, builder, sig, args):
        totals, tensor, at_, count_, k = wrap(builder, sig.args, args)
        s, q, error_s, error_q = totals
        k = k.load(at_, count_, s.broadcast(0.0)) if isinstance(k, Tensor) else splat(builder, k, s.value.type)
        d = tensor.load(at_, count_, k) - k
        (s, error_s), (q, error_q) = add_exactly(s, d, error_s), add_exactly(q, d * d, error_q)
        return context.make_tuple(builder, sums, [one.value for one in (s, q, error_s, error_q)])

    return sums(sums, x, types.int64, types.int64, shift), generate


def add_exactly(total, term, error):
    """Return total + term, and ``error`` plus its rounding error (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    after = total + term
    added = after - total
    return after, error + ((total - (after - added)) + (term - added))


two_sum = inlined(add_exactly)
"""The function :func:`add_exactly` for numbers in kernels."""


@intrinsic
def load_vectors(typing, tensors, at, vectors):
    """Load a vector from element ``at`` on of each of a tuple of tensors, of the type of the given ``vectors``."""
    loaded = types.UniTuple(vectors[0], len(tensors))

    def generate(context, builder, sig, args):
        zero = Lanes(builder, builder.extract_value(args[2], 0))
        each = [memory.load(builder, t, builder.extract_value(args[0], i), args[1], None, zero).value
                for i, t in enumerate(tensors)]  # fmt: skip
        return context.make_tuple(builder, loaded, each)

    return loaded(tensors, types.int64, vectors), generate


@intrinsic
def accumulate(typing, sums, at, count, vector, error_offset):
    """Add a vector, or its first ``count`` lanes, to the float64 sums from element ``at`` on.

    For a float64 vector the rounding errors are added to the numbers that lie ``error_offset`` elements after the sums,
    unless that is ``None``. For a float32 vector they are negligible beside the error that it has already.
    """

    def generate(context, builder, sig, args):
        target, at_, count_, lanes, offset = wrap(builder, sig.args, args)
        t = ir.VectorType(DOUBLE, vector.lanes)
        zero = Lanes(builder, ir.Constant(t, None))
        added = lanes if vector.double else Lanes(builder, builder.fpext(lanes.value, t))
        before = target.load(at_, count_, zero)
        if vector.double and offset is not None:
            error_at = builder.add(at_, offset)
            after, error = add_exactly(before, added, target.load(error_at, count_, zero))
            target.store(error_at, count_, error)
        else:
            after = before + added
        target.store(at_, count_, after)
        return context.get_dummy_value()

    return types.void(sums, types.int64, count_type(count), vector, count_type(error_offset)), generate


@intrinsic
def unaligned_count(typing, target, at, vectors):
    """Return the number of elements from ``at`` to the next aligned vector in memory; 0 if there is no target."""

    def generate(context, builder, sig, args):
        if isinstance(target, types.NoneType):
            return INT64(0)
        left = builder.neg(builder.ptrtoint(memory.element_pointer(builder, *args[:2], target.size, BYTE), INT64))
        return builder.udiv(builder.and_(left, INT64(vectors[0].lanes * target.size - 1)), INT64(target.size))

    return types.int64(target, types.int64, vectors), generate


# --------------------------------------------------------------------------------------------------- kernels, counters
@intrinsic
def claim(typing, counter):
    """Increment the int64 counter at an address atomically, and return its old value, which no other thread gets."""

    def generate(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], INT64.as_pointer()), INT64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def clear(typing, address, numbers):
    """Set the first ``numbers`` float64 or int64 numbers at an address to 0."""

    def generate(context, builder, sig, args):
        cgutils.memset(builder, as_pointer(builder, args[0]), builder.mul(args[1], INT64(8)), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy(typing, target, source, nbytes):
    """Copy bytes from one address to another. The two ranges do not overlap."""

    def generate(context, builder, sig, args):
        cgutils.raw_memcpy(builder, as_pointer(builder, args[0]), as_pointer(builder, args[1]), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def emit_kernel_call(context, builder, address, values, value_types):
    """Generate the code of :func:`call_kernel` for LLVM values and their Numba types."""
    arguments = []
    for value, t in zip(values, value_types, strict=True):
        arguments.append(context.cast(builder, value, t, types.float64 if isinstance(t, types.Float) else types.int64))
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.inttoptr(address, signature.as_pointer()), arguments)


@intrinsic
def call_kernel(typing, address, arguments):
    """Call a kernel that returns nothing, by its address; floats are passed as float64, other numbers as int64."""

    def generate(context, builder, sig, args):
        values = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        emit_kernel_call(context, builder, args[0], values, arguments)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate
