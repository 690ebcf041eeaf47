"""Instructions that compute: registers in, registers out, every lane for itself.

`BUILDERS` maps an opcode to a function that turns an instruction into its runner. Everything that depends on
the text alone (types, rounding, operands) is decided once, when the program is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import formats
from .errors import EmulatorError
from .formats import FLOATS, RAW
from .parser import TYPE_BYTES, Instruction, Vector
from .threads import Array, Mask, Threads, bits_reader, reader, writer

Runner = Callable[[Threads, Mask], None]
BUILDERS: dict[str, Callable[[Instruction], Runner]] = {}


def builds(*opcodes: str) -> Callable[[Callable], Callable]:
    def register(function: Callable[[Instruction], Runner]) -> Callable[[Instruction], Runner]:
        BUILDERS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def unsupported(ins: Instruction, what: str = "instruction") -> EmulatorError:
    return EmulatorError("unknown instruction", f"{what} is not modelled: {ins.where()}")


def elementwise(ins: Instruction, function: Callable[..., Array], types: list[str], to: str | None = None) -> Runner:
    """dest = function(sources), source i read as types[i]; packed pairs are computed half by half."""
    to = to or ins.type
    sources = [reader(ins, operand, type_) for operand, type_ in zip(ins.operands[1:], types, strict=True)]
    write = writer(ins, ins.operands[0], to)

    def run(threads: Threads, active: Mask) -> None:
        write(threads, function(*[source(threads) for source in sources]), active)

    return run


def packed(function: Callable[..., Array], half: str) -> Callable[..., Array]:
    """Lift a function on f16 or bf16 values to packed pairs."""

    def on_pairs(*pairs: Array) -> Array:
        low = [formats.decode((pair & np.uint32(0xFFFF)).astype(np.uint16), half) for pair in pairs]
        high = [formats.decode((pair >> np.uint32(16)).astype(np.uint16), half) for pair in pairs]
        low_bits, high_bits = (formats.encode(function(*part), half).astype(np.uint32) for part in (low, high))
        return low_bits | (high_bits << np.uint32(16))

    return on_pairs


def _float_rules(ins: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """Apply .ftz, .sat and .relu around a float operation; refuse directed rounding."""
    if {"rz", "rm", "rp"} & set(ins.modifiers):
        raise unsupported(ins, "directed rounding of arithmetic")
    type_ = ins.type.removesuffix("x2")
    plain = function
    if "ftz" in ins.modifiers:

        def function(*values: Array) -> Array:
            return formats.flush_subnormals(plain(*(formats.flush_subnormals(v, type_) for v in values)), type_)

    unclamped = function
    if "sat" in ins.modifiers:
        # fmax first: saturation turns NaN into +0.
        def function(*values: Array) -> Array:
            return np.fmin(np.fmax(unclamped(*values), np.float32(0)), np.float32(1))
    elif "relu" in ins.modifiers:

        def function(*values: Array) -> Array:
            return formats.maximum(unclamped(*values), np.float32(0))

    return packed(function, type_) if ins.type.endswith("x2") else function


def _float(ins: Instruction, function: Callable[..., Array]) -> Runner:
    return elementwise(ins, _float_rules(ins, function), [ins.type] * (len(ins.operands) - 1))


def is_float(type_: str) -> bool:
    return type_.removesuffix("x2") in FLOATS


@builds("add", "sub", "min", "max", "mul", "div", "rem")
def _binary(ins: Instruction) -> Runner:
    if "cc" in ins.modifiers:
        raise unsupported(ins, "carry")
    if is_float(ins.type):
        nan = "NaN" in ins.modifiers
        functions = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
            "min": np.minimum if nan else formats.minimum, "max": np.maximum if nan else formats.maximum,
        }  # fmt: skip
        return _float(ins, functions[ins.opcode])
    if ins.opcode == "mul":
        return elementwise(ins, _integer_multiply(ins), [ins.type] * 2, _product_type(ins))
    functions = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "div": _integer_divide, "rem": lambda a, b: a - _integer_divide(a, b) * b,
    }  # fmt: skip
    function = functions[ins.opcode]
    if "sat" in ins.modifiers:
        raise unsupported(ins, "integer saturation")
    return elementwise(ins, function, [ins.type] * 2)


def _integer_divide(a: Array, b: Array) -> Array:
    """Truncating division; division by zero yields all ones, as the hardware does for unsigned integers."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~b, quotient)


def _product_type(ins: Instruction) -> str:
    return f"{ins.type[0]}{2 * int(ins.type[1:])}" if "wide" in ins.modifiers else ins.type


def _integer_multiply(ins: Instruction) -> Callable[[Array, Array], Array]:
    type_, bits = ins.type, int(ins.type[1:])
    narrow = formats.VALUE[type_]
    if "wide" in ins.modifiers:
        wide = formats.VALUE[_product_type(ins)]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if "hi" not in ins.modifiers:
        return np.multiply
    if bits == 64:
        return _multiply_high_64
    wide = formats.VALUE[f"{type_[0]}{2 * bits}"]
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(narrow)


def _multiply_high_64(a: Array, b: Array) -> Array:
    """The upper 64 bits of a 128-bit product, from four 32-bit products."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low = (x & mask) * (y & mask)
    middle = (x >> half) * (y & mask) + (low >> half)
    other = (x & mask) * (y >> half) + (middle & mask)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


@builds("fma", "mad")
def _multiply_add(ins: Instruction) -> Runner:
    if is_float(ins.type):
        return _float(ins, lambda a, b, c: formats.fma(a, b, c, ins.type.removesuffix("x2")))
    if {"cc", "sat"} & set(ins.modifiers):
        raise unsupported(ins, "carry or saturation")
    product, to = _integer_multiply(ins), _product_type(ins)
    return elementwise(ins, lambda a, b, c: product(a, b) + c, [ins.type, ins.type, to], to)


@builds("neg", "abs", "copysign")
def _sign(ins: Instruction) -> Runner:
    count = len(ins.operands) - 1
    if not is_float(ins.type):
        return elementwise(ins, {"neg": np.negative, "abs": np.abs}[ins.opcode], [ins.type])
    # Signs are bits: NaN and zero keep everything else.
    size = TYPE_BYTES[ins.type]
    signs = 0x80008000 if ins.type.endswith("x2") else 1 << (8 * size - 1)
    sign, rest = RAW[size](signs), RAW[size](~signs & (256**size - 1))
    functions = {
        "neg": lambda a: a ^ sign,
        "abs": lambda a: a & rest,
        "copysign": lambda a, b: (a & sign) | (b & rest),
    }
    raw = f"b{8 * size}"
    return elementwise(ins, functions[ins.opcode], [raw] * count, raw)


@builds(*formats.FUNCTIONS)
def _function(ins: Instruction) -> Runner:
    return _float(ins, formats.FUNCTIONS[ins.opcode])


@builds("and", "or", "xor", "not", "cnot")
def _bitwise(ins: Instruction) -> Runner:
    functions = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }  # fmt: skip
    return elementwise(ins, functions[ins.opcode], [ins.type] * (len(ins.operands) - 1))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _flushing(compare: Callable[[Array, Array], Array], type_: str) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(formats.flush_subnormals(a, type_), formats.flush_subnormals(b, type_))


def _comparison(name: str, type_: str) -> Callable[[Array, Array], Array]:
    if is_float(type_):
        if name == "ne":
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            compare = _COMPARE[name[:-1]]
            return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARE[name]


@builds("setp", "set")
def _compare(ins: Instruction) -> Runner:
    type_, relation = ins.type, ins.modifiers[0]
    compare = _comparison(relation, type_)
    if "ftz" in ins.modifiers:
        compare = _flushing(compare, type_)
    combine = next((_COMBINE[m] for m in ins.modifiers[1:] if m in _COMBINE), None)
    a, b = (reader(ins, operand, type_) for operand in ins.operands[1:3])
    third = reader(ins, ins.operands[3], "pred") if combine else None
    first, second = ins.operands[0], None
    if isinstance(first, Vector):
        first, second = first.items
    result_type = "pred" if ins.opcode == "setp" else next(m for m in ins.modifiers if m in TYPE_BYTES)
    writes = [writer(ins, d, result_type) for d in (first, second) if d is not None]
    true = 1 if result_type in ("pred", "f32") else -1

    def run(threads: Threads, active: Mask) -> None:
        outcome = compare(a(threads), b(threads))
        results = (outcome, ~outcome)
        if combine:
            extra = third(threads)
            results = tuple(combine(result, extra) for result in results)
        for write, result in zip(writes, results, strict=False):
            write(threads, np.where(result, true, 0) if result_type != "pred" else result, active)

    return run


@builds("selp", "slct")
def _select(ins: Instruction) -> Runner:
    raw = f"b{8 * TYPE_BYTES[ins.modifiers[0]]}"
    if ins.opcode == "selp":
        return elementwise(ins, lambda a, b, p: np.where(p, a, b), [raw, raw, "pred"], raw)
    return elementwise(ins, lambda a, b, c: np.where(c >= 0, a, b), [raw, raw, ins.type], raw)


@builds("mov")
def _move(ins: Instruction) -> Runner:
    destination, source = ins.operands
    if ins.type == "pred":
        return elementwise(ins, lambda p: p, ["pred"])
    size = TYPE_BYTES[ins.type]
    raw = f"b{8 * size}"
    if isinstance(source, Vector):
        part = size // len(source.items)
        parts = [bits_reader(ins, item, part) for item in source.items]
        write = writer(ins, destination, raw)

        def pack(threads: Threads, active: Mask) -> None:
            whole = RAW[size](0)
            for position, read in enumerate(parts):
                whole = whole | read(threads).astype(RAW[size]) << RAW[size](8 * part * position)
            write(threads, whole, active)

        return pack
    if isinstance(destination, Vector):
        part = size // len(destination.items)
        read = bits_reader(ins, source, size)
        writes = [writer(ins, item, f"b{8 * part}") for item in destination.items]

        def unpack(threads: Threads, active: Mask) -> None:
            whole = read(threads)
            for position, write in enumerate(writes):
                write(threads, (whole >> RAW[size](8 * part * position)).astype(RAW[part]), active)

        return unpack
    return elementwise(ins, lambda a: a, [raw], raw)


@builds("createpolicy")
def _cache_policy(ins: Instruction) -> Runner:
    write = writer(ins, ins.operands[0], "b64")
    return lambda threads, active: write(threads, np.uint64(0), active)


@builds("prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "applypriority", "discard", "nanosleep")
def _nothing(_: Instruction) -> Runner:
    """Hints: they change when things happen, not what happens."""

    def run(threads: Threads, active: Mask) -> None:
        del threads, active

    return run
