"""SIMD vectors: their Numba types, and the arithmetic that generates LLVM IR for them.

Kernels use vectors explicitly, so that nothing depends on LLVM's loop vectoriser, its cost model or its alias checks.
LLVM splits a vector that is longer than a register. A kernel is a loop; its body is one intrinsic, and ordinary Python
functions on :class:`Lanes` generate the code of that intrinsic.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from gpu_bn.kernels.cpu.compiler import stores_by_mask
from gpu_bn.spec import FLOAT_DTYPES

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(len(FLOAT_DTYPES))
"""Codes of the dtypes: their indices in :data:`gpu_bn.spec.FLOAT_DTYPES`."""
SIZES = (2, 2, 4, 8)
"""Bytes of an element, by the code of its dtype."""
BYTES = 64
"""Bytes of a vector in the precision of the computation: a cache line."""
DOUBLES = BYTES // 8
"""The number of float64 lanes in a vector."""
MASKS = stores_by_mask()
"""True if a masked store is as fast as any other. On other CPUs it is many times slower, or LLVM emits branches."""
WIDE = 4 if MASKS else 2
"""The number of vectors in a wide vector. A sum of a wide vector is several independent sums: one sum alone would wait
for each addition to finish."""

BIT, BYTE, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, SINGLE, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


# ------------------------------------------------------------------------------------------------------------- types
class Elements(types.Type):
    """The Numba type of a pointer to elements of a dtype."""

    def __init__(self, code):
        self.code, self.size = code, SIZES[code]
        self.storage = (INT16, INT16, SINGLE, DOUBLE)[code]
        super().__init__(f"Elements({FLOAT_DTYPES[code]})")

    def vector(self, vectors=1):
        """Return the vector type that the elements are computed in: float64 for float64, float32 for all others."""
        return Vector(self.code == FLOAT64, vectors * BYTES // (8 if self.code == FLOAT64 else 4))


class Vector(types.Type):
    """The Numba type of a vector of float64 if ``double``, else of float32."""

    def __init__(self, double, lanes):
        self.double, self.lanes = double, lanes
        self.element = DOUBLE if double else SINGLE
        self.ir = ir.VectorType(self.element, lanes)
        super().__init__(f"Vector({'float64' if double else 'float32'} x {lanes})")


register_model(Elements)(models.OpaqueModel)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, t):
        super().__init__(manager, t, t.ir)


# -------------------------------------------------------------------------------------------------------- arithmetic
class Lanes:
    """A vector in the code being generated. Its operators take vectors of the same type and numbers, and emit code."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    @property
    def double(self):
        return self.value.type.element == DOUBLE

    def broadcast(self, other):
        """Return an operand as a vector of this type: a vector unchanged, a number in all lanes."""
        if isinstance(other, Lanes):
            return other
        if isinstance(other, (int, float)):
            return Lanes(self.builder, constant(self.value.type, float(other)))
        return splat(self.builder, other, self.value.type)

    def binary(self, name, other, swapped=False):
        pair = (self.broadcast(other), self) if swapped else (self, self.broadcast(other))
        return Lanes(self.builder, getattr(self.builder, name)(*[one.value for one in pair]))

    def compare(self, relation, other):
        return LaneMask(self.builder, self.builder.fcmp_ordered(relation, self.value, self.broadcast(other).value))

    def intrinsic(self, name, *others):
        """Return the result of an LLVM intrinsic on this vector and others."""
        args, t = [self.value, *[self.broadcast(other).value for other in others]], self.value.type
        return Lanes(self.builder, call_intrinsic(self.builder, f"llvm.{name}.{type_suffix(t)}", t, args))

    def __neg__(self):
        return Lanes(self.builder, self.builder.fneg(self.value))

    def __abs__(self):
        return self.intrinsic("fabs")


for _name, _instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    setattr(Lanes, f"__{_name}__", lambda a, b, i=_instruction: a.binary(i, b))
    setattr(Lanes, f"__r{_name}__", lambda a, b, i=_instruction: a.binary(i, b, swapped=True))
for _name, _relation in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    setattr(Lanes, f"__{_name}__", lambda a, b, r=_relation: a.compare(r, b))


class LaneMask:
    """One bit for each lane of a vector."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def __or__(self, other):
        return LaneMask(self.builder, self.builder.or_(self.value, other.value))

    def __and__(self, other):
        return LaneMask(self.builder, self.builder.and_(self.value, other.value))


def where(mask, a, b):
    """Return ``a`` in the lanes whose mask bit is 1, ``b`` in the others; at least one of the two is a vector."""
    like = (a if isinstance(a, Lanes) else b).broadcast
    return Lanes(mask.builder, mask.builder.select(mask.value, like(a).value, like(b).value))


def fma(a, b, c):
    """Return a * b + c, rounded once if the CPU has an instruction for that, else twice."""
    return a.intrinsic("fmuladd", b, c)


def power_of_two(shifted):
    """Return 2**n for ``shifted`` = n + bias + 1.5 * 2**m, with the bias of exponents and the significand's m bits."""
    builder, t = shifted.builder, shifted.value.type
    integers, shift = (ir.VectorType(INT64, t.count), 52) if shifted.double else (ir.VectorType(INT32, t.count), 23)
    power = builder.shl(builder.bitcast(shifted.value, integers), constant(integers, shift))
    return Lanes(builder, builder.bitcast(power, t))


# --------------------------------------------------------------------------------------------------------- LLVM code
def constant(t, value):
    """Return a constant vector with the same value in all lanes."""
    return ir.Constant(t, [value] * t.count)


def splat(builder, number, t):
    """Return a vector of type ``t`` with a number in all lanes; float64 is rounded to float32 if ``t`` is float32."""
    if number.type == DOUBLE and t.element == SINGLE:
        number = builder.fptrunc(number, SINGLE)
    return Lanes(builder, fill_lanes(builder, number, t.count))


def fill_lanes(builder, value, count):
    """Return an LLVM vector with a value in all of its ``count`` lanes."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(INT32, count), 0)) if count > 1 else one


def extract_part(builder, value, at, count):
    """Return part ``at`` of an LLVM vector: the ``count`` lanes from ``at * count`` on."""
    return builder.shuffle_vector(value, value, lane_range(at * count, count))


def concatenate(builder, parts):
    """Return LLVM vectors, whose number is a power of two, as one long vector."""
    while len(parts) > 1:
        every = lane_range(0, 2 * parts[0].type.count)
        parts = [builder.shuffle_vector(a, b, every) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def lane_range(first, count):
    """Return the constant vector first, first + 1, ... of ``count`` int32 numbers."""
    return ir.Constant(ir.VectorType(INT32, count), list(range(first, first + count)))


def call_intrinsic(builder, name, result, args, **options):
    """Call an LLVM intrinsic by its full name, such as ``llvm.fabs.v16f32``."""
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args, **options)


def type_suffix(vector):
    """Return the name of a vector type in the names of LLVM intrinsics."""
    kind = {SINGLE: "f32", DOUBLE: "f64", INT32: "i32"}[vector.element]
    return f"v{vector.count}{kind}"


def lane_mask(builder, relation, number, count):
    """Return the LLVM mask of the lanes whose index is in a relation, such as ``"<"``, to a number."""
    return builder.icmp_signed(relation, lane_range(0, count), fill_lanes(builder, builder.trunc(number, INT32), count))


def reduce_add(lanes):
    """Return the sum of the lanes in float64. Halves are added in the vector's own precision until 8 lanes are left."""
    builder, value, count = lanes.builder, lanes.value, lanes.value.type.count
    while count > DOUBLES:
        count //= 2
        value = builder.fadd(*[extract_part(builder, value, half, count) for half in (0, 1)])
    wide = ir.VectorType(DOUBLE, count)
    value = value if lanes.double else builder.fpext(value, wide)
    name = f"llvm.vector.reduce.fadd.{type_suffix(wide)}"
    return call_intrinsic(builder, name, DOUBLE, [DOUBLE(-0.0), value], fastmath=("reassoc",))
