"""Count what a launch does, by line and in all: instructions, bytes, sectors, bank conflicts, DRAM traffic."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .parser import Instruction, Kernel
from .threads import RANK_SHIFT, WARP, Array

if TYPE_CHECKING:
    from .accesses import Target
    from .machine import Launch

SECTOR = 32
BANKS, BANK_BYTES = 32, 4


@dataclass
class Traffic:
    """Sums over the accesses of one kind. `units` are sectors of global memory, or wavefronts of shared memory."""

    instructions: int = 0  # warp instructions
    bytes: int = 0
    units: int = 0
    ideal_units: int = 0  # the smallest number for as many bytes, if they are distinct and contiguous

    def add(self, instructions: int, size: int, units: int, ideal: int) -> None:
        self.instructions += instructions
        self.bytes += size
        self.units += units
        self.ideal_units += ideal


@dataclass
class Report:
    """The counts of one launch."""

    kernel: Kernel
    issued: Array  # warp instructions per entry of kernel.code
    accesses: dict[tuple[int, str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    buffers: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    touched: dict[tuple[int, str], Array] = field(default_factory=dict)  # sectors, by allocation and kind
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0

    @property
    def warp_instructions(self) -> int:
        return int(self.issued.sum())

    def total(self, space: str, kind: str) -> Traffic:
        """Return the sums over all accesses of a kind ("load" or "store") to a space ("global", "shared", "local")."""
        total = Traffic()
        for (_, *where), traffic in self.accesses.items():
            if where == [space, kind]:
                total.add(traffic.instructions, traffic.bytes, traffic.units, traffic.ideal_units)
        return total

    def buffer(self, name: str, kind: str) -> Traffic:
        """Return the sums over the accesses of a kind to the buffer of an argument, such as buffer("x", "load")."""
        return self.buffers.get((name, kind), Traffic())

    def footprint_bytes(self, kind: str) -> int:
        """Return the bytes of the distinct sectors of global memory that were accessed."""
        return SECTOR * int(sum(sectors.sum() for (_, of), sectors in self.touched.items() if of == kind))

    @property
    def bank_conflicts(self) -> int:
        """The number of shared-memory wavefronts beyond those of a layout without conflicts."""
        both = (self.total("shared", "load"), self.total("shared", "store"))
        return sum(traffic.units - traffic.ideal_units for traffic in both)

    def lines(self) -> list[tuple[int, str, int, Traffic | None]]:
        """Return (PTX line, text, warp instructions, traffic) for every instruction that was executed."""
        traffic = {pc: t for (pc, _, _), t in self.accesses.items()}
        code, ran = self.kernel.code, np.flatnonzero(self.issued).tolist()
        return [(code[pc].line, code[pc].text, int(self.issued[pc]), traffic.get(pc)) for pc in ran]


class L2:
    """A fully associative write-back cache of sectors, which replaces the least recently used one."""

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
            # A store that misses reads nothing: the kernels of interest write whole sectors.
            self.read_bytes += 0 if write else self.sector
            lines[line] = write
            if len(lines) > self.capacity and lines.popitem(last=False)[1]:
                self.write_bytes += self.sector

    def flush(self) -> int:
        """Write all modified sectors back, empty the cache, and return the bytes written."""
        written = self.sector * sum(self.lines.values())
        self.write_bytes += written
        self.lines.clear()
        return written


class Counters:
    """Collect the report of one launch."""

    def __init__(self, kernel: Kernel, l2: L2 | None) -> None:
        self.report, self.l2 = Report(kernel, np.zeros(len(kernel.code), np.int64)), l2
        self._position = {id(ins): pc for pc, ins in enumerate(kernel.code)}
        self._before = (l2.read_bytes, l2.write_bytes) if l2 else (0, 0)

    def finish(self) -> Report:
        if self.l2:
            self.report.dram_read_bytes = self.l2.read_bytes - self._before[0]
            self.report.dram_write_bytes = self.l2.write_bytes - self._before[1]
        return self.report

    def access(self, launch: Launch, ins: Instruction, target: Target, size: int, kind: str) -> None:
        region, warp = target.region, target.lanes // WARP
        warps, total = 1 + int(np.count_nonzero(np.diff(warp))), size * len(warp)
        units = ideal = 0
        if region.space == "global":
            units = self._sectors(target, warp, kind)
            ideal = int((-(-np.bincount(warp - warp[0]) * size // SECTOR)).sum())
            self.report.buffers[region.name, kind].add(warps, total, units, ideal)
        elif region.space == "shared":
            units, ideal = _wavefronts(target.lanes, target.offsets % launch.shared_stride, size)
        self.report.accesses[self._position[id(ins)], region.space, kind].add(warps, total, units, ideal)

    def _sectors(self, target: Target, warp: Array, kind: str) -> int:
        region, sectors = target.region, target.offsets // SECTOR
        key = (warp << 40) | sectors
        steps = np.diff(key)
        if len(steps) and steps.min() < 0:
            sectors = np.unique(key) & ((1 << 40) - 1)
        else:
            sectors = sectors[np.concatenate([[True], steps != 0])]
        touched = self.report.touched.get((region.address, kind))
        if touched is None:
            touched = self.report.touched[region.address, kind] = np.zeros(len(region.memory) // SECTOR + 1, bool)
        touched[sectors] = True
        if self.l2:
            self.l2.access(region.address + sectors * SECTOR, kind == "store")
        return len(sectors)


def _wavefronts(lanes: Array, offsets: Array, size: int) -> tuple[int, int]:
    """Return the wavefronts of a shared-memory access, and those that it would take without bank conflicts.

    A wavefront serves 32 lanes of up to 4 bytes, 16 lanes of 8 bytes or 8 lanes of 16 bytes, with one word for each
    bank; lanes that read the same word share it.
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
