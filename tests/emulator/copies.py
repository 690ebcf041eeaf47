"""Execute asynchronous copies (cp.async) from global to shared memory, with their groups and waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import memory
from .accesses import Target, address_reader, load_bytes, targets
from .instructions import Runner, builds, unsupported
from .memory import IN_FLIGHT, WRITTEN
from .parser import Instruction, Register
from .threads import Array, Mask, bits_reader, predicate_reader

if TYPE_CHECKING:
    from .machine import Launch


@builds("cp", "async commit_group wait_group wait_all ca cg shared shared::cta shared::cluster global")
def _copy_async(ins: Instruction) -> Runner:
    if ins.modifiers[1] == "commit_group":
        return lambda launch, active: launch.copies.commit(active)
    if ins.modifiers[1] in ("wait_group", "wait_all"):
        remaining = ins.operands[0].value if ins.operands else None
        return lambda launch, active: launch.copies.wait(launch, active, remaining)
    to, source = (address_reader(ins, operand) for operand in ins.operands[:2])
    size = ins.operands[2].value
    if size not in ((16,) if "cg" in ins.modifiers else (4, 8, 16)):
        raise unsupported(ins)
    # An optional number of bytes to read, or a predicate to read none; a cache policy may follow.
    extra = next((o for o in ins.operands[3:] if not (isinstance(o, Register) and o.bytes == 8)), None)
    ignore = isinstance(extra, Register) and extra.bytes == 1
    skip = predicate_reader(extra) if extra is not None and ignore else None
    used = bits_reader(ins, extra, 4) if extra is not None and not ignore else None

    def run(launch: Launch, active: Mask) -> None:
        threads = launch.threads
        lanes = threads.indices(active)
        data, take = np.zeros((len(lanes), size), np.uint8), np.full(len(lanes), size)
        if used:
            take = threads.everywhere(used(threads))[lanes].astype(int)
        if skip:
            take = np.where(threads.everywhere(skip(threads))[lanes], 0, take)
        addresses = threads.everywhere(source(launch))
        whole = np.flatnonzero(take >= size)
        if len(whole):
            for target in targets(launch, ins, addresses, lanes[whole], size, "global"):
                data[whole[target.picked]] = load_bytes(launch, ins, target, size)
        # For a part of a vector, at the end of a buffer, only its bytes are read; the others become zero.
        for byte in range(size if len(whole) < len(lanes) else 0):
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

    def part(self, chosen: Array) -> _Copy:
        return _Copy(self.ins, self.target.part(chosen), self.data[chosen], self.group[chosen])


class AsyncCopies:
    """Copies in flight. The data reaches shared memory when its thread waits for it, not before."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)  # committed groups of each lane; a copy belongs to the open group
        self.pending: list[_Copy] = []

    def start(self, launch: Launch, ins: Instruction, target: Target, data: Array) -> None:
        if launch.races:
            launch.races.store(ins, target, data.shape[1], data)
        memory.scatter(target.region.state, target.offsets, np.full_like(data, IN_FLIGHT))
        self.pending.append(_Copy(ins, target, data, self.committed[target.lanes]))

    def commit(self, active: Mask) -> None:
        self.committed[slice(None) if active is None else active] += 1

    def wait(self, launch: Launch, active: Mask, remaining: int | None) -> None:
        """Complete the copies of all but the last `remaining` groups; ``None``: all, also those of the open group."""
        limit = self.committed + 1 if remaining is None else self.committed - remaining
        still = []
        for copy in self.pending:
            lanes = copy.target.lanes
            done = copy.group < limit[lanes]
            if active is not None:
                done &= active[lanes]
            if done.any():
                self._land(launch, copy.part(done))
            if not done.all():
                still.append(copy.part(~done))
        self.pending = still

    def _land(self, launch: Launch, copy: _Copy) -> None:
        region, offsets = copy.target.region, copy.target.offsets
        if launch.races:
            launch.races.store(copy.ins, copy.target, copy.data.shape[1], copy.data)
        memory.scatter(region.memory, offsets, copy.data)
        memory.scatter(region.state, offsets, np.full_like(copy.data, WRITTEN))
        launch.progress += 1
