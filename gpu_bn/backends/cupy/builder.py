"""The steps of a call of the CuPy backend, put together: which arrays are copied and allocated, which kernels launched.

A tensor's *place* is its strides and its address as far as vectors care; a vector is told by its dtype, strides and
address. :mod:`gpu_bn.backends.cupy.calls` takes both from arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.cupy.steps import (
    ClusterLaunch,
    CooperativeLaunch,
    Counters,
    Dense,
    Empty,
    GiveBack,
    Instead,
    Launch,
    Places,
    Step,
    compiled,
    properties,
    resident_blocks,
)  # fmt: skip
from gpu_bn.backends.layout import Layout
from gpu_bn.backends.sign_bits import mask_bytes
from gpu_bn.plan import THREADS, LaunchPlan, Work, alignment, plan, plan_once

Shape = tuple[int, ...]
Tensor = tuple[int, Shape, Any, Shape, int]
Place = tuple[Shape, int, int]
Vector = tuple[Any, Shape, int, int]

FLOAT64 = np.dtype(np.float64)
NONE = "none"
"""The name of a null pointer."""
ASKED_AS = {"y": "out", "valid": "mask"}
"""What the front door calls an array that has another name here."""


class Steps:
    """The steps of a call, being put together, as far as they need per-channel vectors only."""

    def __init__(self, device: int, channels: int) -> None:
        self.device, self.channels = device, channels
        self.steps: list[Step] = []
        self.dtypes: dict[str, str] = {}
        self.replaced: set[str] = set()

    def new(self, name: str, shape: int | Shape, dtype: Any = FLOAT64) -> None:
        """Allocate an array."""
        self.steps.append(Empty(name, (shape,) if isinstance(shape, int) else shape, dtype))

    def vectors(self, **vectors: Vector | None) -> None:
        """Say what vectors there are; those that are not dense are copied."""
        for name, found in vectors.items():
            if found is None:
                continue
            dtype, strides, low, device = found
            self.check_device(name, device)
            self.dtypes[name] = dtype.name
            if (strides[0] != dtype.itemsize and self.channels > 1) or low % dtype.itemsize:
                self.steps.append(Dense(name, (self.channels,), dtype))
                self.replaced.add(name)

    def check_device(self, name: str, device: int) -> None:
        """An array must be where the input is."""
        check_device(self.device, ASKED_AS.get(name, name), device)

    def gives_back(self, *names: str) -> None:
        """Copy outputs to the arrays given, where a kernel could not write those."""
        self.steps += [GiveBack(name) for name in names if name in self.replaced]

    def track(self, groups: int, count: int, mean: str, var: str) -> None:
        """Update the running statistics: from groups in order, or from a count that only the device knows."""
        self.launch_small(
            "bn_track_kernel",
            (mean, var, "running_mean", "running_var", "momentum_at", "counts"),
            (self.code("running_mean", "running_var"), np.uint32(self.channels), np.uint32(groups), np.float64(count)),
            ("momentum",),
        )

    def launch_small(self, name: str, before: Sequence[str], constants: Sequence[Any], after: Sequence[str]) -> None:
        """Launch a kernel that has a thread for each channel."""
        kernel = compiled("identity", f"{name}<double>", 0, self.device)
        self.steps.append(Launch(kernel, -(-self.channels // THREADS), 0, before, constants, after))

    def code(self, *names: str) -> np.uint32:
        """The packed dtypes of vectors."""
        return np.uint32(cuda_sources.parameter_codes(*map(self.dtypes.get, names)))


class Draft(Steps):
    """The steps of a call, being put together. Its tensors are dense memory in the order of ``layout``."""

    def __init__(
        self, tier: str | None, x: Tensor, axis: int, activation: str, groups: int, valid: Place | None, counted: bool,
        bits: bool = False,
    ) -> None:  # fmt: skip
        """``counted``: how many positions each group has, the device alone knows; ``bits``: a mask may be kept."""
        device, shape, self.dtype, strides, low = x
        self.given = self.layout = _layout(shape, strides, self.dtype.itemsize, axis)
        if groups > 1 and not _leads(0, self.given):  # a group is one piece of memory
            self.layout = Layout.of_strides(shape, tuple(range(len(shape), 0, -1)), axis)
        super().__init__(device, self.layout.c)
        self.tier, self.activation, self.groups = tier, activation, groups
        self.masked, self.counted = valid is not None, counted
        self.batch = "MASKED_GROUPS" if self.masked else "GROUPS" if groups > 1 or counted else cuda_sources.WHOLE
        self.selection = () if self.batch == cuda_sources.WHOLE else ("valid", "counts")
        self.lows: list[int] = []
        self.rearranged: set[str] = set()
        order = self.layout.order
        sizes, at = [shape[place] for place in order], order.index(axis)
        self.mask_bytes = mask_bytes(sizes, at, self.dtype.itemsize, activation, groups) if bits else 0
        self.reads("x", (strides, low, device))
        if valid is not None:
            self._reads_valid(valid, axis)

    @property
    def count(self) -> int:
        """Positions that a channel has in a group; 0 if they are counted on the device."""
        return 0 if self.counted else self.layout.count // self.groups

    @property
    def statistics(self) -> int:
        """Channels of all groups."""
        return self.groups * self.channels

    # ----------------------------------------------------------------------------------------------- tensors
    def reads(self, name: str, at: Place | None) -> None:
        """Say that a tensor is read; it is copied if it is not dense, or not where a mask needs its vectors."""
        if at is None:
            return
        self.check_device(name, at[2])
        if self._is_dense(at):
            self.lows.append(at[1])
        else:
            self.steps.append(Dense(name, self.layout.shape, self.dtype, self.layout.order))

    def writes(self, name: str, at: Place | None = None) -> None:
        """Say that a tensor is written: the one given, or a new one. Allocators align for any vector."""
        if at is not None:
            self.check_device(name, at[2])
            if self._is_dense(at):
                self.lows.append(at[1])
                return
        new = Empty if at is None else Instead
        self.steps.append(new(name, self.layout.shape, self.dtype, self.layout.order))
        if at is not None:
            self.replaced.add(name)
        elif self.layout is not self.given:
            self.rearranged.add(name)

    def gives_back(self, *names: str) -> None:
        super().gives_back(*names)
        given = self.given
        self.steps += [Dense(name, given.shape, self.dtype, given.order) for name in names if name in self.rearranged]

    def _is_dense(self, at: Place) -> bool:
        (strides, low, _), layout, itemsize = at, self.layout, self.dtype.itemsize
        aligned = low == 0 if self.mask_bytes else low % itemsize == 0
        return aligned and _contiguous(layout.shape, strides, itemsize, layout.order)

    def _reads_valid(self, at: Place, axis: int) -> None:
        """A byte for each position, in the layout's order, at an address where a vector may begin."""
        self.check_device("valid", at[2])
        shape, order = self.layout.shape, self.layout.order
        shape = (*shape[:axis], 1, *shape[axis + 1 :])
        if at[1] or not _contiguous(shape, at[0], 1, order):
            self.steps.append(Dense("valid", shape, np.bool_, order))

    # ------------------------------------------------------------------------------------------------- plans
    def once(self) -> LaunchPlan:
        """The plan of one pass over the tensors."""
        return plan_once(self._work(), properties(self.device))

    def plan(self, direction: str, variant: Sequence[str | bool], **work: Any) -> LaunchPlan:
        """The plan of a training call; ``variant`` is of the kernel that an on-chip plan launches."""
        wanted, device = self._work(**work), properties(self.device)
        found = plan(wanted, device, self.tier if self.batch == cuda_sources.WHOLE else "split")
        if found.tier == "cooperative":
            kernel = self._compiled(self._on_chip(direction, found, variant), found)
            if found.grid > device.sms * resident_blocks(kernel, found.shared_bytes):
                return plan(wanted, device, "split")  # its blocks would wait for blocks that never start
        return found

    def _work(self, **more: Any) -> Work:
        layout = self.layout
        return Work(
            layout.n, layout.c, layout.s, self.dtype.itemsize, alignment=alignment(self.lows), masked=self.masked,
            groups=self.groups, **more,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- launches
    def forward(self, plan: LaunchPlan, variant: Sequence[bool]) -> None:
        """Everything in one launch."""
        vectors = ("weight", "bias", "running_mean", "running_var")
        self._partials(plan)
        self._launch(
            self._on_chip("forward", plan, variant), plan,
            ("x", "y", "residual", "mask", *vectors, "momentum_at", "rows", "partials", "counters"),
            (self.code(*vectors), *_geometry(plan)), ("momentum", "eps", "parameter"),
        )  # fmt: skip

    def stats(self, plan: LaunchPlan, tracked: bool = False) -> None:
        """Fill ``rows``; and update the running statistics."""
        running = ("running_mean", "running_var") if self.groups == 1 else (NONE, NONE)
        vectors = ("weight", "bias", *running)
        self._partials(plan)
        self._launch(
            self._kernel("bn_stats_kernel", plan), plan,
            ("x", *vectors, "momentum_at", "rows", "partials", "counters"),
            (self.code(*vectors), *_geometry(plan, self.groups)), ("momentum", *self.selection),
        )  # fmt: skip
        if self.groups > 1 and tracked:
            self.steps.append(Places("rows", **{"row 1": 8 * self.statistics}))
            self.track(self.groups, self.count, "rows", "row 1")

    def saved_rows(self) -> tuple[str, ...]:
        """Names for the rows of what has been saved."""
        names = ("row 1", "row 2", "row 3")
        self.steps.append(Places("rows", **{name: 8 * self.statistics * k for k, name in enumerate(names, 1)}))
        self.dtypes |= dict.fromkeys(("rows", *names), FLOAT64.name)
        return "rows", *names

    def normalize(self, plan: LaunchPlan, variant: Sequence[bool], vectors: Sequence[str], saves: str = NONE) -> None:
        """Fill ``y`` from mean, variance, weight and bias, named in ``vectors``."""
        mean, var, weight, bias = vectors
        self._launch(
            self._kernel("bn_normalize_kernel", plan, *variant), plan,
            ("x", "y", "residual", "mask", weight, bias, mean, var, saves),
            (self.code(weight, bias, mean, var), *_geometry(plan, self.groups)), ("eps", "parameter", *self.selection),
        )  # fmt: skip

    def backward(self, plan: LaunchPlan, source: str) -> None:
        """Everything in one launch."""
        self._partials(plan)
        self._launch(
            self._on_chip("backward", plan, (source,)), plan,
            (*self._upstream("dx", "dresidual"), "dweight", "dbias", "partials", "counters"),
            (self._backward_code("dweight", "dbias"), *_geometry(plan)), ("count", "eps", "parameter"),
        )  # fmt: skip

    def backward_reduce(self, plan: LaunchPlan, source: str, dx: str, dresidual: str) -> None:
        """Fill ``sums``, of ``dz`` and ``dz * xhat``; ``dx`` with frozen statistics."""
        sums = 2 * self.statistics
        self.new("sums", sums + self._partial_size(plan))
        self.steps.append(Places("sums", partials=8 * sums))
        self._counters(plan)
        gradients = ("dweight", "dbias") if self.groups == 1 else (NONE, NONE)
        self._launch(
            self._kernel("bn_backward_reduce_kernel", plan, source), plan,
            (*self._upstream(dx, dresidual), *gradients, "sums", "partials", "counters"),
            (self._backward_code(*gradients), *_geometry(plan, self.groups)), ("eps", "parameter", *self.selection),
        )  # fmt: skip
        if self.groups > 1 and not self.dtypes.keys().isdisjoint(("dweight", "dbias")):
            constants = self.code("dweight", "dbias"), np.uint32(self.channels), np.uint32(self.groups)
            self.launch_small("bn_add_groups_kernel", ("sums", "dweight", "dbias"), constants, ())

    def backward_input(self, plan: LaunchPlan, source: str, sums: str, dresidual: str) -> None:
        """Fill ``dx`` from the sums, or without them for frozen statistics."""
        self._launch(
            self._kernel("bn_backward_input_kernel", plan, source), plan,
            (*self._upstream("dx", dresidual), sums),
            (self._backward_code(), *_geometry(plan, self.groups)), ("count", "eps", "parameter", *self.selection),
        )  # fmt: skip

    def _upstream(self, dx: str, dresidual: str) -> tuple[str, ...]:
        return "x", "dy", "residual", "mask", dx, dresidual, "weight", "bias", "mean", "var"

    def _backward_code(self, *gradients: str) -> np.uint32:
        return self.code("weight", "bias", "mean", "var", *gradients)

    def _on_chip(self, direction: str, plan: LaunchPlan, variant: Sequence[str | bool]) -> str:
        if plan.tier == "cluster":
            return self._kernel(f"bn_{direction}_cluster_kernel", plan, str(plan.blocks), *variant)
        return self._kernel(f"bn_{direction}_kernel", plan, plan.tier.capitalize(), *variant)

    def _kernel(self, name: str, plan: LaunchPlan, *variant: str | bool) -> str:
        return cuda_sources.kernel(name, self.dtype.name, plan.tiling, *variant, batch=self.batch)

    def _compiled(self, name: str, plan: LaunchPlan) -> Any:
        return compiled(self.activation, name, plan.shared_bytes, self.device)

    def _launch(
        self, name: str, plan: LaunchPlan, before: Sequence[str], constants: Sequence[Any], after: Sequence[str]
    ) -> None:
        launch = {"cooperative": CooperativeLaunch, "cluster": ClusterLaunch}.get(plan.tier, Launch)
        self.steps.append(launch(self._compiled(name, plan), plan.grid, plan.shared_bytes, before, constants, after))

    def _partials(self, plan: LaunchPlan) -> None:
        """What the blocks of a strip need to exchange their sums."""
        if size := self._partial_size(plan):
            self.new("partials", size)
        self._counters(plan)

    def _partial_size(self, plan: LaunchPlan) -> int:
        """Partial sums, and their counts and origins."""
        return plan.partials + (plan.grid + plan.partials // 2 if self.masked else 0)

    def _counters(self, plan: LaunchPlan) -> None:
        if plan.counters:
            self.steps.append(Counters(plan))


def check_device(expected: int, name: str, device: int) -> None:
    """An array must be on the input's device: kernels get addresses only."""
    if device != expected:
        raise ValueError(f"expected all arrays on one GPU, got input on GPU {expected}, {name} on GPU {device}")


def _layout(shape: Shape, strides: Shape, itemsize: int, axis: int) -> Layout:
    if _contiguous(shape, strides, itemsize, range(len(shape))):  # whatever the strides of axes of one element say
        strides = tuple(range(len(shape), 0, -1))
    return Layout.of_strides(shape, strides, axis)


def _contiguous(shape: Shape, strides: Shape, itemsize: int, order: Sequence[int]) -> bool:
    """Whether elements lie side by side, the axes in an order from the outermost to the innermost."""
    expected = itemsize
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _leads(axis: int, layout: Layout) -> bool:
    """Whether an axis is the outermost in memory."""
    return prod(layout.shape[a] for a in layout.order[: layout.order.index(axis)]) == 1


@lru_cache(4096)
def _geometry(plan: LaunchPlan, groups: int = 1) -> tuple[Any, ...]:
    tiling = plan.tiling
    inner = (tiling.c if tiling.columns else tiling.s) // tiling.vector
    if plan.grid >= 1 << 31:
        raise ValueError(f"expected launches of less than 2**31 blocks, got {plan.grid}")
    if inner >= 1 << 32:
        raise ValueError(f"expected rows of less than 2**32 vectors, got {inner} vectors of {tiling.vector} elements")
    if (statistics := groups * tiling.c) >= 1 << 32:
        raise ValueError(f"expected less than 2**32 channels in all groups, got {statistics}")
    return (
        np.uint32(tiling.c), np.uint32(inner), np.uint32(tiling.lanes), np.uint32(tiling.strips // groups),
        np.int64(tiling.positions), np.uint32(plan.share), np.uint32(plan.blocks), np.uint32(plan.groups),
    )  # fmt: skip
