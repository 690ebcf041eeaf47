"""Compare floating-point instructions with exact arithmetic or NumPy, bit for bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from emulator import EmulatorError

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")
from support.instructions import NUMPY, evaluate, floats, nearest, same_bits

FLOATS = ("f16", "bf16", "f32", "f64")


DIGITS = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}


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


def in_float64(function):
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
    ("rsqrt.approx.{t} {d}, {0};", "t", in_float64(lambda a: 1 / np.sqrt(a)), ("f32",)),
    ("ex2.approx.{t} {d}, {0};", "t", in_float64(np.exp2), ("f32",)),
    ("ex2.approx.ftz.{t} {d}, {0};", "t", lambda a: flushed(in_float64(np.exp2)(flushed(a))), ("f32",)),
    ("lg2.approx.{t} {d}, {0};", "t", in_float64(np.log2), ("f32",)),
    ("sin.approx.{t} {d}, {0};", "t", in_float64(np.sin), ("f32",)),
    ("cos.approx.{t} {d}, {0};", "t", in_float64(np.cos), ("f32",)),
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
    """Triton emits this on sm_100 if it adds a half to a float."""
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
    """The exact results lie near ties, where rounding twice gives a wrong result."""
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
        # The exact sum is just above a tie of float32. In float64 it becomes the tie, which is rounded down.
        ("f32", 1 + 2**-12, 1 + 2**-12, 2**-60),
        # The rounding error of the product is below the smallest double, and decides the result.
        ("f64", (1 + 2**-52) * 2.0**-500, (1 + 2**-52) * 2.0**-500, 2.0**-998),
        # The product is too large to be split into halves. The first two sums are finite, the third is not.
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
