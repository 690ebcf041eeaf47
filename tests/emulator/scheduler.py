"""Decides which threads run next.

Threads of all blocks that are at one instruction run together. By default the group that is furthest behind
runs, so that threads which took different branches meet again. With a seed, random warps run for random
spells instead: a program whose result depends on that order has a fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .barriers import Release
from .parser import Instruction, Symbol
from .threads import WARP, bits_reader, predicate_reader
from .warp import ballot, mask_operand, per_lane

if TYPE_CHECKING:
    from .machine import Launch

Array = np.ndarray
CONTROL = ("bra", "brx", "ret", "exit", "trap", "bar", "barrier")
_LOOP_PATIENCE = 1000  # backward branches before others get a turn, if nothing is seen to spin
_TURN = 256  # instructions that a group may run when others spin
_SPIN_LIMIT = 64


class Scheduler:
    """Runs one batch of co-resident blocks to its end."""

    def __init__(self, launch: Launch, rng: np.random.Generator | None) -> None:
        self.launch, self.rng = launch, rng
        self.code, self.runners = launch.kernel.code, launch.program.runners
        self.ready: dict[int, Array] = {0: launch.threads.alive.copy()}
        self.parked: dict[int, Array] = {}  # at a warp-synchronous instruction, waiting for lanes of their warp
        self.turn_after: int | None = None
        self.fruitless = 0  # spells in a row that only spun
        self.loops = 0
        self.seen_progress = self.seen_polls = 0

    def run(self) -> None:
        while self.ready or self._wake():
            pc, lanes, budget = self._pick()
            self._advance(pc, lanes, budget)

    # ---------------------------------------------------------------- choice

    def _pick(self) -> tuple[int, Array, int]:
        if self.rng is not None:
            return self._pick_random()
        places = sorted(self.ready)
        pc, budget = places[0], 0
        if self.turn_after is not None:
            pc = next((p for p in places if p > self.turn_after), places[0])
            self.turn_after, budget = None, _TURN
        return pc, self.ready.pop(pc), budget

    def _pick_random(self) -> tuple[int, Array, int]:
        places = sorted(self.ready)
        pc = places[self.rng.integers(len(places))]
        lanes = self.ready.pop(pc)
        warps = np.flatnonzero(lanes.reshape(-1, WARP).any(1))
        keep = warps if self.rng.random() < 0.3 else warps[self.rng.random(len(warps)) < 0.5]
        chosen = np.zeros(len(lanes) // WARP, bool)
        chosen[keep if len(keep) else warps[:1]] = True
        running = lanes & per_lane(chosen)
        self._push(pc, lanes & ~running)
        return pc, running, int(self.rng.integers(1, 100))

    def _push(self, pc: int, lanes: Array) -> None:
        if lanes.any():
            self.ready[pc] = self.ready[pc] | lanes if pc in self.ready else lanes

    def _release(self, releases: list[Release]) -> None:
        for release in releases:
            self._push(release.pc, release.lanes)

    # ---------------------------------------------------------------- execution

    def _advance(self, pc: int, lanes: Array, budget: int) -> None:
        """Run a group until it splits, waits, exits, or others should run."""
        launch, issued = self.launch, self.launch.counters.report.issued
        left = budget
        warps, everyone = _extent(lanes)
        while True:
            ins = self.code[pc]
            issued[pc] += warps
            launch.step(ins)
            taken = lanes
            if ins.guard is not None:
                taken = lanes & predicate_reader(ins.guard)(launch.threads)
            if ins.opcode in CONTROL or launch.program.synchronous[pc]:
                following = self._control(pc, ins, lanes, taken)
                if following is None:
                    return
                pc, lanes = following
                warps, everyone = _extent(lanes)
            else:
                if ins.guard is None:
                    self.runners[pc](launch, None if everyone else lanes)
                elif taken.any():
                    self.runners[pc](launch, None if everyone and taken.all() else taken)
                pc += 1
            left -= 1
            if self.ready and self.rng is None and pc in self.ready:
                lanes = lanes | self.ready.pop(pc)
                warps, everyone = _extent(lanes)
            if left == 0 or (left < 0 and self.ready and (self.rng is not None or min(self.ready) < pc)):
                self._push(pc, lanes)
                return

    def _control(self, pc: int, ins: Instruction, lanes: Array, taken: Array) -> tuple[int, Array] | None:
        """Carry out a control instruction: where the group continues, or None if it dissolved."""
        if self.launch.program.synchronous[pc]:
            return self._warp_synchronous(pc, ins, lanes, taken)
        if not taken.any():
            return pc + 1, lanes
        rest = lanes & ~taken
        if ins.opcode == "bra":
            return self._branch(pc, self._target(ins.operands[0], ins), taken, rest)
        if ins.opcode == "brx":
            return self._branch_indexed(ins, taken, rest, pc)
        if ins.opcode == "trap":
            self.launch.fail("trap", "the kernel stopped itself", ins, int(np.flatnonzero(taken)[0]))
        self._push(pc + 1, rest)
        if ins.opcode in ("ret", "exit"):
            self.launch.threads.alive &= ~taken
            self.launch.progress += 1
            self._release(self.launch.barriers.exited(ins))
        elif ins.modifiers[0] != "cluster":
            self._release(self.launch.barriers.arrive(pc, ins, taken))
        elif ins.modifiers[1] == "arrive":
            self.launch.barriers.cluster_arrive(ins, taken)
            self._push(pc + 1, taken)
            self._release(self.launch.barriers.cluster_completed())
        else:
            self._release(self.launch.barriers.cluster_wait(pc, taken))
        return None

    def _target(self, label: Symbol, ins: Instruction) -> int:
        if label.name not in self.launch.kernel.labels:
            self.launch.fail("syntax", f"no label {label.name}", ins)
        return self.launch.kernel.labels[label.name]

    def _branch(self, pc: int, target: int, taken: Array, rest: Array) -> tuple[int, Array] | None:
        if target <= pc and self._spins(pc):
            self._push(target, taken)
            self._push(pc + 1, rest)
            return None
        if not rest.any():
            return target, taken
        self._push(target, taken)
        return pc + 1, rest

    def _spins(self, pc: int) -> bool:
        """Called at a backward branch: should somebody else run now? Fails when nobody ever will."""
        launch = self.launch
        progressed, polled = launch.progress != self.seen_progress, launch.polls != self.seen_polls
        self.seen_progress, self.seen_polls = launch.progress, launch.polls
        if progressed:
            self.fruitless = self.loops = 0
            return False
        self.loops += 1
        if not polled:
            self.fruitless = 0
            if self.loops < _LOOP_PATIENCE:
                return False
            self.loops = 0
        else:
            self.fruitless += 1
            if self.fruitless > _SPIN_LIMIT * (len(self.ready) + 1) * (1 if self.rng is None else 4):
                self._report_deadlock(f"threads spin at {self.code[pc].where()} for what nobody will do")
        self.turn_after = pc
        return True

    def _branch_indexed(self, ins: Instruction, taken: Array, rest: Array, pc: int) -> None:
        labels = self.launch.kernel.branch_targets[ins.operands[1].name]
        index = self.launch.threads.everywhere(bits_reader(ins, ins.operands[0], 4)(self.launch.threads))
        for position, label in enumerate(labels):
            self._push(self._target(Symbol(label), ins), taken & (index == position))
        self._push(pc + 1, rest)

    def _warp_synchronous(self, pc: int, ins: Instruction, lanes: Array, taken: Array) -> tuple[int, Array] | None:
        """Run the warps whose members are all here; the others wait for them."""
        if pc in self.parked:
            waiting = self.parked.pop(pc)
            taken, lanes = taken | waiting, lanes | waiting
        if not taken.any():
            return pc + 1, lanes
        complete = taken & self._members_present(ins, taken)
        if (taken & ~complete).any():
            self.parked[pc] = taken & ~complete
        if complete.any():
            self.runners[pc](self.launch, None if complete.all() else complete)
        going_on = (lanes & ~taken) | complete
        return (pc + 1, going_on) if going_on.any() else None

    def _members_present(self, ins: Instruction, taken: Array) -> Array:
        """Per lane: has every living lane that its mask names arrived?"""
        threads = self.launch.threads
        mask = bits_reader(ins, mask_operand(ins), 4)(threads)
        outside = taken & ((threads.everywhere(mask) >> threads.lane.astype(np.uint32)) & 1 == 0)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            self.launch.fail("absent lane", "a thread is not in the mask that it names itself", ins, lane)
        missing = per_lane(ballot(threads.alive) & ~ballot(taken))
        return (missing & mask) == 0

    # ---------------------------------------------------------------- standstill

    def _wake(self) -> bool:
        """Nobody can run. Lanes that waited for ones that exited may; otherwise the end, or a deadlock."""
        for pc, lanes in self.parked.items():
            if (lanes & self._members_present(self.code[pc], lanes)).any():
                self._push(pc, self.parked.pop(pc))
                return True
        if self.launch.threads.alive.any():
            self._report_deadlock("no thread can continue")
        return False

    def _report_deadlock(self, what: str) -> None:
        lines, ins, lane = self.launch.barriers.describe_waiting()
        for pc, lanes in self.parked.items():
            ins, lane = self.code[pc], int(np.flatnonzero(lanes)[0])
            lines.append(f"{int(lanes.sum())} threads wait for lanes of their mask at {ins.where()}")
        threads = self.launch.threads
        exited = int((threads.exists & ~threads.alive).sum())
        lines += [f"{exited} threads have exited"] if exited else []
        check = "absent lane" if self.parked and not self.ready else "deadlock"
        self.launch.fail(check, "; ".join([what, *lines]), ins, lane)


def _extent(lanes: Array) -> tuple[int, bool]:
    """How many warps take part, and whether every lane does."""
    if lanes.all():
        return len(lanes) // WARP, True
    return int(np.count_nonzero(ballot(lanes))), False
