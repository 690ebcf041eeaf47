"""Single instructions on small inputs, against NumPy and exact arithmetic, bit for bit."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.snippet import snippet

BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
NUMPY = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64,
    **{f"{kind}{bits}": np.dtype(f"{letter}{int(bits) // 8}").type
       for kind, letter in (("u", "u"), ("s", "i"), ("b", "u")) for bits in BITS},
    "f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.uint32,
}  # fmt: skip
REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def evaluate(instruction: str, sources: list[tuple[str, np.ndarray]], to: str, extra: str = "") -> np.ndarray:
    """Run `instruction`, one thread per element. {0} {1} {2} stand for the sources, {d} for the result."""
    count = len(sources[0][1])
    body, names = ["mov.u32 %r60, %tid.x; cvt.u64.u32 %rd60, %r60;"], {}
    for i, (type_, _) in enumerate(sources):
        size = np.dtype(NUMPY[type_]).itemsize
        names[str(i)] = register = f"{REGISTER[size]}{i + 1}"
        body.append(f"ld.param.u64 %rd50, [x{i}]; mad.lo.u64 %rd50, %rd60, {size}, %rd50;")
        body.append(f"ld.global.b{8 * size} {register}, [%rd50];")
    size = np.dtype(NUMPY[to]).itemsize
    result = f"{REGISTER[size]}20"
    body.append(instruction.format(*names.values(), d="%p1" if to == "pred" else result))
    if to == "pred":
        body.append(f"selp.u32 {result}, 1, 0, %p1;")
    body.append(f"ld.param.u64 %rd50, [out]; mad.lo.u64 %rd50, %rd60, {size}, %rd50;")
    body.append(f"st.global.b{8 * size} [%rd50], {result};")
    parameters = ", ".join(["u64 out", *(f"u64 x{i}" for i in range(len(sources)))])
    device = Device()
    out = device.empty(count, NUMPY[to])
    device.launch(snippet(extra + "\n".join(body), parameters), 1, count, [out, *(np.array(x) for _, x in sources)])
    return out


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal as bits; any NaN equals any NaN."""
    want = np.asarray(want).astype(got.dtype)
    both_nan = np.isnan(got.astype(float)) & np.isnan(want.astype(float))
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(np.where(both_nan, 0, got.view(bits)), np.where(both_nan, 0, want.view(bits)))


def integers(type_: str, seed: int, count: int = 256) -> np.ndarray:
    """Random integers of all magnitudes, with the corner cases."""
    dtype = np.dtype(NUMPY[type_])
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    values >>= rng.integers(0, info.bits, count).astype(dtype)
    corners = np.array([0, 1, info.max, info.min, 2, 3, info.max - 1], dtype)
    values[: len(corners)] = rng.permutation(corners)
    return values


def floats(type_: str, seed: int, count: int = 512) -> np.ndarray:
    """Random bit patterns: every exponent, subnormals, infinities and NaN; and some of common size."""
    dtype = np.dtype(NUMPY[type_])
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).view(dtype)
    patterns[::2] = rng.standard_normal(count // 2 + count % 2).astype(dtype)
    return patterns


# -------------------------------------------------------------------- integers


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add", np.add),
        ("sub", np.subtract),
        ("min", np.minimum),
        ("max", np.maximum),
        ("mul.lo", np.multiply),
    ],
)
def test_integer_arithmetic_wraps(name, function, type_):
    a, b = integers(type_, 1), integers(type_, 2)
    got = evaluate(f"{name}.{type_} {{d}}, {{0}}, {{1}};", [(type_, a), (type_, b)], type_)
    with np.errstate(over="ignore"):
        same_bits(got, function(a, b))


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_products_and_quotients_are_exact(type_):
    a, b = integers(type_, 3), integers(type_, 4)
    b[b == 0] = 7
    info = np.iinfo(NUMPY[type_])
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    wrap = lambda values: np.array([v % 2**info.bits for v in values], f"u{info.bits // 8}").view(a.dtype)  # noqa: E731
    sources = [(type_, a), (type_, b)]
    same_bits(
        evaluate(f"mul.hi.{type_} {{d}}, {{0}}, {{1}};", sources, type_),
        wrap([v >> info.bits for v in exact]),
    )
    truncated = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)]
    same_bits(evaluate(f"div.{type_} {{d}}, {{0}}, {{1}};", sources, type_), wrap(truncated))
    remainder = [int(x) - q * int(y) for x, y, q in zip(a, b, truncated, strict=True)]
    same_bits(evaluate(f"rem.{type_} {{d}}, {{0}}, {{1}};", sources, type_), wrap(remainder))


@pytest.mark.parametrize(("type_", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide_multiply_add(type_, wide):
    a, b, c = integers(type_, 5), integers(type_, 6), integers(wide, 7)
    sources = [(type_, a), (type_, b), (wide, c)]
    got = evaluate(f"mad.wide.{type_} {{d}}, {{0}}, {{1}}, {{2}};", sources, wide)
    with np.errstate(over="ignore"):
        same_bits(got, a.astype(NUMPY[wide]) * b.astype(NUMPY[wide]) + c)


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_shifts_clamp_their_amount(type_):
    a = integers(type_, 8)
    amounts = np.arange(len(a), dtype=np.uint32) % 70
    bits = np.iinfo(NUMPY[type_]).bits
    sources = [(type_, a), ("u32", amounts)]
    left = [(int(x) << int(n)) % 2**bits if n < bits else 0 for x, n in zip(a, amounts, strict=True)]
    got = evaluate(f"shl.b{bits} {{d}}, {{0}}, {{1}};", sources, f"u{bits}")
    np.testing.assert_array_equal(got, np.array(left, f"u{bits // 8}"))
    right = [int(x) >> min(int(n), bits) for x, n in zip(a, amounts, strict=True)]
    same_bits(evaluate(f"shr.{type_} {{d}}, {{0}}, {{1}};", sources, type_), np.array(right, NUMPY[type_]))


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract_and_insert(type_):
    rng = np.random.default_rng(9)
    a, b = integers(type_, 10), integers(type_, 11)
    start = rng.integers(0, 70, len(a)).astype(np.uint32)
    length = rng.integers(0, 70, len(a)).astype(np.uint32)
    bits, signed = np.iinfo(NUMPY[type_]).bits, type_[0] == "s"

    def extract(x: int, at: int, size: int) -> int:
        size_in = min(size, bits - at) if at < bits else 0
        field = (x % 2**bits >> at) & (2**size_in - 1)
        top = x % 2**bits >> min(at + size - 1, bits - 1) & 1 if size else 0
        return field - (2**size_in if signed and top else 0)

    want = [extract(int(x), int(s), int(n)) for x, s, n in zip(a, start, length, strict=True)]
    got = evaluate(f"bfe.{type_} {{d}}, {{0}}, {{1}}, {{2}};", [(type_, a), ("u32", start), ("u32", length)], type_)
    same_bits(got, np.array(want, NUMPY[type_]))

    unsigned = f"u{bits}"
    x, y = a.view(NUMPY[unsigned]), b.view(NUMPY[unsigned])
    mask = [((2 ** int(n) - 1) << int(s)) % 2**bits for s, n in zip(start, length, strict=True)]
    want = [(int(q) & ~m) | ((int(p) << int(s)) & m) for p, q, s, m in zip(x, y, start, mask, strict=True)]
    instruction = f"mov.u32 %r40, {{2}}; bfi.b{bits} {{d}}, {{0}}, {{1}}, %r40, {{3}};"
    sources = [(unsigned, x), (unsigned, y), ("u32", start), ("u32", length)]
    same_bits(evaluate(instruction, sources, unsigned), np.array(want, NUMPY[unsigned]))


def test_bit_counting_and_reversal():
    a = integers("u32", 12)
    text = [f"{int(x):032b}" for x in a]
    expected = {
        "popc.b32": [t.count("1") for t in text],
        "clz.b32": [32 - len(t.lstrip("0")) for t in text],
        "brev.b32": [int(t[::-1], 2) for t in text],
        "bfind.u32": [(len(t.lstrip("0")) - 1) % 2**32 for t in text],
        "not.b32": [~int(x) % 2**32 for x in a],
        "cnot.b32": [int(x == 0) for x in a],
    }
    for name, want in expected.items():
        same_bits(evaluate(f"{name} {{d}}, {{0}};", [("u32", a)], "u32"), np.array(want, np.uint32))


def test_lop3_is_its_truth_table():
    a, b, c = (integers("u32", seed) for seed in (13, 14, 15))
    for table in (0xE8, 0x96, 0xCA, 0x01):
        got = evaluate(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", [("u32", a), ("u32", b), ("u32", c)], "u32")
        index = [(((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1)) for i in range(32)]
        want = sum((table >> bit.astype(np.int64) & 1) << i for i, bit in enumerate(index))
        same_bits(got, want)


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


def test_funnel_shift():
    low, high, amount = integers("u32", 19), integers("u32", 20), np.arange(256, dtype=np.uint32) % 40
    both = [(int(h) << 32) | int(x) for x, h in zip(low, high, strict=True)]
    sources = [("u32", low), ("u32", high), ("u32", amount)]
    for name, want in {
        "shf.l.wrap": [(v << (int(n) & 31)) >> 32 & 0xFFFFFFFF for v, n in zip(both, amount, strict=True)],
        "shf.r.wrap": [(v >> (int(n) & 31)) & 0xFFFFFFFF for v, n in zip(both, amount, strict=True)],
        "shf.r.clamp": [(v >> min(int(n), 32)) & 0xFFFFFFFF for v, n in zip(both, amount, strict=True)],
    }.items():
        same_bits(evaluate(f"{name}.b32 {{d}}, {{0}}, {{1}}, {{2}};", sources, "u32"), np.array(want, np.uint32))


# -------------------------------------------------------------------- floating point


def exactly_rounded(value: Fraction, dtype: np.dtype) -> object:
    """The value of `dtype` nearest to a fraction, ties to even: a first guess or its neighbour."""
    guess = np.array(float(value)).astype(dtype)
    if not np.isfinite(guess):
        return guess
    bits = f"i{dtype.itemsize}"
    around = [(guess.view(bits) + step).view(dtype) for step in (-1, 0, 1)]
    if guess == 0:
        tiny = np.array(1, bits).view(dtype)
        around = [-tiny, guess, tiny]
    finite = [v for v in around if np.isfinite(v)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(bits)) & 1))


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
def test_fma_rounds_once(type_):
    """Operands are chosen so that the sum lies near a tie, where rounding twice goes wrong."""
    dtype = np.dtype(NUMPY[type_])
    rng = np.random.default_rng(21)
    digits = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}[type_]
    count = 1000
    a = (1 + rng.integers(0, 2 ** (digits - 1), count) * 2.0 ** (1 - digits)).astype(dtype)
    b = (1 + rng.integers(0, 2 ** (digits - 1), count) * 2.0 ** (1 - digits)).astype(dtype)
    scale = 2.0 ** -rng.integers(-digits, 2 * digits, count)
    c = (rng.choice([-1, 1], count) * scale * (1 + rng.integers(0, 4, count) / 4)).astype(dtype)
    got = np.concatenate([
        evaluate(f"fma.rn.{type_} {{d}}, {{0}}, {{1}}, {{2}};",
                 [(type_, a[part]), (type_, b[part]), (type_, c[part])], type_)
        for part in (slice(0, 500), slice(500, 1000))
    ])  # fmt: skip
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    same_bits(got, np.array([exactly_rounded(v, dtype) for v in exact], dtype))


def test_fma_f32_of_a_known_double_rounding():
    # The exact sum is just above a tie of float32; float64 would round it to the tie, which goes down.
    a, b, c = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2**-60)
    got = evaluate("fma.rn.f32 {d}, {0}, {1}, {2};", [("f32", np.array([v])) for v in (a, b, c)], "f32")
    assert got[0] == np.float32(1 + 2**-11 + 2**-23)


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_float_arithmetic_rounds_to_nearest(name, function, type_):
    a, b = floats(type_, 22), floats(type_, 23)
    got = evaluate(f"{name}.{type_} {{d}}, {{0}}, {{1}};", [(type_, a), (type_, b)], type_)
    with np.errstate(all="ignore"):
        same_bits(got, function(a, b))


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
def test_min_and_max_prefer_numbers_and_order_zeros(type_):
    a, b = floats(type_, 24), floats(type_, 25)
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1.0], [-0.0, 0.0, 1.0, np.nan]
    for name, function in (("min", np.fmin), ("max", np.fmax)):
        got = evaluate(f"{name}.{type_} {{d}}, {{0}}, {{1}};", [(type_, a), (type_, b)], type_)
        np.testing.assert_array_equal(got.astype(float), function(a.astype(float), b.astype(float)))
        assert np.signbit(got[:2].astype(float)).all() == (name == "min")
        propagated = evaluate(f"{name}.NaN.{type_} {{d}}, {{0}}, {{1}};", [(type_, a), (type_, b)], type_)
        either = np.isnan(a.astype(float)) | np.isnan(b.astype(float))
        np.testing.assert_array_equal(np.isnan(propagated.astype(float)), either)


def test_flush_to_zero_applies_to_inputs_and_outputs():
    tiny = np.float32(2.0**-127)
    a = np.array([tiny, -tiny, 2.0**-100, 1.0], np.float32)
    b = np.array([1.0, 1.0, 2.0**-40, 2.0**-130], np.float32)
    sources = [("f32", a), ("f32", b)]
    same_bits(evaluate("mul.ftz.f32 {d}, {0}, {1};", sources, "f32"), np.array([0.0, -0.0, 0.0, 0.0], np.float32))
    same_bits(evaluate("mul.f32 {d}, {0}, {1};", sources, "f32"), a * b)
    compared = evaluate("setp.eq.ftz.f32 {d}, {0}, 0f00000000;", [("f32", a)], "pred")
    np.testing.assert_array_equal(compared, [1, 1, 0, 0])


def test_saturation_clamps_and_maps_nan_to_zero():
    a = np.array([-1.0, 0.25, 3.0, np.nan], np.float32)
    got = evaluate("add.sat.f32 {d}, {0}, 0f00000000;", [("f32", a)], "f32")
    same_bits(got, np.array([0.0, 0.25, 1.0, 0.0], np.float32))


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_packed_arithmetic_is_two_halves(half):
    a, b, c = (floats(half, seed).view(np.uint32) for seed in (26, 27, 28))
    a_half, b_half = a.view(NUMPY[half]), b.view(NUMPY[half])
    with np.errstate(all="ignore"):
        for name, function in (("add", np.add), ("mul", np.multiply)):
            got = evaluate(f"{name}.{half}x2 {{d}}, {{0}}, {{1}};", [("u32", a), ("u32", b)], f"{half}x2")
            same_bits(got.view(NUMPY[half]), function(a_half, b_half))
    packed = evaluate(f"fma.rn.{half}x2 {{d}}, {{0}}, {{1}}, {{2}};", [("u32", v) for v in (a, b, c)], f"{half}x2")
    single = evaluate(
        f"fma.rn.{half} {{d}}, {{0}}, {{1}}, {{2}};", [(half, v.view(NUMPY[half])) for v in (a, b, c)], half
    )
    same_bits(packed.view(NUMPY[half]), single)


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_functions(type_):
    a = np.abs(floats(type_, 29))
    a[::2] += NUMPY[type_](0.25)
    with np.errstate(all="ignore"):
        expected = {"sqrt.rn": np.sqrt(a), "rcp.rn": 1 / a}
        if type_ == "f32":
            wide = a.astype(np.float64)
            expected |= {
                "rsqrt.approx": 1 / np.sqrt(wide),
                "ex2.approx": np.exp2(wide),
                "lg2.approx": np.log2(wide),
            }
        for name, want in expected.items():
            same_bits(evaluate(f"{name}.{type_} {{d}}, {{0}};", [(type_, a)], type_), want.astype(a.dtype))


def test_signs_are_bits():
    a = floats("f32", 30)
    bits = a.view(np.uint32)
    for name, want in (("neg", bits ^ 0x80000000), ("abs", bits & 0x7FFFFFFF)):
        got = evaluate(f"{name}.f32 {{d}}, {{0}};", [("f32", a)], "f32")
        np.testing.assert_array_equal(got.view(np.uint32), want.astype(np.uint32))


# -------------------------------------------------------------------- comparison, selection, conversion


def test_comparisons_of_floats_and_nan():
    a, b = floats("f32", 31), floats("f32", 32)
    b[::5] = a[::5]
    unordered = np.isnan(a) | np.isnan(b)
    with np.errstate(invalid="ignore"):
        expected = {
            "eq": a == b, "ne": (a != b) & ~unordered, "lt": a < b, "ge": a >= b, "equ": (a == b) | unordered,
            "neu": a != b, "ltu": (a < b) | unordered, "gtu": (a > b) | unordered, "num": ~unordered,
            "nan": unordered,
        }  # fmt: skip
    for relation, want in expected.items():
        got = evaluate(f"setp.{relation}.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], "pred")
        np.testing.assert_array_equal(got, want, err_msg=relation)


def test_integer_comparisons_know_their_sign_and_combine():
    a, b = integers("s32", 33), integers("s32", 34)
    sources = [("s32", a), ("s32", b)]
    np.testing.assert_array_equal(evaluate("setp.lt.s32 {d}, {0}, {1};", sources, "pred"), a < b)
    unsigned = a.view(np.uint32) < b.view(np.uint32)
    np.testing.assert_array_equal(evaluate("setp.lt.u32 {d}, {0}, {1};", sources, "pred"), unsigned)
    both = evaluate("setp.gt.s32 %p2, {0}, 0; setp.lt.and.s32 {d}, {0}, {1}, %p2;", sources, "pred")
    np.testing.assert_array_equal(both, (a < b) & (a > 0))
    second = evaluate("setp.lt.s32 %p2|{d}, {0}, {1};", sources, "pred")
    np.testing.assert_array_equal(second, a >= b)


def test_selection_and_packing():
    a, b = integers("u32", 35), integers("u32", 36)
    sources = [("u32", a), ("u32", b)]
    got = evaluate("setp.lt.u32 %p2, {0}, {1}; selp.b32 {d}, {0}, {1}, %p2;", sources, "u32")
    np.testing.assert_array_equal(got, np.minimum(a, b))
    swapped = evaluate("mov.b32 {{%h10, %h11}}, {0}; mov.b32 {d}, {{%h11, %h10}};", sources, "u32")
    np.testing.assert_array_equal(swapped, (a >> 16) | (a << 16))
    joined = evaluate("mov.b64 {d}, {{{0}, {1}}};", sources, "u64")
    np.testing.assert_array_equal(joined, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_division_rounds_to_nearest(type_):
    a, b = floats(type_, 22), floats(type_, 23)
    got = evaluate(f"div.rn.{type_} {{d}}, {{0}}, {{1}};", [(type_, a), (type_, b)], type_)
    with np.errstate(all="ignore"):
        same_bits(got, a / b)


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("f16", "f32"),
        ("bf16", "f32"),
        ("f64", "f32"),
        ("f32", "f16"),
        ("f64", "f16"),
        ("f32", "bf16"),
        ("f32", "f64"),
    ],
)
def test_float_conversions_round_to_nearest_even(source, to):
    a = floats(source, 37)
    rounding = "" if (source, to) in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64")) else ".rn"
    got = evaluate(f"cvt{rounding}.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
    with np.errstate(all="ignore"):
        same_bits(got, a.astype(NUMPY[to]))


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_directed_conversions_bracket_the_value(to):
    a = np.random.default_rng(38).standard_normal(512).astype(np.float32)
    toward_zero = evaluate(f"cvt.rz.{to}.f32 {{d}}, {{0}};", [("f32", a)], to)
    assert (np.abs(toward_zero.astype(np.float32)) <= np.abs(a)).all()
    nearest = a.astype(NUMPY[to]).astype(np.float32)
    step = (toward_zero.view(np.uint16) + 1).astype(np.uint16).view(NUMPY[to]).astype(np.float32)
    assert ((nearest == toward_zero.astype(np.float32)) | (nearest == step)).all()
    assert (np.abs(step) > np.abs(a)).all()


def test_conversion_to_pairs_and_relu():
    a, b = floats("f32", 39), floats("f32", 40)
    for half in ("f16", "bf16"):
        got = evaluate(f"cvt.rn.{half}x2.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], f"{half}x2")
        with np.errstate(all="ignore"):
            same_bits(got.view(NUMPY[half]), np.stack([b, a], 1).astype(NUMPY[half]).reshape(-1))


def test_conversions_to_integers_truncate_clamp_and_extend():
    a = np.array([1.5, -1.5, 2.5, 3e9, -3e9, np.nan, 1e30, -0.5], np.float32)
    got = evaluate("cvt.rzi.s32.f32 {d}, {0};", [("f32", a)], "s32")
    np.testing.assert_array_equal(got, [1, -1, 2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0])
    got = evaluate("cvt.rni.s64.f32 {d}, {0};", [("f32", a)], "s64")
    np.testing.assert_array_equal(got, [2, -2, 2, 3 * 10**9, -3 * 10**9, 0, 2**63 - 1, 0])
    small = integers("s32", 41)
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 {d}, {0};", [("s32", small)], "s64"), small)
    np.testing.assert_array_equal(evaluate("cvt.s32.s8 {d}, {0};", [("s32", small)], "s32"), small.astype(np.int8))
    np.testing.assert_array_equal(evaluate("cvt.u64.u32 {d}, {0};", [("s32", small)], "u64"), small.view(np.uint32))
    same_bits(evaluate("cvt.rn.f32.s32 {d}, {0};", [("s32", small)], "f32"), small.astype(np.float32))


# -------------------------------------------------------------------- what is not known


def test_an_unknown_opcode_quotes_its_line():
    kernel = snippet("    wgmma.fence.sync.aligned;")
    with pytest.raises(EmulatorError, match=r"PTX line 13: wgmma\.fence\.sync\.aligned;") as caught:
        Device().launch(kernel, 1, 32, [])
    assert caught.value.check == "unknown instruction"


@pytest.mark.parametrize(
    "line",
    [
        "add.rz.f32 %f1, %f2, %f3;",
        "add.cc.u32 %r1, %r2, %r3;",
        "cp.async.bulk.commit_group;",
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
    ],
)
def test_an_unknown_variant_of_a_known_opcode_is_refused(line):
    with pytest.raises(EmulatorError, match="unknown instruction"):
        Device().launch(snippet(line), 1, 32, [])
