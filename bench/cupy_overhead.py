"""What a call of the CuPy backend costs in Python: ``python bench/cupy_overhead.py``. No GPU is needed.

A time is that of all that gpu_bn does in a later call of a shape: checks, dispatch, looking up what has been prepared,
gathering arguments, keeping what the backward call needs. It is without CuPy's own time: the stand-in for CuPy launches
nothing, and has one array of each shape, which it hands out whenever one is allocated. The table says how often a call
allocates, launches and makes a view; CuPy takes some microseconds for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import cupy_stand_in
import numpy as np

import gpu_bn
from gpu_bn.bench.timing import CpuTimer, take_samples

TIMER = CpuTimer(batch=0.002, pause=0)


def rows() -> dict[str, Callable[[], Any]]:
    """Return the timed calls by the name of their row."""
    x, out = (cupy_stand_in.ndarray((2, 8, 4, 4), np.float32) for _ in range(2))
    vectors = [cupy_stand_in.ndarray((8,), np.float32) for _ in range(4)]
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True)

    def training(**options: Any) -> Callable[[], Any]:
        return lambda: gpu_bn.batch_norm(x, *vectors, training=True, **options)

    return {
        "forward, evaluation": lambda: gpu_bn.batch_norm(x, *vectors),
        "forward, training": training(),
        "forward, training, relu and residual": training(residual=x, activation="relu"),
        "forward, training, given an output": training(out=out),
        "backward": lambda: gpu_bn.batch_norm_backward(x, saved),
    }


def main() -> None:
    """Measure and print; the exit code is 1 if a row is not below the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--limit", type=float, default=float("inf"), help="microseconds, with five tries for each row")
    options = parser.parse_args()
    cupy_stand_in.install()
    print(f"{'microseconds a call, the best of batches of 2 ms':50}{'allocations':>12}{'views':>7}{'launches':>10}")
    missed = False
    for name, call in rows().items():
        call()
        cupy_stand_in.CALLS.clear()
        call()
        counts = cupy_stand_in.CALLS.copy()
        best = float("inf")
        for _ in range(5):  # another process may use the CPU for a while
            samples = take_samples({name: call}, TIMER, "wall", options.seconds)
            best = min(best, 1e6 * min(samples.times(name)))
            if best < options.limit:
                break
        missed |= best >= options.limit
        print(f"{name:40}{best:10.1f}{counts['allocations']:12}{counts['views']:7}{counts['launches']:10}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
