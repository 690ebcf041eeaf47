"""A module ``cupy`` that needs no GPU, for the scripts here: arrays are NumPy's, launches do nothing but count."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

CALLS: Counter[str] = Counter()
"""How often CuPy was asked for allocations, views and launches."""
KERNELS: dict[tuple[str, str], None] = {}
"""The kernels that CuPy was asked to compile, by source and name."""


class MemoryPointer(NamedTuple):
    """An address."""

    ptr: int
    device_id: int = 0

    def __add__(self, offset: int) -> MemoryPointer:  # type: ignore[override]
        return MemoryPointer(self.ptr + offset)


class ndarray(np.ndarray):
    """An array whose attributes take about as long to read as those of CuPy's (14.2)."""

    shape = property(np.ndarray.shape.__get__)
    strides = property(np.ndarray.strides.__get__)
    data = cached_property(lambda self: MemoryPointer(self.ctypes.data))  # type: ignore[assignment]
    device = contextlib.nullcontext()

    def __getitem__(self, where: Any) -> Any:
        CALLS["views"] += 1
        return super().__getitem__(where)


ndarray.__module__ = "cupy"


@cache
def array_of(shape: tuple[int, ...], dtype: Any) -> ndarray:
    """Return the array that is handed out for a shape and dtype."""
    return ndarray(shape, dtype)


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    """Count an allocation."""
    CALLS["allocations"] += 1
    return array_of(shape, dtype)


def asarray(array: Any, dtype: Any = None) -> ndarray:
    """Return an array as one of CuPy's, in the same memory."""
    return np.asarray(array, dtype).view(ndarray)


def launch(*_: Any, **__: Any) -> None:
    """Count a launch."""
    CALLS["launches"] += 1


def install(arch: int = 90) -> None:
    """Put the module where ``import cupy`` finds it, on a GPU like an H100 but for its architecture."""
    found = {
        "name": b"H100", "major": arch // 10, "minor": arch % 10, "multiProcessorCount": 132, "memoryBusWidth": 5120,
        "l2CacheSize": 50 << 20, "sharedMemPerMultiprocessor": 228 << 10, "sharedMemPerBlockOptin": 227 << 10,
        "memoryClockRate": 2_619_000,
    }  # fmt: skip
    simple, kernel = types.SimpleNamespace, types.SimpleNamespace(ptr=0)
    launch.kernel, launch.max_dynamic_shared_size_bytes = kernel, 48 << 10  # type: ignore[attr-defined]

    def module(code: str, name_expressions: tuple[str], **_: Any) -> Any:
        KERNELS[code, *name_expressions] = None
        return simple(get_function=lambda _: launch)

    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.RawModule = ndarray, empty, module
    cupy.zeros = lambda shape, dtype=np.float64: np.zeros(shape, dtype).view(ndarray)
    cupy.asarray = asarray
    runtime = simple(
        CUDARuntimeError=RuntimeError, getDevice=lambda: 0, getDeviceCount=lambda: 1, memGetInfo=lambda: (1, 1),
        getDeviceProperties=lambda _: found,
    )  # fmt: skip
    driver = simple(launchCooperativeKernel=launch, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2)
    stream = simple(ptr=0, is_capturing=lambda: False)
    cupy.cuda = simple(
        runtime=runtime, driver=driver, nvrtc=simple(getVersion=lambda: (12, 9)), get_current_stream=lambda: stream
    )
    sys.modules["cupy"] = cupy
