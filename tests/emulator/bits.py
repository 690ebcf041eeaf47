"""Instructions on bit patterns: shifts, fields, counting, permutation, functions given by a truth table."""

from __future__ import annotations

import numpy as np

from .arithmetic import Runner, builds, elementwise, unsupported
from .formats import RAW
from .parser import TYPE_BYTES, Instruction
from .threads import Array


@builds("lop3")
def _lop3(ins: Instruction) -> Runner:
    table = ins.operands[4].value

    def lookup(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a & b & c)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    plain = Instruction(ins.opcode, ins.modifiers, ins.operands[:4], ins.guard, ins.line, ins.text)
    return elementwise(plain, lookup, [ins.type] * 3)


def shift_left(value: Array, amount: Array) -> Array:
    """PTX clamps the amount; NumPy leaves amounts beyond the width undefined."""
    bits = 8 * value.dtype.itemsize
    shifted = value << np.minimum(amount, bits - 1).astype(value.dtype)
    return np.where(amount >= bits, value.dtype.type(0), shifted)


def shift_right(value: Array, amount: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, bits - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(amount >= bits, value.dtype.type(0), shifted)


@builds("shl", "shr")
def _shift(ins: Instruction) -> Runner:
    return elementwise(ins, shift_left if ins.opcode == "shl" else shift_right, [ins.type, "u32"])


@builds("shf")
def _funnel_shift(ins: Instruction) -> Runner:
    left, wrap = "l" in ins.modifiers, "wrap" in ins.modifiers

    def shift(low: Array, high: Array, amount: Array) -> Array:
        amount = (amount & np.uint32(31)) if wrap else np.minimum(amount, np.uint32(32))
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if left:
            return ((both << amount.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> amount.astype(np.uint64)).astype(np.uint32)

    return elementwise(ins, shift, ["b32"] * 3)


@builds("bfe", "bfi", "bfind", "brev", "clz", "popc")
def _bit_field(ins: Instruction) -> Runner:
    if ins.opcode == "bfe":
        return elementwise(ins, _extract, [ins.type, "u32", "u32"])
    if ins.opcode == "bfi":
        return elementwise(ins, _insert, [ins.type, ins.type, "u32", "u32"])
    bits = 8 * TYPE_BYTES[ins.type]
    raw = f"b{bits}"
    if ins.opcode == "brev":
        return elementwise(ins, _reverse_bits, [raw])
    if ins.opcode == "popc":
        return elementwise(ins, np.bitwise_count, [raw], "u32")
    if ins.opcode == "clz":
        return elementwise(ins, lambda a: np.uint32(bits) - _bit_length(a), [raw], "u32")
    if "shiftamt" in ins.modifiers:
        raise unsupported(ins)
    # bfind: the highest set bit, or the highest non-sign bit of a negative number.
    find = lambda a: _bit_length(np.where(a < 0, ~a, a).view(RAW[bits // 8])) - np.uint32(1)  # noqa: E731
    return elementwise(ins, find, [ins.type], "u32")


def _bit_length(a: Array) -> Array:
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < 8 * a.dtype.itemsize:
            a = a | (a >> a.dtype.type(shift))
    return np.bitwise_count(a).astype(np.uint32)


def _reverse_bits(a: Array) -> Array:
    result = np.zeros_like(a)
    one = a.dtype.type(1)
    for bit in range(8 * a.dtype.itemsize):
        result = (result << one) | ((a >> a.dtype.type(bit)) & one)
    return result


def _extract(value: Array, start: Array, length: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    start, length = start & np.uint32(255), length & np.uint32(255)
    signed = value.dtype.kind == "i"
    # Move the field to the top and back down: the second shift brings in zeros or the sign.
    end = np.minimum(start.astype(np.int64) + length, bits)
    width = np.maximum(end - start, 0)
    field = shift_right(shift_left(value, (bits - end).astype(np.uint32)), (bits - width).astype(np.uint32))
    beyond = shift_right(value, np.uint32(bits - 1)) if signed else value.dtype.type(0)
    return np.where(length == 0, value.dtype.type(0), np.where(start >= bits, beyond, field))


def _insert(value: Array, into: Array, start: Array, length: Array) -> Array:
    start, length = start & np.uint32(255), length & np.uint32(255)
    one = value.dtype.type(1)
    mask = shift_left(shift_left(value * value.dtype.type(0) + one, length) - one, start)
    return (into & ~mask) | (shift_left(value, start) & mask)


@builds("prmt")
def _permute_bytes(ins: Instruction) -> Runner:
    if ins.modifiers != ("b32",):
        raise unsupported(ins)

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for position in range(4):
            choice = (selector >> np.uint32(4 * position)) & np.uint32(15)
            shift = (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = (both >> shift).astype(np.uint32) & np.uint32(255)
            # The fourth selector bit replicates the byte's sign.
            replicated = (byte >> np.uint32(7)) * np.uint32(255)
            result = result | np.where(choice & np.uint32(8), replicated, byte) << np.uint32(8 * position)
        return result

    return elementwise(ins, permute, ["b32"] * 3)
