"""Describe GPUs to the planner, and compile kernels for them."""

from __future__ import annotations

from functools import cache, lru_cache
from threading import Lock, local
from typing import Any

import cupy

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.gpu_model import memory_bandwidth
from gpu_bn.plan import THREADS, Device

OLDEST_ARCHES = {12: 70, 13: 75}
"""The oldest architecture that NVRTC compiles for, by the major version of CUDA."""
MODULES = 1024
"""The most compiled modules kept in memory. CuPy keeps the others on disk."""
MEMORY_CLOCK_RATE = 36
"""The device attribute ``cudaDevAttrMemoryClockRate``."""
_SHARED_LIMIT = Lock()
"""A lock that is held while a kernel's limit of shared memory is read and raised."""
_THREAD = local()
"""``devices``: the devices whose context this thread has."""
_WITHOUT_CLUSTERS: set[int] = set()
"""Devices that have refused to launch a cluster."""


@cache
def properties(index: int) -> Device:
    """Return the planner's description of a device.

    Raises:
        BackendUnavailableError: NVRTC does not compile for it.
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
    """Return the bandwidth of memory in bytes per second. In CUDA 13, only a device attribute has the clock rate."""
    clock = properties.get("memoryClockRate") or cupy.cuda.runtime.deviceGetAttribute(MEMORY_CLOCK_RATE, index)
    return memory_bandwidth(clock, properties["memoryBusWidth"])


def disable_clusters() -> None:
    """Plan without clusters on the current device from now on."""
    _WITHOUT_CLUSTERS.add(cupy.cuda.runtime.getDevice())
    properties.cache_clear()


def bind_context() -> None:
    """Give the thread the current device's context, which CUDA driver functions need when CuPy calls them directly."""
    devices = _THREAD.__dict__.setdefault("devices", set())
    if (device := cupy.cuda.runtime.getDevice()) not in devices:
        cupy.cuda.runtime.memGetInfo()
        devices.add(device)


@lru_cache(4096)
def get_kernel(activation: str | None, name: str, shared_bytes: int, device: int) -> Any:
    """Return a compiled kernel for the current device, which may use ``shared_bytes`` of dynamic shared memory."""
    del device  # only a part of the cache's key: the limit of shared memory is set for each device
    try:
        kernel = _module(activation, name).get_function(name)
    except Exception as error:  # CuPy raises many types: NVRTC is missing, does not know the GPU, or reports an error
        raise BackendUnavailableError(
            f"the kernel {name} could not be compiled ({type(error).__name__}): {error}\n"
            "If NVRTC is missing: pip install -e '.[cupy]' in a clone of gpu_bn. If it does not know the GPU: "
            "update CuPy. If it is newer than the NVIDIA driver: update that."
        ) from error
    if shared_bytes > 32 << 10:
        bind_context()
        with _SHARED_LIMIT:  # plans with other sizes share the kernel and its limit
            kernel.max_dynamic_shared_size_bytes = max(shared_bytes, kernel.max_dynamic_shared_size_bytes)
    return kernel


@lru_cache(MODULES)
def _module(activation: str | None, name: str) -> Any:
    return cupy.RawModule(code=cuda_sources.source(activation), options=cuda_sources.OPTIONS, name_expressions=(name,))


@lru_cache(4096)
def resident_blocks(kernel: Any, shared_bytes: int) -> int:
    """Return the number of blocks of a kernel that an SM holds at the same time."""
    bind_context()
    driver = cupy.cuda.driver
    blocks: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, THREADS, shared_bytes)
    return blocks
