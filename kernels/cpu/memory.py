"""Generate loads and stores of vectors. float16 and bfloat16 elements are computed in float32."""

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
    call_intrinsic,
    constant,
    fill_lanes,
    lane_mask,
    type_suffix,
)


def as_pointer(builder, address):
    return builder.inttoptr(address, BYTE.as_pointer())


def element_pointer(builder, pointer, index, size, t):
    """Return the address of element ``index``, which has ``size`` bytes, as a pointer to ``t``."""
    at = builder.gep(pointer, [builder.mul(index, INT64(size))], source_etype=BYTE)
    return builder.bitcast(at, t.as_pointer())


def widen(builder, bits, code, t):
    """Return a vector of type ``t`` from the bits of a stored one."""
    word, single = (ir.VectorType(one, bits.type.count) for one in (INT32, SINGLE))
    if code == FLOAT16:
        bits = builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, bits.type.count)), single)
    if code == BFLOAT16:  # the upper half of a float32
        bits = builder.bitcast(builder.shl(builder.zext(bits, word), constant(word, 16)), single)
    return Lanes(builder, builder.fpext(bits, t) if t.element == DOUBLE and code != FLOAT64 else bits)


def narrow(lanes, code):
    """Return the bits to store of a vector, rounded to nearest even; NaN stays NaN."""
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


def load(builder, source, pointer, at, count, fill):
    """Load a vector from element ``at`` on, of the type of the vector ``fill``.

    If ``count``, at least 1, is not ``None``, only that many elements are read, and the other lanes are from ``fill``.
    """
    t = fill.value.type
    storage = ir.VectorType(source.storage, t.count)
    if count is None:
        bits = builder.load(element_pointer(builder, pointer, at, source.size, storage), align=source.size)
        return widen(builder, bits, source.code, t)
    if source.size > 2:
        bits = masked_load(builder, element_pointer(builder, pointer, at, source.size, storage), count, source.size)
    else:  # in pairs, and the last element alone: a masked load of AVX2 has lanes of 32 bits
        pairs, last = ir.VectorType(INT32, t.count // 2), builder.sub(count, INT64(1))
        bits = masked_load(builder, element_pointer(builder, pointer, at, 2, pairs), builder.ashr(count, INT64(1)), 2)
        one = builder.load(element_pointer(builder, pointer, builder.add(at, last), 2, INT16), align=2)
        at_last = lane_mask(builder, "==", last, t.count)
        bits = builder.select(at_last, fill_lanes(builder, one, t.count), builder.bitcast(bits, storage))
    in_range = lane_mask(builder, "<", count, t.count)
    return Lanes(builder, builder.select(in_range, widen(builder, bits, source.code, t).value, fill.value))


def store(builder, target, pointer, at, count, lanes, nontemporal=False):
    """Store a vector, or its first ``count`` lanes, at least 1, if ``count`` is not ``None``.

    ``nontemporal``: store past the caches, which otherwise read the cache lines first. The address must then be a
    multiple of the size of a vector.
    """
    bits = narrow(lanes, target.code)
    if count is None:
        align = min(bits.type.count * target.size, BYTES) if nontemporal else target.size
        written = builder.store(bits, element_pointer(builder, pointer, at, target.size, bits.type), align=align)
        if nontemporal:
            written.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return
    if target.size == 2:
        last = builder.sub(count, INT64(1))
        one = builder.extract_element(bits, last)
        builder.store(one, element_pointer(builder, pointer, builder.add(at, last), 2, INT16), align=2)
        bits = builder.bitcast(bits, ir.VectorType(INT32, bits.type.count // 2))
        count = builder.ashr(count, INT64(1))
    place = element_pointer(builder, pointer, at, target.size, bits.type)
    args = [bits, place, INT32(target.size), lane_mask(builder, "<", count, bits.type.count)]
    call_intrinsic(builder, f"llvm.masked.store.{type_suffix(bits.type)}.p0", ir.VoidType(), args)


def masked_load(builder, at, count, size):
    t = at.type.pointee
    args = [at, INT32(size), lane_mask(builder, "<", count, t.count), constant(t, 0)]
    return call_intrinsic(builder, f"llvm.masked.load.{type_suffix(t)}.p0", t, args)


# ------------------------------------------------------------------------------------------- arguments of intrinsics
class Tensor:
    """A tensor argument of an intrinsic: a pointer with the Numba type ``t``."""

    def __init__(self, builder, t, pointer):
        self.builder, self.t, self.pointer = builder, t, pointer

    def advance(self, offset):
        """Return the tensor from element ``offset`` on."""
        return Tensor(self.builder, self.t, element_pointer(self.builder, self.pointer, offset, self.t.size, BYTE))

    def load(self, at, count, fill):
        return load(self.builder, self.t, self.pointer, at, count, fill)

    def store(self, at, count, lanes, nontemporal=False):
        store(self.builder, self.t, self.pointer, at, count, lanes, nontemporal)


def wrap(builder, types_of, args):
    """Return an intrinsic's arguments: vectors as :class:`Lanes`, pointers as :class:`Tensor`, tuples as lists."""
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


def count_type(t):
    """Return the Numba type of a number that may be ``None``."""
    return t if isinstance(t, types.NoneType) else types.int64
