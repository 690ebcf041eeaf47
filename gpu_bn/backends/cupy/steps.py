"""The current GPU as the CuPy backend sees it: its properties, its kernels, and the steps that a call is made of.

A step does one thing with a *frame*, the arrays and numbers of a call by name: it allocates, copies or launches.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from threading import Lock, local
from typing import Any

import cupy
import numpy as np

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.layout import Layout
from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.plan import THREADS, Device, LaunchPlan
from gpu_bn.spec import MAX_RANK

Array = Any
Frame = dict[str, Any]
Step = Callable[[Frame], None]

OLDEST_ARCHES = {12: 70, 13: 75}
"""What NVRTC compiles for, by its major version."""
KERNELS = 1024
"""Modules that are kept; CuPy has those that are forgotten on disk."""
MEMORY_CLOCK_RATE = 36
"""``cudaDevAttrMemoryClockRate``."""
REFUSALS = ("CUDA_ERROR_INVALID_CLUSTER_SIZE", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "CUDA_ERROR_NOT_SUPPORTED")
"""How a launch fails if a part of a GPU (MIG) has no room for a cluster."""
NATURAL = tuple(range(MAX_RANK))
BLOCK = (THREADS,)
NULL = np.intp(0)
_LIMIT = Lock()
"""Held while a kernel's limit of shared memory is read and raised."""
_BOUND = local()
"""``devices``: those whose context this thread has."""
_WITHOUT_CLUSTERS: set[int] = set()
"""Devices that have refused a cluster."""


class ClusterRefusedError(Exception):
    """The device has no room for a cluster; from now on its plans have none."""


@cache
def properties(index: int) -> Device:
    """The device of a number.

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
    """Bytes per second. CUDA 13 has the clock among a device's attributes only."""
    clock = properties.get("memoryClockRate") or cupy.cuda.runtime.deviceGetAttribute(MEMORY_CLOCK_RATE, index)
    return 2e3 * float(clock) * float(properties["memoryBusWidth"]) / 8  # kHz, bits


def bind_context() -> None:
    """Give the thread the device's context: the driver's own functions, which CuPy passes on as they are, need one."""
    devices = _BOUND.__dict__.setdefault("devices", set())
    if (device := cupy.cuda.runtime.getDevice()) not in devices:
        cupy.cuda.runtime.memGetInfo()
        devices.add(device)


# ------------------------------------------------------------------------------------------------------ kernels
@lru_cache(4096)
def compiled(activation: str, name: str, shared_bytes: int, device: int) -> Any:
    """A kernel, allowed to use a block's shared memory: the current device's, which is asked for each."""
    del device  # part of the key
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
        with _LIMIT:  # the kernel's, for plans of all sizes
            kernel.max_dynamic_shared_size_bytes = max(shared_bytes, kernel.max_dynamic_shared_size_bytes)
    return kernel


@lru_cache(KERNELS)
def _module(activation: str, name: str) -> Any:
    return cupy.RawModule(code=cuda_sources.source(activation), options=cuda_sources.OPTIONS, name_expressions=(name,))


@lru_cache(4096)
def resident_blocks(kernel: Any, shared_bytes: int) -> int:
    """Blocks of a kernel that an SM holds."""
    bind_context()
    driver = cupy.cuda.driver
    blocks: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, THREADS, shared_bytes)
    return blocks


# -------------------------------------------------------------------------------------------------------- steps
class Launch:
    """Launch a kernel on the current stream: with what the frame has, constants, and more of what the frame has.

    ``None`` in a frame is a null pointer; CuPy itself would make another of it (cupy#9046).
    """

    def __init__(
        self, kernel: Any, grid: int, shared_bytes: int, before: Sequence[str], constants: Sequence[Any],
        after: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.shared_bytes = kernel, (grid,), shared_bytes
        self.before, self.constants, self.after = tuple(before), tuple(constants), tuple(after)

    def __call__(self, frame: Frame) -> None:
        self.kernel(self.grid, BLOCK, self.arguments(frame), shared_mem=self.shared_bytes)

    def arguments(self, frame: Frame) -> tuple[Any, ...]:
        """The kernel's, in order."""
        found = frame.__getitem__
        arguments = (*map(found, self.before), *self.constants, *map(found, self.after))
        return tuple([NULL if argument is None else argument for argument in arguments])


class ClusterLaunch(Launch):
    """Launch a kernel whose blocks come in clusters.

    Raises:
        ClusterRefusedError: the device has no room for one; nothing has run.
    """

    def __call__(self, frame: Frame) -> None:
        try:
            super().__call__(frame)
        except cupy.cuda.driver.CUDADriverError as error:
            if not str(error).startswith(REFUSALS):
                raise
            _WITHOUT_CLUSTERS.add(cupy.cuda.runtime.getDevice())
            properties.cache_clear()
            raise ClusterRefusedError(str(error)) from error


class CooperativeLaunch(Launch):
    """Launch with all blocks co-resident. CuPy's own way to ask for that needs a CUDA toolkit to link with."""

    def __call__(self, frame: Frame) -> None:
        bind_context()
        values, formats = zip(*map(_cell, self.arguments(frame)), strict=True)
        cells = ctypes.create_string_buffer(8 * len(values))
        struct.pack_into("=" + "".join(formats), cells, 0, *values)
        first = ctypes.addressof(cells)
        table = (ctypes.c_void_p * len(values))(*range(first, first + len(cells), 8))
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.driver.launchCooperativeKernel(
            self.kernel.kernel.ptr, *self.grid, 1, 1, *BLOCK, 1, 1, self.shared_bytes, stream, ctypes.addressof(table)
        )


def _cell(argument: Any) -> tuple[Any, str]:
    """An argument as :mod:`struct` packs it into 8 bytes."""
    if isinstance(argument, np.generic):
        return argument, {"u4": "I4x", "i8": "q", "f8": "d"}[argument.dtype.str[1:]]
    return getattr(argument, "data", argument).ptr, "Q"


class Empty:
    """Allocate an array; its axes lie in memory in an order of their own, if one is given."""

    def __init__(self, name: str, shape: Sequence[int], dtype: Any, order: tuple[int, ...] | None = None) -> None:
        self.name, self.dtype = name, dtype
        natural = order is None or order == NATURAL[: len(order)]
        self.shape = tuple(shape) if order is None else tuple(shape[axis] for axis in order)
        self.inverse = None if order is None or natural else tuple(map(order.index, range(len(order))))

    def __call__(self, frame: Frame) -> None:
        array = cupy.empty(self.shape, self.dtype)
        frame[self.name] = array if self.inverse is None else array.transpose(self.inverse)


class Instead(Empty):
    """Allocate an array in the place of another, which stays in the frame as :func:`given`."""

    def __call__(self, frame: Frame) -> None:
        frame[given(self.name)] = frame[self.name]
        super().__call__(frame)


class Dense(Instead):
    """Put a copy in an array's place."""

    def __call__(self, frame: Frame) -> None:
        array = frame[self.name]
        super().__call__(frame)
        frame[self.name][...] = array


class GiveBack:
    """Copy an array to the one given, in whose place it was."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, frame: Frame) -> None:
        target = frame[given(self.name)]
        target[...] = frame[self.name]
        frame[self.name] = target


class Places:
    """Name places in an array by their addresses, for which no view has to be made."""

    def __init__(self, name: str, **offsets: int) -> None:
        self.name, self.offsets = name, tuple(offsets.items())

    def __call__(self, frame: Frame) -> None:
        start = frame[self.name].data
        for name, offset in self.offsets:
            frame[name] = start + offset


class Counters:
    """Take zeros for blocks to count with from the frame's ``zeros``."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.size = plan.counters

    def __call__(self, frame: Frame) -> None:
        frame["counters"] = frame["zeros"](self.size)


def given(name: str) -> str:
    """The name of the caller's array where another has taken its place."""
    return f"given {name}"


def empty(layout: Layout, dtype: Any) -> Array:
    """An array of a layout."""
    frame: Frame = {}
    Empty("new", layout.shape, dtype, layout.order)(frame)
    return frame["new"]
