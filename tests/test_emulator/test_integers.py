"""Compare integer instructions with exact arithmetic, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")
from support.instructions import NUMPY, evaluate, integers, same_bits

INTEGER_TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]


LARGE_TYPES = INTEGER_TYPES[2:]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def extract(a: int, start: int, length: int, bits: int, signed: bool) -> int:
    """Return the result of ``bfe``, computed bit by bit as the manual defines it."""
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


# (instruction, source types, result type, function of Python integers, types). The result is the low bits of the
# function's value. {t} is the type, {b} its size in bits, {w} the type of twice its size.
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
        if source == "n":  # shift amounts and field sizes, some of them beyond the width
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
