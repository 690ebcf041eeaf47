"""A model of GPUs that are not here; nothing is measured.

Our bytes and times are the plan's. Those of others are what they are known to move, and launches and bytes over the
bandwidth of a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpu_bn.activations import Activation
from gpu_bn.bench.cases import Case
from gpu_bn.explanation import ITEMSIZES, geometry_of, works
from gpu_bn.gpu_model import copying
from gpu_bn.plan import DEVICES, THRESHOLDS, TIERS, Device, LaunchPlan, NoPlanError, Work, plan, plan_once

RESIDENT_POSITIONS = 100_000
"""About the most positions of a channel with which cuDNN and apex keep NHWC tensors of float16 on chip."""


FUSED = ("", "+relu", "+add+relu")
"""What may be fused with an operation, in the order of the columns of :class:`Traffic`."""
Moved = tuple[int, int]
"""Passes over a tensor, and over a bit mask."""


class Traffic(NamedTuple):
    """What a library moves, by what is fused with the operation; see :data:`FUSED`."""

    name: str
    forward: tuple[Moved, Moved, Moved]
    backward: tuple[Moved, Moved, Moved]

    def bytes(self, case: Case) -> int | None:
        """Return a case's bytes; ``None`` if the table does not say."""
        operation = case.operation
        if not operation.training:
            return None
        table = self.forward if operation.direction == "forward" else self.backward
        tensors, masks = table[FUSED.index(str(operation).removeprefix(operation.direction))]
        return tensors * case.bytes + masks * (math.prod(case.shape) // 8)


TRAFFIC = {
    "unfused": Traffic("separate elementwise operations", ((10, 0), (12, 0), (15, 0)), ((27, 0), (30, 0), (30, 0))),
    "torch": Traffic("PyTorch's own kernels, ReLU and sum apart", ((3, 0), (5, 0), (8, 0)), ((5, 0), (8, 0), (8, 0))),
    "cudnn": Traffic("cuDNN, NHWC, not resident", ((3, 0), (3, 1), (4, 1)), ((5, 0), (5, 2), (6, 2))),
    "cudnn resident": Traffic("cuDNN and apex, NHWC, resident", ((2, 0), (2, 1), (3, 1)), ((3, 0), (3, 1), (4, 1))),
}
"""Counted by hand, not measured: PyTorch 2.14's and apex's in their sources, cuDNN's by descriptions of its kernels.
Caches are not counted. Backward by separate operations is an estimate."""


@dataclass(frozen=True)
class Modelled:
    """One case on one device.

    Attributes:
        plan: what we would launch.
        floor_bytes: every tensor read and written once.
        tiers: bytes that reach the memory, for each tier that can serve the case if it is forced.
        torch_bytes, cudnn_bytes: what the others' kernels ask for; ``None`` if it is not known.
    """

    case: Case
    device: Device
    plan: LaunchPlan
    floor_bytes: int
    tiers: dict[str, int]
    torch_bytes: int | None
    cudnn_bytes: int | None

    @property
    def tier(self) -> str:
        """The plan's tier; ``one pass`` in evaluation."""
        return self.plan.tier if self.case.operation.training else "one pass"

    def seconds(self, asked: int | None, launches: int = 1) -> float | None:
        """Estimate the time of another's kernels that ask for so many bytes.

        The cache serves what they ask for beyond the floor, as far as it would serve ours.
        """
        if asked is None:
            return None
        cached = min(max(asked - self.floor_bytes, 0), int(THRESHOLDS.usable_l2 * self.device.l2_bytes))
        return launches * THRESHOLDS.launch + copying(asked - cached, self.device, THRESHOLDS)

    @property
    def torch_seconds(self) -> float | None:
        """PyTorch's time: it launches statistics, then outputs; ReLU and the sum are launches of their own."""
        operation = self.case.operation
        return self.seconds(self.torch_bytes, 1 + operation.training + operation.relu + operation.residual)

    @property
    def cudnn_seconds(self) -> float | None:
        """cuDNN's time: it launches once."""
        return self.seconds(self.cudnn_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return what the report keeps."""
        return {
            "case": str(self.case), "device": self.device.name, "tier": self.tier, "launches": self.plan.launches,
            "floor_bytes": self.floor_bytes, "moved_bytes": self.plan.dram_bytes, "tiers": self.tiers,
            "seconds": self.plan.seconds, "torch_bytes": self.torch_bytes, "cudnn_bytes": self.cudnn_bytes,
            "torch_seconds": self.torch_seconds, "cudnn_seconds": self.cudnn_seconds,
        }  # fmt: skip


def model(cases: Iterable[Case], devices: Sequence[Device] = tuple(DEVICES.values())) -> list[Modelled]:
    """Model all cases on all devices."""
    return [modelled(case, device) for case in cases for device in devices]


def modelled(case: Case, device: Device) -> Modelled:
    """Model a case on a device."""
    work, training = work_of(case), case.operation.training
    found = plan(work, device) if training else plan_once(work, device)
    tiers = _tiers(work, device) if training else {"one pass": found.dram_bytes}
    torch_bytes, cudnn_bytes = TRAFFIC["torch"].bytes(case), _cudnn_bytes(case)
    return Modelled(case, device, found, work.floor_bytes, tiers, torch_bytes, cudnn_bytes)


def work_of(case: Case) -> Work:
    """Return what the planner needs to know of a case."""
    n, c, s = geometry_of(case.shape, case.layout)
    operation = case.operation
    activation = Activation.of("relu" if operation.relu else None)
    forward, backward = works(n, c, s, ITEMSIZES[case.dtype], activation, operation.residual, operation.training)
    return backward if operation.direction == "backward" else forward


def _tiers(work: Work, device: Device) -> dict[str, int]:
    found = {}
    for tier in TIERS:
        with suppress(NoPlanError):
            found[tier] = plan(work, device, tier).dram_bytes
    return found


def _cudnn_bytes(case: Case) -> int | None:
    if case.layout != "nhwc" or case.dtype == "float64":
        return None
    positions = math.prod(case.shape) // case.shape[1]
    resident = case.dtype == "float16" and positions <= RESIDENT_POSITIONS
    return TRAFFIC["cudnn resident" if resident else "cudnn"].bytes(case)
