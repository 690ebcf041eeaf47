"""Builders of prepared calls of the CuPy backend: registers, copies into dense memory, plans and launches.

A builder knows arrays by their registers and signatures (:mod:`gpu_bn.backends.cupy.signatures`).
:mod:`gpu_bn.backends.cupy.calls` uses builders to prepare each kind of call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.cupy import steps
from gpu_bn.backends.cupy.device import get_kernel, properties, resident_blocks
from gpu_bn.backends.cupy.signatures import FLOAT64, Shape, Signature, TensorSignature, VectorSignature
from gpu_bn.backends.cupy.steps import GIVEN, NULL, Arguments, PreparedCall, Register, Step, memory_shape
from gpu_bn.backends.layout import Layout
from gpu_bn.backends.sign_bits import mask_bytes
from gpu_bn.plan import THREADS, LaunchPlan, Work, alignment, plan, plan_once

Pointer = Register | None
"""An array argument of a kernel, by its register; ``None`` is a null pointer."""
Argument = Pointer | np.generic
"""An argument of a kernel: the contents of a register, or a constant."""


class Vector(NamedTuple):
    """The register and the dtype of a per-channel vector; ``None`` if it is absent."""

    register: Pointer = None
    dtype: str | None = None


ABSENT = Vector()


class Vectors(NamedTuple):
    """The per-channel vectors that ``y`` is computed from, in the order of the kernels' arguments."""

    weight: Vector
    bias: Vector
    mean: Vector
    var: Vector


def registers(*vectors: Vector) -> tuple[Pointer, ...]:
    """Return the registers of vectors."""
    return tuple(vector.register for vector in vectors)


def codes(*vectors: Vector) -> np.uint32:
    """Return the packed dtypes of vectors."""
    return np.uint32(cuda_sources.parameter_codes(*(vector.dtype for vector in vectors)))


class Builder:
    """A builder of calls with per-channel vectors only."""

    def __init__(self, device: int, channels: int) -> None:
        self.device, self.channels = device, channels
        self._steps: list[Step] = []
        self._values: list[Any] = []
        self._given: dict[Register, Register] = {}
        self._plan: LaunchPlan | None = None

    def build(self, *results: Pointer, keeps_residual: bool = False, count: int = 0) -> PreparedCall:
        """Return the prepared call; ``None`` stands for a result that it does not have."""
        absent = self.constant(None)
        registers = tuple(absent if result is None else result for result in results)
        return PreparedCall(tuple(self._steps), tuple(self._values), registers, keeps_residual, count, self._plan)

    # ------------------------------------------------------------------------------------- registers and arrays
    def constant(self, value: Any) -> Register:
        """Add a register with an initial value."""
        self._values.append(value)
        return Register(len(Arguments._fields) + len(self._values) - 1)

    def allocate(self, shape: int | Shape, dtype: Any = FLOAT64, order: Shape | None = None) -> Register:
        """Add a step that allocates a dense array with the axes in memory in ``order``; return its register."""
        target, shape = self.constant(None), (shape,) if isinstance(shape, int) else shape
        shape, axes = (shape, None) if order is None else memory_shape(shape, order)
        self._steps.append(steps.Allocate(target, shape, axes, dtype))
        return target

    def copy(self, source: Register, shape: Shape, dtype: Any, order: Shape | None = None) -> Register:
        """Add steps that copy an array into a new dense one; return its register."""
        target = self.allocate(shape, dtype, order)
        self._steps.append(steps.Copy(source, target))
        return target

    def address(self, array: Register, doubles: int) -> Register:
        """Add a step that computes the address of element ``doubles`` of a float64 array; return its register."""
        target = self.constant(None)
        self._steps.append(steps.Address(array, FLOAT64.itemsize * doubles, target))
        return target

    def vector(self, given: Register, signature: VectorSignature | None) -> Vector:
        """Return a vector that kernels can use: the given one, or a contiguous copy."""
        if signature is None:
            return ABSENT
        dtype, strides, misaligned, device = signature
        self.check_device(given, device)
        if (strides[0] == dtype.itemsize or self.channels == 1) and misaligned % dtype.itemsize == 0:
            return Vector(given, dtype.name)
        copy = self.copy(given, (self.channels,), dtype)
        self._given[copy] = given
        return Vector(copy, dtype.name)

    def vectors(self, given: Sequence[Register], signatures: Sequence[VectorSignature | None]) -> Vectors:
        """Return weight, bias, mean and variance that kernels can use."""
        return Vectors(*map(self.vector, given, signatures))

    def check_device(self, given: Register, device: int) -> None:
        """Check that an argument is on the device of the input."""
        check_device(self.device, "mask" if given == GIVEN.valid else Arguments._fields[given], device)

    def result(self, written: Pointer) -> Pointer:
        """Return the array that the caller gets: the written one, or the given one that it replaced, after a copy."""
        if written is None or written not in self._given:
            return written
        self._steps.append(steps.Copy(written, self._given[written]))
        return self._given[written]

    # ------------------------------------------------------------------------------------------------ launches
    def launch(self, kernel: Any, plan: LaunchPlan, *arguments: Argument) -> None:
        """Add the launch of a kernel as planned."""
        self._plan = plan
        kinds = {"cooperative": steps.CooperativeLaunch, "cluster": steps.ClusterLaunch}
        self._launch(kinds.get(plan.tier, steps.Launch), kernel, plan.grid, plan.shared_bytes, arguments)

    def launch_channels(self, name: str, *arguments: Argument) -> None:
        """Add the launch of a kernel that has a thread for each channel."""
        kernel = get_kernel("identity", f"{name}<double>", 0, self.device)
        self._launch(steps.Launch, kernel, -(-self.channels // THREADS), 0, arguments)

    def _launch(
        self, kind: type[steps.Launch], kernel: Any, grid: int, shared_bytes: int, arguments: Iterable[Argument]
    ) -> None:
        registers = [
            self.constant(NULL if argument is None else argument)
            if argument is None or isinstance(argument, np.generic)
            else argument
            for argument in arguments
        ]
        self._steps.append(kind(kernel, (grid,), shared_bytes, itemgetter(*registers)))


class TensorBuilder(Builder):
    """A builder of calls with tensors. Kernels get them dense, with their axes in the memory order of ``layout``.

    Attributes:
        x, valid, counts: registers that every kernel of the call reads.
        sign_bytes: bytes of the sign bits that a forward call keeps instead of the residual; 0 if it keeps none.
    """

    def __init__(self, signature: Signature, sign_bits: bool = False) -> None:
        """Read the input and the mask; ``sign_bits``: whether sign bits may replace the residual."""
        (device, shape, self.dtype, strides, misaligned), axis = signature.x, signature.axis
        self.input_layout = self.layout = _layout(shape, strides, self.dtype.itemsize, axis)
        if signature.groups > 1 and not _is_outermost(0, self.layout):  # a ghost batch must be contiguous
            self.layout = Layout.from_strides(shape, tuple(range(len(shape), 0, -1)), axis)
        super().__init__(device, self.layout.c)
        self.tier, self.activation, self.groups = signature.tier, signature.activation, signature.groups
        self.masked, self.counted = signature.valid is not None, signature.counted
        grouped = self.groups > 1 or self.counted
        self.batch = "MASKED_GROUPS" if self.masked else "GROUPS" if grouped else cuda_sources.WHOLE
        self._misalignments: list[int] = []
        self._writes_given = False
        self._rearranged: set[Pointer] = set()
        order = self.layout.order
        sizes = [shape[axis] for axis in order]
        self.sign_bytes = (
            mask_bytes(sizes, order.index(axis), self.dtype.itemsize, self.activation, self.groups) if sign_bits else 0
        )
        self.x = self.read(GIVEN.x, (strides, misaligned, device))
        self.valid = self._read_valid(signature.valid, axis)
        self.counts: Pointer = GIVEN.counts if self.counted else None

    @property
    def count(self) -> int:
        """The number of positions of a channel in a ghost batch; 0 if the device counts them."""
        return 0 if self.counted else self.layout.count // self.groups

    @property
    def statistics(self) -> int:
        """The number of channels times ghost batches."""
        return self.groups * self.channels

    @property
    def selection(self) -> tuple[Pointer, ...]:
        """The last arguments of kernels for ghost batches: the mask and the counts."""
        return () if self.batch == cuda_sources.WHOLE else (self.valid, self.counts)

    # ------------------------------------------------------------------------------------------------ tensors
    def read(self, given: Register, signature: TensorSignature | None) -> Pointer:
        """Return a tensor that kernels can read: the given one, or a copy if it is not dense.

        A byte of sign bits belongs to an aligned vector, so with sign bits a misaligned tensor is copied too.
        """
        if signature is None:
            return None
        self.check_device(given, signature[2])
        if self._is_usable(signature):
            return given
        return self.copy(given, self.layout.shape, self.dtype, self.layout.order)

    def write(self, given: Register, signature: TensorSignature) -> Register:
        """Return a tensor that kernels can write: the given one, or a new one that :meth:`result` copies into it."""
        self.check_device(given, signature[2])
        self._writes_given = True  # kernels may also read the given tensor
        if self._is_usable(signature):
            return given
        new = self.allocate(self.layout.shape, self.dtype, self.layout.order)
        self._given[new] = given
        return new

    def output(self) -> Register:
        """Return a new tensor for kernels to write, aligned for any vector."""
        new = self.allocate(self.layout.shape, self.dtype, self.layout.order)
        if self.layout is not self.input_layout:
            self._rearranged.add(new)
        return new

    def result(self, written: Pointer) -> Pointer:
        """Return the array that the caller gets: the given one, or one in the memory order of the input."""
        if written is None or written not in self._rearranged:
            return super().result(written)
        return self.copy(written, self.input_layout.shape, self.dtype, self.input_layout.order)

    def count_positions(self) -> None:
        """Allocate an array for the counts of positions if the device counts them."""
        if self.counted:
            self.counts = self.allocate(self.groups)

    def _is_usable(self, signature: TensorSignature) -> bool:
        """Tell whether kernels can use a tensor: it is dense and aligned. If so, note its alignment for the plan."""
        (strides, misaligned, _), layout, itemsize = signature, self.layout, self.dtype.itemsize
        aligned = misaligned == 0 if self.sign_bytes else misaligned % itemsize == 0
        dense = aligned and _is_contiguous(layout.shape, strides, itemsize, layout.order)
        if dense:
            self._misalignments.append(misaligned)
        return dense

    def _read_valid(self, signature: TensorSignature | None, axis: int) -> Pointer:
        """Return a mask that kernels can read: contiguous in the layout's order, and aligned for any vector."""
        if signature is None:
            return None
        given: Register = GIVEN.valid
        strides, misaligned, device = signature
        self.check_device(given, device)
        shape, order = self.layout.shape, self.layout.order
        shape = (*shape[:axis], 1, *shape[axis + 1 :])
        if misaligned == 0 and _is_contiguous(shape, strides, 1, order):
            return given
        return self.copy(given, shape, np.bool_, order)

    # ------------------------------------------------------------------------------------- plans and kernels
    def plan_once(self) -> LaunchPlan:
        """Return the plan of one pass over the tensors."""
        return plan_once(self._work(), properties(self.device))

    def plan(self, direction: str, variant: Sequence[str | bool], **work: Any) -> LaunchPlan:
        """Return the plan of a training call; ``variant``: the template arguments of the on-chip kernel."""
        moved, device = self._work(**work), properties(self.device)
        found = plan(moved, device, self.tier if self.batch == cuda_sources.WHOLE else "split")
        if found.tier == "cooperative":
            kernel = self.on_chip_kernel(direction, found, *variant)
            if found.grid > device.sms * resident_blocks(kernel, found.shared_bytes):
                return plan(moved, device, "split")  # blocks would wait for others that never start
        return found

    def _work(self, **more: Any) -> Work:
        """Return the work of the call, for the planner; ``more``: other fields of :class:`gpu_bn.plan.Work`."""
        layout = self.layout
        return Work(
            layout.n, layout.c, layout.s, self.dtype.itemsize, alignment=alignment(self._misalignments),
            masked=self.masked, groups=self.groups, **more,
            ragged=self.batch == cuda_sources.WHOLE and not self._writes_given,
        )  # fmt: skip

    def on_chip_kernel(self, direction: str, plan: LaunchPlan, *variant: str | bool) -> Any:
        """Return the kernel that does a whole forward or backward call in one launch."""
        if plan.tier == "cluster":
            return self.kernel(f"bn_{direction}_cluster_kernel", plan, str(plan.blocks), *variant)
        return self.kernel(f"bn_{direction}_kernel", plan, plan.tier.capitalize(), *variant)

    def kernel(self, name: str, plan: LaunchPlan, *variant: str | bool) -> Any:
        """Return a kernel for the tensors' dtype and the plan's vectors."""
        name = cuda_sources.kernel(name, self.dtype.name, plan.tiling, *variant, batch=self.batch)
        return get_kernel(self.activation, name, plan.shared_bytes, self.device)

    def exchange(self, plan: LaunchPlan) -> tuple[Pointer, Pointer]:
        """Return partial results and counters, through which the blocks of a strip exchange their sums."""
        size = self.partial_size(plan)
        return self.allocate(size) if size else None, self.counters(plan)

    def partial_size(self, plan: LaunchPlan) -> int:
        """Return the number of doubles of the partial results; with a mask, these include counts and origins."""
        return plan.partials + (plan.grid + plan.partials // 2 if self.masked else 0)

    def counters(self, plan: LaunchPlan) -> Pointer:
        """Return zeros for the blocks to count with, or ``None`` if they do not count."""
        if not plan.counters:
            return None
        target = self.constant(None)
        self._steps.append(steps.Counters(plan.counters, target))
        return target


def check_device(expected: int, name: str, device: int) -> None:
    """Check that an array is on the device of the input, because kernels get nothing but addresses."""
    if device != expected:
        raise ValueError(f"expected all arrays on one GPU, got input on GPU {expected}, {name} on GPU {device}")


def _layout(shape: Shape, strides: Shape, itemsize: int, axis: int) -> Layout:
    if _is_contiguous(shape, strides, itemsize, range(len(shape))):  # strides of axes of length 1 do not matter
        strides = tuple(range(len(shape), 0, -1))
    return Layout.from_strides(shape, strides, axis)


def _is_contiguous(shape: Shape, strides: Shape, itemsize: int, order: Sequence[int]) -> bool:
    """Tell whether an array is contiguous with its axes in ``order``, from the outermost to the innermost."""
    expected = itemsize
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _is_outermost(axis: int, layout: Layout) -> bool:
    """Tell whether an axis is the outermost in memory, apart from axes of length 1."""
    return prod(layout.shape[a] for a in layout.order[: layout.order.index(axis)]) == 1


@lru_cache(4096)
def geometry(plan: LaunchPlan, groups: int = 1) -> tuple[Any, ...]:
    """Return the kernels' GEOMETRY_ARGS for a plan. They describe one ghost batch, but count all strips in flight.

    Raises:
        ValueError: blocks, vectors or channels are too many for the integers of the kernels.
    """
    tiling = plan.tiling
    inner, row = tiling.inner, tiling.s if tiling.ragged else 0
    if plan.grid >= 1 << 31:
        raise ValueError(f"expected launches of less than 2**31 blocks, got {plan.grid}")
    if inner >= 1 << 32:
        raise ValueError(f"expected rows of less than 2**32 vectors, got {inner} vectors of {tiling.vector} elements")
    if (statistics := groups * tiling.c) >= 1 << 32:
        raise ValueError(f"expected less than 2**32 channels in all groups, got {statistics}")
    return (
        np.uint32(tiling.c), np.uint32(inner), np.uint32(row), np.uint32(tiling.lanes),
        np.uint32(tiling.strips // groups), np.int64(tiling.positions), np.uint32(plan.share), np.uint32(plan.blocks),
        np.uint32(plan.in_flight),
    )  # fmt: skip
