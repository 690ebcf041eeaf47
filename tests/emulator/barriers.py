"""Barriers of blocks and clusters: who waits where, when everybody is let go, and what counts as misuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import unsupported
from .parser import Instruction
from .threads import bits_reader, predicate_reader, writer

if TYPE_CHECKING:
    from .machine import Launch

Array = np.ndarray
_NOBODY = -1


@dataclass
class Release:
    """Lanes that a barrier lets go, and the instruction they continue at."""

    pc: int
    lanes: Array


class Barriers:
    """The barrier state of one batch of blocks."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.threads = launch, launch.threads
        lanes, blocks = self.threads.count, len(self.threads.blocks)
        self.waiting_pc = np.full(lanes, _NOBODY)
        self.waiting_id = np.full(lanes, _NOBODY)
        self.arrivals = np.zeros(lanes, np.int64)  # cluster arrivals, counted
        self.cluster_waiting_pc = np.full(lanes, _NOBODY)
        self.phase = np.zeros(blocks, np.int64)  # cluster barriers completed
        self.remote_access = np.full(blocks, _NOBODY)  # the phase in which others last used its shared memory

    # ---------------------------------------------------------------- barriers of a block

    def arrive(self, pc: int, ins: Instruction, lanes: Array) -> list[Release]:
        if ins.modifiers[0] not in ("sync", "red", "cta") or "arrive" in ins.modifiers:
            raise unsupported(ins)
        identifier = ins.operands[1 if "red" in ins.modifiers else 0]
        ids = bits_reader(ins, identifier, 4)(self.threads).astype(np.int64)
        self.waiting_pc[lanes], self.waiting_id[lanes] = pc, np.broadcast_to(ids, lanes.shape)[lanes]
        return self.completed()

    def completed(self) -> list[Release]:
        """Let go of the blocks in which everybody has arrived."""
        releases = []
        for barrier in np.unique(self.waiting_id[self.waiting_id != _NOBODY]).tolist():
            waiting = self.waiting_id == barrier
            per_block = waiting.reshape(-1, self.launch.shape.lanes)
            expected = self._expected(waiting)
            done = (per_block.sum(1) >= expected) & per_block.any(1)
            if done.any():
                leaving = waiting & np.repeat(done, self.launch.shape.lanes)
                releases += self._let_go(leaving)
        return releases

    def _expected(self, waiting: Array) -> Array:
        """How many threads each block's barrier needs: a count it names, or all that are alive."""
        alive = self.threads.alive.reshape(-1, self.launch.shape.lanes).sum(1)
        if self._is_whole_block(waiting):
            return alive
        ins = self.launch.kernel.code[int(self.waiting_pc[waiting][0])]
        count = bits_reader(ins, ins.operands[1], 4)(self.threads).astype(np.int64)
        return np.broadcast_to(count, waiting.shape)[:: self.launch.shape.lanes]

    def _let_go(self, leaving: Array) -> list[Release]:
        launch, lanes_per_block = self.launch, self.launch.shape.lanes
        self._require_same_place(leaving)
        blocks = np.repeat(leaving.reshape(-1, lanes_per_block).any(1), lanes_per_block)
        exited = blocks & self.threads.exists & ~self.threads.alive
        if exited.any() and self._is_whole_block(leaving):
            lane = int(np.flatnonzero(leaving)[0])
            missing = int(exited.reshape(-1, lanes_per_block).sum(1).max())
            ins = launch.kernel.code[int(self.waiting_pc[lane])]
            launch.fail("divergent barrier", f"{missing} threads of the block exited before the barrier", ins, lane)
        if launch.races:
            launch.races.block_barrier(leaving)
        releases = []
        for pc in np.unique(self.waiting_pc[leaving]).tolist():
            here = leaving & (self.waiting_pc == pc)
            ins = launch.kernel.code[pc]
            if "red" in ins.modifiers:
                self._reduce(ins, here)
            releases.append(Release(pc + 1, here))
        self.waiting_pc[leaving] = self.waiting_id[leaving] = _NOBODY
        launch.progress += 1
        return releases

    def _is_whole_block(self, waiting: Array) -> bool:
        ins = self.launch.kernel.code[int(self.waiting_pc[waiting][0])]
        return "red" in ins.modifiers or len(ins.operands) < 2

    def _require_same_place(self, leaving: Array) -> None:
        places = np.where(leaving, self.waiting_pc, _NOBODY).reshape(-1, self.launch.shape.lanes)
        highest = places.max(1)
        lowest = np.where(places == _NOBODY, highest[:, None], places).min(1)
        if (highest != lowest).any():
            block = int(np.flatnonzero(highest != lowest)[0])
            first, second = (self.launch.kernel.code[int(pc[block])] for pc in (lowest, highest))
            lane = int(np.flatnonzero(places[block] == highest[block])[0]) + block * self.launch.shape.lanes
            message = f"threads of one block wait at different barriers, others at {first.where()}"
            self.launch.fail("divergent barrier", message, second, lane)

    def _reduce(self, ins: Instruction, lanes: Array) -> None:
        """bar.red: every thread receives the count, or the conjunction or disjunction, of all predicates."""
        threads = self.threads
        predicate = threads.everywhere(predicate_reader(ins.operands[-1])(threads)) & lanes
        true = predicate.reshape(-1, self.launch.shape.lanes).sum(1)
        present = lanes.reshape(-1, self.launch.shape.lanes).sum(1)
        if "popc" in ins.modifiers:
            result, type_ = true.astype(np.uint32), "u32"
        else:
            result, type_ = (true == present if "and" in ins.modifiers else true > 0), "pred"
        writer(ins, ins.operands[0], type_)(threads, np.repeat(result, self.launch.shape.lanes), lanes)

    # ---------------------------------------------------------------- barriers of a cluster

    def cluster_arrive(self, ins: Instruction, lanes: Array) -> None:
        again = lanes & (self.arrivals > np.repeat(self.phase, self.launch.shape.lanes))
        if again.any():
            lane = int(np.flatnonzero(again)[0])
            self.launch.fail("divergent barrier", "a thread arrives twice at the cluster barrier", ins, lane)
        self.arrivals[lanes] += 1
        if self.launch.races:
            self.launch.races.cluster_arrive(lanes, "relaxed" in ins.modifiers)

    def cluster_wait(self, pc: int, lanes: Array) -> list[Release]:
        self.cluster_waiting_pc[lanes] = pc
        return self.cluster_completed()

    def cluster_completed(self) -> list[Release]:
        """Complete the phases in which every living thread of the cluster has arrived, and wake who waits."""
        cluster_lanes = self.launch.shape.lanes * self.launch.shape.cluster
        missing = self.threads.alive & (self.arrivals <= np.repeat(self.phase, self.launch.shape.lanes))
        present = self.threads.alive.reshape(-1, cluster_lanes).any(1)
        for cluster in np.flatnonzero(present & ~missing.reshape(-1, cluster_lanes).any(1)).tolist():
            slots = list(range(cluster * self.launch.shape.cluster, (cluster + 1) * self.launch.shape.cluster))
            self.phase[slots] += 1
            self.launch.progress += 1
            if self.launch.races:
                self.launch.races.cluster_barrier(slots)
        phase = np.repeat(self.phase, self.launch.shape.lanes)
        leaving = (self.cluster_waiting_pc != _NOBODY) & (phase >= self.arrivals)
        releases = [
            Release(pc + 1, leaving & (self.cluster_waiting_pc == pc))
            for pc in np.unique(self.cluster_waiting_pc[leaving]).tolist()
        ]
        self.cluster_waiting_pc[leaving] = _NOBODY
        return releases

    def note_remote_access(self, ins: Instruction, lanes: Array, own: Array, slot: Array) -> None:
        """Distributed shared memory exists only while its block runs."""
        remote = own != slot
        if not remote.any():
            return
        block_alive = self.threads.alive.reshape(-1, self.launch.shape.lanes).any(1)
        gone = remote & ~block_alive[slot]
        if gone.any():
            lane = int(lanes[np.flatnonzero(gone)[0]])
            self.launch.fail("exited block", "the shared memory of a block that has exited is accessed", ins, lane)
        self.remote_access[slot[remote]] = self.phase[slot[remote]]

    # ---------------------------------------------------------------- exits

    def exited(self, ins: Instruction) -> list[Release]:
        """Some lanes have exited: barriers may complete, and a block may be gone too early."""
        if self.launch.shape.cluster > 1:
            block_alive = self.threads.alive.reshape(-1, self.launch.shape.lanes).any(1)
            early = ~block_alive & (self.remote_access == self.phase)
            if early.any():
                lane = int(np.flatnonzero(early)[0]) * self.launch.shape.lanes
                self.launch.fail(
                    "exited block",
                    "a block exits with no cluster barrier after others used its shared memory", ins, lane,
                )  # fmt: skip
        return self.completed() + self.cluster_completed()

    def describe_waiting(self) -> tuple[list[str], Instruction | None, int]:
        """Where the threads that will never continue wait."""
        lines, ins, lane = [], None, 0
        for places, kind in ((self.waiting_pc, "block"), (self.cluster_waiting_pc, "cluster")):
            for pc in np.unique(places[places != _NOBODY]).tolist():
                lanes = np.flatnonzero(places == pc)
                ins, lane = self.launch.kernel.code[pc], int(lanes[0])
                lines.append(f"{len(lanes)} threads wait for their {kind} at {ins.where()}")
        return lines, ins, lane
