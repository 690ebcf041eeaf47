"""Prepared calls of the CuPy backend: their steps, and the registers that steps read and write.

The registers of a call are one list: the caller's :class:`Arguments`, constants, and a place for each array that a step
allocates. Each step does one thing: allocate, copy, take an address or counters, or launch a kernel. Each register is
written once.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType

import cupy
import numpy as np

from gpu_bn.backends.cupy.device import bind_context, disable_clusters
from gpu_bn.backends.cupy.signatures import Shape
from gpu_bn.plan import THREADS, LaunchPlan

Array = Any
Register = NewType("Register", int)
"""An index into the registers of a call."""
Registers = list[Any]
Step = Callable[[Registers], None]

REFUSALS = ("CUDA_ERROR_INVALID_CLUSTER_SIZE", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "CUDA_ERROR_NOT_SUPPORTED")
"""Errors of a launch if the device, such as a part of a GPU (MIG), has no room for a cluster."""
BLOCK = (THREADS,)
NULL = np.intp(0)
"""A null pointer. CuPy does not pass ``None`` as one (cupy#9046)."""


class Arguments(NamedTuple):
    """The caller's arguments: tensors, per-channel vectors and numbers. A call reads some of them."""

    counters: Any = None  # counters(size) returns zeros for blocks to count with
    x: Any = None
    residual: Any = None
    out: Any = None
    valid: Any = None  # which positions count
    counts: Any = None  # the count of each ghost batch
    sign_bits: Any = None  # kept instead of the residual
    weight: Any = None
    bias: Any = None
    mean: Any = None
    var: Any = None
    running_mean: Any = None
    running_var: Any = None
    momentum_at: Any = NULL  # the momentum on the device; null if ``momentum`` is its value
    momentum: Any = None
    eps: Any = None
    parameter: Any = None
    count: Any = None
    rows: Any = None  # where a call for the statistics alone writes them
    dy: Any = None
    dx: Any = None
    dresidual: Any = None
    sums: Any = None


GIVEN = Arguments(*map(Register, range(len(Arguments._fields))))
"""The register of each argument, as in ``GIVEN.x``."""


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """The steps of a call, prepared once for all calls with the same signature.

    Attributes:
        steps: the steps, in order.
        values: the initial values of the registers after the arguments: constants, and ``None`` for arrays.
        results: the registers of the results.
        keeps_residual: whether the backward call reads the residual.
        count: the number of positions of a channel in a ghost batch; 0 if the device counts them.
        plan: the plan that the launches follow, or ``None``.
    """

    steps: tuple[Step, ...]
    values: tuple[Any, ...]
    results: tuple[Register, ...]
    keeps_residual: bool
    count: int
    plan: LaunchPlan | None

    def __call__(self, arguments: Arguments) -> list[Any]:
        """Run the steps and return the results; a result that the call does not have is ``None``."""
        registers = [*arguments, *self.values]
        for step in self.steps:
            step(registers)
        return [registers[result] for result in self.results]

    @property
    def launches(self) -> list[Launch]:
        """The launches among the steps."""
        return [step for step in self.steps if isinstance(step, Launch)]


@dataclass(frozen=True, slots=True)
class Allocate:
    """Allocate an array with a shape in memory order, and transpose it by ``axes`` unless they are ``None``."""

    target: Register
    shape: Shape
    axes: Shape | None
    dtype: Any

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = empty(self.shape, self.axes, self.dtype)


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the elements of an array into another."""

    source: Register
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target][...] = registers[self.source]


@dataclass(frozen=True, slots=True)
class Address:
    """Compute the address at an offset in an array. A view would take more time."""

    array: Register
    offset: int
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = registers[self.array].data + self.offset


@dataclass(frozen=True, slots=True)
class Counters:
    """Get zeros for blocks to count with. Kernels reset them to zero, so that later calls can use the same array."""

    size: int
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = registers[GIVEN.counters](self.size)


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch a kernel on the current stream; ``arguments`` selects the kernel's arguments from the registers."""

    kernel: Any
    grid: tuple[int]
    shared_bytes: int
    arguments: Callable[[Registers], tuple[Any, ...]]

    @property
    def registers(self) -> int | None:
        """The number of registers of a thread, or ``None`` if CuPy does not know it."""
        return getattr(self.kernel, "num_regs", None)

    def __call__(self, registers: Registers) -> None:
        self.kernel(self.grid, BLOCK, self.arguments(registers), shared_mem=self.shared_bytes)


class ClusterRefusedError(Exception):
    """The device has no room for a cluster. Its later plans have no clusters."""


class ClusterLaunch(Launch):
    """Launch a kernel in clusters of blocks.

    Raises:
        ClusterRefusedError: the device has no room for a cluster; nothing has run.
    """

    def __call__(self, registers: Registers) -> None:
        try:
            super().__call__(registers)
        except cupy.cuda.driver.CUDADriverError as error:
            if not str(error).startswith(REFUSALS):
                raise
            disable_clusters()
            raise ClusterRefusedError(str(error)) from error


class CooperativeLaunch(Launch):
    """Launch a kernel with all blocks co-resident, by a driver call, because CuPy's way needs a CUDA toolkit."""

    def __call__(self, registers: Registers) -> None:
        bind_context()
        values, formats = zip(*map(_cell, self.arguments(registers)), strict=True)
        cells = ctypes.create_string_buffer(8 * len(values))
        struct.pack_into("=" + "".join(formats), cells, 0, *values)
        first = ctypes.addressof(cells)
        table = (ctypes.c_void_p * len(values))(*range(first, first + len(cells), 8))
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.driver.launchCooperativeKernel(
            self.kernel.kernel.ptr, *self.grid, 1, 1, *BLOCK, 1, 1, self.shared_bytes, stream, ctypes.addressof(table)
        )


def _cell(argument: Any) -> tuple[Any, str]:
    """Return an argument's value and the format with which :mod:`struct` packs it into 8 bytes."""
    if isinstance(argument, np.generic):
        return argument, {"u4": "I4x", "i8": "q", "f8": "d"}[argument.dtype.str[1:]]
    return getattr(argument, "data", argument).ptr, "Q"


def empty(shape: Shape, axes: Shape | None, dtype: Any) -> Array:
    """Allocate an array with a shape in memory order, and transpose it by ``axes`` unless they are ``None``."""
    array = cupy.empty(shape, dtype)
    return array if axes is None else array.transpose(axes)


def memory_shape(shape: Shape, order: Shape) -> tuple[Shape, Shape | None]:
    """Return the shape of a dense array in memory order, and the transposition from it to ``shape``, or ``None``."""
    if order == tuple(range(len(order))):
        return shape, None
    return tuple(shape[axis] for axis in order), tuple(map(order.index, range(len(order))))
