"""Give the reasons for kernels with more than 128 registers a thread: an SM then holds one block of 256 threads.

The figures are those of the covering set. Of other groups, the record may have older sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from support.gates import Cell, Family, Group, Record

MANY = 128
"""The most registers of a thread with which an SM holds two blocks of 256 threads."""
HALF = "float16, bfloat16"


class Kernels(NamedTuple):
    """The kernels for some kinds of calls, in one layout, for elements of one size."""

    kind: str
    layout: str
    dtype: str

    @staticmethod
    def of(group: Group) -> Kernels:
        """Return the kernels to which a group belongs."""
        held = any(word in ("held", "cluster", "sizes") for word in group.kind.split())
        kind = KINDS.get(group.kind, HELD if held else STREAMED)
        ragged = "ragged" in group.kind.lower()
        layout = "ragged rows" if ragged else "channels-last" if group.columns else "rows"
        return Kernels(kind, layout, HALF if group.dtype in HALF.split(", ") else group.dtype)


KINDS = {
    "WHOLE": "whole batches",
    "RAGGED_ROWS": "whole batches",
    "GROUPS": "ghost batches",
    "MASKED_GROUPS": "masked ghost batches",
}
"""The kinds of calls of the CUDA kernels in words. The Triton kernels are told apart by whether they hold a channel."""
HELD, STREAMED = "hold a channel", "stream a channel"
DOUBLES = "elements and sums in double precision take two registers each; launch bounds ask for one block on an SM"
ADDRESSES = "with narrower vectors, addresses of up to 48"
GELU = "the derivative of GELU, of 16 elements at a time"
GELU_DOUBLES = "the derivative of GELU, of 8 elements at a time, two registers each"
REASONS = {
    "cuda": {
        Kernels("whole batches", "channels-last", "float64"): DOUBLES,
        Kernels("whole batches", "rows", "float64"): DOUBLES,
    },
    "triton": {
        Kernels(HELD, "channels-last", HALF): f"up to 48 elements a thread, and sums of 8 channels; {ADDRESSES}",
        Kernels(HELD, "channels-last", "float32"): f"up to 48 elements a thread, and sums of 4 channels; {ADDRESSES}",
        Kernels(HELD, "channels-last", "float64"): "up to 32 elements a thread, two registers each, and sums",
        Kernels(HELD, "ragged rows", HALF): "up to 48 elements a thread, and masks for vectors that rows share",
        Kernels(HELD, "ragged rows", "float32"): "up to 48 elements a thread, and masks for vectors that rows share",
        Kernels(HELD, "rows", HALF): f"up to 80 elements a thread; {ADDRESSES}",
        Kernels(HELD, "rows", "float32"): f"up to 64 elements a thread; {ADDRESSES}",
        Kernels(HELD, "rows", "float64"): "up to 32 elements a thread, two registers each",
        Kernels(STREAMED, "channels-last", HALF): GELU,
        Kernels(STREAMED, "channels-last", "float32"): GELU,
        Kernels(STREAMED, "channels-last", "float64"): GELU_DOUBLES,
        Kernels(STREAMED, "ragged rows", "float32"): GELU,
        Kernels(STREAMED, "rows", HALF): GELU,
        Kernels(STREAMED, "rows", "float32"): GELU,
        Kernels(STREAMED, "rows", "float64"): GELU_DOUBLES,
    },
}
"""The reasons by family and kernels, for exactly those that have more than ``MANY`` registers."""


def crowded(family: Family) -> dict[Kernels, list[tuple[Group, Cell]]]:
    """Return the recorded groups of all kernels of which some have more than ``MANY`` registers."""
    record, found = Record.read(family), dict[Kernels, list[tuple[Group, Cell]]]()
    for group in family.covering():
        if group in record.cells:
            found.setdefault(Kernels.of(group), []).append((group, record.cells[group]))
    many = {kernels for kernels, cells in found.items() if any(cell.registers > MANY for _, cell in cells)}
    return {kernels: found[kernels] for kernels in sorted(many)}


def table(family: Family) -> str:
    """Return the table of these kernels, in Markdown."""
    header = "kernels", "layout", "dtype", "most registers", "narrower vectors", f"groups above {MANY}", "reason"
    lines = [header, ("---",) * len(header)]
    for kernels, cells in crowded(family).items():
        full, narrow = ([cell for group, cell in cells if group.full is wanted] for wanted in (True, False))
        above = sum(cell.registers > MANY for _, cell in cells)
        numbers = _most(full), _most(narrow), f"{above} of {len(cells)}"
        lines.append((*kernels, *numbers, REASONS[family.name].get(kernels, "")))
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _most(cells: Iterable[Cell]) -> str:
    return str(max((cell.registers for cell in cells), default="-"))
