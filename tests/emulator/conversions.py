"""Conversions between number formats, and between the addresses of state spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import formats
from .arithmetic import Runner, builds, elementwise, is_float, unsupported
from .parser import TYPE_BYTES, Instruction
from .threads import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW, Array


@builds("cvta")
def _convert_address(ins: Instruction) -> Runner:
    space = next(m.split("::")[0] for m in ins.modifiers if m != "to")
    base = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0))
    change = np.subtract if "to" in ins.modifiers else np.add
    return elementwise(ins, lambda a: change(a, base), ["u64"], "u64")


@builds("cvt")
def _convert(ins: Instruction) -> Runner:
    to, source = [m for m in ins.modifiers if m in TYPE_BYTES]
    if to.endswith("x2"):
        half = to.removesuffix("x2")
        relu = "relu" in ins.modifiers

        def pair(high: Array, low: Array) -> Array:
            if relu:
                high, low = (formats.maximum(v, np.float32(0)) for v in (high, low))
            high_bits, low_bits = (formats.encode(v, half).astype(np.uint32) for v in (high, low))
            return (high_bits << np.uint32(16)) | low_bits

        if not {"rn"} & set(ins.modifiers):
            raise unsupported(ins, "directed rounding to a pair")
        return elementwise(ins, pair, [source] * 2, to)
    return elementwise(ins, _conversion(ins, to, source), [source], to)


_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _conversion(ins: Instruction, to: str, source: str) -> Callable[[Array], Array]:
    mode = next((m for m in ins.modifiers if m in ("rz", "rm", "rp", "rna", "rs")), None)
    integral = next((_TO_INTEGRAL[m] for m in ins.modifiers if m in _TO_INTEGRAL), None)
    if mode in ("rna", "rs") or (mode and not is_float(to)) or to == "tf32":
        raise unsupported(ins, "rounding mode")
    if not is_float(to):
        if not is_float(source):
            return _saturate(to) if "sat" in ins.modifiers else lambda a: a.astype(formats.VALUE[to])
        saturate = _saturate(to)
        return lambda a: saturate(np.where(np.isnan(a), 0, integral(a.astype(np.float64))))

    def to_float(values: Array) -> Array:
        if not is_float(source):
            values = values.astype(np.float64)
        if "ftz" in ins.modifiers and source == "f32":
            values = formats.flush_subnormals(values, "f32")
        if integral:
            values = integral(values)
        if "sat" in ins.modifiers:
            values = np.fmin(np.fmax(values, values.dtype.type(0)), values.dtype.type(1))
        if "relu" in ins.modifiers:
            values = formats.maximum(values, values.dtype.type(0))
        if mode:
            values = formats.round_directed(values, to, mode)
        if "ftz" in ins.modifiers and to == "f32":
            values = formats.flush_subnormals(values.astype(np.float32), "f32")
        return values

    return to_float


def _saturate(to: str) -> Callable[[Array], Array]:
    """Clamp to the range of an integer type; the upper end of a 64-bit range is not a float64."""
    value_type = formats.VALUE[to]
    low, high = np.iinfo(value_type).min, np.iinfo(value_type).max

    def saturate(values: Array) -> Array:
        inside = (values >= low) & (values < high)
        ends = np.where(values >= high, value_type(high), value_type(low))
        return np.where(inside, np.where(inside, values, 0).astype(value_type), ends)

    return saturate


@builds("mapa")
def _map_to_rank(ins: Instruction) -> Runner:
    """The address of another block's copy of a shared variable, see RANK_SHIFT."""

    def move(address: Array, rank: Array) -> Array:
        offset = address & address.dtype.type((1 << RANK_SHIFT) - 1)
        window = address.dtype.type(0) if address.dtype == np.uint32 else address.dtype.type(SHARED_WINDOW)
        return (
            offset | window | ((rank.astype(address.dtype) + address.dtype.type(1)) << address.dtype.type(RANK_SHIFT))
        )

    return elementwise(ins, move, [ins.type, "u32"])


@builds("isspacep")
def _is_space(ins: Instruction) -> Runner:
    low = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}[ins.modifiers[0].split("::")[0]]
    high = {0: SHARED_WINDOW, SHARED_WINDOW: LOCAL_WINDOW, LOCAL_WINDOW: 2 * LOCAL_WINDOW}[low]
    return elementwise(ins, lambda a: (a >= np.uint64(low)) & (a < np.uint64(high)), ["u64"], "pred")
