"""Provide a replacement of CuPy without a GPU. Arrays are NumPy arrays, and kernels run on the PTX emulator.

It has the parts of CuPy that :mod:`gpu_bn.backends.cupy.backend` uses. ``install`` makes ``import cupy`` return it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import sys
import types
import weakref
from threading import get_ident
from typing import Any

import numpy as np
from emulator import Device
from emulator.compile import Compiled, compile_cuda
from emulator.formats import VALUE
from emulator.parser import TYPE_BYTES

from gpu_bn import functional, registry
from support.fake_streams import MadeStreams, Stream

PROPERTIES = {
    75: {"name": b"emulated sm_75", "major": 7, "minor": 5, "multiProcessorCount": 4, "l2CacheSize": 32 << 10,
         "sharedMemPerMultiprocessor": 64 << 10, "sharedMemPerBlockOptin": 64 << 10},
    80: {"name": b"emulated sm_80", "major": 8, "minor": 0, "multiProcessorCount": 4, "l2CacheSize": 32 << 10,
         "sharedMemPerMultiprocessor": 164 << 10, "sharedMemPerBlockOptin": 163 << 10},
    90: {"name": b"emulated sm_90", "major": 9, "minor": 0, "multiProcessorCount": 6, "l2CacheSize": 64 << 10,
         "sharedMemPerMultiprocessor": 228 << 10, "sharedMemPerBlockOptin": 227 << 10},
    100: {"name": b"emulated sm_100", "major": 10, "minor": 0, "multiProcessorCount": 6, "l2CacheSize": 64 << 10,
          "sharedMemPerMultiprocessor": 228 << 10, "sharedMemPerBlockOptin": 227 << 10},
    120: {"name": b"emulated sm_120", "major": 12, "minor": 0, "multiProcessorCount": 4, "l2CacheSize": 32 << 10,
          "sharedMemPerMultiprocessor": 100 << 10, "sharedMemPerBlockOptin": 99 << 10},
}  # fmt: skip
"""The properties of small GPUs: few multiprocessors and little cache, so that small tensors use every tier."""


GPUS: list[EmulatedGpu] = []
"""The emulated GPU in use."""


@dataclasses.dataclass(frozen=True)
class MemoryPointer:
    """An address in the memory of an array, like ``cupy.cuda.MemoryPointer``."""

    array: ndarray
    device_id: int
    ptr: int

    def __add__(self, offset: int) -> MemoryPointer:
        return dataclasses.replace(self, ptr=self.ptr + offset)

    def bytes(self) -> np.ndarray:
        """Return the memory from this address on."""
        memory, offset = self.place()
        return memory[offset:]

    def place(self) -> tuple[np.ndarray, int]:
        """Return the memory of the array, and the offset of this address in bytes."""
        memory = _plain(self.array)
        assert memory.flags.c_contiguous
        return memory.reshape(-1).view(np.uint8), self.ptr - memory.ctypes.data


class CurrentDevice:
    """The value of ``array.device``: a number, and a context in which this device is the current one."""

    def __init__(self, index: int) -> None:
        self.id = index
        self.inside: list[Any] = []

    def __enter__(self) -> CurrentDevice:
        self.inside.append(GPUS[0].entering(self.id))
        self.inside[-1].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.inside.pop().__exit__(None, None, None)


class ndarray(np.ndarray):
    """A NumPy array with the attributes of a CuPy array."""

    def __new__(cls, shape: Any, dtype: Any, memptr: MemoryPointer, strides: Any = None) -> ndarray:
        array = super().__new__(cls, shape, dtype, *memptr.place(), strides)
        array.device_id = memptr.device_id
        return array

    def __array_finalize__(self, source: Any) -> None:
        self.device_id = getattr(source, "device_id", 0)

    @property
    def device(self) -> Any:
        return CurrentDevice(self.device_id)

    @property
    def data(self) -> Any:
        return MemoryPointer(self, self.device_id, self.ctypes.data)

    def get(self) -> np.ndarray:
        """Return a NumPy array in C order, whatever the order of this array is."""
        return np.array(self, order="C")

    def copy(self, order: str = "C") -> ndarray:
        return GPUS[0]._register(self.view(np.ndarray).copy(order))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Compute on the current device, as CuPy does. Arguments must be on it, and the result is."""
        arguments = (*inputs, *options.get("out", ()))
        _require_current(arguments)
        if "out" in options:
            options["out"] = tuple(array.view(np.ndarray) for array in options["out"])
        plain = [array.view(np.ndarray) if isinstance(array, ndarray) else array for array in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        if "out" in options:
            return arguments[len(inputs)]
        return GPUS[0]._register(np.asarray(result)) if GPUS else result

    def __setitem__(self, where: Any, value: Any) -> None:
        _require_current((self, value))
        if type(value) is np.ndarray and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        super().__setitem__(where, value)
        for gpu in GPUS:  # kernels may read what the host has written
            gpu.device.memory.mark_written(self[where])


ndarray.__module__ = "cupy"


def _require_current(arguments: tuple[Any, ...]) -> None:
    """Require arrays of the current device: CuPy accepts others only if the GPUs can access each other's memory."""
    devices = {array.device_id for array in arguments if isinstance(array, ndarray)}
    assert not GPUS or devices <= {GPUS[0].current}, "arithmetic with an array of another device than the current one"


DEFAULT_SHARED = 48 << 10
"""The bytes of static and dynamic shared memory that a block may have without a request for more."""


class CUDADriverError(RuntimeError):
    """The error of the same name in ``cupy.cuda.driver``."""


class Kernel:
    """A kernel of a module on one device. As with CUDA, all requests for it return the same object."""

    def __init__(self, gpu: EmulatedGpu, compiled: Compiled) -> None:
        self.gpu, self.compiled, self.device_id = gpu, compiled, gpu.current
        self.requested: int | None = None
        self.kernel = types.SimpleNamespace(ptr=id(self))

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return DEFAULT_SHARED if self.requested is None else self.requested

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self.gpu.require_context()
        self.requested = size

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        self.gpu.bind_context()
        self.require_launchable(shared_mem)
        if self.gpu.refuses_clusters and self.compiled.kernel.cluster > 1:
            raise CUDADriverError("CUDA_ERROR_INVALID_CLUSTER_SIZE: invalid cluster size")
        devices = {getattr(arg, "device_id", self.device_id) for arg in args}
        assert devices == {self.device_id}, "an array of another device"
        self.gpu.launch(self, grid, block, args, shared_mem)

    def require_launchable(self, shared: int) -> None:
        assert self.device_id == self.gpu.current, "a kernel of another device"
        room = DEFAULT_SHARED - self.compiled.kernel.shared_bytes if self.requested is None else self.requested
        assert shared <= room, "more shared memory than was requested"


class EmulatedGpu:
    """An emulated GPU with its module ``cupy``. It records the launches."""

    def __init__(self, device: Device, arch: int) -> None:
        self.device, self.arch = device, arch
        GPUS[:] = [self]
        self.kernels: dict[int, Kernel] = {}
        self.allocated: list[weakref.ref] = []
        self.launched: list[str] = []
        self.current = 0
        self.entered: list[int] = []
        self.launched_on: set[int] = set()
        self.launched_in: set[int] = set()
        """The streams of the launches, by ``ptr``."""
        self.null, self.streams = Stream(self, 0), {}
        self.properties = {"memoryClockRate": 1_000_000, "memoryBusWidth": 1024, **PROPERTIES[arch]}
        self.contexts: set[tuple[int, int]] = set()
        """Pairs of a thread and a device whose context it has."""
        self.refuses_clusters = False
        self.nvrtc = 12, 9
        self.resident_blocks = 2
        self.shared_per_sm = self.properties["sharedMemPerMultiprocessor"]
        """The bytes that the blocks of an SM can really use."""
        self.edit_source = lambda source: source

    @property
    def stream(self) -> Stream:
        """The current stream of the calling thread on the current device."""
        return self.streams.get((get_ident(), self.current), self.null)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self.streams[get_ident(), self.current] = stream

    def launch(self, kernel: Kernel, grid: tuple, block: tuple, args: tuple, shared: int, **options: Any) -> None:
        values = [_plain(arg) for arg in args]
        self._note(kernel, self.stream.ptr)
        self.device.launch(kernel.compiled.kernel, grid, block, values, shared, **options)

    def raw_module(self, *, code: str, options: tuple = (), name_expressions: tuple = ()) -> Any:
        compiled = compile_cuda(
            self.edit_source(code), self.arch, options, expressions=name_expressions, resources=False
        )
        kernel = functools.cache(lambda name, device: self._kernel(compiled[name]))  # noqa: ARG005
        return types.SimpleNamespace(get_function=lambda name: kernel(name, self.current))

    def _kernel(self, compiled: Compiled) -> Kernel:
        kernel = Kernel(self, compiled)
        self.kernels[id(kernel)] = kernel
        return kernel

    def bind_context(self) -> tuple[int, int]:
        """Create a context, as CuPy does before a launch. Return the free and the total memory, as ``memGetInfo``."""
        self.contexts.add((get_ident(), self.current))
        return 1 << 30, 1 << 30

    def require_context(self) -> None:
        """Require that there is a context. The driver's functions do not create one."""
        if (get_ident(), self.current) not in self.contexts:
            raise CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")

    def launch_cooperative(
        self, pointer: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, table: int
    ) -> None:
        self.require_context()
        kernel = self.kernels[pointer]
        parameters = kernel.compiled.kernel.parameters
        cells = (ctypes.c_void_p * len(parameters)).from_address(table)
        args = [self._argument(cell, parameter) for cell, parameter in zip(cells, parameters, strict=True)]
        self._note(kernel, stream)
        kernel.require_launchable(shared)
        room = self.properties["multiProcessorCount"] * self.occupancy(pointer, bx * by * bz, shared)
        if gx * gy * gz > room:
            raise RuntimeError("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")
        self.device.launch(kernel.compiled.kernel, (gx, gy, gz), (bx, by, bz), args, shared, cooperative=True)

    def occupancy(self, pointer: int, threads: int, shared: int) -> int:
        """Return the number of blocks of a kernel that an SM holds; ``shared`` is the dynamic shared memory of each."""
        self.require_context()
        del threads  # resident_blocks stands for the limit by registers and threads
        static = self.kernels[pointer].compiled.kernel.shared_bytes if pointer in self.kernels else 0
        reserved = 1024 if self.arch >= 80 else 0
        return min(self.resident_blocks, self.shared_per_sm // max(static + shared + reserved, 1))

    def _note(self, kernel: Kernel, stream: int) -> None:
        self.launched.append(kernel.compiled.name)
        self.launched_on.add(self.current)
        self.launched_in.add(stream)

    @contextlib.contextmanager
    def entering(self, index: int) -> Any:
        """Enter ``cupy.cuda.Device(index)``. All devices are the same emulated one with different numbers."""
        before, self.current = self.current, index
        self.entered.append(index)
        try:
            yield
        finally:
            self.current = before

    def empty(self, shape: Any, dtype: Any = np.float64) -> ndarray:
        return self._register(self.device.empty(tuple(np.atleast_1d(shape)), dtype))

    def asarray(self, array: Any, dtype: Any = None) -> ndarray:
        """Return an array of this GPU and dtype unchanged. Copy others to aligned memory in the same order of axes."""
        if isinstance(array, ndarray) and dtype in (None, array.dtype):
            return array
        array = np.asarray(array, dtype)
        order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        dense = self._register(array.transpose(order).copy())
        return dense.transpose(np.argsort(order))

    def module(self) -> types.ModuleType:
        """Return the module ``cupy``."""
        cupy = types.ModuleType("cupy")
        cupy.float32, cupy.float64, cupy.float16 = np.float32, np.float64, np.float16
        cupy.ndarray, cupy.RawModule, cupy.empty = ndarray, self.raw_module, self.empty
        cupy.zeros = lambda shape, dtype=np.float64: self._register(np.zeros(shape, dtype))
        cupy.ones = lambda shape, dtype=np.float64: self._register(np.ones(shape, dtype))
        cupy.asarray = self.asarray
        cupy.asnumpy = lambda array: np.array(array)
        cupy.stack = lambda arrays: self._register(np.stack(arrays))
        cupy.concatenate = lambda arrays: self._register(np.concatenate(arrays))
        cupy.cuda = types.SimpleNamespace(
            Device=self.entering,
            Stream=MadeStreams(self),
            get_current_stream=lambda: self.stream,
            nvrtc=types.SimpleNamespace(getVersion=lambda: self.nvrtc),
            driver=types.SimpleNamespace(
                CUDADriverError=CUDADriverError,
                launchCooperativeKernel=self.launch_cooperative,
                occupancyMaxActiveBlocksPerMultiprocessor=self.occupancy,
            ),
            runtime=types.SimpleNamespace(
                CUDARuntimeError=RuntimeError,
                memGetInfo=self.bind_context,
                getDevice=lambda: self.current,
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda _: self.properties,
                deviceGetAttribute=lambda attribute, _: {36: 1_000_000}[attribute],
            ),
        )
        return cupy

    def _register(self, array: np.ndarray) -> ndarray:
        owner = array.view(ndarray)
        owner.device_id = self.current
        self.allocated.append(weakref.ref(array))
        return owner

    def _argument(self, cell: int, parameter: Any) -> Any:
        """Read an entry of a launch's table of arguments. Return the memory of an array for an address, or a number."""
        size = TYPE_BYTES[parameter.type]
        content = ctypes.string_at(cell, size)
        if size < 8 or parameter.type == "f64":
            return np.frombuffer(content, VALUE[parameter.type])[0]
        value = int.from_bytes(content, "little")
        self.allocated = [ref for ref in self.allocated if ref() is not None]
        for array in (ref() for ref in self.allocated):
            start = array.ctypes.data
            if start <= value < start + array.nbytes:
                return array.reshape(-1).view(np.uint8)[value - start :]
        return np.int64(value)


def _plain(argument: Any) -> Any:
    """Return an argument for the emulator. A kernel gets the memory of an array, whatever its strides are."""
    assert argument is not None, "CuPy does not accept None for a null pointer"
    if isinstance(argument, MemoryPointer):
        return argument.bytes()
    if not isinstance(argument, np.ndarray):
        return argument
    order = sorted(range(argument.ndim), key=lambda axis: -argument.strides[axis])
    return argument.view(np.ndarray).transpose(order)


def install(monkeypatch: Any, device: Device, arch: int, kind: type[EmulatedGpu] = EmulatedGpu) -> EmulatedGpu:
    """Make ``import cupy`` return an emulated CuPy, and load the backend afresh."""
    gpu = kind(device, arch)
    monkeypatch.setitem(sys.modules, "cupy", gpu.module())
    for module in [name for name in sys.modules if name.startswith("gpu_bn.backends.cupy.")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(sys.modules["gpu_bn.backends.cupy"], module.rpartition(".")[2], raising=False)
    registry.load.cache_clear()
    for known in (
        functional._FORWARDS,
        functional._BACKWARDS,
    ):  # the keys hold an earlier GPU
        known.clear()
    return gpu
