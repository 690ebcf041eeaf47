"""Execute conversions between number formats, and between the addresses of state spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import formats
from .formats import VALUE, is_float
from .instructions import Runner, builds, elementwise, unsupported
from .parser import TYPE_BYTES, Instruction
from .threads import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW, Array

_WINDOWS = {
    "global": (0, SHARED_WINDOW), "const": (0, SHARED_WINDOW),
    "shared": (SHARED_WINDOW, LOCAL_WINDOW), "local": (LOCAL_WINDOW, 2 * LOCAL_WINDOW),
}  # fmt: skip
_SPACES = "to global const local shared shared::cta shared::cluster"
_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvta", _SPACES)
def _convert_address(ins: Instruction) -> Runner:
    base = np.uint64(_WINDOWS[next(m.split("::")[0] for m in ins.modifiers if m != "to")][0])
    change = np.subtract if "to" in ins.modifiers else np.add
    return elementwise(ins, lambda a: change(a, base), ["u64"], "u64")


@builds("isspacep", _SPACES)
def _is_space(ins: Instruction) -> Runner:
    low, high = _WINDOWS[ins.modifiers[0].split("::")[0]]
    return elementwise(ins, lambda a: (a >= np.uint64(low)) & (a < np.uint64(high)), ["u64"], "pred")


@builds("mapa", "shared::cluster")
def _map_to_rank(ins: Instruction) -> Runner:
    """Build mapa: the address of a shared variable in another block of the cluster; see RANK_SHIFT."""
    type_ = VALUE[ins.type]
    window = type_(0 if "shared::cluster" in ins.modifiers else SHARED_WINDOW)
    offset, one = type_((1 << RANK_SHIFT) - 1), type_(1)

    def move(address: Array, rank: Array) -> Array:
        return (address & offset) | window | ((rank.astype(type_) + one) << type_(RANK_SHIFT))

    return elementwise(ins, move, [ins.type, "u32"])


@builds("cvt", "rn rz rm rp rni rzi rmi rpi ftz sat relu")
def _convert(ins: Instruction) -> Runner:
    to, source = [m for m in ins.modifiers if m in TYPE_BYTES]
    if to == "tf32":
        raise unsupported(ins)
    if to.endswith("x2"):
        return _convert_pair(ins, to.removesuffix("x2"), source)
    if is_float(to):
        return elementwise(ins, _to_float(ins, to, source), [source], to)
    if is_float(source):
        return elementwise(ins, _to_integer(ins, to, source), [source], to)
    whole = _clamp(to) if "sat" in ins.modifiers else lambda a: a.astype(VALUE[to])
    return elementwise(ins, whole, [source], to)


def _convert_pair(ins: Instruction, half: str, source: str) -> Runner:
    if source != "f32" or "rn" not in ins.modifiers:
        raise unsupported(ins)
    limit = formats.relu if "relu" in ins.modifiers else lambda v: v

    def pair(high: Array, low: Array) -> Array:
        high_bits, low_bits = (formats.encode(limit(v), half).astype(np.uint32) for v in (high, low))
        return (high_bits << np.uint32(16)) | low_bits

    return elementwise(ins, pair, ["f32"] * 2, f"{half}x2")


def _to_float(ins: Instruction, to: str, source: str) -> Callable[[Array], Array]:
    mode = next((m for m in ins.modifiers if m in ("rz", "rm", "rp")), None)
    integral = next((_TO_INTEGRAL[m] for m in ins.modifiers if m in _TO_INTEGRAL), None)
    flush = "ftz" in ins.modifiers
    if mode and to == "f64":
        raise unsupported(ins)

    def convert(values: Array) -> Array:
        if not is_float(source):
            values = _integer_to_double(values, exact=to == "f64")
        if flush and source == "f32":
            values = formats.flush_subnormals(values, "f32")
        if integral:
            values = integral(values)
        if "sat" in ins.modifiers:
            values = formats.saturate(values)
        if "relu" in ins.modifiers:
            values = formats.relu(values)
        if mode:
            values = formats.round_directed(values, to, mode)
        return formats.flush_subnormals(values.astype(np.float32), "f32") if flush and to == "f32" else values

    return convert


def _integer_to_double(values: Array, exact: bool) -> Array:
    """Convert to float64, rounded to nearest if ``exact``; else to odd, so that a second rounding stays correct."""
    if exact or values.dtype.itemsize < 8:
        return values.astype(np.float64)
    high, low = values >> values.dtype.type(32), values & values.dtype.type(0xFFFFFFFF)
    return formats.odd(*formats.two_sum(high.astype(np.float64) * 2.0**32, low.astype(np.float64)))


def _to_integer(ins: Instruction, to: str, source: str) -> Callable[[Array], Array]:
    integral = next(_TO_INTEGRAL[m] for m in ins.modifiers if m in _TO_INTEGRAL)
    clamp, bits, value_type = _clamp(to), 8 * TYPE_BYTES[to], VALUE[to]
    sign_bit = source == "f64" or bits == 64
    nan = value_type(np.iinfo(value_type).min or 1 << (bits - 1)) if sign_bit else value_type(0)

    def convert(values: Array) -> Array:
        if "ftz" in ins.modifiers:
            values = formats.flush_subnormals(values, source)
        return np.where(np.isnan(values), nan, clamp(integral(values.astype(np.float64))))

    return convert


def _clamp(to: str) -> Callable[[Array], Array]:
    """Return a function that clamps to an integer type's range. The largest 64-bit integers are no float64 numbers."""
    value_type = VALUE[to]
    low, high = np.iinfo(value_type).min, np.iinfo(value_type).max

    def clamp(values: Array) -> Array:
        inside = (values >= low) & (values < high)
        ends = np.where(values >= high, value_type(high), value_type(low))
        return np.where(inside, np.where(inside, values, 0).astype(value_type), ends)

    return clamp
