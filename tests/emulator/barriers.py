"""Execute barriers of blocks and clusters: record waiting threads, release them, and report misuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .instructions import Runner, builds, unsupported
from .parser import Instruction
from .threads import WARP, Array, bits_reader, predicate_reader, writer
from .warp import warp_barrier

if TYPE_CHECKING:
    from .machine import Launch

_NOBODY = -1
Releases = list[tuple[int, Array]]
"""Pairs: the instruction at which lanes continue, and a mask of these lanes."""


@builds("bar barrier", "warp sync cta red popc and or cluster arrive wait aligned relaxed release acquire")
def _barrier(ins: Instruction) -> Runner:
    """Build a barrier of a warp; for barriers of blocks and clusters the scheduler calls `Barriers`."""
    if "cluster" not in ins.modifiers and "arrive" in ins.modifiers:
        raise unsupported(ins)
    return warp_barrier


def _count_operand(ins: Instruction) -> int | None:
    """Return the index of the operand that states how many threads take part; ``None`` for the whole block."""
    place = 2 if "red" in ins.modifiers else 1
    return place if len(ins.operands) > place + ("red" in ins.modifiers) else None


class Barriers:
    """The state of the barriers of one batch of blocks."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.threads, self.code = launch, launch.threads, launch.kernel.code
        lanes, blocks = self.threads.count, len(self.threads.blocks)
        self.waiting_pc, self.waiting_id, self.waiting_count = (np.full(lanes, _NOBODY) for _ in range(3))
        self.arrivals = np.zeros(lanes, np.int64)  # the number of arrivals at cluster barriers
        self.cluster_waiting_pc = np.full(lanes, _NOBODY)
        self.phase = np.zeros(blocks, np.int64)  # the number of completed cluster barriers
        self.remote_access = np.full(blocks, _NOBODY)  # the phase in which other blocks last used its shared memory

    # ---------------------------------------------------------------- barriers of a block

    def arrive(self, pc: int, ins: Instruction, lanes: Array) -> Releases:
        def number(operand: int) -> Array:
            value = bits_reader(ins, ins.operands[operand], 4)(self.threads)
            return self.threads.everywhere(value.astype(np.int64))[lanes]

        count = _count_operand(ins)
        self.waiting_pc[lanes], self.waiting_id[lanes] = pc, number(1 if "red" in ins.modifiers else 0)
        self.waiting_count[lanes] = _NOBODY if count is None else number(count)
        return self.completed()

    def completed(self) -> Releases:
        """Release the blocks in which all threads have arrived: all living ones, or as many as the barrier states."""
        releases: Releases = []
        per_block, alive = self.threads.per_block, self.threads.per_block(self.threads.alive).sum(1)
        for barrier in np.unique(self.waiting_id[self.waiting_id != _NOBODY]).tolist():
            waiting = self.waiting_id == barrier
            count = per_block(np.where(waiting, self.waiting_count, _NOBODY)).max(1)
            # The stated count is a multiple of 32, even if a warp has fewer threads.
            missing = (self.threads.exists & ~waiting).reshape(-1, WARP).any(1)
            padding = per_block(~self.threads.exists & ~np.repeat(missing, WARP)).sum(1)
            arrived = per_block(waiting).sum(1)
            done = (arrived > 0) & np.where(count == _NOBODY, arrived >= alive, arrived + padding >= count)
            if done.any():
                releases += self._let_go(waiting & self.threads.per_lane(done))
        return releases

    def _let_go(self, leaving: Array) -> Releases:
        self._require_same_place(leaving)
        whole = self.threads.per_lane(self.threads.per_block(leaving & (self.waiting_count == _NOBODY)).any(1))
        exited = whole & self.threads.exists & ~self.threads.alive
        if exited.any():
            missing = int(self.threads.per_block(exited).sum(1).max())
            lane = int(np.flatnonzero(leaving & whole)[0])
            message = f"{missing} threads of the block exited before the barrier"
            self.launch.fail("divergent barrier", message, self.code[int(self.waiting_pc[lane])], lane)
        if self.launch.races:
            self.launch.races.block_barrier(leaving)
        releases: Releases = []
        for pc in np.unique(self.waiting_pc[leaving]).tolist():
            here = leaving & (self.waiting_pc == pc)
            if "red" in self.code[pc].modifiers:
                self._reduce(self.code[pc], here)
            releases.append((pc + 1, here))
        self.waiting_pc[leaving] = self.waiting_id[leaving] = _NOBODY
        self.launch.progress += 1
        return releases

    def _require_same_place(self, leaving: Array) -> None:
        places = self.threads.per_block(np.where(leaving, self.waiting_pc, _NOBODY))
        highest = places.max(1)
        lowest = np.where(places == _NOBODY, highest[:, None], places).min(1)
        if (highest != lowest).any():
            block = int(np.flatnonzero(highest != lowest)[0])
            first, second = (self.code[int(pc[block])] for pc in (lowest, highest))
            lane = int(np.flatnonzero(places[block] == highest[block])[0]) + block * self.launch.shape.lanes
            message = f"threads of one block wait at different barriers, others at {first.where()}"
            self.launch.fail("divergent barrier", message, second, lane)

    def _reduce(self, ins: Instruction, lanes: Array) -> None:
        """Give every thread of a bar.red the count, conjunction or disjunction of all predicates."""
        true = self.threads.per_block(predicate_reader(ins.operands[-1])(self.threads) & lanes).sum(1)
        if "popc" in ins.modifiers:
            result, type_ = true.astype(np.uint32), "u32"
        else:
            present = self.threads.per_block(lanes).sum(1)
            result, type_ = (true == present if "and" in ins.modifiers else true > 0), "pred"
        writer(ins, ins.operands[0], type_)(self.threads, self.threads.per_lane(result), lanes)

    # ---------------------------------------------------------------- barriers of a cluster

    def cluster_arrive(self, ins: Instruction, lanes: Array) -> Releases:
        again = lanes & (self.arrivals > self.threads.per_lane(self.phase))
        if again.any():
            lane = int(np.flatnonzero(again)[0])
            self.launch.fail("divergent barrier", "a thread arrives twice at the cluster barrier", ins, lane)
        self.arrivals[lanes] += 1
        if self.launch.races:
            self.launch.races.cluster_arrive(lanes, "relaxed" in ins.modifiers)
        return self.cluster_completed()

    def cluster_wait(self, pc: int, lanes: Array) -> Releases:
        self.cluster_waiting_pc[lanes] = pc
        return self.cluster_completed()

    def cluster_completed(self) -> Releases:
        """Complete the phases in which every living thread of a cluster has arrived, and release the waiting lanes."""
        size = self.launch.shape.cluster
        missing = self.threads.alive & (self.arrivals <= self.threads.per_lane(self.phase))
        by_cluster = missing.reshape(-1, self.launch.shape.lanes * size).any(1)
        present = self.threads.alive.reshape(by_cluster.size, -1).any(1)
        for cluster in np.flatnonzero(present & ~by_cluster).tolist():
            slots = list(range(cluster * size, (cluster + 1) * size))
            self.phase[slots] += 1
            self.launch.progress += 1
            if self.launch.races:
                self.launch.races.cluster_barrier(slots)
        leaving = (self.cluster_waiting_pc != _NOBODY) & (self.threads.per_lane(self.phase) >= self.arrivals)
        places = np.unique(self.cluster_waiting_pc[leaving]).tolist()
        releases = [(pc + 1, leaving & (self.cluster_waiting_pc == pc)) for pc in places]
        self.cluster_waiting_pc[leaving] = _NOBODY
        return releases

    def note_remote_access(self, ins: Instruction, lanes: Array, own: Array, slot: Array) -> None:
        """Check and record an access to the shared memory of other blocks.

        That memory exists after the block has started, which only a cluster barrier ensures, and until it exits.
        """
        remote = own != slot
        if not remote.any():
            return
        alive = self.threads.per_block(self.threads.alive).any(1)
        for wrong, check, message in (
            (remote & ~alive[slot], "exited block", "the shared memory of a block that has exited is accessed"),
            (
                remote & (self.phase[slot] == 0),
                "block not started",
                "no cluster barrier says that the block has started",
            ),
        ):
            if wrong.any():
                self.launch.fail(check, message, ins, int(lanes[np.flatnonzero(wrong)[0]]))
        self.remote_access[slot[remote]] = self.phase[slot[remote]]

    # ---------------------------------------------------------------- exits

    def exited(self, ins: Instruction) -> Releases:
        """Complete barriers after some lanes have exited; fail if a block exits while others may use its memory."""
        if self.launch.shape.cluster > 1:
            early = ~self.threads.per_block(self.threads.alive).any(1) & (self.remote_access == self.phase)
            if early.any():
                lane = int(np.flatnonzero(early)[0]) * self.launch.shape.lanes
                message = "a block exits with no cluster barrier after others used its shared memory"
                self.launch.fail("exited block", message, ins, lane)
        return self.completed() + self.cluster_completed()

    def describe_waiting(self) -> tuple[list[str], Instruction | None, int]:
        """Return, for a deadlock, lines on where threads wait, and one of the instructions and lanes."""
        lines, ins, lane = [], None, 0
        for places, kind in ((self.waiting_pc, "block"), (self.cluster_waiting_pc, "cluster")):
            for pc in np.unique(places[places != _NOBODY]).tolist():
                lanes = np.flatnonzero(places == pc)
                ins, lane = self.code[pc], int(lanes[0])
                lines.append(f"{len(lanes)} threads wait for their {kind} at {ins.where()}")
        return lines, ins, lane
