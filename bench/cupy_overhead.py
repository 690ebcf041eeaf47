"""What a call of the CuPy backend costs in Python: kernels are launched by a function that does nothing.

Arrays are NumPy's behind CuPy's interface, so no GPU is needed; what CuPy itself takes to allocate and to launch (a few
microseconds each) is not included.

    python bench/cupy_overhead.py
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fake_cupy
from emulator import Device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    seconds = parser.parse_args().seconds
    gpu = without_kernels()
    sys.modules["cupy"] = gpu.module()
    sys.modules["cupy"].empty = lambda shape, dtype=np.float64: np.empty(shape, dtype).view(fake_cupy.ndarray)

    import gpu_bn

    x = np.ones((2, 8, 4, 4), np.float32).view(fake_cupy.ndarray)
    vectors = [np.ones(8, np.float32).view(fake_cupy.ndarray) for _ in range(4)]
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True)
    rows = {
        "forward, evaluation": lambda: gpu_bn.batch_norm(x, *vectors),
        "forward, training": lambda: gpu_bn.batch_norm(x, *vectors, training=True),
        "forward, training, relu and residual": lambda: gpu_bn.batch_norm(
            x, *vectors, training=True, residual=x, activation="relu"
        ),
        "backward": lambda: gpu_bn.batch_norm_backward(x, saved),
    }
    print("microseconds a call (best of 7)")
    for name, call in rows.items():
        print(f"{name:40} {microseconds(call, seconds):6.1f}")


def without_kernels(arch: int = 90) -> fake_cupy.EmulatedGpu:
    """An emulated GPU whose kernels do nothing and need no compiler."""
    gpu = fake_cupy.EmulatedGpu(Device(), arch)

    def nothing(grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        pass

    gpu.raw_module = lambda **_: types.SimpleNamespace(get_function=lambda _: nothing)
    return gpu


def microseconds(call, seconds: float) -> float:
    calls = 50
    best = float("inf")
    for _ in range(7):
        end, count = time.perf_counter() + seconds / 7, 0
        start = time.perf_counter()
        while count == 0 or time.perf_counter() < end:
            for _ in range(calls):
                call()
            count += calls
        best = min(best, (time.perf_counter() - start) / count)
    return 1e6 * best


if __name__ == "__main__":
    main()
