"""Detect data races: unordered accesses to one address by two threads, where one writes and not both are strong.

Each thread has a clock that advances when it synchronises. For each address, the thread and the clock of the last write
and of the last reads are recorded. An access is ordered after a recorded one if its thread knows that clock: through a
barrier of the block or the cluster, bar.warp.sync, or a release that it acquired (directly, or by a fence around
relaxed accesses) at a scope that includes both threads. Shuffles and votes order nothing, as in the PTX memory model.

Simplifications: for each address two readers are recorded (the first and last lane of the latest load); a store that
does not change the value is no race; a barrier of some warps is treated as one of the block, and cluster scope as
device scope.

A load through the read-only cache (ld.global.nc) fails if the same launch has written to the address before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import memory
from .accesses import is_strong, space_of
from .parser import TYPE_BYTES, Instruction, Kernel
from .threads import WARP, Array, Mask

if TYPE_CHECKING:
    from .accesses import Target
    from .machine import Launch

# A tag records an access: the thread, whether it was strong, and the thread's clock; -1 is no access.
_STRONG = 1 << 31
_CLOCK = _STRONG - 1
_THREAD_SHIFT = 32
_Place = tuple[str, int, int | None]  # region, offset, and the block slot of a scope within a block


def _granule(kernel: Kernel, spaces: tuple[str, ...]) -> int:
    """Return the bytes of a kernel's narrowest access to some spaces, which is the unit that races are tracked in."""
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
        self.granules = launch.kernel.granules
        if not self.granules:
            self.granules["global"] = _granule(launch.kernel, ("global", "const", "generic"))
            self.granules["shared"] = _granule(launch.kernel, ("shared", "generic"))
        # For each region, tags of granules: the last writer, and the first and last lane of the latest load.
        self.shadows: dict[int, Array] = {}
        # For each release, the clocks that it makes known, of all threads of the grid.
        self.published: dict[_Place, Array] = {}

    def begin_batch(self) -> None:
        """Start a batch of blocks: shared memory has no history, global memory keeps its history."""
        self.threads = self.launch.threads
        shape, lanes = self.launch.shape, self.threads.count
        self.identity = self.threads.block * shape.lanes + self.threads.thread
        self.lane_of = np.full(shape.blocks * shape.lanes, -1, np.int64)
        self.lane_of[self.identity] = self.threads.every
        self.clock = np.ones(lanes, np.int64)
        # The clock of each lane at its last barrier of the block, its last barrier of the warp, and its last arrival at
        # a barrier of the cluster; and at its last fence with block scope, and with device scope.
        self.block_knows, self.warp_knows, self.arrived = (np.zeros(lanes, np.int64) for _ in range(3))
        self.fenced = {narrow: np.zeros(lanes, np.int64) for narrow in (True, False)}
        self.foreign: dict[int, Array] = {}  # block slot -> the clocks of other blocks' threads that it knows
        self.acquired: dict[int, Array] = {}  # lane -> the clocks that it knows besides those of its block
        self.seen: dict[tuple[int, int | None], Array] = {}  # (lane, scope) -> clocks that its next fence acquires
        self.shadows.pop(self.launch.shared.address, None)
        shared = self.launch.shared.name
        self.published = {p: clocks for p, clocks in self.published.items() if p[0] != shared and p[2] is None}

    # ---------------------------------------------------------------- accesses

    def load(self, ins: Instruction, target: Target, size: int) -> None:
        if target.region.space != "local":
            shadow, index = self._shadow(target, size)
            self._check(ins, target, shadow[0][index], "load", "write", None)
            if "nc" in ins.modifiers:
                self._check_unwritten(ins, target, shadow[0][index])
            tags = np.broadcast_to(self._tags(ins, target)[:, None], index.shape)
            shadow[2][index] = tags
            shadow[1][index[::-1]] = tags[::-1]

    def store(self, ins: Instruction, target: Target, size: int, data: Array | None) -> None:
        """Check and record a store; `data` is what a plain store is about to write, ``None`` for an atomic."""
        if target.region.space != "local":
            shadow, index = self._shadow(target, size)
            for tags, what in zip(shadow, ("write", "read", "read"), strict=True):
                self._check(ins, target, tags[index], "store", what, data)
            shadow[0][index] = self._tags(ins, target)[:, None]

    def _shadow(self, target: Target, size: int) -> tuple[Array, Array]:
        """Return the tags of a region, and the indices of each lane's granules as one row."""
        granule = self.granules[target.region.space]
        shadow = self.shadows.get(target.region.address)
        if shadow is None:
            shadow = np.full((3, len(target.region.memory) // granule + 1), -1, np.int64)
            self.shadows[target.region.address] = shadow
        index = (target.offsets // granule)[:, None]
        return shadow, index if size <= granule else index + np.arange(size // granule)

    def _tags(self, ins: Instruction, target: Target) -> Array:
        lanes, clock = target.lanes, self.clock[target.lanes]
        if not is_strong(ins):
            return (self.identity[lanes] << _THREAD_SHIFT) | clock
        # A strong access after a fence has the clock of that fence, with which it forms a release.
        fenced = self.fenced[False][lanes]
        return (self.identity[lanes] << _THREAD_SHIFT) | _STRONG | np.where(fenced > 0, fenced, clock)

    def _check(self, ins: Instruction, target: Target, old: Array, kind: str, what: str, data: Array | None) -> None:
        if old.max() < 0:
            return
        suspect = (old >= 0) & ((old >> _THREAD_SHIFT) != self.identity[target.lanes][:, None])
        if is_strong(ins):
            suspect &= (old & _STRONG) == 0
        if not suspect.any():
            return
        rows, columns = np.nonzero(suspect)
        bad = ~self._ordered(old[rows, columns], target.lanes[rows])
        if data is not None and bad.any():
            current = memory.gather(target.region.memory, target.offsets, data.shape[1])
            bad &= (current != data).any(1)[rows]
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            other = int(old[rows[first], columns[first]] >> _THREAD_SHIFT)
            block, thread = divmod(other, self.launch.shape.lanes)
            message = (
                f"{kind} of {target.region.name} is not ordered after the {what} by block {block}, thread {thread}"
            )
            self.launch.fail("data race", message, ins, int(target.lanes[rows[first]]))

    def _check_unwritten(self, ins: Instruction, target: Target, old: Array) -> None:
        """Fail if the launch has written to what is read: the read-only cache may have the old value in any case."""
        rows, columns = np.nonzero(old >= 0)
        if len(rows):
            block, thread = divmod(int(old[rows[0], columns[0]] >> _THREAD_SHIFT), self.launch.shape.lanes)
            message = (
                f"{target.region.name} is read through the read-only cache, but block {block}, thread {thread} of "
                "this launch has written there"
            )
            self.launch.fail("stale read", message, ins, int(target.lanes[rows[0]]))

    def _ordered(self, tags: Array, lanes: Array) -> Array:
        """Tell, for each lane, whether it knows the clock of a tag."""
        other, clock = tags >> _THREAD_SHIFT, tags & _CLOCK
        lane = self.lane_of[other]
        here, slot = lane >= 0, self.threads.slot
        known = here & (slot[lane] == slot[lanes]) & (clock <= self.block_knows[lane])
        known |= here & (lane // WARP == lanes // WARP) & (clock <= self.warp_knows[lane])
        for i in np.flatnonzero(~known) if self.foreign or self.acquired else ():
            for clocks in (self.foreign.get(int(slot[lanes[i]])), self.acquired.get(int(lanes[i]))):
                known[i] |= clocks is not None and bool(clock[i] <= clocks[other[i]])
        return known

    # ---------------------------------------------------------------- barriers

    def block_barrier(self, lanes: Array) -> None:
        """Order the accesses of lanes that have completed a barrier of their block."""
        self.block_knows[lanes] = self.clock[lanes]
        self.clock[lanes] += 1
        for lane in [lane for lane in self.acquired if lanes[lane]]:
            slot = int(self.threads.slot[lane])
            self.foreign[slot] = np.maximum(self.foreign.get(slot, 0), self.acquired.pop(lane))

    def warp_barrier(self, lanes: Array) -> None:
        self.warp_knows[lanes] = self.clock[lanes]
        self.clock[lanes] += 1
        for warp in {lane // WARP for lane in self.acquired if lanes[lane]}:
            mates = [lane for lane in range(warp * WARP, (warp + 1) * WARP) if lanes[lane]]
            together = np.maximum.reduce([self.acquired[lane] for lane in mates if lane in self.acquired])
            self.acquired.update(dict.fromkeys(mates, together))

    def cluster_arrive(self, lanes: Array, relaxed: bool) -> None:
        if not relaxed:
            self.arrived[lanes] = self.clock[lanes]
        self.clock[lanes] += 1

    def cluster_barrier(self, slots: list[int]) -> None:
        """Order the accesses of the cluster in `slots`, all of whose threads have arrived."""
        lanes = np.flatnonzero(np.isin(self.threads.slot, slots))
        clocks = self._clocks(*(self.foreign.get(slot) for slot in slots), *map(self.acquired.get, lanes.tolist()))
        self.block_knows[lanes] = np.maximum(self.block_knows[lanes], self.arrived[lanes])
        clocks[self.identity[lanes]] = np.maximum(clocks[self.identity[lanes]], self.block_knows[lanes])
        self.foreign.update(dict.fromkeys(slots, clocks))

    # ---------------------------------------------------------------- fences, releases, acquires

    def fence(self, active: Mask, narrow: bool) -> None:
        lanes = self.threads.indices(active)
        for reach in {narrow, True}:
            self.fenced[reach][lanes] = self.clock[lanes]
        self.clock[lanes] += 1
        for lane, scope in [key for key in self.seen if active is None or active[key[0]]]:
            if scope is not None or not narrow:
                self.acquired[lane] = np.maximum(self.acquired.get(lane, 0), self.seen.pop((lane, scope)))

    def synchronise(self, ins: Instruction, target: Target, order: Sequence[int] | None = None) -> None:
        """Exchange clocks at a strong access, as far as its semantics and the fences around it allow.

        `order` is the order in which the lanes access memory. A scope is a block slot, or ``None`` for the device.
        """
        acquires, releases = ("acq_rel" in ins.modifiers or word in ins.modifiers for word in ("acquire", "release"))
        writes, reads, narrow = ins.opcode != "ld", ins.opcode in ("ld", "atom"), "cta" in ins.modifiers
        for position in range(len(target.lanes)) if order is None else order:
            lane, place = int(target.lanes[position]), (target.region.name, int(target.offsets[position]))
            slot = int(self.threads.slot[lane])
            released = False
            for scope in (slot,) if narrow else (slot, None):
                if reads and (clocks := self.published.get((*place, scope))) is not None:
                    if acquires:
                        self.acquired[lane] = np.maximum(self.acquired.get(lane, 0), clocks)
                    else:
                        self.seen[lane, scope] = np.maximum(self.seen.get((lane, scope), 0), clocks)
                clock = int(self.clock[lane] if releases else self.fenced[scope is not None][lane])
                if writes and clock:
                    self._publish((*place, scope), lane, clock)
                    released = True
            self.clock[lane] += released

    def _publish(self, place: _Place, lane: int, clock: int) -> None:
        slot = int(self.threads.slot[lane])
        clocks = self._clocks(self.foreign.get(slot), self.acquired.get(lane), self.published.get(place))
        start, first = slot * self.launch.shape.lanes, lane // WARP * WARP
        for lanes, knows in ((slice(start, start + self.launch.shape.lanes), self.block_knows),
                             (slice(first, first + WARP), self.warp_knows)):  # fmt: skip
            them = self.identity[lanes]
            clocks[them] = np.maximum(clocks[them], knows[lanes])
        clocks[self.identity[lane]] = max(clocks[self.identity[lane]], clock)
        self.published[place] = clocks

    def _clocks(self, *known: Array | None) -> Array:
        """Return the maximum of some clocks as a new array."""
        clocks = np.zeros(len(self.lane_of), np.int64)
        for more in known:
            if more is not None:
                np.maximum(clocks, more, out=clocks)
        return clocks
