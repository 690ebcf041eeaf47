"""Carry out a prepared call of the CuPy backend: its steps, and the registers that they read and write.

The registers of a call are one list: what the caller gives (:class:`Arguments`), constants, and a place for each array
that a step makes. A step does one thing: it allocates, copies, takes an address or counters, or launches a kernel. Each
register is written once.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType

import cupy
import numpy as np

from gpu_bn.backends.cupy.device import bind_context, without_clusters
from gpu_bn.backends.cupy.signatures import Shape
from gpu_bn.plan import THREADS, LaunchPlan

Array = Any
Register = NewType("Register", int)
"""An index into the registers of a call."""
Registers = list[Any]
Step = Callable[[Registers], None]

REFUSALS = ("CUDA_ERROR_INVALID_CLUSTER_SIZE", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "CUDA_ERROR_NOT_SUPPORTED")
"""How a launch fails if a part of a GPU (MIG) has no room for a cluster."""
BLOCK = (THREADS,)
NULL = np.intp(0)
"""A null pointer. CuPy makes something else of ``None`` (cupy#9046)."""


class Arguments(NamedTuple):
    """Hold what a caller gives: tensors, per-channel vectors, numbers. A call reads some of them.

    ``valid`` and ``counts`` tell which positions count, and how many do in each ghost batch; ``sign_bits`` have been
    kept in place of the residual; ``momentum_at`` is the momentum on the device, or null where ``momentum`` is its
    value; a call of statistics alone fills ``rows``; ``counters(size)`` makes zeros for blocks to count with.
    """

    counters: Any = None
    x: Any = None
    residual: Any = None
    out: Any = None
    valid: Any = None
    counts: Any = None
    sign_bits: Any = None
    weight: Any = None
    bias: Any = None
    mean: Any = None
    var: Any = None
    running_mean: Any = None
    running_var: Any = None
    momentum_at: Any = NULL
    momentum: Any = None
    eps: Any = None
    parameter: Any = None
    count: Any = None
    rows: Any = None
    dy: Any = None
    dx: Any = None
    dresidual: Any = None
    sums: Any = None


GIVEN = Arguments(*map(Register, range(len(Arguments._fields))))
"""The register of each argument: ``GIVEN.x``."""


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """Hold the steps of a call, made once for all calls of a signature.

    Attributes:
        steps: what is done, in order.
        values: the first contents of the registers behind the arguments: constants, ``None`` for arrays to be made.
        results: the registers of what the call returns.
        keeps_residual: whether the backward call reads the residual.
        count: positions that a channel has in a ghost batch; 0 if they are counted on the device.
        plan: what the launches follow; ``None`` if there is none.
    """

    steps: tuple[Step, ...]
    values: tuple[Any, ...]
    results: tuple[Register, ...]
    keeps_residual: bool
    count: int
    plan: LaunchPlan | None

    def __call__(self, arguments: Arguments) -> list[Any]:
        """Do the steps and return the results; one that this call has not is ``None``."""
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
    """Allocate an array whose ``shape`` is that in memory, and transpose it by ``axes``, if any."""

    target: Register
    shape: Shape
    axes: Shape | None
    dtype: Any

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = empty(self.shape, self.axes, self.dtype)


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the elements of an array to another."""

    source: Register
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target][...] = registers[self.source]


@dataclass(frozen=True, slots=True)
class Address:
    """Take an address inside an array. A view would cost more time."""

    array: Register
    offset: int
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = registers[self.array].data + self.offset


@dataclass(frozen=True, slots=True)
class Counters:
    """Take zeros for blocks to count with. Kernels leave zeros behind, so that later calls use the same array."""

    size: int
    target: Register

    def __call__(self, registers: Registers) -> None:
        registers[self.target] = registers[GIVEN.counters](self.size)


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch a kernel on the current stream; ``arguments`` picks the kernel's from the registers, in order."""

    kernel: Any
    grid: tuple[int]
    shared_bytes: int
    arguments: Callable[[Registers], tuple[Any, ...]]

    @property
    def registers(self) -> int | None:
        """The registers of a thread, if CuPy knows them."""
        return getattr(self.kernel, "num_regs", None)

    def __call__(self, registers: Registers) -> None:
        self.kernel(self.grid, BLOCK, self.arguments(registers), shared_mem=self.shared_bytes)


class ClusterRefusedError(Exception):
    """Report that the device has no room for a cluster. Its plans have none from now on."""


class ClusterLaunch(Launch):
    """Launch a kernel whose blocks come in clusters.

    Raises:
        ClusterRefusedError: the device has no room for one; nothing has run.
    """

    def __call__(self, registers: Registers) -> None:
        try:
            super().__call__(registers)
        except cupy.cuda.driver.CUDADriverError as error:
            if not str(error).startswith(REFUSALS):
                raise
            without_clusters()
            raise ClusterRefusedError(str(error)) from error


class CooperativeLaunch(Launch):
    """Launch with all blocks co-resident. CuPy's own way to ask for that needs a CUDA toolkit to link with."""

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
    """Return an argument's value and format, as :mod:`struct` packs it into 8 bytes."""
    if isinstance(argument, np.generic):
        return argument, {"u4": "I4x", "i8": "q", "f8": "d"}[argument.dtype.str[1:]]
    return getattr(argument, "data", argument).ptr, "Q"


def empty(shape: Shape, axes: Shape | None, dtype: Any) -> Array:
    """Allocate an array of a shape in the order of memory, and transpose it to its own axes."""
    array = cupy.empty(shape, dtype)
    return array if axes is None else array.transpose(axes)


def in_memory(shape: Shape, order: Shape) -> tuple[Shape, Shape | None]:
    """Return the sizes of a dense array in the order of memory, and the transposition to its own axes, if any."""
    if order == tuple(range(len(order))):
        return shape, None
    return tuple(shape[axis] for axis in order), tuple(map(order.index, range(len(order))))
