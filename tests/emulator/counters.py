"""What a launch cost, per line and in all: instructions, bytes, sectors, bank conflicts, DRAM traffic."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .parser import Instruction, Kernel
from .threads import RANK_SHIFT, WARP

if TYPE_CHECKING:
    from .accesses import Target
    from .machine import Launch

Array = np.ndarray
SECTOR = 32
BANKS, BANK_BYTES = 32, 4


@dataclass
class Traffic:
    """Sums over the accesses of one kind. `units` are sectors in global and wavefronts in shared memory."""

    instructions: int = 0  # executed by warps
    bytes: int = 0
    units: int = 0
    ideal_units: int = 0

    def add(self, instructions: int, size: int, units: int, ideal: int) -> None:
        self.instructions += instructions
        self.bytes += size
        self.units += units
        self.ideal_units += ideal


@dataclass
class Footprint:
    """Which sectors of one allocation a launch has touched."""

    name: str
    loaded: Array
    stored: Array


@dataclass
class Report:
    """The counts of one launch."""

    kernel: Kernel
    issued: Array  # warp instructions per entry of kernel.code
    accesses: dict[tuple[int, str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    buffers: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    footprints: dict[int, Footprint] = field(default_factory=dict)
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0

    @property
    def warp_instructions(self) -> int:
        return int(self.issued.sum())

    def total(self, space: str, kind: str) -> Traffic:
        """All accesses of a kind ("load" or "store") to a space ("global", "shared", "local")."""
        total = Traffic()
        for (_, its_space, its_kind), traffic in self.accesses.items():
            if (its_space, its_kind) == (space, kind):
                total.add(traffic.instructions, traffic.bytes, traffic.units, traffic.ideal_units)
        return total

    def buffer(self, name: str, kind: str) -> Traffic:
        """The accesses of a kind to the buffer an argument names, e.g. buffer("x", "load")."""
        return self.buffers.get((name, kind), Traffic())

    def footprint_bytes(self, kind: str) -> int:
        """Distinct global memory touched, in whole sectors."""
        touched = (f.loaded if kind == "load" else f.stored for f in self.footprints.values())
        return SECTOR * int(sum(bits.sum() for bits in touched))

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond those a conflict-free layout would take."""
        both = (self.total("shared", "load"), self.total("shared", "store"))
        return sum(traffic.units - traffic.ideal_units for traffic in both)

    def lines(self) -> list[tuple[int, str, int, Traffic | None]]:
        """(PTX line, text, warp instructions, traffic) for every instruction that ran."""
        traffic: dict[int, Traffic] = {pc: t for (pc, _, _), t in self.accesses.items()}
        code = self.kernel.code
        ran = np.flatnonzero(self.issued).tolist()
        return [(code[pc].line, code[pc].text, int(self.issued[pc]), traffic.get(pc)) for pc in ran]


class L2:
    """A fully associative write-back cache of sectors with least-recently-used replacement."""

    def __init__(self, capacity_bytes: int, sector_bytes: int = SECTOR) -> None:
        self.capacity, self.sector = capacity_bytes // sector_bytes, sector_bytes
        self.lines: OrderedDict[int, bool] = OrderedDict()
        self.read_bytes = self.write_bytes = 0

    def access(self, addresses: Array, write: bool) -> None:
        lines = self.lines
        for line in (addresses // self.sector).tolist():
            if line in lines:
                lines.move_to_end(line)
                lines[line] |= write
                continue
            # A missed store does not read: the kernels of interest write whole sectors.
            self.read_bytes += 0 if write else self.sector
            lines[line] = write
            if len(lines) > self.capacity and lines.popitem(last=False)[1]:
                self.write_bytes += self.sector

    def flush(self) -> int:
        """Write everything back and forget it; returns the bytes written."""
        written = self.sector * sum(self.lines.values())
        self.write_bytes += written
        self.lines.clear()
        return written


class Counters:
    """Collects one launch's report."""

    def __init__(self, kernel: Kernel, l2: L2 | None) -> None:
        self.report = Report(kernel, np.zeros(len(kernel.code), np.int64))
        self.l2 = l2
        self._position = {id(ins): pc for pc, ins in enumerate(kernel.code)}
        self._before = (l2.read_bytes, l2.write_bytes) if l2 else (0, 0)

    def finish(self) -> Report:
        if self.l2:
            self.report.dram_read_bytes = self.l2.read_bytes - self._before[0]
            self.report.dram_write_bytes = self.l2.write_bytes - self._before[1]
        return self.report

    def access(self, launch: Launch, ins: Instruction, target: Target, size: int, kind: str) -> None:
        warp = target.lanes // WARP
        warps = 1 + int(np.count_nonzero(np.diff(warp)))
        total = size * len(target.lanes)
        if target.space == "global":
            units = self._sectors(target, warp, kind)
            per_warp = np.bincount(warp - warp[0])
            ideal = int((-(-per_warp * size // SECTOR)).sum())
            self.report.buffers[target.name, kind].add(warps, total, units, ideal)
        elif target.space == "shared":
            units, ideal = _wavefronts(target.lanes, target.offsets % launch.shared_stride, size)
        else:
            units = ideal = 0
        self.report.accesses[self._position[id(ins)], target.space, kind].add(warps, total, units, ideal)

    def _sectors(self, target: Target, warp: Array, kind: str) -> int:
        sectors = target.offsets // SECTOR
        key = (warp << 40) | sectors
        steps = np.diff(key)
        if len(steps) and steps.min() < 0:
            key = np.unique(key)
            sectors = key & ((1 << 40) - 1)
        else:
            sectors = sectors[np.concatenate([[True], steps != 0])]
        footprint = self.report.footprints.get(target.shadow_key)
        if footprint is None:
            count = len(target.memory) // SECTOR + 1
            footprint = Footprint(target.name, np.zeros(count, bool), np.zeros(count, bool))
            self.report.footprints[target.shadow_key] = footprint
        (footprint.loaded if kind == "load" else footprint.stored)[sectors] = True
        if self.l2:
            self.l2.access(target.shadow_key + sectors * SECTOR, kind == "store")
        return len(sectors)


def _wavefronts(lanes: Array, offsets: Array, size: int) -> tuple[int, int]:
    """Passes a shared access takes, and the passes it would take with no conflict.

    A pass serves 32 lanes of up to 4 bytes, 16 lanes of 8 or 8 lanes of 16, one word per bank; lanes that
    read the same word share it.
    """
    words_per_lane = max(1, size // BANK_BYTES)
    phase = lanes // (WARP // words_per_lane)
    words = (offsets & ((1 << RANK_SHIFT) - 1)) // BANK_BYTES
    phases = 1 + int(np.count_nonzero(np.diff(phase)))
    step = np.diff(words)
    if len(step) and (step[np.diff(phase) == 0] == words_per_lane).all():
        return phases, phases
    words = (words[:, None] + np.arange(words_per_lane)).reshape(-1)
    row = np.repeat(phase - phase[0], words_per_lane)
    distinct = np.unique((row << 32) | words)
    per_bank = np.bincount((distinct >> 32) * BANKS + (distinct & (BANKS - 1)))
    per_bank = np.pad(per_bank, (0, -len(per_bank) % BANKS)).reshape(-1, BANKS)
    return int(per_bank.max(1).sum()), phases
