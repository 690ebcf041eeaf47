"""Loads and stores of vectors, in code that is being generated. float16 and bfloat16 are computed in float32."""

from llvmlite import ir
from numba import types

from gpu_bn.kernels.cpu.vector import (
    BFLOAT16,
    BYTE,
    BYTES,
    DOUBLE,
    FLOAT16,
    FLOAT64,
    HALF,
    INT16,
    INT32,
    INT64,
    SINGLE,
    Elements,
    Lanes,
    Vector,
    call,
    constant,
    in_all,
    numbered,
    suffix,
)


def place(builder, pointer, index, size, t):
    """The address of element ``index``, as a pointer to ``t``."""
    at = builder.gep(pointer, [builder.mul(index, INT64(size))], source_etype=BYTE)
    return builder.bitcast(at, t.as_pointer())


def widen(builder, bits, code, t):
    """A stored vector as a vector of type ``t``."""
    word, single = (ir.VectorType(one, bits.type.count) for one in (INT32, SINGLE))
    if code == FLOAT16:
        bits = builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, bits.type.count)), single)
    if code == BFLOAT16:  # the upper half of a float32
        bits = builder.bitcast(builder.shl(builder.zext(bits, word), constant(word, 16)), single)
    return Lanes(builder, builder.fpext(bits, t) if t.element == DOUBLE and code != FLOAT64 else bits)


def narrow(lanes, code):
    """A vector as it is stored, rounded to nearest even; NaN stays NaN."""
    builder, value, count = lanes.builder, lanes.value, lanes.value.type.count
    word, short, single = (ir.VectorType(t, count) for t in (INT32, INT16, SINGLE))
    if code == FLOAT64:
        return value
    value = builder.fptrunc(value, single) if lanes.double else value
    if code == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(HALF, count)), short)
    if code == BFLOAT16:
        bits = builder.bitcast(value, word)
        upper = builder.lshr(bits, constant(word, 16))
        half = builder.add(constant(word, 0x7FFF), builder.and_(upper, constant(word, 1)))
        rounded = builder.lshr(builder.add(bits, half), constant(word, 16))
        quiet = builder.or_(upper, constant(word, 0x40))
        return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), short)
    return value


def load(builder, source, pointer, at, count, like):
    """A vector like another, of what lies from element ``at`` on.

    Where there is a ``count``, of at least 1, the lanes beyond are those of ``like``.
    """
    t = like.value.type
    stored = ir.VectorType(source.stored, t.count)
    if count is None:
        bits = builder.load(place(builder, pointer, at, source.size, stored), align=source.size)
        return widen(builder, bits, source.code, t)
    if source.size > 2:
        bits = masked_load(builder, place(builder, pointer, at, source.size, stored), count, source.size)
    else:  # in pairs, and the last by itself: what AVX2 can load by a mask has 32 bits
        pairs, last = ir.VectorType(INT32, t.count // 2), builder.sub(count, INT64(1))
        bits = masked_load(builder, place(builder, pointer, at, 2, pairs), builder.ashr(count, INT64(1)), 2)
        one = builder.load(place(builder, pointer, builder.add(at, last), 2, INT16), align=2)
        at_last = numbered(builder, "==", last, t.count)
        bits = builder.select(at_last, in_all(builder, one, t.count), builder.bitcast(bits, stored))
    there = numbered(builder, "<", count, t.count)
    return Lanes(builder, builder.select(there, widen(builder, bits, source.code, t).value, like.value))


def store(builder, target, pointer, at, count, lanes, past=False):
    """Write a vector, or its first ``count`` lanes, of which there is at least one.

    ``past``: without reading the cache lines first; the address is then a multiple of a vector's size.
    """
    bits = narrow(lanes, target.code)
    if count is None:
        align = min(bits.type.count * target.size, BYTES) if past else target.size
        written = builder.store(bits, place(builder, pointer, at, target.size, bits.type), align=align)
        if past:
            written.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return
    if target.size == 2:
        last = builder.sub(count, INT64(1))
        one = builder.extract_element(bits, last)
        builder.store(one, place(builder, pointer, builder.add(at, last), 2, INT16), align=2)
        bits = builder.bitcast(bits, ir.VectorType(INT32, bits.type.count // 2))
        count = builder.ashr(count, INT64(1))
    masked_store(builder, bits, place(builder, pointer, at, target.size, bits.type), count, target.size)


def masked_load(builder, at, count, size):
    t = at.type.pointee
    args = [at, INT32(size), numbered(builder, "<", count, t.count), constant(t, 0)]
    return call(builder, f"llvm.masked.load.{suffix(t)}.p0", t, args)


def masked_store(builder, value, at, count, size):
    args = [value, at, INT32(size), numbered(builder, "<", count, value.type.count)]
    call(builder, f"llvm.masked.store.{suffix(value.type)}.p0", ir.VoidType(), args)


# ------------------------------------------------------------------------------------------- arguments of intrinsics
class Tensor:
    """A kernel's tensor in code that is being generated."""

    def __init__(self, builder, t, pointer):
        self.builder, self.t, self.pointer = builder, t, pointer

    def __bool__(self):
        return isinstance(self.t, Elements)

    def load(self, at, count, like):
        return load(self.builder, self.t, self.pointer, at, count, like)

    def store(self, at, count, lanes, past=False):
        store(self.builder, self.t, self.pointer, at, count, lanes, past)


def unpacked(builder, types_of, args):
    """An intrinsic's arguments: vectors, tuples of them, tensors; numbers as they are."""
    result = []
    for t, arg in zip(types_of, args, strict=True):
        if isinstance(t, types.BaseTuple):
            result.append([Lanes(builder, builder.extract_value(arg, i)) for i in range(len(t))])
        elif isinstance(t, Vector):
            result.append(Lanes(builder, arg))
        elif isinstance(t, Elements):
            result.append(Tensor(builder, t, arg))
        else:
            result.append(None if isinstance(t, types.NoneType) else arg)
    return result


def integer(t):
    """The type of a count, which may be ``None``."""
    return t if isinstance(t, types.NoneType) else types.int64
