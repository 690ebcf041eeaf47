"""Execute instructions on bit patterns: logic, shifts, fields, counts, permutation, functions by truth table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .formats import RAW
from .instructions import Runner, builds, elementwise, unsupported
from .parser import TYPE_BYTES, Instruction
from .threads import Array

_LOGIC: dict[str, Any] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}  # fmt: skip


@builds("and or xor not cnot")
def _logic(ins: Instruction) -> Runner:
    return elementwise(ins, _LOGIC[ins.opcode], [ins.type] * (len(ins.operands) - 1))


@builds("lop3")
def _lop3(ins: Instruction) -> Runner:
    table = ins.operands[4].value

    def lookup(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a & b & c)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(replace(ins, operands=ins.operands[:4]), lookup, [ins.type] * 3)


def _shift_left(value: Array, amount: Array) -> Array:
    """Shift left; an amount beyond the width gives 0 as in PTX, where NumPy's result is undefined."""
    bits = 8 * value.dtype.itemsize
    shifted = value << np.minimum(amount, bits - 1).astype(value.dtype)
    return np.where(amount >= bits, value.dtype.type(0), shifted)


def _shift_right(value: Array, amount: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, bits - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(amount >= bits, value.dtype.type(0), shifted)


@builds("shl shr")
def _shift(ins: Instruction) -> Runner:
    return elementwise(ins, _shift_left if ins.opcode == "shl" else _shift_right, [ins.type, "u32"])


@builds("shf", "l r wrap clamp")
def _funnel_shift(ins: Instruction) -> Runner:
    left, wrap = "l" in ins.modifiers, "wrap" in ins.modifiers

    def shift(low: Array, high: Array, amount: Array) -> Array:
        amount = ((amount & np.uint32(31)) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return (((both << amount) >> np.uint64(32)) if left else (both >> amount)).astype(np.uint32)

    return elementwise(ins, shift, ["b32"] * 3)


# -------------------------------------------------------------------- fields and counts


def _extract(value: Array, start: Array, length: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    # Move the field to the top and back down: the second shift brings in zeros or the sign.
    end = np.minimum(start + length, bits)
    width = np.maximum(end - start, 0)
    field = _shift_right(_shift_left(value, bits - end), bits - width)
    beyond = _shift_right(value, np.int64(bits - 1)) if value.dtype.kind == "i" else value.dtype.type(0)
    return np.where(length == 0, value.dtype.type(0), np.where(start >= bits, beyond, field))


def _insert(value: Array, into: Array, start: Array, length: Array) -> Array:
    start, length = start & np.uint32(255), length & np.uint32(255)
    one = np.ones_like(value)
    mask = _shift_left(_shift_left(one, length) - one, start)
    return (into & ~mask) | (_shift_left(value, start) & mask)


def _bit_length(a: Array) -> Array:
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < 8 * a.dtype.itemsize:
            a = a | (a >> a.dtype.type(shift))
    return np.bitwise_count(a).astype(np.uint32)


def _reverse_bits(a: Array) -> Array:
    result, one = np.zeros_like(a), a.dtype.type(1)
    for bit in range(8 * a.dtype.itemsize):
        result = (result << one) | ((a >> a.dtype.type(bit)) & one)
    return result


def _find_highest(a: Array) -> Array:
    """Return the position of the highest set bit, or for a negative number of the highest bit unlike its sign."""
    return _bit_length(np.where(a < 0, ~a, a).view(RAW[a.dtype.itemsize])) - np.uint32(1)


@builds("bfe bfi bfind brev clz popc", "shiftamt")
def _bit_field(ins: Instruction) -> Runner:
    type_, bits = ins.type, 8 * TYPE_BYTES[ins.type]
    distance = lambda a: np.where((a == 0) | (a == -1), ~np.uint32(0), np.uint32(bits - 1) - _find_highest(a))  # noqa: E731
    table: dict[str, Any] = {
        "bfe": (_extract, [type_, "u32", "u32"], type_),
        "bfi": (_insert, [type_, type_, "u32", "u32"], type_),
        "bfind": (distance if "shiftamt" in ins.modifiers else _find_highest, [type_], "u32"),
        "brev": (_reverse_bits, [type_], type_),
        "clz": (lambda a: np.uint32(bits) - _bit_length(a), [type_], "u32"),
        "popc": (np.bitwise_count, [type_], "u32"),
    }
    function, types, to = table[ins.opcode]
    return elementwise(ins, function, types, to)


@builds("prmt")
def _permute_bytes(ins: Instruction) -> Runner:
    if ins.modifiers != ("b32",):
        raise unsupported(ins)

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for position in range(4):
            choice = (selector >> np.uint32(4 * position)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32)
            byte = byte & np.uint32(255)
            replicated = (byte >> np.uint32(7)) * np.uint32(255)  # the fourth bit of a choice replicates the sign
            result = result | np.where(choice & np.uint32(8), replicated, byte) << np.uint32(8 * position)
        return result

    return elementwise(ins, permute, ["b32"] * 3)
