"""Parse numbers and lists of PTX."""

from __future__ import annotations

import re

FLOAT_BITS = re.compile(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")
TYPE_BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8,
    "b128": 16,
}  # fmt: skip


def split(text: str) -> list[str]:
    """Split at the commas that are outside of brackets and braces."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[\]{}])+", text)
    return [part.strip() for part in parts if part.strip()]


def number(text: str) -> int | float:
    if FLOAT_BITS.match(text):
        return int(text[2:], 16)
    if "." in text:
        return float(text)
    digits = text.rstrip("U").lstrip("+-")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8 if octal else 0)
    return -value if text.startswith("-") else value


def initial_bytes(text: str, type_: str) -> bytes:
    size = TYPE_BYTES[type_]
    values = [part.strip() for part in text.strip("{} \n\t").split(",")]
    return b"".join((number(value) & (256**size - 1)).to_bytes(size, "little") for value in values)
