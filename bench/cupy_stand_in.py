"""A module ``cupy`` that needs no GPU, for the scripts here: arrays are NumPy arrays, launches are only counted."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

CALLS: Counter[str] = Counter()
"""The numbers of allocations, views and launches."""
KERNELS: dict[tuple[str, str], None] = {}
"""The kernels that CuPy would compile, by source and name, in their order."""
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
    """An array whose attributes take about as long to read as those of an array of CuPy 14.2."""

    shape = property(np.ndarray.shape.__get__)
    strides = property(np.ndarray.strides.__get__)
    data = cached_property(lambda self: MemoryPointer(self.ctypes.data))  # type: ignore[assignment]
    device = contextlib.nullcontext()

    def __getitem__(self, where: Any) -> Any:
        CALLS["views"] += 1
        return super().__getitem__(where)


ndarray.__module__ = "cupy"
array_of = cache(ndarray)
"""Return the array for a shape and dtype, always the same one."""


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    """Count an allocation and return an array, which earlier calls may have returned too."""
    CALLS["allocations"] += 1
    return array_of(shape, dtype)


def asarray(array: Any, dtype: Any = None) -> ndarray:
    """Return a CuPy array, in the same memory if the dtype allows."""
    return np.asarray(array, dtype).view(ndarray)


def launch(*_: Any, **__: Any) -> None:
    """Count a launch."""
    CALLS["launches"] += 1


launch.kernel, launch.max_dynamic_shared_size_bytes = types.SimpleNamespace(ptr=0), 48 << 10  # type: ignore[attr-defined]


def raw_module(code: str, name_expressions: tuple[str], **_: Any) -> Any:
    """Note a kernel, and return a module whose kernels count their launches."""
    KERNELS[code, *name_expressions] = None
    return types.SimpleNamespace(get_function=lambda _: launch)


def install(arch: int = 90) -> None:
    """Put the module where ``import cupy`` finds it; its GPU is an H100 with the compute capability ``arch``."""
    simple, properties = types.SimpleNamespace, H100 | {"major": arch // 10, "minor": arch % 10}
    runtime = simple(
        CUDARuntimeError=RuntimeError, getDevice=lambda: 0, getDeviceCount=lambda: 1, memGetInfo=lambda: (1, 1),
        getDeviceProperties=lambda _: properties,
    )  # fmt: skip
    driver = simple(launchCooperativeKernel=launch, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2)
    nvrtc, stream = simple(getVersion=lambda: (12, 9)), simple(ptr=0, is_capturing=lambda: False)
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.asarray, cupy.RawModule = ndarray, empty, asarray, raw_module
    cupy.zeros = lambda shape, dtype=np.float64: asarray(np.zeros(shape, dtype))
    cupy.cuda = simple(runtime=runtime, driver=driver, nvrtc=nvrtc, get_current_stream=lambda: stream)
    sys.modules["cupy"] = cupy
