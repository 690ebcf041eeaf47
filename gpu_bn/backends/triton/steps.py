"""Prepare the launches of a call: its plan, and its kernels with their grids and constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl

from gpu_bn.backends.triton.arguments import BackwardCall
from gpu_bn.backends.triton.launch import CLUSTERS, Launch, Step
from gpu_bn.backends.triton.programs import (
    CROWDED,
    SAMPLES,
    SHORT,
    STREAMED,
    SUMMED,
    SUMS_REGISTERS,
    Geometry,
    chain_length,
    chunk,
    device_of,
    held_block,
    loads_at_once,
    merge_block,
    one_pass_plan,
    streamed_block,
    strip_constants,
    training_plan,
)
from gpu_bn.kernels.triton import backward as backward_kernels
from gpu_bn.kernels.triton import forward as forward_kernels
from gpu_bn.kernels.triton.activations import functions
from gpu_bn.plan import VECTOR_BYTES, Device, LaunchPlan, Work
from gpu_bn.spec import BatchNormSpec

Array = Any
Arrays = tuple[Array | None, ...]
Pair = tuple[Array | None, Array | None]
TENSORS = frozenset({"x", "dy", "y", "residual", "dz", "dx", "valid"})


@dataclass(slots=True, eq=False)
class ForwardSteps:
    """The launches of all forward calls with the same key."""

    plan: LaunchPlan
    first: Step | None  # writes partial results of the statistics; None if ``last`` needs none
    merge: Step | None  # merges them; None if ``last`` does
    last: Step  # writes y
    bessel: float  # n / (n - 1), or 1 for a single position
    on_chip: bool = False  # whether ``last`` also computes the statistics of the batch

    @property
    def launches(self) -> list[Step]:
        """The launches of a call, in order."""
        return [step for step in (self.first, self.merge, self.last) if step is not None]

    @property
    def table_rows(self) -> int:
        """The rows of the table of merged statistics: centre, scale, shift; 0 without a table."""
        return 0 if self.merge is None else 3

    def run(
        self, launch: Launch, tensors: Arrays, vectors: Arrays, scratch: Pair, frozen: Pair, tracked: Pair,
        rest: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Launch a call.

        ``tensors``: x, residual, y, mask, valid. ``vectors``: weight, bias, saved rows, counts. ``scratch``: partial
        results, and the table of merged ones. ``frozen``: the mean and variance to normalise with, in evaluation.
        ``tracked``: the running mean and variance to update. ``rest``: counter, momentum as a number and as a tensor,
        eps, the activation's parameter.
        """
        counter, momentum, momentum_at, eps, parameter = rest
        numbers = (*tracked, counter, momentum, momentum_at, self.bessel, eps, parameter)
        if self.on_chip:
            launch(self.last, (*tensors[:4], *vectors[:3], *numbers))
            return
        partials, table = scratch
        if self.first is not None:
            launch(self.first, (tensors[0], tensors[4], partials))
        if self.merge is not None:
            weight, bias, saved, counts = vectors
            launch(self.merge, (partials, saved, counts, table, weight, bias, eps))
            partials, vectors = None, (None, None, saved, None)
        launch(self.last, (*tensors, *frozen, partials, table, *vectors, *numbers))


@dataclass(slots=True, eq=False)
class BackwardSteps:
    """The launches of all backward calls with the same key; ``None`` for those that a call does not make."""

    plan: LaunchPlan
    first: Step | None  # writes partial sums, and the gradients of tensors if there is no ``last``
    last: Step | None  # writes the gradients of tensors from the sums
    merge: Step | None  # merges the sums; None if ``last`` does
    on_chip: Step | None = None  # the only launch, if one launch computes all gradients

    @property
    def launches(self) -> list[Step]:
        """The launches of a call, in order."""
        return [step for step in (self.on_chip, self.first, self.merge, self.last) if step is not None]

    @property
    def table_rows(self) -> int:
        """The rows of the table of merged sums: centre, scale, shift, slope, offset; 0 without a table."""
        return 0 if self.merge is None or self.last is None else 5

    def run(
        self, launch: Launch, tensors: Arrays, vectors: Arrays, scratch: Pair, outputs: tuple[Pair, Pair],
        numbers: tuple[float, float], divisor: tuple[float, Array | None],
    ) -> None:  # fmt: skip
        """Launch a call.

        ``tensors``: x, dy, residual, mask, valid. ``vectors``: mean, var, weight, bias. ``scratch``: partial sums, and
        the table of merged ones. ``outputs``: dz and dx; dweight and dbias. ``numbers``: eps, the activation's
        parameter. ``divisor``: 1 / count as a number, or the counts as a tensor.
        """
        partials, table = scratch
        gradients, vector_gradients = outputs
        if self.on_chip:
            launch(self.on_chip, (*tensors[:4], *gradients, *vectors, *vector_gradients, *numbers, divisor[0]))
            return
        if self.first is not None:
            written = gradients if self.last is None else (None, None)
            launch(self.first, (*tensors, *written, *vectors, partials, *numbers))
        if self.merge is not None:
            parameters = (None, None) if table is None else vectors[2:]
            launch(self.merge, (partials, *vectors[:2], *parameters, *vector_gradients, table, numbers[0], *divisor))
            vectors, partials, vector_gradients, divisor = (None,) * 4, None, (None, None), (0.0, None)
        if self.last is not None:
            sums = partials, table, None, None
            launch(self.last, (*tensors, *gradients, *vectors, *sums, *vector_gradients, *numbers, *divisor))


class Programs(NamedTuple):
    """The form of a launch's programs."""

    alignment: int = 1  # bytes that all addresses of tensors are multiples of
    warps: int = 1
    blocks: int = 1  # several are a cluster
    most_registers: int | None = None  # of a thread; None lets the compiler choose


ONE_WARP = Programs()


class StepBuilder:
    """Plan calls, and build the steps of their launches.

    Args:
        device: a device to plan for instead of that of the tensors.
        tier: the tier to use if it can serve a call.
        wide: whether offsets have 64 bits even if 32 suffice.
    """

    def __init__(self, device: Device | None, tier: str | None, wide: bool) -> None:
        self._device, self._tier, self._wide = device, tier, wide
        self.clusters = CLUSTERS
        self._devices: dict[Any, Device] = {}

    def do_without_clusters(self) -> None:
        """Plan without clusters from now on."""
        self.clusters = False
        self._devices.clear()

    def forward(self, work: Work, spec: BatchNormSpec, x: Array, split: bool) -> ForwardSteps:
        """Build the steps of a forward call; ``split``: it needs the split tier, for a mask or ghost batches."""
        groups, alignment = spec.groups, work.alignment
        act = functions(spec.activation.name)
        count = work.n * work.s
        bessel = count / max(count - 1, 1)
        constants = (act.value, act.drop if work.sign_bits else None)
        if not spec.batch_stats:
            plan = self.plan_once(work, x)
            return ForwardSteps(plan, None, None, self.normalize(plan, x, alignment, constants), bessel)
        plan = self.plan_once(work, x) if split else self.plan(work, x)
        if plan.tier == "split":
            first, last = self.stats(plan, x, alignment, groups), self.normalize(plan, x, alignment, constants, groups)
            merge = self._merge_moments(plan, x, groups) if self.merges_separately(x) else None
            return ForwardSteps(plan, first, merge, last, bessel)
        positions, tiles, warps = held_block(plan, x)
        geometry = self._geometry(plan)
        step = self._step(
            forward_kernels.bn_forward_kernel, plan, x, (plan.tiling.strips, 1),
            (*geometry.tail, *constants, tiles, positions, *strip_constants(plan), geometry.wide, compute_dtype(x),
             may_overflow(x)), Programs(alignment, warps, plan.blocks),
        )  # fmt: skip
        return ForwardSteps(plan, None, None, step, bessel, on_chip=True)

    def stats(self, plan: LaunchPlan, x: Array, alignment: int, groups: int) -> Step:
        """Build the first step of the split tier: the statistics of each block's share."""
        geometry, (positions, warps) = self._geometry(plan, groups), streamed_block(plan, x, SUMMED)
        chain, columns = chain_length(plan, positions), plan.tiling.columns
        most = SUMS_REGISTERS[columns or (plan.tiling.ragged and geometry.wide)]
        tail = (*geometry.tail, plan.share, SAMPLES[columns], chain, loads_at_once(plan, x), positions,
                *strip_constants(plan), geometry.wide, compute_dtype(x), may_overflow(x), groups)  # fmt: skip
        step = self._step(
            forward_kernels.bn_stats_kernel, plan, x, (groups * plan.tiling.strips, plan.blocks), tail,
            Programs(alignment, warps, most_registers=most), groups,
        )  # fmt: skip
        dtype = self._partials_dtype(x, chain)
        planes = (4 if dtype == torch.float32 else 2) + plan.tiling.ragged
        step.partials = (planes, plan.blocks, groups * plan.tiling.c), dtype
        return step

    def normalize(
        self, plan: LaunchPlan, x: Array, alignment: int, constants: tuple[Any, Any], groups: int = 1
    ) -> Step:
        """Build the last step: it normalises, and merges the statistics if no earlier step does."""
        geometry, (positions, warps) = self._geometry(plan, groups), streamed_block(plan, x)
        tail = (*geometry.tail, plan.share, *constants, chunk(plan, warps), positions, *strip_constants(plan),
                geometry.wide, compute_dtype(x), groups)  # fmt: skip
        grid = (groups * plan.tiling.strips, plan.blocks)
        kernel = forward_kernels.bn_normalize_kernel
        return self._step(kernel, plan, x, grid, tail, Programs(alignment, warps), groups)

    def backward(self, call: BackwardCall, need: frozenset[str], batch_stats: bool) -> BackwardSteps:
        """Build the steps of a backward call that returns the gradients in ``need``."""
        wants_dx, wants_dz, wants_sums = "dx" in need, "dresidual" in need, bool(need & {"dweight", "dbias"})
        work = call.work(wants_dx + wants_dz)
        if not wants_sums and not (wants_dx and batch_stats):  # nothing depends on a sum
            plan = self.plan_once(work, call.x)
            return BackwardSteps(plan, None, self.input(plan, call), None)
        if batch_stats:
            plan = self.plan_once(work, call.x) if call.split else self.plan(work, call.x)
            if plan.tier != "split":
                return BackwardSteps(plan, None, None, None, self._on_chip(plan, call))
            if wants_dx:
                merge = self._merge_sums(plan, call) if self.merges_separately(call.x) else None
                return BackwardSteps(plan, self._reduce(plan, call), self.input(plan, call), merge)
        plan, first, merge = self.reduce_and_merge(call, (wants_dz, wants_dx))
        return BackwardSteps(plan, first, None, merge)

    def stats_and_merge(self, work: Work, x: Array, groups: int) -> tuple[Step, Step]:
        """Build the two steps of a call for the statistics alone."""
        plan = self.plan_once(work, x)
        return self.stats(plan, x, work.alignment, groups), self._merge_moments(plan, x, groups)

    def reduce_and_merge(
        self, call: BackwardCall, outputs: tuple[bool, bool], new_outputs: bool = True
    ) -> tuple[LaunchPlan, Step, Step]:
        """Return the plan and the two steps of a call for the sums alone.

        ``outputs``: whether the first step also writes dz, and dx. ``new_outputs``: see :meth:`BackwardCall.work`.
        """
        plan = self.plan_once(call.work(sum(outputs), new_outputs), call.x)
        return plan, self._reduce(plan, call, all(outputs)), self._merge_sums(plan, call)

    def merges_separately(self, x: Array) -> bool:
        """Tell whether a separate launch merges the partial results, once for each strip.

        If not, every program of the last launch merges them, in all of its warps. That saves a launch. Where double
        precision is slow it would take longer than a launch.
        """
        return self._device_of(x).slow_doubles

    def _partials_dtype(self, x: Array, chain: int) -> torch.dtype:
        """Return the dtype of partial results: float32 if the sums are in float32 and doubles are slow.

        Blocks then write no more bytes, and the launch that merges them takes no longer.
        """
        floats = self.merges_separately(x) and chain == 0 and x.dtype != torch.float64
        return torch.float32 if floats else torch.float64

    def _merge_moments(self, plan: LaunchPlan, x: Array, groups: int) -> Step:
        at_once, channels = merge_block(plan)
        elements = 1 if plan.tiling.columns else plan.tiling.vector
        tail = (plan.tiling.c, elements * plan.tiling.positions, elements * plan.share, plan.blocks, at_once, channels,
                compute_dtype(x), groups, plan.tiling.ragged)  # fmt: skip
        grid = (groups * -(-plan.tiling.c // channels), 1)
        return self._step(forward_kernels.bn_merge_moments_kernel, plan, x, grid, tail, groups=groups)

    def _merge_sums(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        at_once, channels = merge_block(plan)
        tail = (plan.tiling.c, plan.blocks, at_once, channels, compute_dtype(call.x), call.groups)
        grid = (call.groups * -(-plan.tiling.c // channels), 1)
        return self._step(backward_kernels.bn_merge_sums_kernel, plan, call.x, grid, tail, groups=call.groups)

    def _reduce(self, plan: LaunchPlan, call: BackwardCall, writes_both: bool = False) -> Step:
        """Build the step of the sums; ``writes_both``: it also writes dz and dx."""
        masked_groups = call.groups > 1 and call.tensors[-1] is not None
        columns, geometry = plan.tiling.columns, self._geometry(plan, call.groups)
        shapes = CROWDED if columns or masked_groups else STREAMED
        if (plan.tiling.ragged and geometry.wide) or (writes_both and columns and not masked_groups):
            shapes = SHORT
        positions, warps = streamed_block(plan, call.x, shapes)
        chain = chain_length(plan, positions)
        tail = (*geometry.tail, plan.share, call.gradient, chain, positions, *strip_constants(plan), geometry.wide,
                compute_dtype(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_reduce_kernel
        step = self._step(kernel, plan, call.x, grid, tail, Programs(call.alignment, warps), call.groups)
        step.partials = (2, plan.blocks, call.groups * plan.tiling.c), self._partials_dtype(call.x, chain)
        return step

    def input(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        """Build the step that writes dx from the sums, or without sums if statistics are frozen."""
        geometry = self._geometry(plan, call.groups)
        crowded = SHORT if geometry.wide else CROWDED
        positions, warps = streamed_block(plan, call.x, crowded if plan.tiling.columns else STREAMED)
        tail = (*geometry.tail, plan.share, call.gradient, chunk(plan, warps), positions, *strip_constants(plan),
                geometry.wide, compute_dtype(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_input_kernel
        return self._step(kernel, plan, call.x, grid, tail, Programs(call.alignment, warps), call.groups)

    def _on_chip(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        """Build the step that computes all gradients of a strip in registers."""
        geometry, (positions, tiles, warps) = self._geometry(plan), held_block(plan, call.x)
        tail = (*geometry.tail, call.gradient, tiles, positions, *strip_constants(plan), geometry.wide,
                compute_dtype(call.x))  # fmt: skip
        grid = (plan.tiling.strips, 1)
        programs = Programs(call.alignment, warps, plan.blocks)
        return self._step(backward_kernels.bn_backward_kernel, plan, call.x, grid, tail, programs)

    def plan(self, work: Work, x: Array) -> LaunchPlan:
        """Return the plan of a call that needs statistics or sums of the batch."""
        return training_plan(work, self._device_of(x), self._tier)

    def plan_once(self, work: Work, x: Array) -> LaunchPlan:
        """Return the plan of one pass over the tensors."""
        return one_pass_plan(work, self._device_of(x))

    def _step(
        self, kernel: Any, plan: LaunchPlan, x: Array, grid: tuple[int, int], tail: tuple[Any, ...],
        programs: Programs = ONE_WARP, groups: int = 1,
    ) -> Step:  # fmt: skip
        alignment, warps, blocks, most_registers = programs
        wide = self._geometry(plan, groups).wide
        aligned = TENSORS if alignment == VECTOR_BYTES else frozenset[str]()
        index = -1 if x.device.index is None else x.device.index
        return Step(kernel, grid, tail, warps, blocks, most_registers, wide, aligned, index)

    def _geometry(self, plan: LaunchPlan, groups: int = 1) -> Geometry:
        geometry = Geometry.from_plan(plan, groups)
        return geometry._replace(wide=geometry.wide or self._wide)

    def _device_of(self, x: Array) -> Device:
        device = self._devices.get(x.device)
        if device is None:
            device = self._device or device_of(x.device)
            device = self._devices[x.device] = device if self.clusters else replace(device, clusters=False)
        return device


def compute_dtype(x: Array) -> Any:
    """Return the dtype of the kernels' arithmetic on elements."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def partials_of(first: Step, counted: bool = False) -> tuple[tuple[int, int, int], torch.dtype]:
    """Return shape and dtype of the partial results of a step; ``counted``: with a plane of counts, for a mask."""
    assert first.partials is not None
    (planes, blocks, statistics), dtype = first.partials
    return (planes + counted, blocks, statistics), dtype


def scratch_of(
    steps: ForwardSteps | BackwardSteps, x: Array, groups: int = 1, counted: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the partial results and of the table of merged ones, by name, if a call has them."""
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if steps.first is not None:
        forms["partials"] = partials_of(steps.first, counted)
    if steps.table_rows:
        forms["table"] = (steps.table_rows, groups * steps.plan.tiling.c), torch.promote_types(x.dtype, torch.float32)
    return forms


def may_overflow(x: Array) -> bool:
    """Tell whether squares of elements may leave the range of float32."""
    return x.dtype in (torch.float32, torch.bfloat16)
