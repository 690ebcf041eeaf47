"""Execute stmatrix and ldmatrix: a warp moves 8x8 matrices of 16-bit elements. Triton changes layouts with them.

Lane 8 m + r has the address of row r of matrix m. Lane l has two elements of row l // 4, 2 (l % 4) and the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .accesses import _items, address_reader, load_bytes, store_bytes, targets
from .instructions import Runner, builds, unsupported
from .parser import Instruction
from .threads import WARP, Array, Mask, bits_reader

if TYPE_CHECKING:
    from .machine import Launch

ROW_BYTES, ROWS = 16, 8
FORMS = "sync aligned m8n8 x1 x2 x4 trans shared"


@builds("stmatrix", FORMS)
def _store_matrices(ins: Instruction) -> Runner:
    count, transposed = _form(ins)
    address = address_reader(ins, ins.operands[0])
    sources = [bits_reader(ins, item, 4) for item in _items(ins.operands[1])]

    def run(launch: Launch, active: Mask) -> None:
        storing = _row_lanes(launch, ins, active, count)
        values = np.stack([launch.threads.everywhere(source(launch.threads)) for source in sources])
        halves = np.ascontiguousarray(values.astype(np.uint32)).view(np.uint16).reshape(count, -1, 2)
        first, column = (storing // WARP * WARP)[:, None], np.arange(ROWS)[None, :]
        matrix, row = (storing % WARP // ROWS)[:, None], (storing % ROWS)[:, None]
        a, b = (column, row) if transposed else (row, column)
        data = np.ascontiguousarray(halves[matrix, first + 4 * a + b // 2, b % 2]).view(np.uint8)
        for target in targets(launch, ins, address(launch), storing, ROW_BYTES, "shared"):
            store_bytes(launch, ins, target, data[target.picked])

    return run


@builds("ldmatrix", FORMS)
def _load_matrices(ins: Instruction) -> Runner:
    count, transposed = _form(ins)
    destinations, address = _items(ins.operands[0]), address_reader(ins, ins.operands[1])

    def run(launch: Launch, active: Mask) -> None:
        reading = _row_lanes(launch, ins, active, count)
        (target,) = targets(launch, ins, address(launch), reading, ROW_BYTES, "shared")
        rows = np.ascontiguousarray(load_bytes(launch, ins, target, ROW_BYTES)).view(np.uint16)
        matrices = rows.reshape(-1, count, ROWS, ROWS)  # warp, matrix, row, column
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
        lanes = launch.threads.indices(active)
        for matrix, destination in enumerate(destinations):
            launch.threads.set_lanes(destination.index, pairs[:, matrix].reshape(-1), lanes)

    return run


def _form(ins: Instruction) -> tuple[int, bool]:
    """Return the number of matrices, and whether they are transposed in memory."""
    count = next((int(m[1:]) for m in ins.modifiers if m in ("x1", "x2", "x4")), 0)
    if not count or not {"m8n8", "shared", "b16"} <= {*ins.modifiers, ins.type}:
        raise unsupported(ins)
    return count, "trans" in ins.modifiers


def _row_lanes(launch: Launch, ins: Instruction, active: Mask, count: int) -> Array:
    """Return the lanes that have the addresses of the rows; fail unless whole warps take part."""
    lanes = launch.threads.indices(active)
    if len(lanes) % WARP or (lanes.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
        launch.fail("absent lane", "not all lanes of a warp take part", ins, int(lanes[0]))
    return lanes[lanes % WARP < ROWS * count]
