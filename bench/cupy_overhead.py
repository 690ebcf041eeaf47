"""What a call of the CuPy backend costs in Python: ``python bench/cupy_overhead.py``. No GPU is needed.

Counted is all that gpu_bn does in a later call of a shape: checks, dispatch, looking up what has been prepared,
gathering arguments, keeping what the backward call needs. What CuPy does is not counted: its stand-in launches nothing,
and has one array of each shape, which it hands out whenever one is allocated. The table says how often a call asks for
either, and for views; CuPy takes some microseconds each time. To read an attribute of the stand-in's arrays takes about
as long as of CuPy's (14.2): some 0.1 µs for a shape or strides, 0.05 µs for an address, less for a dtype.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import timeit
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 100
"""Calls in one timing."""
CALLS: Counter[str] = Counter()
"""What has been asked of CuPy."""
ADDRESSES = itertools.count(1 << 20, 1 << 20)


class MemoryPointer:
    """An address."""

    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr: int) -> None:
        self.ptr, self.device_id = ptr, 0

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.ptr + offset)


class ndarray:
    """An array without memory."""

    __slots__ = ("_data", "_shape", "_strides", "dtype", "nbytes", "ndim", "size")

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        like = np.empty(shape, dtype)
        self._shape, self._strides = list(like.shape), list(like.strides)
        self._data = MemoryPointer(next(ADDRESSES))
        self.dtype, self.ndim, self.size, self.nbytes = like.dtype, like.ndim, like.size, like.nbytes

    @property
    def data(self) -> MemoryPointer:
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self._strides)

    @property
    def flags(self) -> Any:
        return types.SimpleNamespace(c_contiguous=True)

    def __getitem__(self, where: Any) -> ndarray:
        CALLS["views"] += 1
        return self


ndarray.__module__ = "cupy"
ARRAYS: dict[Any, ndarray] = {}


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    """The array of a shape and dtype."""
    CALLS["allocations"] += 1
    return ARRAYS.get((shape, dtype)) or ARRAYS.setdefault((shape, dtype), ndarray(shape, dtype))


def launch(_grid: tuple[int], _block: tuple[int], _arguments: tuple[Any, ...], **_: int) -> None:
    """Launch nothing."""
    CALLS["launches"] += 1


def stand_in() -> types.ModuleType:
    """A module ``cupy`` for an H100 that does nothing."""
    properties = {
        "name": b"H100", "major": 9, "minor": 0, "multiProcessorCount": 132, "l2CacheSize": 50 << 20,
        "sharedMemPerMultiprocessor": 228 << 10, "sharedMemPerBlockOptin": 227 << 10, "memoryBusWidth": 5120,
        "memoryClockRate": 2_619_000,
    }  # fmt: skip
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty = ndarray, empty
    cupy.RawModule = lambda **_: types.SimpleNamespace(get_function=lambda _: launch)
    runtime = types.SimpleNamespace(
        CUDARuntimeError=RuntimeError, getDevice=lambda: 0, getDeviceCount=lambda: 1,
        getDeviceProperties=lambda _: properties,
    )  # fmt: skip
    cupy.cuda = types.SimpleNamespace(runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=lambda: (12, 9)))
    return cupy


def rows() -> dict[str, Callable[[], Any]]:
    """The calls that are timed."""
    import gpu_bn

    x = ndarray((2, 8, 4, 4), np.float32)
    vectors = [ndarray((8,), np.float32) for _ in range(4)]
    y, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True)
    out = ndarray(y.shape, y.dtype)
    return {
        "forward, evaluation": lambda: gpu_bn.batch_norm(x, *vectors),
        "forward, training": lambda: gpu_bn.batch_norm(x, *vectors, training=True),
        "forward, training, relu and residual": lambda: gpu_bn.batch_norm(
            x, *vectors, training=True, residual=x, activation="relu"
        ),
        "forward, training, given an output": lambda: gpu_bn.batch_norm(x, *vectors, training=True, out=out),
        "backward": lambda: gpu_bn.batch_norm_backward(x, saved),
    }


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """A call's, the best of some batches."""
    timer, end = timeit.Timer(call), time.perf_counter() + seconds
    best = timer.timeit(BATCH)
    while time.perf_counter() < end:
        best = min(best, timer.timeit(BATCH))
    return 1e6 * best / BATCH


def main() -> None:
    """Measure and print; the exit code is 1 if a row is not below the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--limit", type=float, default=float("inf"), help="microseconds, with five tries for each row")
    options = parser.parse_args()
    sys.modules["cupy"] = stand_in()
    print(f"{'microseconds a call, the best of batches of 100':50}{'allocations':>12}{'views':>7}{'launches':>10}")
    missed = False
    for name, call in rows().items():
        call()
        CALLS.clear()
        call()
        counts = [CALLS[what] for what in ("allocations", "views", "launches")]
        best = float("inf")
        for _ in range(5):  # the machine may be busy for a while
            best = min(best, microseconds(call, options.seconds))
            if best < options.limit:
                break
        missed |= best >= options.limit
        print(f"{name:40}{best:10.1f}{counts[0]:12}{counts[1]:7}{counts[2]:10}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
