"""Predict the bytes and times of GPUs that are not here; nothing is measured.

Our bytes and times are those of the launch plan. The bytes of other libraries are what their kernels are known to move;
their times follow from launches and bytes over the bandwidth of a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import NamedTuple

from gpu_bn.activations import Activation
from gpu_bn.bench.cases import Case
from gpu_bn.cli.console import Table, megabytes, microseconds
from gpu_bn.explanation import ITEMSIZES, geometry_of, works
from gpu_bn.gpu_model import copy_seconds
from gpu_bn.plan import DEVICES, THRESHOLDS, TIERS, Device, NoPlanError, Work, plan, plan_once

RESIDENT_POSITIONS = 100_000
"""The approximate number of positions up to which cuDNN and apex keep a channel of float16 NHWC on chip."""
Moved = tuple[int, int]
"""The numbers of passes over a tensor and over a bit mask."""


class Traffic(NamedTuple):
    """The bytes that a library moves: with nothing fused, with ReLU, and with a residual and ReLU."""

    name: str
    forward: tuple[Moved, Moved, Moved]
    backward: tuple[Moved, Moved, Moved]

    def bytes(self, case: Case) -> int | None:
        """Return the bytes of a case; ``None`` for evaluation, which the table does not have."""
        operation = case.operation
        if not operation.training:
            return None
        table = self.forward if operation.direction == "forward" else self.backward
        tensors, masks = table[operation.relu + operation.residual]
        return tensors * case.bytes + masks * (math.prod(case.shape) // 8)


TRAFFIC = {
    "unfused": Traffic("separate elementwise operations", ((10, 0), (12, 0), (15, 0)), ((27, 0), (30, 0), (30, 0))),
    "torch": Traffic("PyTorch's own kernels, ReLU and sum apart", ((3, 0), (5, 0), (8, 0)), ((5, 0), (8, 0), (8, 0))),
    "cudnn": Traffic("cuDNN, NHWC, not resident", ((3, 0), (3, 1), (4, 1)), ((5, 0), (5, 2), (6, 2))),
    "cudnn resident": Traffic("cuDNN and apex, NHWC, resident", ((2, 0), (2, 1), (3, 1)), ((3, 0), (3, 1), (4, 1))),
}
"""The traffic counted by hand, not measured: in the sources of PyTorch 2.14 and apex, and in descriptions of cuDNN's
kernels. Caches are not counted. Backward by separate operations is an estimate."""
OTHERS = {"PyTorch native": "torch_seconds", "cuDNN": "cudnn_seconds"}
"""The other libraries with modelled times, and the field of :class:`Modelled` that holds these."""
NOTE = (
    "A model, nothing here was measured: launches of 2.5 us, and bytes that reach the memory over 88 % of the data "
    "sheet's bandwidth. Ours by the plan, also what idle SMs and the exchange of sums cost (gpu_bn/gpu_model.py). Of "
    "the others, what their kernels read and write (gpu_bn/bench/model.py), less what of it the cache may hold."
)


class Modelled:
    """The model of one case on one device; its fields go into the report.

    ``floor_bytes`` counts every tensor once. ``moved_bytes`` counts what our launches read from and write to the
    memory, ``tiers`` the same for each forced tier that can serve the case. ``torch_bytes`` and ``cudnn_bytes`` count
    what kernels request, also from caches; ``None`` if it is not known.
    """

    def __init__(self, case: Case, device: Device) -> None:
        work, operation = work_of(case), case.operation
        chosen = plan(work, device) if operation.training else plan_once(work, device)
        self.case, self.device = case, device.name
        self.tier = chosen.tier if operation.training else "one pass"
        self.launches, self.floor_bytes, self.moved_bytes = chosen.launches, work.floor_bytes, chosen.dram_bytes
        self.tiers = {} if operation.training else {self.tier: chosen.dram_bytes}
        for tier in TIERS if operation.training else ():
            with suppress(NoPlanError):
                self.tiers[tier] = plan(work, device, tier).dram_bytes
        self.seconds = chosen.seconds
        resident = case.dtype == "float16" and math.prod(case.shape) // case.shape[1] <= RESIDENT_POSITIONS
        cudnn = TRAFFIC["cudnn resident" if resident else "cudnn"]
        self.torch_bytes = TRAFFIC["torch"].bytes(case)
        self.cudnn_bytes = cudnn.bytes(case) if case.layout == "nhwc" and case.dtype != "float64" else None
        launches = 1 + operation.training + operation.relu + operation.residual  # statistics, then outputs
        self.torch_seconds = seconds_of(self.torch_bytes, work.floor_bytes, device, launches)
        self.cudnn_seconds = seconds_of(self.cudnn_bytes, work.floor_bytes, device)


def model(cases: Iterable[Case]) -> list[Modelled]:
    """Model each case on each device of :data:`gpu_bn.plan.DEVICES`."""
    return [Modelled(case, device) for case in cases for device in DEVICES.values()]


def seconds_of(requested: int | None, floor_bytes: int, device: Device, launches: int = 1) -> float | None:
    """Estimate the time of another library's kernels from the bytes that they request; ``None`` if not known.

    The cache serves the requests beyond the floor, as far as its usable share reaches.
    """
    if requested is None:
        return None
    cached = min(max(requested - floor_bytes, 0), int(THRESHOLDS.usable_l2 * device.l2_bytes))
    return launches * THRESHOLDS.launch + copy_seconds(requested - cached, device, THRESHOLDS)


def work_of(case: Case) -> Work:
    """Return the work of a case, as the planner describes it."""
    n, c, s = geometry_of(case.shape, case.layout)
    operation = case.operation
    activation = Activation.of("relu" if operation.relu else None)
    forward, backward = works(n, c, s, ITEMSIZES[case.dtype], activation, operation.residual, operation.training)
    return backward if operation.direction == "backward" else forward


# ------------------------------------------------------------------------------------------------------- tables
def model_tables(rows: Sequence[Modelled]) -> list[Table]:
    """Return the table of times on each device, and the table of bytes by tier on one of the devices."""
    if not rows:
        return []
    devices = list(dict.fromkeys(row.device for row in rows))
    lines: list[list[str] | str] = []
    for tensor, tensor_rows in groupby(rows, lambda row: row.case.tensor):
        lines.append(tensor)
        for operation, group in groupby(tensor_rows, lambda row: row.case.operation):
            by_device = list(group)
            times = [f"{microseconds(row.seconds)} {row.tier}" for row in by_device]
            lines.append([f"  {operation}", "gpu_bn", *times])
            for by, field in OTHERS.items():
                seconds = [getattr(row, field) for row in by_device]
                lines += [] if None in seconds else [[f"  {operation}", by, *map(microseconds, seconds)]]
    header = ["operation", "by", *(f"{device} (us)" for device in devices)]
    table = Table("Model: times on GPUs that are not here", header, lines, NOTE, keys=2)
    shown = devices[min(3, len(devices) - 1)]
    trained = [row for row in rows if row.device == shown and row.case.operation.training]
    return [table, *([_tiers_table(trained)] if trained else [])]


def _tiers_table(rows: Sequence[Modelled]) -> Table:
    lines = []
    for row in rows:
        columns = [*(row.tiers.get(tier) for tier in TIERS), row.torch_bytes, row.cudnn_bytes]
        cells = [f"{nbytes / row.floor_bytes:.2f}" if nbytes else "-" for nbytes in columns]
        cells[TIERS.index(row.tier)] += "*"
        lines.append([str(row.case), megabytes(row.floor_bytes), *cells])
    caption = (
        "As multiples of the floor (every tensor read and written once). By tier, what reaches the memory by the plan; "
        "* is chosen. Of the others, what their kernels ask for, whether or not the cache has it."
    )
    header = ["case", "floor (MB)", *TIERS, *OTHERS]
    return Table(f"Model: bytes by tier on {rows[0].device}", header, lines, caption)


def traffic_table() -> Table:
    """Return the table of :data:`TRAFFIC`."""

    def passes(moved: Moved) -> str:
        tensors, masks = moved
        return f"{tensors}" + ("" if not masks else "+m" if masks == 1 else f"+{masks}m")

    rows = [
        [row.name, *(f"{passes(f)} / {passes(b)}" for f, b in zip(row.forward, row.backward, strict=True))]
        for row in TRAFFIC.values()
    ]
    title = "What kernels read and write: passes over a tensor, forward / backward"
    return Table(title, ["by", "BN", "+ReLU", "+add+ReLU"], rows, "m: a bit mask. Caches are not counted.")
