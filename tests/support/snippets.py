"""Run short kernels on the emulator."""

from __future__ import annotations

import numpy as np
from emulator import Device
from emulator.snippet import snippet

STORE_R1 = """
    mov.u32 %r60, %ctaid.x; mov.u32 %r61, %ntid.x; mov.u32 %r62, %tid.x; mad.lo.u32 %r60, %r60, %r61, %r62;
    ld.param.u64 %rd60, [out]; mul.wide.u32 %rd61, %r60, 4; add.u64 %rd60, %rd60, %rd61;
    st.global.u32 [%rd60], %r1;
"""


SEEDS = (None, 0, 1, 2)


def run(body: str, block: int = 64, grid: int = 1, seed: int | None = None, module: str = "") -> np.ndarray:
    """Run PTX code that leaves its result in %r1, and return the result of each thread."""
    device = Device(seed=seed)
    out = device.empty(grid * block, np.uint32)
    device.launch(snippet(body + STORE_R1, "u64 out", module=module), grid, block, [out])
    device.require_written(out)
    return out
