"""Execute the instructions that compute, compare and move numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from . import formats
from .formats import RAW, VALUE, is_float
from .instructions import Runner, builds, elementwise, unsupported
from .parser import TYPE_BYTES, Instruction, Vector
from .threads import Array, Mask, bits_reader, reader, writer

if TYPE_CHECKING:
    from .machine import Launch

Function = Callable[..., Array]


# -------------------------------------------------------------------- floating point


def packed(function: Function, half: str) -> Function:
    """Return a function on packed pairs that applies a function to both halves."""
    whole, part = RAW[2 * TYPE_BYTES[half]], RAW[TYPE_BYTES[half]]
    shift = whole(8 * TYPE_BYTES[half])

    def on_pairs(*pairs: Array) -> Array:
        low = [formats.decode(pair.astype(part), half) for pair in pairs]
        high = [formats.decode((pair >> shift).astype(part), half) for pair in pairs]
        low_bits, high_bits = (formats.encode(function(*values), half).astype(whole) for values in (low, high))
        return low_bits | (high_bits << shift)

    return on_pairs


def _float(ins: Instruction, function: Function) -> Runner:
    """Build a float operation with its .ftz, .sat and .relu; packed pairs are computed half by half.

    Operations of mixed types, such as ``add.f32.bf16``, compute in f32, and their last source is f32.
    """
    mixed = ins.type in ("f16", "bf16") and "f32" in ins.modifiers
    if mixed and ins.opcode not in ("add", "sub", "fma"):
        raise unsupported(ins)
    of = "f32" if mixed else ins.type
    type_ = of.removesuffix("x2")
    if mode := next((m for m in ins.modifiers if m in ("rz", "rm", "rp")), None):
        if of != "f32" or ins.opcode not in _AS_FMA:
            raise unsupported(ins)
        as_fma = _AS_FMA[ins.opcode]

        def function(*values: Array) -> Array:
            a, b, c = as_fma(*values)
            return formats.round_directed(formats.fma(a, b, c, "odd"), "f32", mode)

    limit = next((limit for name, limit in _LIMITS.items() if name in ins.modifiers), None)
    flush = "ftz" in ins.modifiers

    def full(*values: Array) -> Array:
        result = function(*(formats.flush_subnormals(v, type_) for v in values) if flush else values)
        result = limit(result) if limit else result
        return formats.flush_subnormals(result, type_) if flush else result

    whole = full if flush or limit else function
    lifted = packed(whole, type_) if of.endswith("x2") else whole
    return elementwise(ins, lifted, [*[ins.type] * (len(ins.operands) - 2), of], of)


# For directed rounding: the operands of an fma that computes the same as each operation.
_AS_FMA: dict[str, Callable[..., tuple[Array, ...]]] = {
    "add": lambda a, b: (a, np.float32(1), b), "sub": lambda a, b: (a, np.float32(1), -b),
    "mul": lambda a, b: (a, b, np.float32(-0.0)), "fma": lambda a, b, c: (a, b, c),
}  # fmt: skip
_LIMITS = {"sat": formats.saturate, "relu": formats.relu}
_FLOAT: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "div": np.divide, "min": formats.minimum, "max": formats.maximum,
}  # fmt: skip


@builds(" ".join(formats.FUNCTIONS), "rn approx ftz")
def _function(ins: Instruction) -> Runner:
    function = formats.FUNCTIONS[ins.opcode]
    if ins.type == "f64" and {"approx", "ftz"} <= set(ins.modifiers):  # a first estimate, from the upper 32 bits only
        return _float(ins, lambda x: formats.coarse(function(x), 20))
    return _float(ins, function)


# -------------------------------------------------------------------- integers


def _divide(a: Array, b: Array) -> Array:
    """Divide and truncate; division by zero yields all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, b.dtype.type(0) - b.dtype.type(1), quotient)


_INTEGER: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "div": _divide, "rem": lambda a, b: a - _divide(a, b) * b,
}  # fmt: skip


@builds("add sub min max div rem", "rn rz rm rp approx full ftz sat relu NaN")
def _binary(ins: Instruction) -> Runner:
    if is_float(ins.type):
        function = _FLOAT[ins.opcode]
        two = formats.nan_wins(function) if "NaN" in ins.modifiers else function
        return _float(ins, two if len(ins.operands) == 3 else lambda *values: reduce(two, values))
    if ins.modifiers != (ins.type,):
        raise unsupported(ins)
    return elementwise(ins, _INTEGER[ins.opcode], [ins.type] * 2)


@builds("mul mad fma", "rn rz rm rp ftz sat relu lo hi wide")
def _multiply(ins: Instruction) -> Runner:
    type_, part, add = ins.type, ins.modifiers[0], ins.opcode != "mul"
    if is_float(type_):
        of = "f32" if "f32" in ins.modifiers else type_.removesuffix("x2")
        return _float(ins, (lambda a, b, c: formats.fma(a, b, c, of)) if add else np.multiply)
    if part not in ("lo", "hi", "wide") or "sat" in ins.modifiers:
        raise unsupported(ins)
    wide, bits = f"{type_[0]}{2 * int(type_[1:])}", int(type_[1:])
    products: dict[str, Function] = {
        "lo": np.multiply,
        "wide": lambda a, b: a.astype(VALUE[wide]) * b.astype(VALUE[wide]),
        "hi": _multiply_high_64 if bits == 64 else lambda a, b: (products["wide"](a, b) >> bits).astype(VALUE[type_]),
    }
    product, to = products[part], wide if part == "wide" else type_
    if not add:
        return elementwise(ins, product, [type_] * 2, to)
    return elementwise(ins, lambda a, b, c: product(a, b) + c, [type_, type_, to], to)


def _multiply_high_64(a: Array, b: Array) -> Array:
    """Return the upper 64 bits of a 128-bit product, from four 32-bit products."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low = (x & mask) * (y & mask)
    middle = (x >> half) * (y & mask) + (low >> half)
    other = (x & mask) * (y >> half) + (middle & mask)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


# -------------------------------------------------------------------- signs and classes


@builds("neg abs copysign", "ftz")
def _sign(ins: Instruction) -> Runner:
    if not is_float(ins.type):
        return elementwise(ins, {"neg": np.negative, "abs": np.abs}[ins.opcode], [ins.type])
    # Only the sign bit changes, also for NaN and zero.
    size = TYPE_BYTES[ins.type]
    signs = 0x80008000 if ins.type.endswith("x2") else 1 << (8 * size - 1)
    sign, rest = RAW[size](signs), RAW[size](~signs & (256**size - 1))
    functions: dict[str, Function] = {
        "neg": lambda a: a ^ sign, "abs": lambda a: a & rest, "copysign": lambda a, b: (a & sign) | (b & rest),
    }  # fmt: skip
    function = functions[ins.opcode]
    if "ftz" in ins.modifiers:
        keep = lambda a: formats.flush_subnormals(a.view(VALUE[ins.type]), ins.type).view(RAW[size])  # noqa: E731
        return elementwise(ins, lambda a: function(keep(a)), [f"b{8 * size}"], f"b{8 * size}")
    return elementwise(ins, function, [f"b{8 * size}"] * (len(ins.operands) - 1), f"b{8 * size}")


@builds("testp", "finite infinite number notanumber normal subnormal")
def _test_property(ins: Instruction) -> Runner:
    subnormal = lambda a: (a != 0) & (formats.flush_subnormals(a, ins.type) == 0)  # noqa: E731
    tests: dict[str, Function] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "subnormal": subnormal, "normal": lambda a: np.isfinite(a) & (a != 0) & ~subnormal(a),
    }  # fmt: skip
    return elementwise(ins, tests[ins.modifiers[0]], [ins.type], "pred")


# -------------------------------------------------------------------- comparison, selection, moves

_COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "nan")


def _comparison(relation: str, type_: str, flush: bool) -> Function:
    if not is_float(type_):
        return _COMPARE[relation]
    unordered = relation in _UNORDERED  # the result if an operand is NaN
    compare = _COMPARE.get(relation.removesuffix("u"), lambda a, b: np.full(np.broadcast(a, b).shape, not unordered))

    def run(a: Array, b: Array) -> Array:
        a, b = (formats.flush_subnormals(v, type_) for v in (a, b)) if flush else (a, b)
        return np.where(np.isnan(a) | np.isnan(b), unordered, compare(a, b))

    return run


@builds("setp set", " ".join([*_COMPARE, *_UNORDERED, *_COMBINE, "num ftz"]))
def _compare(ins: Instruction) -> Runner:
    type_ = ins.type
    compare = _comparison(ins.modifiers[0], type_, "ftz" in ins.modifiers)
    combine = next((_COMBINE[m] for m in ins.modifiers[1:] if m in _COMBINE), None)
    a, b = (reader(ins, operand, type_) for operand in ins.operands[1:3])
    third = reader(ins, ins.operands[3], "pred") if combine else None
    to = "pred" if ins.opcode == "setp" else next(m for m in ins.modifiers if m in TYPE_BYTES)
    if "x2" in type_ + to:
        if to != type_ or combine or "ftz" in ins.modifiers:
            raise unsupported(ins)
        half = type_.removesuffix("x2")
        both = _comparison(ins.modifiers[0], half, False)
        return elementwise(
            ins, packed(lambda a, b: np.where(both(a, b), np.float32(1), np.float32(0)), half), [type_] * 2
        )
    first = ins.operands[0]
    writes = [writer(ins, d, to) for d in (first.items if isinstance(first, Vector) else (first,))]
    true = 1 if to == "pred" or is_float(to) else -1

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        outcome = compare(a(threads), b(threads))
        for write, result in zip(writes, (outcome, ~outcome), strict=False):
            if combine and third:
                result = combine(result, third(threads))
            write(threads, result if to == "pred" else np.where(result, true, 0), active)

    return run


@builds("selp slct", "ftz")
def _select(ins: Instruction) -> Runner:
    raw = f"b{8 * TYPE_BYTES[ins.modifiers[0]]}"
    if ins.opcode == "selp":
        return elementwise(ins, lambda a, b, p: np.where(p, a, b), [raw, raw, "pred"], raw)
    return elementwise(ins, lambda a, b, c: np.where(c >= 0, a, b), [raw, raw, ins.type], raw)


@builds("mov")
def _move(ins: Instruction) -> Runner:
    destination, source = ins.operands
    size = TYPE_BYTES[ins.type]
    raw = "pred" if ins.type == "pred" else f"b{8 * size}"
    whole = RAW[size]
    if isinstance(source, Vector):
        part = size // len(source.items)
        reads = [bits_reader(ins, item, part) for item in source.items]
        write = writer(ins, destination, raw)

        def pack(launch: Launch, active: Mask) -> None:
            parts = (read(launch.threads).astype(whole) << whole(8 * part * i) for i, read in enumerate(reads))
            write(launch.threads, reduce(np.bitwise_or, parts), active)

        return pack
    if isinstance(destination, Vector):
        part = size // len(destination.items)
        read = bits_reader(ins, source, size)
        writes = [writer(ins, item, f"b{8 * part}") for item in destination.items]

        def unpack(launch: Launch, active: Mask) -> None:
            value = read(launch.threads)
            for i, write in enumerate(writes):
                write(launch.threads, (value >> whole(8 * part * i)).astype(RAW[part]), active)

        return unpack
    return elementwise(ins, lambda a: a, [raw], raw)
