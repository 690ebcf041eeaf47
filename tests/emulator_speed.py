"""How fast the PTX emulator of `tests/emulator` runs the reference kernel: millions of elements per second.

    python tests/emulator_speed.py

CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

import time

import numpy as np
from emulator import Checks, Device
from emulator.compile import compile_cuda
from support.reference_backend import CUDA_SOURCE, forward


def main() -> None:
    compiled = compile_cuda(CUDA_SOURCE, 80, resources=False)["bn_forward_f32_v4"]
    x = np.random.default_rng(0).standard_normal((8, 64, 1024), np.float32)
    ones = np.ones(64, np.float32)
    for name, checks in (
        ("every check", Checks()),
        ("no races", Checks(races=False)),
        ("neither races nor initialisation", Checks(races=False, initialised=False)),
    ):
        device, best = Device(checks=checks), np.inf
        for _ in range(5):
            start = time.process_time()
            forward(device, compiled, x, device.empty(x.shape, x.dtype), ones, ones)
            best = min(best, time.process_time() - start)
        print(f"{name:34} {x.size / best / 1e6:6.1f}")


if __name__ == "__main__":
    main()
