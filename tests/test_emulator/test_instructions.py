"""Single instructions on small inputs: every row of a table against exact arithmetic or NumPy, bit for bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.snippet import snippet

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")

NUMPY = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64,
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}").type
       for kind, letter in (("u", "u"), ("s", "i"), ("b", "u")) for bits in (8, 16, 32, 64)},
    "f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.uint32,
}  # fmt: skip
REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}
FLOATS = ("f16", "bf16", "f32", "f64")
DIGITS = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}


def evaluate(instruction: str, sources: list[tuple[str, np.ndarray]], to: str) -> np.ndarray:
    """Run `instruction`, one thread per element. {0} {1} {2} stand for the sources, {d} for the result."""
    count = len(sources[0][1])
    if count > 1024:
        parts = (slice(1024), slice(1024, None))
        return np.concatenate([evaluate(instruction, [(type_, x[part]) for type_, x in sources], to) for part in parts])
    body, names = ["mov.u32 %r60, %tid.x; cvt.u64.u32 %rd60, %r60;"], []
    for i, (type_, _) in enumerate(sources):
        size = np.dtype(NUMPY[type_]).itemsize
        names.append(f"{REGISTER[size]}{i + 1}")
        body.append(f"ld.param.u64 %rd50, [x{i}]; mad.lo.u64 %rd50, %rd60, {size}, %rd50;")
        body.append(f"ld.global.b{8 * size} {names[-1]}, [%rd50];")
    size = np.dtype(NUMPY[to]).itemsize
    result = f"{REGISTER[size]}20"
    body.append(instruction.format(*names, d="%p1" if to == "pred" else result))
    if to == "pred":
        body.append(f"selp.u32 {result}, 1, 0, %p1;")
    body.append(f"ld.param.u64 %rd50, [out]; mad.lo.u64 %rd50, %rd60, {size}, %rd50;")
    body.append(f"st.global.b{8 * size} [%rd50], {result};")
    parameters = ", ".join(["u64 out", *(f"u64 x{i}" for i in range(len(sources)))])
    device = Device()
    out = device.empty(count, NUMPY[to])
    device.launch(snippet("\n".join(body), parameters), 1, count, [out, *(np.array(x) for _, x in sources)])
    return out


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal as bits; any NaN equals any NaN."""
    want = np.asarray(want).astype(got.dtype)
    both_nan = np.isnan(got.astype(float)) & np.isnan(want.astype(float))
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(np.where(both_nan, 0, got.view(bits)), np.where(both_nan, 0, want.view(bits)))


def integers(type_: str, seed: int, count: int = 256) -> np.ndarray:
    """Random integers of all magnitudes, with the corner cases."""
    dtype, rng = np.dtype(NUMPY[type_]), np.random.default_rng(seed)
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    values >>= rng.integers(0, info.bits, count).astype(dtype)
    corners = np.array([0, 1, info.max, info.min, 2, 3, info.max - 1], dtype)
    values[: len(corners)] = rng.permutation(corners)
    return values


def floats(type_: str, seed: int, count: int = 512) -> np.ndarray:
    """Random bit patterns: every exponent, subnormals, infinities and NaN; and some of common size."""
    dtype, rng = np.dtype(NUMPY[type_]), np.random.default_rng(seed)
    patterns = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).view(dtype)
    patterns[::2] = rng.standard_normal(count // 2).astype(dtype)
    patterns[:6] = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]).astype(dtype)
    return patterns


# -------------------------------------------------------------------- integers

INTEGER_TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]
LARGE_TYPES = INTEGER_TYPES[2:]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def extract(a: int, start: int, length: int, bits: int, signed: bool) -> int:
    """The bits of the result one by one, as the manual defines them."""
    a, start, length = a % 2**bits, start & 255, length & 255
    sign = a >> min(start + length - 1, bits - 1) & 1 if signed and length else 0
    return sum((a >> (start + i) & 1 if i < length and start + i < bits else sign) << i for i in range(bits))


def insert(a: int, b: int, start: int, length: int, bits: int) -> int:
    for i in range(min(length & 255, bits)):
        at = (start & 255) + i
        if at < bits:
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def text(a: int, bits: int) -> str:
    return f"{a % 2**bits:0{bits}b}"


def length(a: int) -> int:
    return (~a if a < 0 else a).bit_length()


def shift(x: int, n: int, bits: int, left: bool) -> int:
    return x << n if left and n < bits else (0 if left else x >> min(n, bits))


# (instruction, source types, result type, function of Python integers, of which the low bits are the result, types).
# {t} is the type, {b} its size in bits, {w} the type of twice its size.
INTEGER_ROWS = [
    ("add.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a + b, INTEGER_TYPES),
    ("sub.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a - b, INTEGER_TYPES),
    ("min.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: min(a, b), INTEGER_TYPES),
    ("max.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: max(a, b), INTEGER_TYPES),
    ("mul.lo.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a * b, INTEGER_TYPES),
    ("mul.hi.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, n: a * b >> n, INTEGER_TYPES),
    ("mul.wide.{t} {d}, {0}, {1};", "t t", "w", lambda a, b, _: a * b, INTEGER_TYPES[:4]),
    ("mad.lo.{t} {d}, {0}, {1}, {2};", "t t t", "t", lambda a, b, c, _: a * b + c, INTEGER_TYPES),
    ("mad.hi.{t} {d}, {0}, {1}, {2};", "t t t", "t", lambda a, b, c, n: (a * b >> n) + c, INTEGER_TYPES),
    ("mad.wide.{t} {d}, {0}, {1}, {2};", "t t w", "w", lambda a, b, c, _: a * b + c, INTEGER_TYPES[:4]),
    ("div.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: quotient(a, b), INTEGER_TYPES),
    ("rem.{t} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a - quotient(a, b) * b if b else a, INTEGER_TYPES),
    ("neg.{t} {d}, {0};", "t", "t", lambda a, _: -a, INTEGER_TYPES[1::2]),
    ("abs.{t} {d}, {0};", "t", "t", lambda a, _: abs(a), INTEGER_TYPES[1::2]),
    ("and.b{b} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a & b, INTEGER_TYPES),
    ("or.b{b} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a | b, INTEGER_TYPES),
    ("xor.b{b} {d}, {0}, {1};", "t t", "t", lambda a, b, _: a ^ b, INTEGER_TYPES),
    ("not.b{b} {d}, {0};", "t", "t", lambda a, _: ~a, INTEGER_TYPES),
    ("cnot.b{b} {d}, {0};", "t", "t", lambda a, _: a == 0, INTEGER_TYPES),
    ("shl.b{b} {d}, {0}, {1};", "t n", "t", lambda a, n, bits: shift(a, n, bits, True), INTEGER_TYPES),
    ("shr.{t} {d}, {0}, {1};", "t n", "t", lambda a, n, bits: shift(a, n, bits, False), INTEGER_TYPES),
    ("popc.b{b} {d}, {0};", "t", "u32", lambda a, n: text(a, n).count("1"), LARGE_TYPES),
    ("clz.b{b} {d}, {0};", "t", "u32", lambda a, n: n - len(text(a, n).lstrip("0")), LARGE_TYPES),
    ("brev.b{b} {d}, {0};", "t", "t", lambda a, n: int(text(a, n)[::-1], 2), LARGE_TYPES),
    ("bfind.{t} {d}, {0};", "t", "u32", lambda a, _: length(a) - 1, LARGE_TYPES),
    ("bfind.shiftamt.{t} {d}, {0};", "t", "u32", lambda a, n: n - length(a) if length(a) else -1, LARGE_TYPES),
    ("bfe.{t} {d}, {0}, {1}, {2};", "t n n", "t", lambda a, s, n, b: extract(a, s, n, b, False), ["u32", "u64"]),
    ("bfe.{t} {d}, {0}, {1}, {2};", "t n n", "t", lambda a, s, n, b: extract(a, s, n, b, True), ["s32", "s64"]),
    ("mov.u32 %r40, {2}; bfi.b{b} {d}, {0}, {1}, %r40, {3};", "t t n n", "t", insert, ["u32", "u64"]),
    ("shf.l.wrap.b32 {d}, {0}, {1}, {2};", "t t n", "t", lambda a, b, n, _: (b << 32 | a) << (n & 31) >> 32, ["u32"]),
    ("shf.l.clamp.b32 {d}, {0}, {1}, {2};", "t t n", "t",
     lambda a, b, n, _: (b << 32 | a) << min(n, 32) >> 32, ["u32"]),
    ("shf.r.wrap.b32 {d}, {0}, {1}, {2};", "t t n", "t", lambda a, b, n, _: (b << 32 | a) >> (n & 31), ["u32"]),
    ("shf.r.clamp.b32 {d}, {0}, {1}, {2};", "t t n", "t", lambda a, b, n, _: (b << 32 | a) >> min(n, 32), ["u32"]),
    ("lop3.b32 {d}, {0}, {1}, {2}, 0xE8;", "t t t", "t", lambda a, b, c, _: a & b | b & c | a & c, ["u32"]),
    ("lop3.b32 {d}, {0}, {1}, {2}, 0x96;", "t t t", "t", lambda a, b, c, _: a ^ b ^ c, ["u32"]),
    ("lop3.b32 {d}, {0}, {1}, {2}, 0x07;", "t t t", "t", lambda a, b, c, _: ~a & ~b | ~a & ~c, ["u32"]),
    ("setp.lt.{t} {d}, {0}, {1};", "t t", "pred", lambda a, b, _: a < b, INTEGER_TYPES),
    ("setp.ge.{t} {d}, {0}, {1};", "t t", "pred", lambda a, b, _: a >= b, INTEGER_TYPES),
    ("setp.hi.{t} {d}, {0}, {1};", "t t", "pred", lambda a, b, _: a > b, INTEGER_TYPES[::2]),
    ("setp.gt.{t} %p2, {0}, 0; setp.lt.and.{t} {d}, {0}, {1}, !%p2;", "t t", "pred",
     lambda a, b, _: a < b and a <= 0, INTEGER_TYPES),
    ("setp.lt.{t} %p2|{d}, {0}, {1};", "t t", "pred", lambda a, b, _: a >= b, INTEGER_TYPES),
    ("set.le.u32.{t} {d}, {0}, {1};", "t t", "u32", lambda a, b, _: -(a <= b), INTEGER_TYPES),
    ("setp.lt.{t} %p2, {0}, {1}; selp.b{b} {d}, {0}, {1}, %p2;", "t t", "t", lambda a, b, _: min(a, b), INTEGER_TYPES),
    ("slct.{t}.s32 {d}, {0}, {1}, {2};", "t t s32", "t", lambda a, b, c, _: a if c >= 0 else b, INTEGER_TYPES),
    ("cvt.s64.{t} {d}, {0};", "t", "s64", lambda a, _: a, INTEGER_TYPES),
    ("cvt.u16.{t} {d}, {0};", "t", "u16", lambda a, _: a, LARGE_TYPES),
    ("cvt.s32.s8 {d}, {0};", "t", "s32", lambda a, _: (a + 128) % 256 - 128, ["s32"]),
    ("cvt.sat.u8.{t} {d}, {0};", "t", "u16", lambda a, _: min(max(a, 0), 255), INTEGER_TYPES),
    ("cvt.sat.s16.{t} {d}, {0};", "t", "s16", lambda a, _: min(max(a, -(2**15)), 2**15 - 1), LARGE_TYPES),
    ("mov.b64 {d}, {{{0}, {1}}};", "t t", "u64", lambda a, b, _: b << 32 | a, ["u32"]),
    ("mov.b32 {{%h10, %h11}}, {0}; mov.b32 {d}, {{%h11, %h10}};", "t", "t", lambda a, _: a << 16 | a >> 16, ["u32"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "type_"), [pytest.param(row, t, id=f"{row[0].split()[0]}-{t}") for row in INTEGER_ROWS for t in row[4]]
)
def test_integers(row, type_):
    instruction, sources, to, function, _ = row
    bits = int(type_[1:])
    types = {"t": type_, "w": f"{type_[0]}{2 * bits}", "n": "u32"}
    given = [types.get(source, source) for source in sources.split()]
    values = [integers(source, seed) for seed, source in enumerate(given)]
    for value, source in zip(values, sources.split(), strict=True):
        if source == "n":  # shift amounts and field sizes, also beyond the width
            value[:] = np.random.default_rng(len(instruction)).permutation(len(value)) % 300 // 3
    names = {"t": type_, "b": bits, "d": "{d}", **{str(i): f"{{{i}}}" for i in range(4)}}
    for key, name in names.items():
        instruction = instruction.replace(f"{{{key}}}", str(name))
    result = types.get(to, to)
    got = evaluate(instruction, list(zip(given, values, strict=True)), result)
    dtype = np.dtype(NUMPY[result])
    want = [int(function(*map(int, row), bits)) % 2 ** (8 * dtype.itemsize) for row in zip(*values, strict=True)]
    np.testing.assert_array_equal(got.view(f"u{dtype.itemsize}"), np.array(want, f"u{dtype.itemsize}"))


def test_prmt_selects_bytes_and_replicates_signs():
    a, b, selector = (integers("u32", seed) for seed in (16, 17, 18))
    data = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
    want = np.zeros(len(a), np.uint32)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = data[np.arange(len(a)), nibble & 7].astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        want |= byte.astype(np.uint32) << np.uint32(8 * i)
    same_bits(evaluate("prmt.b32 {d}, {0}, {1}, {2};", [("u32", a), ("u32", b), ("u32", selector)], "u32"), want)


# -------------------------------------------------------------------- floating point


def nearest(value: Fraction, dtype: np.dtype) -> object:
    """The value of `dtype` nearest to a fraction, ties to even: a first guess or its neighbour."""
    guess = np.array(float(value)).astype(dtype)
    bits = f"i{dtype.itemsize}"
    around = [(guess.view(bits) + step).view(dtype) for step in (-1, 0, 1)]
    if guess == 0:
        tiny = np.array(1, bits).view(dtype)
        around = [-tiny, guess, tiny]
    finite = [v for v in around if np.isfinite(v)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(bits)) & 1))


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def nan_or(function):
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, function(a, b)).astype(a.dtype)


def flushed(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), a), a)


def relu(a: np.ndarray) -> np.ndarray:
    return np.where((a > 0) | np.isnan(a), a, a.dtype.type(0))


def clamp01(a: np.ndarray) -> np.ndarray:
    return np.where(a > 0, np.minimum(a, a.dtype.type(1)), a.dtype.type(0))


def near(function):
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


UNORDERED = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
# (instruction, result type or "t", NumPy function, types)
FLOAT_ROWS = [
    ("add.{t} {d}, {0}, {1};", "t", np.add, FLOATS),
    ("sub.{t} {d}, {0}, {1};", "t", np.subtract, FLOATS),
    ("mul.rn.{t} {d}, {0}, {1};", "t", np.multiply, FLOATS),
    ("div.rn.{t} {d}, {0}, {1};", "t", np.divide, ("f32", "f64")),
    ("sqrt.rn.{t} {d}, {0};", "t", np.sqrt, ("f32", "f64")),
    ("rcp.rn.{t} {d}, {0};", "t", lambda a: 1 / a, ("f32", "f64")),
    ("rsqrt.approx.{t} {d}, {0};", "t", near(lambda a: 1 / np.sqrt(a)), ("f32",)),
    ("ex2.approx.{t} {d}, {0};", "t", near(np.exp2), ("f32",)),
    ("ex2.approx.ftz.{t} {d}, {0};", "t", lambda a: flushed(near(np.exp2)(flushed(a))), ("f32",)),
    ("lg2.approx.{t} {d}, {0};", "t", near(np.log2), ("f32",)),
    ("sin.approx.{t} {d}, {0};", "t", near(np.sin), ("f32",)),
    ("cos.approx.{t} {d}, {0};", "t", near(np.cos), ("f32",)),
    ("neg.{t} {d}, {0};", "t", np.negative, FLOATS),
    ("abs.{t} {d}, {0};", "t", np.abs, FLOATS),
    ("neg.ftz.{t} {d}, {0};", "t", lambda a: -flushed(a), ("f32",)),
    ("abs.ftz.{t} {d}, {0};", "t", lambda a: np.abs(flushed(a)), ("f32",)),
    ("copysign.{t} {d}, {0}, {1};", "t", lambda a, b: np.copysign(b, a), ("f32", "f64")),
    ("add.ftz.{t} {d}, {0}, {1};", "t", lambda a, b: flushed(flushed(a) + flushed(b)), ("f32",)),
    ("mul.ftz.{t} {d}, {0}, {1};", "t", lambda a, b: flushed(flushed(a) * flushed(b)), ("f32",)),
    ("add.sat.{t} {d}, {0}, {1};", "t", lambda a, b: clamp01(a + b), ("f32",)),
    ("fma.rn.relu.{t} {d}, {0}, {1}, {2};", "t", lambda a, b, c: relu((a.astype("f8") * b.astype("f8")
     + c.astype("f8")).astype(a.dtype)), ("f16",)),
    ("min.{t} {d}, {0}, {1};", "t", smaller, FLOATS),
    ("max.{t} {d}, {0}, {1};", "t", larger, FLOATS),
    ("min.NaN.{t} {d}, {0}, {1};", "t", nan_or(smaller), FLOATS[:3]),
    ("max.NaN.{t} {d}, {0}, {1};", "t", nan_or(larger), FLOATS[:3]),
    ("max.{t} {d}, {0}, {1}, {2};", "t", lambda a, b, c: np.fmax(np.fmax(a, b), c) + 0, ("f32",)),
    ("setp.eq.{t} {d}, {0}, {1};", "pred", np.equal, FLOATS),
    ("setp.ne.{t} {d}, {0}, {1};", "pred", lambda a, b: (a != b) & ~UNORDERED(a, b), FLOATS),
    ("setp.lt.{t} {d}, {0}, {1};", "pred", np.less, FLOATS),
    ("setp.ge.{t} {d}, {0}, {1};", "pred", np.greater_equal, FLOATS),
    ("setp.equ.{t} {d}, {0}, {1};", "pred", lambda a, b: (a == b) | UNORDERED(a, b), FLOATS),
    ("setp.neu.{t} {d}, {0}, {1};", "pred", np.not_equal, FLOATS),
    ("setp.leu.{t} {d}, {0}, {1};", "pred", lambda a, b: ~(a > b), FLOATS),
    ("setp.gtu.{t} {d}, {0}, {1};", "pred", lambda a, b: ~(a <= b), FLOATS),
    ("setp.num.{t} {d}, {0}, {1};", "pred", lambda a, b: ~UNORDERED(a, b), FLOATS),
    ("setp.nan.{t} {d}, {0}, {1};", "pred", UNORDERED, FLOATS),
    ("setp.eq.ftz.{t} {d}, {0}, 0f00000000;", "pred", lambda a: flushed(a) == 0, ("f32",)),
    ("set.lt.f32.{t} {d}, {0}, {1};", "f32", np.less, ("f32", "f64")),
    ("set.lt.u32.{t} {d}, {0}, {1};", "u32", lambda a, b: np.where(a < b, np.uint32(2**32 - 1), np.uint32(0)), FLOATS),
    ("slct.b32.{t} {d}, 7, 8, {0};", "u32", lambda a: np.where(a >= 0, 7, 8), ("f32",)),
    ("testp.finite.{t} {d}, {0};", "pred", np.isfinite, ("f32", "f64")),
    ("testp.infinite.{t} {d}, {0};", "pred", np.isinf, ("f32", "f64")),
    ("testp.notanumber.{t} {d}, {0};", "pred", np.isnan, ("f32", "f64")),
    ("testp.subnormal.{t} {d}, {0};", "pred", lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).smallest_normal),
     ("f32", "f64")),
    ("cvt.f64.{t} {d}, {0};", "f64", lambda a: a, ("f32",)),
    ("cvt.f32.{t} {d}, {0};", "f32", lambda a: a, ("f16", "bf16")),
    ("cvt.rn.f32.{t} {d}, {0};", "f32", lambda a: a, ("f64",)),
    ("cvt.rn.f16.{t} {d}, {0};", "f16", lambda a: a, ("f32", "f64")),
    ("cvt.rn.bf16.{t} {d}, {0};", "bf16", lambda a: a, ("f32",)),
    ("cvt.rn.relu.f16.{t} {d}, {0};", "f16", relu, ("f32",)),
    ("cvt.ftz.f32.f32 {d}, {0};", "f32", flushed, ("f32",)),
    ("cvt.sat.f32.f32 {d}, {0};", "f32", clamp01, ("f32",)),
    ("cvt.rni.{t}.{t} {d}, {0};", "t", np.rint, ("f32", "f64")),
    ("cvt.rmi.{t}.{t} {d}, {0};", "t", np.floor, ("f32", "f64")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "type_"), [pytest.param(row, t, id=f"{row[0].split()[0]}-{t}") for row in FLOAT_ROWS for t in row[3]]
)
def test_floats(row, type_):
    instruction, to, function, _ = row
    count = next(i for i in (3, 2, 1) if f"{{{i - 1}}}" in instruction)
    values = [floats(type_, seed + 20) for seed in range(count)]
    if count > 1:
        values[1][::5] = values[0][::5]
        values[1][:4] = values[0][[1, 0, 4, 5]]  # -0 with +0, NaN with a number
    got = evaluate(instruction.replace("{t}", type_), [(type_, v) for v in values], type_ if to == "t" else to)
    with np.errstate(all="ignore"):
        same_bits(got, function(*values))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_directed_rounding_brackets_the_exact_result(name, mode):
    values = [v[np.isfinite(v)][:300] for v in (floats("f32", seed, 800) for seed in (50, 51, 52))]
    given = values[: 3 if name == "fma" else 2]
    operands = ", ".join(f"{{{i}}}" for i in range(len(given)))
    got = evaluate(f"{name}.{mode}.f32 {{d}}, {operands};", [("f32", v) for v in given], "f32")
    a, b, c = ([Fraction(float(x)) for x in v] for v in values)
    exact = {"add": lambda x, y, _: x + y, "sub": lambda x, y, _: x - y, "mul": lambda x, y, _: x * y,
             "fma": lambda x, y, z: x * y + z}[name]  # fmt: skip
    for result, want in zip(got, map(exact, a, b, c), strict=True):
        toward_plus = mode == "rp" or (mode == "rz" and want < 0)
        beyond = np.nextafter(result, np.float32(-np.inf if toward_plus else np.inf))
        if np.isfinite(result):
            assert (result >= want) if toward_plus else (result <= want)
        if np.isfinite(beyond) and result != want:
            assert (beyond < want) if toward_plus else (beyond > want)


def test_packed_singles_are_two_singles():
    pairs = [floats("f32", seed).view(np.uint64) for seed in (53, 54, 55)]
    for name, count in (("add", 2), ("mul", 2), ("fma.rn", 3)):
        operands = ", ".join(f"{{{i}}}" for i in range(count))
        packed = evaluate(f"{name}.f32x2 {{d}}, {operands};", [("u64", v) for v in pairs[:count]], "u64")
        halves = [("f32", v.view(np.float32)) for v in pairs[:count]]
        same_bits(packed.view(np.float32), evaluate(f"{name}.f32 {{d}}, {operands};", halves, "f32"))


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_packed_arithmetic_is_two_halves(half):
    pairs = [floats(half, seed).view(np.uint32) for seed in (26, 27, 28)]
    halves = [pair.view(NUMPY[half]) for pair in pairs]
    for name, count in (
        ("add", 2),
        ("mul", 2),
        ("min", 2),
        ("max.NaN", 2),
        ("neg", 1),
        ("abs", 1),
        ("fma.rn", 3),
        ("set.ltu", 2),
    ):
        operands = ", ".join(f"{{{i}}}" for i in range(count))
        types = (f"{half}.{half}", f"{half}x2.{half}x2") if "set" in name else (half, f"{half}x2")
        packed = evaluate(f"{name}.{types[1]} {{d}}, {operands};", [("u32", v) for v in pairs[:count]], f"{half}x2")
        single = evaluate(f"{name}.{types[0]} {{d}}, {operands};", [(half, v) for v in halves[:count]], half)
        same_bits(packed.view(NUMPY[half]), single)
    a, b = floats("f32", 39), floats("f32", 40)
    for relued in ("", ".relu"):
        line = f"cvt.rn{relued}.{half}x2.f32 {{d}}, {{0}}, {{1}};"
        got = evaluate(line, [("f32", a), ("f32", b)], f"{half}x2")
        with np.errstate(all="ignore"):
            both = np.stack([b, a], 1).reshape(-1)
            same_bits(got.view(NUMPY[half]), (relu(both) if relued else both).astype(NUMPY[half]))


@pytest.mark.parametrize("half", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_sums_of_mixed_types_are_of_float32(half, mode):
    """What Triton makes of a half number in a sum on sm_100."""
    a, b = floats(half, 60, 300), floats(half, 61, 300)
    c = floats("f32", 62, 300)
    for name, values in (("add", [a, c]), ("sub", [a, c]), ("fma", [a, b, c])):
        names = ", ".join(f"{{{i}}}" for i in range(len(values)))
        wide = [("f32", value.astype(np.float32)) for value in values]
        given = [*[(half, value) for value in values[:-1]], ("f32", c)]
        expected = evaluate(f"{name}.{mode}.f32 {{d}}, {names};", wide, "f32")
        same_bits(evaluate(f"{name}.{mode}.f32.{half} {{d}}, {names};", given, "f32"), expected)
    with pytest.raises(EmulatorError, match="this is not modelled"):
        evaluate(f"mul.rn.f32.{half} {{d}}, {{0}}, {{1}};", given[1:], "f32")


@pytest.mark.parametrize("type_", FLOATS)
def test_fma_rounds_once(type_):
    """Operands are chosen so that the sum lies near a tie, where rounding twice goes wrong."""
    dtype, rng, count = np.dtype(NUMPY[type_]), np.random.default_rng(21), 1000
    digits = DIGITS[type_]
    a, b = ((1 + rng.integers(0, 2 ** (digits - 1), count) * 2.0 ** (1 - digits)).astype(dtype) for _ in range(2))
    scale = 2.0 ** -rng.integers(-digits, 2 * digits, count)
    c = (rng.choice([-1, 1], count) * scale * (1 + rng.integers(0, 4, count) / 4)).astype(dtype)
    got = evaluate(f"fma.rn.{type_} {{d}}, {{0}}, {{1}}, {{2}};", [(type_, v) for v in (a, b, c)], type_)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    same_bits(got, np.array([nearest(v, dtype) for v in exact], dtype))


@pytest.mark.parametrize(
    ("type_", "a", "b", "c"),
    [
        # Just above a tie of float32; a sum in float64 is the tie itself, which goes down.
        ("f32", 1 + 2**-12, 1 + 2**-12, 2**-60),
        # The rounding error of the product is below the smallest double, and decides.
        ("f64", (1 + 2**-52) * 2.0**-500, (1 + 2**-52) * 2.0**-500, 2.0**-998),
        # The product is too large to be split into halves, the sum is not.
        ("f64", (1 + 2**-52) * 2.0**1000, 1 + 2**-52, -(1 + 2**-51) * 2.0**1000),
        ("f64", 1.5 * 2.0**512, 2.0**512, -(2 - 2**-52) * 2.0**1023),
        ("f64", 2.0**1000, 2.0**100, -1.7e308),
    ],
)
def test_fma_at_the_ends_of_the_range(type_, a, b, c):
    dtype = np.dtype(NUMPY[type_])
    given = [np.array([v], dtype) for v in (a, b, c)]
    got = evaluate(f"fma.rn.{type_} {{d}}, {{0}}, {{1}}, {{2}};", [(type_, v) for v in given], type_)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert got[0] == (nearest(exact, dtype) if abs(exact) < Fraction(np.finfo(dtype).max.item()) else np.inf)


def test_tanh_has_the_accuracy_of_the_hardware_and_no_more():
    a = floats("f32", 42)
    got, want = evaluate("tanh.approx.f32 {d}, {0};", [("f32", a)], "f32").astype(float), np.tanh(a.astype(float))
    error = np.abs(got / np.where(want == 0, 1, want) - 1)[np.isfinite(want) & (want != 0)]
    assert 2.0**-14 < error.max() <= 2.0**-11


# -------------------------------------------------------------------- conversions


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_conversions_round_their_way(to, mode):
    source = "f64" if to == "f32" else "f32"
    a = np.concatenate([floats(source, 38), np.array([1e-30, -1e-30, 3e38, -3e38], NUMPY[source])])
    a = a[np.isfinite(a)]
    got = evaluate(f"cvt.{mode}.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
    bits = got.view(f"u{got.dtype.itemsize}")
    up = mode == "rp"
    for value, result, bit in zip(a.tolist(), got, bits, strict=True):
        toward_plus = up or (mode == "rz" and value < 0)
        assert float(result) >= value if toward_plus else float(result) <= value
        # The next value in the other direction is on the other side.
        step = -1 if (float(result) > 0 or bit == 0) == toward_plus else 1
        if float(result) != value and bit != 0 and np.isfinite(result.astype(float)):
            other = float(bit.dtype.type(int(bit) + step).view(got.dtype))
            assert other < value if toward_plus else other > value


@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["f16", "f32", "f64"])
def test_integers_become_floats_rounded_once(to, source):
    a = integers(source, 43)
    a[:2] = [2**62 + 2**38 + 1, 2**60 + 2**36 + 1] if source.endswith("64") else [2**30 + 2**6 + 1, 5]
    got = evaluate(f"cvt.rn.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
    with np.errstate(over="ignore"):
        want = [nearest(Fraction(int(v)), got.dtype) if abs(int(v)) < 65520 or to != "f16" else
                np.copysign(np.inf, float(v)) for v in a]  # fmt: skip
    same_bits(got, np.array(want).astype(got.dtype))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s16", "s32", "u32", "s64", "u64"])
def test_floats_become_integers_clamped(to, source):
    a = np.array([1.5, -1.5, 2.5, -0.5, 3e9, -3e9, 1e30, -1e30, np.inf, -np.inf, np.nan], NUMPY[source])
    info = np.iinfo(NUMPY[to])
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        # NaN becomes 0 from single precision to at most 32 bits, and otherwise the sign bit.
        nan = 0 if source == "f32" and not to.endswith("64") else (info.min or (info.max >> 1) + 1)
        rounded = [function(float(v)) for v in a]
        want = [nan if v != v else int(max(min(v, info.max), info.min)) if abs(v) < 1e18 else
                (info.max if v > 0 else info.min) for v in rounded]  # fmt: skip
        got = evaluate(f"cvt.{mode}.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
        np.testing.assert_array_equal(got, np.array(want, NUMPY[to]))
    tiny = np.array([1e-40], np.float32)
    assert evaluate("cvt.rpi.s32.f32 {d}, {0};", [("f32", tiny)], "s32")[0] == 1
    assert evaluate("cvt.rpi.ftz.s32.f32 {d}, {0};", [("f32", tiny)], "s32")[0] == 0


# -------------------------------------------------------------------- what is not known


def test_an_unknown_opcode_quotes_its_line():
    kernel = snippet("    wgmma.fence.sync.aligned;")
    with pytest.raises(EmulatorError, match=r"PTX line 13: wgmma\.fence\.sync\.aligned;") as caught:
        Device().launch(kernel, 1, 32, [])
    assert caught.value.check == "unknown instruction"


@pytest.mark.parametrize(
    "line",
    [
        "add.rz.f64 %d1, %d2, %d3;",
        "div.rz.f32 %f1, %f2, %f3;",
        "add.cc.u32 %r1, %r2, %r3;",
        "addc.u32 %r1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "min.xorsign.abs.f32 %f1, %f2, %f3;",
        "setp.lt.f16x2 %p1|%p2, %r1, %r2;",
        "set.lt.u32.f16x2 %r1, %r2, %r3;",
        "mul24.lo.u32 %r1, %r2, %r3;",
        "cvt.rna.tf32.f32 %r1, %f1;",
        "cvt.rn.satfinite.f16x2.f32 %r1, %f1, %f2;",
        "cvt.rz.f16x2.f32 %r1, %f1, %f2;",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "mov.f32 %f1, 1.5;",
        "cp.async.bulk.commit_group;",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
        "redux.sync.min.NaN.f32 %f1, %f2, -1;",
        "match.any.sync.b32 %r1, %r2, -1;",
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3];",
        "red.global.add.v2.f32 [%rd1], {%f1, %f2};",
        "fence.proxy.async;",
        "bar.arrive 1, 64;",
        "call foo;",
    ],
)
def test_an_unknown_variant_is_refused(line):
    with pytest.raises(EmulatorError, match="unknown instruction"):
        Device().launch(snippet(line), 1, 32, [])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed):
    """Four matrices: lane 8 m + r gives the address of row r of matrix m, in an order of its own here."""
    body = f"""
    mov.u32 %r1, %tid.x;
    xor.b32 %r2, %r1, 5; shl.b32 %r2, %r2, 4; mov.u32 %r3, memory; add.u32 %r2, %r2, %r3;
    shl.b32 %r4, %r1, 1; add.u32 %r5, %r4, 1; shl.b32 %r5, %r5, 16; or.b32 %r10, %r4, %r5;
    add.u32 %r11, %r10, 0x400040; add.u32 %r12, %r11, 0x400040; add.u32 %r13, %r12, 0x400040;
    stmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
    bar.warp.sync 0xffffffff;
    shl.b32 %r6, %r1, 4; add.u32 %r6, %r6, %r3;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r6];
    ld.param.u64 %rd1, [out]; cvt.u64.u32 %rd2, %r1; shl.b64 %rd2, %rd2, 4; add.u64 %rd1, %rd1, %rd2;
    st.global.v4.b32 [%rd1], {{%r20, %r21, %r22, %r23}};"""
    device = Device()
    out = device.empty((32, 8), np.uint16)
    module = ".shared .align 16 .b8 memory[512];"
    device.launch(snippet(body, "u64 out", module=module), 1, 32, [out])
    matrices = np.arange(256).reshape(4, 8, 8)
    rows = (matrices.transpose(0, 2, 1) if transposed else matrices).reshape(32, 8)
    np.testing.assert_array_equal(out, rows[np.arange(32) ^ 5])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    body = f"""
    mov.u32 %r1, %tid.x; cvt.u64.u32 %rd2, %r1; shl.b64 %rd2, %rd2, 4; mov.u32 %r3, memory; shl.b32 %r6, %r1, 4;
    add.u32 %r2, %r3, %r6; ld.param.u64 %rd1, [x]; add.u64 %rd1, %rd1, %rd2;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd1]; st.shared.v4.b32 [%r2], {{%r20, %r21, %r22, %r23}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
    ld.param.u64 %rd3, [out]; add.u64 %rd3, %rd3, %rd2;
    st.global.v4.b32 [%rd3], {{%r10, %r11, %r12, %r13}};"""
    device = Device()
    out = device.empty((32, 4, 2), np.uint16)
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    device.launch(snippet(body, "u64 out, u64 x", module=".shared .align 16 .b8 memory[512];"), 1, 32, [out, x])
    wanted = (x.transpose(0, 2, 1) if transposed else x).reshape(4, 32, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(out, wanted)
