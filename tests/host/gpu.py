"""A stand-in for CuPy whose kernels are compiled by g++ and run on the CPU, thread by thread."""

from __future__ import annotations

import ctypes
import functools
import importlib
import types
from typing import Any

import numpy as np
from support import fake_cupy

from .compile import compile_kernels, compile_scheduler


@functools.cache
def scheduler() -> ctypes.CDLL:
    """Return the library of ``fibres.cpp``, which all kernels share."""
    return ctypes.CDLL(str(compile_scheduler()), ctypes.RTLD_GLOBAL)


class HostKernel:
    """A kernel in a library that was compiled with g++."""

    shared_bytes = 0  # static shared memory, which the shim allocates

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.function = ctypes.cast(library[f"kernel_{index}"], ctypes.c_void_p)

    def launch(self, grid: Any, block: Any, table: Any, shared: int, cooperative: bool, seed: int) -> None:
        blocks, threads = int(np.prod(grid)), int(np.prod(block))
        scheduler().shim_launch(self.function, table, blocks, threads, ctypes.c_size_t(shared), cooperative, seed)


class HostDevice:
    """Memory and launches, with the methods of :class:`emulator.Device` that CuPy's stand-in calls."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.memory = seed, self

    def mark_written(self, array: np.ndarray) -> None:
        """Do nothing: this device does not check reads of unwritten bytes."""

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        """Return an array whose bits are all 1: NaN, or -1 or the largest integer."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    def launch(self, kernel: HostKernel, grid: Any, block: Any, values: list[Any], shared: int) -> None:
        """Run a kernel to its end."""
        cells = [ctypes.create_string_buffer(_bytes(value), 8) for value in values]
        table = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        kernel.launch(grid, block, table, shared, False, self.seed)


def _bytes(argument: Any) -> bytes:
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data.to_bytes(8, "little")
    return np.asarray(argument).tobytes()


class HostGpu(fake_cupy.EmulatedGpu):
    """A stand-in for CuPy whose kernels are compiled with ``sanitizer``."""

    sanitizer = "address"

    def raw_module(self, *, code: str, options: tuple = (), name_expressions: tuple = ()) -> Any:
        """Compile kernels, in place of ``cupy.RawModule``."""
        del options
        scheduler()
        library = ctypes.CDLL(str(compile_kernels(self.edit_source(code), name_expressions, self.sanitizer)))
        found = {
            name: types.SimpleNamespace(name=name, kernel=HostKernel(library, index))
            for index, name in enumerate(name_expressions)
        }
        kernel = functools.cache(lambda name, device: self._kernel(found[name]))  # noqa: ARG005
        return types.SimpleNamespace(get_function=lambda name: kernel(name, self.current))

    def launch_cooperative(
        self, pointer: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, table: int
    ) -> None:
        """Run all blocks together, in place of ``cupy.cuda.driver.launchCooperativeKernel``."""
        kernel = self.kernels[pointer]
        self._note(kernel, stream)
        cells = ctypes.c_void_p(table)
        kernel.compiled.kernel.launch((gx, gy, gz), (bx, by, bz), cells, shared, True, self.device.seed)


def backend(monkeypatch: Any, tier: str | None, sanitizer: str, seed: int = 0, arch: int = 90) -> Any:
    """Return the CuPy backend on such a GPU, which is its attribute ``gpu``."""
    gpu = fake_cupy.install(monkeypatch, HostDevice(seed), arch, HostGpu)
    gpu.sanitizer = sanitizer
    made = importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier)
    made.gpu = gpu
    return made
