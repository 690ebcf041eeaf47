"""Asynchronous copies (cp.async) from global to shared memory, with their groups and waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import memory
from .accesses import Array, LaunchRunner, Target, address_reader, builds, load_bytes, targets
from .arithmetic import unsupported
from .memory import IN_FLIGHT, WRITTEN
from .parser import Instruction, Register
from .threads import bits_reader, predicate_reader

if TYPE_CHECKING:
    from .machine import Launch


@builds("cp")
def _copy_async(ins: Instruction) -> LaunchRunner:
    if ins.modifiers[0] != "async" or "bulk" in ins.modifiers or "mbarrier" in ins.modifiers:
        raise unsupported(ins)
    if ins.modifiers[1] == "commit_group":
        return lambda launch, active: launch.copies.commit(active)
    if ins.modifiers[1] in ("wait_group", "wait_all"):
        remaining = ins.operands[0].value if ins.operands else 0
        return lambda launch, active: launch.copies.wait(launch, ins, active, remaining)
    to, source = (address_reader(ins, operand) for operand in ins.operands[:2])
    size = ins.operands[2].value
    extra = [o for o in ins.operands[3:] if not (isinstance(o, Register) and o.bytes == 8)]
    ignore = extra and isinstance(extra[0], Register) and extra[0].bytes == 1
    used = bits_reader(ins, extra[0], 4) if extra and not ignore else None
    skip = predicate_reader(extra[0]) if ignore else None

    def run(launch: Launch, active: Array | None) -> None:
        lanes = launch.threads.indices(active)
        data = np.zeros((len(lanes), size), np.uint8)
        take = np.full(len(lanes), size)
        if used:
            take = launch.threads.everywhere(used(launch.threads))[lanes].astype(int)
        if skip:
            take = np.where(launch.threads.everywhere(skip(launch.threads))[lanes], 0, take)
        addresses = launch.threads.everywhere(source(launch))
        whole = np.flatnonzero(take >= size)
        if len(whole):
            for target in targets(launch, ins, addresses, lanes[whole], size, "global"):
                data[whole[target.picked]] = load_bytes(launch, ins, target, size)
        # A part of a vector, at the end of a buffer: only its bytes are read, the others become zero.
        for byte in range(size):
            part = np.flatnonzero((take < size) & (take > byte))
            if len(part):
                for target in targets(launch, ins, addresses + byte, lanes[part], 1, "global"):
                    data[part[target.picked], byte] = load_bytes(launch, ins, target, 1)[:, 0]
        target = targets(launch, ins, to(launch), lanes, size, "shared")[0]
        launch.counters.access(launch, ins, target, size, "store")
        launch.copies.start(launch, ins, target, data)

    return run


@dataclass
class _Copy:
    ins: Instruction
    target: Target
    data: Array
    group: Array


class AsyncCopies:
    """cp.async in flight: the data reaches shared memory when its thread waits for it, not before."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[_Copy] = []

    def start(self, launch: Launch, ins: Instruction, target: Target, data: Array) -> None:
        if launch.races:
            launch.races.access(ins, target, data.shape[1], data, strong=False)
        memory.scatter(target.state, target.offsets, np.full_like(data, IN_FLIGHT))
        self.pending.append(_Copy(ins, target, data, self.committed[target.lanes]))

    def commit(self, active: Array | None) -> None:
        self.committed[slice(None) if active is None else active] += 1

    def wait(self, launch: Launch, ins: Instruction, active: Array | None, remaining: int) -> None:
        limit = self.committed - remaining
        if "wait_all" in ins.modifiers:
            limit = limit + 1  # also what no group was committed for
        still = []
        for copy in self.pending:
            lanes = copy.target.lanes
            done = copy.group < limit[lanes]
            if active is not None:
                done &= active[lanes]
            if done.any():
                self._land(launch, copy, done)
            if not done.all():
                still.append(_Copy(copy.ins, _part(copy.target, ~done), copy.data[~done], copy.group[~done]))
        self.pending = still

    def _land(self, launch: Launch, copy: _Copy, done: Array) -> None:
        target, data = _part(copy.target, done), copy.data[done]
        if launch.races:
            launch.races.access(copy.ins, target, data.shape[1], data, strong=False)
        memory.scatter(target.memory, target.offsets, data)
        memory.scatter(target.state, target.offsets, np.full_like(data, WRITTEN))
        launch.progress += 1


def _part(target: Target, chosen: Array) -> Target:
    return Target(target.lanes[chosen], target.offsets[chosen], target.memory, target.state, target.name,
                  target.space, slice(None), target.shadow_key)  # fmt: skip
