"""Ask the current GPU for its properties, and compile kernels for it."""

from __future__ import annotations

from functools import cache, lru_cache
from threading import Lock, local
from typing import Any

import cupy

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.plan import THREADS, Device

OLDEST_ARCHES = {12: 70, 13: 75}
"""The oldest GPUs that NVRTC compiles for, by its major version."""
MODULES = 1024
"""Compiled modules kept in memory. CuPy keeps the others on disk."""
MEMORY_CLOCK_RATE = 36
"""``cudaDevAttrMemoryClockRate``."""
_SHARED_LIMIT = Lock()
"""Held while a kernel's limit of shared memory is read and raised."""
_THREAD = local()
"""``devices``: those whose context this thread has."""
_WITHOUT_CLUSTERS: set[int] = set()
"""Devices that have refused a cluster."""


@cache
def properties(index: int) -> Device:
    """Return the device of a number.

    Raises:
        BackendUnavailableError: the kernels do not run on it.
    """
    found = cupy.cuda.runtime.getDeviceProperties(index)
    arch = 10 * found["major"] + found["minor"]
    name = found["name"].decode()
    cuda = cupy.cuda.nvrtc.getVersion()[0]
    oldest = OLDEST_ARCHES.get(cuda, max(OLDEST_ARCHES.values()))
    if arch < oldest:
        with_12 = ", or cupy-cuda12x in place of this CuPy" if arch >= OLDEST_ARCHES[12] else ""
        raise BackendUnavailableError(
            f"{name} is sm_{arch}, the kernels need sm_{oldest} or newer with CUDA {cuda}; use NumPy arrays{with_12}"
        )
    return Device(
        name, arch, found["multiProcessorCount"], found["sharedMemPerMultiprocessor"], found["sharedMemPerBlockOptin"],
        found["l2CacheSize"], _bandwidth(index, found), clusters=arch >= 90 and index not in _WITHOUT_CLUSTERS,
    )  # fmt: skip


def _bandwidth(index: int, properties: dict[str, Any]) -> float:
    """Return bytes per second. CUDA 13 has the clock among a device's attributes only."""
    clock = properties.get("memoryClockRate") or cupy.cuda.runtime.deviceGetAttribute(MEMORY_CLOCK_RATE, index)
    return 2e3 * float(clock) * float(properties["memoryBusWidth"]) / 8  # kHz, bits


def without_clusters() -> None:
    """Plan without clusters on the current device from now on."""
    _WITHOUT_CLUSTERS.add(cupy.cuda.runtime.getDevice())
    properties.cache_clear()


def bind_context() -> None:
    """Give the thread the device's context, which functions of the driver need that CuPy passes on as they are."""
    devices = _THREAD.__dict__.setdefault("devices", set())
    if (device := cupy.cuda.runtime.getDevice()) not in devices:
        cupy.cuda.runtime.memGetInfo()
        devices.add(device)


@lru_cache(4096)
def compiled(activation: str | None, name: str, shared_bytes: int, device: int) -> Any:
    """Return a kernel for the current device, allowed to use a block's dynamic shared memory."""
    del device  # part of the key: the limit of shared memory is set on each device
    try:
        kernel = _module(activation, name).get_function(name)
    except Exception as error:  # NVRTC is missing, or does not know the GPU, or has complaints: CuPy has many types
        raise BackendUnavailableError(
            f"the kernel {name} could not be compiled ({type(error).__name__}): {error}\n"
            "If NVRTC is missing: pip install -e '.[cupy]' in a clone of gpu_bn. If it does not know the GPU: "
            "update CuPy. If it is newer than the NVIDIA driver: update that."
        ) from error
    if shared_bytes > 32 << 10:
        bind_context()
        with _SHARED_LIMIT:  # plans of all sizes share the kernel and its limit
            kernel.max_dynamic_shared_size_bytes = max(shared_bytes, kernel.max_dynamic_shared_size_bytes)
    return kernel


@lru_cache(MODULES)
def _module(activation: str | None, name: str) -> Any:
    return cupy.RawModule(code=cuda_sources.source(activation), options=cuda_sources.OPTIONS, name_expressions=(name,))


@lru_cache(4096)
def resident_blocks(kernel: Any, shared_bytes: int) -> int:
    """Return how many blocks of a kernel an SM holds."""
    bind_context()
    driver = cupy.cuda.driver
    blocks: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, THREADS, shared_bytes)
    return blocks
