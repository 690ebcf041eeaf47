"""Data races: two unordered accesses to one place by different threads, at least one of them a plain write.

Each thread has a clock that advances when it synchronises; a place remembers the thread and the clock of its
last write and of its last reads. An access is ordered after a remembered one if its thread knows that clock:
through a barrier of the block or the cluster, bar.warp.sync, or a release that it acquired (directly, or
by a fence around relaxed atomics). Shuffles and votes order nothing, as in the PTX memory model.

Kept small on purpose: a place keeps two of its readers (the first and last lane of the latest reading
instruction), and a store that leaves the value as it was is no race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import memory
from .parser import TYPE_BYTES, Instruction, Kernel
from .threads import WARP

if TYPE_CHECKING:
    from .accesses import Target
    from .machine import Launch

Array = np.ndarray
_CLOCK_BITS = 31
_STRONG = 1 << _CLOCK_BITS
_CLOCK = _STRONG - 1
_THREAD_SHIFT = _CLOCK_BITS + 1
_ACQUIRE, _RELEASE = {"acquire", "acq_rel"}, {"release", "acq_rel"}


@dataclass
class _Shadow:
    """Tags (thread, strong, clock) per granule of one memory; -1 is nobody."""

    writer: Array
    first_reader: Array
    last_reader: Array

    @staticmethod
    def of(granules: int) -> _Shadow:
        return _Shadow(*(np.full(granules, -1, np.int64) for _ in range(3)))


def granule(kernel: Kernel, spaces: tuple[str, ...]) -> int:
    """The narrowest access of a kernel to some spaces: tracking at this width loses nothing."""
    from .accesses import space_of

    widths = [16]
    for ins in kernel.code:
        if ins.opcode in ("ld", "st", "atom", "red", "ldu") and space_of(ins) in spaces:
            widths.append(TYPE_BYTES[ins.type] * ins.vector_length)
        elif ins.opcode == "cp" and len(ins.operands) > 2:
            widths.append(ins.operands[2].value)
    return min(widths)


class RaceDetector:
    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.granules = {
            "global": granule(launch.kernel, ("global", "const", "generic")),
            "shared": granule(launch.kernel, ("shared", "generic")),
        }
        self.shadows: dict[int, _Shadow] = {}
        # What each release published: the clocks of all threads of the grid that it stands for.
        self.published: dict[tuple[str, int], Array] = {}
        self.threads_in_grid = launch.shape.blocks * launch.shape.lanes

    def begin_batch(self) -> None:
        """A batch of blocks starts; its shared memory is new, global memory keeps its history."""
        threads = self.launch.threads
        lanes = threads.count
        self.identity = threads.block * self.launch.shape.lanes + threads.thread
        self.lane_of_block = np.full(self.launch.shape.blocks, -1, np.int64)
        self.lane_of_block[threads.blocks] = np.arange(len(threads.blocks)) * self.launch.shape.lanes
        self.clock = np.ones(lanes, np.int64)
        self.block_knows = np.zeros(lanes, np.int64)  # clock of this lane at its block's last barrier
        self.warp_knows = np.zeros(lanes, np.int64)  # ... at its warp's last bar.warp.sync
        self.fenced = np.zeros(lanes, np.int64)  # ... at the lane's last fence
        self.arrived = np.zeros(lanes, np.int64)  # ... at its last cluster arrival
        self.foreign: dict[int, Array] = {}  # block slot -> clocks of other blocks' threads it knows
        self.acquired: dict[int, Array] = {}  # lane -> clocks it knows beyond its block's
        self.seen: dict[int, Array] = {}  # lane -> clocks read by relaxed accesses, known after a fence
        self.shadows.pop(-1, None)
        self.published = {place: clocks for place, clocks in self.published.items() if place[0] != "shared memory"}

    # ---------------------------------------------------------------- accesses

    def access(self, ins: Instruction, target: Target, size: int, data: Array | None, strong: bool) -> None:
        """Check one access (a store of `data`, or a load) and remember it."""
        granule = self.granules[target.space]
        shadow = self.shadows.get(target.shadow_key)
        if shadow is None:
            shadow = self.shadows[target.shadow_key] = _Shadow.of(len(target.memory) // granule + 1)
        index = (target.offsets // granule)[:, None] + np.arange(max(1, size // granule))
        self._check(ins, target, shadow.writer[index], "write", data, strong)
        if data is not None:
            self._check(ins, target, shadow.first_reader[index], "read", data, strong)
            self._check(ins, target, shadow.last_reader[index], "read", data, strong)
        lanes = target.lanes
        tag = (self.identity[lanes] << _THREAD_SHIFT) | (_STRONG if strong else 0) | self.clock[lanes]
        tags = np.broadcast_to(tag[:, None], index.shape)
        if data is not None:
            shadow.writer[index] = tags
        else:
            shadow.last_reader[index] = tags
            shadow.first_reader[index[::-1]] = tags[::-1]

    def _check(self, ins: Instruction, target: Target, old: Array, what: str, data: Array | None, strong: bool) -> None:
        me = self.identity[target.lanes][:, None]
        suspect = (old >= 0) & ((old >> _THREAD_SHIFT) != me)
        if strong:
            suspect &= (old & _STRONG) == 0
        if not suspect.any():
            return
        rows, columns = np.nonzero(suspect)
        bad = ~self._ordered(old[rows, columns], target.lanes[rows])
        if data is not None and bad.any():
            current = memory.gather(target.memory, target.offsets, data.shape[1])
            bad &= (current != data).any(1)[rows]
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            other = int(old[rows[first], columns[first]] >> _THREAD_SHIFT)
            block, thread = divmod(other, self.launch.shape.lanes)
            self.launch.fail(
                "data race",
                f"{'load' if data is None else 'store'} of {target.name} is not ordered after the {what} "
                f"by block {block}, thread {thread}",
                ins, int(target.lanes[rows[first]]),
            )  # fmt: skip

    def _ordered(self, tags: Array, lanes: Array) -> Array:
        """Does each lane know the clock of the tag it met?"""
        other, clock = tags >> _THREAD_SHIFT, tags & _CLOCK
        start = self.lane_of_block[other // self.launch.shape.lanes]
        other_lane = np.where(start >= 0, start + other % self.launch.shape.lanes, 0)
        here = start >= 0
        threads = self.launch.threads
        same_block = here & (threads.slot[other_lane] == threads.slot[lanes])
        same_warp = here & (other_lane // WARP == lanes // WARP)
        known = same_block & (clock <= self.block_knows[other_lane])
        known |= same_warp & (clock <= self.warp_knows[other_lane])
        for position in np.flatnonzero(~known) if self.foreign or self.acquired else ():
            lane = int(lanes[position])
            for clocks in (self.foreign.get(int(threads.slot[lane])), self.acquired.get(lane)):
                known[position] |= clocks is not None and bool(clock[position] <= clocks[other[position]])
        return known

    # ---------------------------------------------------------------- order

    def block_barrier(self, lanes: Array) -> None:
        """Lanes met at a barrier of their block."""
        self.block_knows[lanes] = self.clock[lanes]
        self.clock[lanes] += 1
        for lane in [lane for lane in self.acquired if lanes[lane]]:
            slot = int(self.launch.threads.slot[lane])
            self.foreign[slot] = np.maximum(self.foreign.get(slot, 0), self.acquired.pop(lane))

    def warp_barrier(self, lanes: Array) -> None:
        self.warp_knows[lanes] = self.clock[lanes]
        self.clock[lanes] += 1

    def cluster_arrive(self, lanes: Array, relaxed: bool) -> None:
        if not relaxed:
            self.arrived[lanes] = self.clock[lanes]
        self.clock[lanes] += 1

    def cluster_barrier(self, slots: list[int]) -> None:
        """All threads of the cluster that occupies `slots` have arrived."""
        lanes = np.concatenate([self._lanes_of(slot) for slot in slots])
        clocks = self._zeros()
        for slot in slots:
            np.maximum(clocks, self.foreign.get(slot, 0), out=clocks)
        for lane in lanes.tolist():
            if lane in self.acquired:
                np.maximum(clocks, self.acquired[lane], out=clocks)
        np.maximum.at(clocks, self.identity[lanes], np.maximum(self.arrived[lanes], self.block_knows[lanes]))
        for slot in slots:
            self.foreign[slot] = clocks
            own = self._lanes_of(slot)
            self.block_knows[own] = np.maximum(self.block_knows[own], self.arrived[own])

    def fence(self, active: Array | None) -> None:
        lanes = np.arange(len(self.clock)) if active is None else np.flatnonzero(active)
        self.fenced[lanes] = self.clock[lanes]
        self.clock[lanes] += 1
        for lane in [lane for lane in self.seen if active is None or active[lane]]:
            self.acquired[lane] = np.maximum(self.acquired.get(lane, 0), self.seen.pop(lane))

    def synchronise(self, ins: Instruction, target: Target, order: Sequence[int] | None = None) -> None:
        """A strong access: publish and learn what its semantics and the fences around it allow.

        Lanes come in the order in which they reach memory.
        """
        modifiers = set(ins.modifiers)
        acquires, releases = bool(modifiers & _ACQUIRE), bool(modifiers & _RELEASE)
        writes, reads = ins.opcode in ("st", "atom", "red"), ins.opcode in ("ld", "atom")
        for position in range(len(target.lanes)) if order is None else order:
            lane, place = int(target.lanes[position]), (target.name, int(target.offsets[position]))
            if reads and place in self.published:
                into = self.acquired if acquires else self.seen
                into[lane] = np.maximum(into.get(lane, 0), self.published[place])
            if writes and (releases or self.fenced[lane]):
                clock = int(self.clock[lane] if releases else self.fenced[lane])
                self._publish(place, lane, clock)
                self.clock[lane] += 1

    def _publish(self, place: tuple[str, int], lane: int, clock: int) -> None:
        clocks = self._zeros()
        slot = int(self.launch.threads.slot[lane])
        for known in (self.foreign.get(slot), self.acquired.get(lane), self.published.get(place)):
            if known is not None:
                np.maximum(clocks, known, out=clocks)
        own = self._lanes_of(slot)
        identity = self.identity[own]
        clocks[identity] = np.maximum(clocks[identity], self.block_knows[own])
        clocks[self.identity[lane]] = max(clocks[self.identity[lane]], clock)
        self.published[place] = clocks

    def _lanes_of(self, slot: int) -> Array:
        return np.arange(self.launch.shape.lanes) + slot * self.launch.shape.lanes

    def _zeros(self) -> Array:
        return np.zeros(self.threads_in_grid, np.int64)
