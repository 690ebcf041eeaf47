"""Provide kernels in which several blocks synchronise, with faults that the emulator must report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.snippet import snippet

SEEDS = (None, 0, 1)


def first_report(run: Callable[[Device], None]) -> EmulatorError:
    """Return the first error that the emulator reports for a run, in lock-step or under a random schedule."""
    for seed in SEEDS:
        try:
            run(Device(seed=seed, max_steps=100_000))
        except EmulatorError as error:
            return error
    pytest.fail("no check reported the fault")


GRID_BARRIER = """
    ld.param.u64 %rd1, [slots]; ld.param.u64 %rd2, [counter]; mov.u32 %r2, %ctaid.x; mov.u32 %r9, %nctaid.x;
    mad.wide.u32 %rd3, %r2, 4, %rd1; st.global.u32 [%rd3], %r2;
    {release}
    red.relaxed.gpu.global.add.u32 [%rd2], 1;
spin: {poll}
    setp.lt.u32 %p2, %r6, %r9; @%p2 bra spin;
    add.u32 %r7, %r2, 1; rem.u32 %r7, %r7, %r9; mad.wide.u32 %rd4, %r7, 4, %rd1; ld.global.u32 %r1, [%rd4];
"""


def run_grid_barrier(device: Device, release: str, poll: str, blocks: int = 6, cooperative: bool = True) -> None:
    """Launch blocks that each write a slot, wait for all others, and read the next block's slot."""
    kernel = snippet(GRID_BARRIER.format(release=release, poll=poll), "u64 slots, u64 counter")
    slots, counter = device.empty(blocks, np.uint32), np.zeros(1, np.uint32)
    device.launch(kernel, blocks, 1, [slots, counter], cooperative=cooperative)
