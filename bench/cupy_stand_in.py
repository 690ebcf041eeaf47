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
H100 = {
    "name": b"H100", "multiProcessorCount": 132, "memoryBusWidth": 5120, "l2CacheSize": 50 << 20,
    "sharedMemPerMultiprocessor": 228 << 10, "sharedMemPerBlockOptin": 227 << 10, "memoryClockRate": 2_619_000,
}  # fmt: skip


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
array_of = cache(ndarray)
"""The array that is handed out for a shape and dtype."""


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


launch.kernel, launch.max_dynamic_shared_size_bytes = types.SimpleNamespace(ptr=0), 48 << 10  # type: ignore[attr-defined]


def raw_module(code: str, name_expressions: tuple[str], **_: Any) -> Any:
    """Note a kernel, and return what launches it."""
    KERNELS[code, *name_expressions] = None
    return types.SimpleNamespace(get_function=lambda _: launch)


def install(arch: int = 90) -> None:
    """Put the module where ``import cupy`` finds it, on a GPU like an H100 but for its architecture."""
    simple, found = types.SimpleNamespace, H100 | {"major": arch // 10, "minor": arch % 10}
    runtime = simple(
        CUDARuntimeError=RuntimeError, getDevice=lambda: 0, getDeviceCount=lambda: 1, memGetInfo=lambda: (1, 1),
        getDeviceProperties=lambda _: found,
    )  # fmt: skip
    driver = simple(launchCooperativeKernel=launch, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2)
    nvrtc, stream = simple(getVersion=lambda: (12, 9)), simple(ptr=0, is_capturing=lambda: False)
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.asarray, cupy.RawModule = ndarray, empty, asarray, raw_module
    cupy.zeros = lambda shape, dtype=np.float64: asarray(np.zeros(shape, dtype))
    cupy.cuda = simple(runtime=runtime, driver=driver, nvrtc=nvrtc, get_current_stream=lambda: stream)
    sys.modules["cupy"] = cupy
