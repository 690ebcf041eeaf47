"""Choose the threads that run next.

All threads of all blocks that are at one instruction run together. By default the group with the lowest instruction
runs, so that threads that took different branches join again. With a seed, random warps run for random numbers of
instructions instead: a program whose result depends on this order has a fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .barriers import Releases
from .instructions import Runner, builds
from .parser import Instruction, Symbol
from .threads import WARP, Array, bits_reader, predicate_reader
from .warp import ballot, is_warp_synchronous, mask_operand, per_lane

if TYPE_CHECKING:
    from .machine import Launch

_LOOP_PATIENCE = 1000  # backward branches without progress or polls after which other groups run
_TURN = 256  # instructions that a group runs while others spin
_SPIN_LIMIT = 64  # turns of every group without progress after which it is a deadlock


@builds("bra brx ret exit trap", "uni idx")
def _control(ins: Instruction) -> Runner:
    """Build nothing: the scheduler executes these instructions itself."""
    del ins
    return lambda launch, active: None  # noqa: ARG005


def is_control(ins: Instruction) -> bool:
    return ins.opcode in ("bra", "brx", "ret", "exit", "trap", "bar", "barrier")


class Scheduler:
    """Run one batch of resident blocks to its end."""

    def __init__(self, launch: Launch, runners: list[Runner], rng: np.random.Generator | None) -> None:
        self.launch, self.threads, self.rng = launch, launch.threads, rng
        self.code, self.runners = launch.kernel.code, runners
        self.synchronous = [is_warp_synchronous(ins) for ins in self.code]
        self.special = [
            synchronous or is_control(ins) for ins, synchronous in zip(self.code, self.synchronous, strict=True)
        ]
        self.guards = [predicate_reader(ins.guard) if ins.guard else None for ins in self.code]
        self.ready: dict[int, Array] = {0: self.threads.alive.copy()}
        self.parked: dict[int, Array] = {}  # waiting at a warp-synchronous instruction for lanes of their warp
        self.turn_after: int | None = None
        self.fruitless = 0  # successive backward branches that only polled
        self.loops = 0
        self.seen_progress = self.seen_polls = 0

    def run(self) -> None:
        while self.ready or self._wake():
            self._advance(*self._pick())

    # ---------------------------------------------------------------- choice

    def _pick(self) -> tuple[int, Array, int]:
        """Choose an instruction, a group of lanes, and how many instructions they run (0: no limit)."""
        places = sorted(self.ready)
        if self.rng is not None:
            return self._pick_random(self.rng, places)
        pc, budget = places[0], 0
        if self.turn_after is not None:
            pc = next((p for p in places if p > self.turn_after), places[0])
            self.turn_after, budget = None, _TURN
        return pc, self.ready.pop(pc), budget

    def _pick_random(self, rng: np.random.Generator, places: list[int]) -> tuple[int, Array, int]:
        pc = places[rng.integers(len(places))]
        lanes = self.ready.pop(pc)
        warps = np.flatnonzero(lanes.reshape(-1, WARP).any(1))
        keep = warps if rng.random() < 0.3 else warps[rng.random(len(warps)) < 0.5]
        chosen = np.zeros(len(lanes) // WARP, bool)
        chosen[keep if len(keep) else warps[:1]] = True
        running = lanes & per_lane(chosen)
        self._push(pc, lanes & ~running)
        return pc, running, int(rng.integers(1, 100))

    def _push(self, pc: int, lanes: Array) -> None:
        if lanes.any():
            self.ready[pc] = self.ready[pc] | lanes if pc in self.ready else lanes

    def _release(self, releases: Releases) -> None:
        for pc, lanes in releases:
            self._push(pc, lanes)

    # ---------------------------------------------------------------- execution

    def _advance(self, pc: int, lanes: Array, budget: int) -> None:
        """Run a group until it splits, waits or exits, or another group should run."""
        launch, issued = self.launch, self.launch.counters.report.issued
        left = budget
        warps, everyone = _extent(lanes)
        while True:
            issued[pc] += warps
            launch.step(self.code[pc])
            guard = self.guards[pc]
            taken = lanes & guard(self.threads) if guard else lanes
            if self.special[pc]:
                following = self._control(pc, lanes, taken)
                if following is None:
                    return
                pc, same = following[0], following[1] is lanes
                if not same:
                    lanes = following[1]
                    warps, everyone = _extent(lanes)
            else:
                if not guard:
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

    def _control(self, pc: int, lanes: Array, taken: Array) -> tuple[int, Array] | None:
        """Execute a control instruction; return where the group continues, or ``None`` if no group is left."""
        ins, barriers = self.code[pc], self.launch.barriers
        if self.synchronous[pc]:
            return self._warp_synchronous(pc, ins, lanes, taken)
        if not taken.any():
            return pc + 1, lanes
        rest = lanes & ~taken
        if ins.opcode == "bra":
            return self._branch(pc, self._target(ins.operands[0], ins), taken, rest)
        self._push(pc + 1, rest)
        if ins.opcode == "brx":
            index = self.threads.everywhere(bits_reader(ins, ins.operands[0], 4)(self.threads))
            for position, label in enumerate(self.launch.kernel.branch_targets[ins.operands[1].name]):
                self._push(self._target(Symbol(label), ins), taken & (index == position))
        elif ins.opcode == "trap":
            self.launch.fail("trap", "the kernel stopped itself", ins, int(np.flatnonzero(taken)[0]))
        elif ins.opcode in ("ret", "exit"):
            self.threads.alive &= ~taken
            self.launch.progress += 1
            self._release(barriers.exited(ins))
        elif ins.modifiers[0] != "cluster":
            self._release(barriers.arrive(pc, ins, taken))
        elif "arrive" in ins.modifiers:
            self._push(pc + 1, taken)
            self._release(barriers.cluster_arrive(ins, taken))
        else:
            self._release(barriers.cluster_wait(pc, taken))
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
        """Tell, at a backward branch, whether another group should run now; fail if none can make progress."""
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

    def _warp_synchronous(self, pc: int, ins: Instruction, lanes: Array, taken: Array) -> tuple[int, Array] | None:
        """Run the warps whose members have all arrived; the lanes of other warps wait."""
        if pc in self.parked:
            waiting = self.parked.pop(pc)
            taken, lanes = taken | waiting, lanes | waiting
        if not taken.any():
            return pc + 1, lanes
        present = self._members_present(ins, taken)
        if (taken <= present).all():
            self.runners[pc](self.launch, None if taken.all() else taken)
            return pc + 1, lanes
        complete = taken & present
        self.parked[pc] = taken & ~complete
        if complete.any():
            self.runners[pc](self.launch, complete)
        going_on = (lanes & ~taken) | complete
        return (pc + 1, going_on) if going_on.any() else None

    def _members_present(self, ins: Instruction, taken: Array) -> Array:
        """Tell, for each lane, whether all living lanes in its member mask have arrived."""
        threads = self.threads
        mask = bits_reader(ins, mask_operand(ins), 4)(threads)
        if np.ndim(mask) == 0 and mask == 0xFFFFFFFF and (taken == threads.alive).all():
            return taken  # the usual case
        outside = taken & ((mask >> threads.lane.astype(np.uint32)) & 1 == 0)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            self.launch.fail("absent lane", "a thread is not in the mask that it names itself", ins, lane)
        missing = per_lane(ballot(threads.alive) & ~ballot(taken))
        return (missing & mask) == 0

    # ---------------------------------------------------------------- standstill

    def _wake(self) -> bool:
        """Wake lanes that waited for lanes which have exited; return whether there are any. Fail at a deadlock."""
        for pc, lanes in self.parked.items():
            if (lanes & self._members_present(self.code[pc], lanes)).any():
                self._push(pc, self.parked.pop(pc))
                return True
        if self.threads.alive.any():
            self._report_deadlock("no thread can continue")
        return False

    def _report_deadlock(self, what: str) -> None:
        lines, ins, lane = self.launch.barriers.describe_waiting()
        for pc, lanes in self.parked.items():
            ins, lane = self.code[pc], int(np.flatnonzero(lanes)[0])
            lines.append(f"{int(lanes.sum())} threads wait for lanes of their mask at {ins.where()}")
        exited = int((self.threads.exists & ~self.threads.alive).sum())
        lines += [f"{exited} threads have exited"] if exited else []
        check = "absent lane" if self.parked and not self.ready else "deadlock"
        self.launch.fail(check, "; ".join([what, *lines]), ins, lane)


def _extent(lanes: Array) -> tuple[int, bool]:
    """Return the number of warps with such lanes, and whether these are all lanes."""
    if lanes.all():
        return len(lanes) // WARP, True
    return int(np.count_nonzero(ballot(lanes))), False
