"""Run single instructions on small inputs on the emulator."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from emulator import Device
from emulator.snippet import snippet

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")


NUMPY = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64,
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}").type
       for kind, letter in (("u", "u"), ("s", "i"), ("b", "u")) for bits in (8, 16, 32, 64)},
    "f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.uint32,
}  # fmt: skip


REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def evaluate(instruction: str, sources: list[tuple[str, np.ndarray]], to: str) -> np.ndarray:
    """Run an instruction with one thread per element and return the results.

    Args:
        instruction: the text, in which {0} {1} {2} stand for the sources and {d} for the result.
        sources: the type and the values of each source.
        to: the type of the result.
    """
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
    """Assert that two arrays have the same bits, where any NaN equals any NaN."""
    want = np.asarray(want).astype(got.dtype)
    both_nan = np.isnan(got.astype(float)) & np.isnan(want.astype(float))
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(np.where(both_nan, 0, got.view(bits)), np.where(both_nan, 0, want.view(bits)))


def integers(type_: str, seed: int, count: int = 256) -> np.ndarray:
    """Return random integers of all magnitudes, with the corner cases."""
    dtype, rng = np.dtype(NUMPY[type_]), np.random.default_rng(seed)
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    values >>= rng.integers(0, info.bits, count).astype(dtype)
    corners = np.array([0, 1, info.max, info.min, 2, 3, info.max - 1], dtype)
    values[: len(corners)] = rng.permutation(corners)
    return values


def floats(type_: str, seed: int, count: int = 512) -> np.ndarray:
    """Return random bit patterns with every exponent, subnormals, infinities and NaN, and some common numbers."""
    dtype, rng = np.dtype(NUMPY[type_]), np.random.default_rng(seed)
    patterns = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).view(dtype)
    patterns[::2] = rng.standard_normal(count // 2).astype(dtype)
    patterns[:6] = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]).astype(dtype)
    return patterns


def nearest(value: Fraction, dtype: np.dtype) -> object:
    """Return the value of a dtype that is nearest to a fraction, with ties to even: a first guess or its neighbour."""
    guess = np.array(float(value)).astype(dtype)
    bits = f"i{dtype.itemsize}"
    around = [(guess.view(bits) + step).view(dtype) for step in (-1, 0, 1)]
    if guess == 0:
        tiny = np.array(1, bits).view(dtype)
        around = [-tiny, guess, tiny]
    finite = [v for v in around if np.isfinite(v)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(bits)) & 1))
