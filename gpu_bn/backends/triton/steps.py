"""Make the launches of a call: choose the plan that serves it, and its kernels with all that is constant to them."""

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
    at_once,
    chain,
    chunk,
    device_of,
    held_block,
    merging,
    one_pass_plan,
    streamed_block,
    strip,
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
    """Hold the launches of all forward calls with arguments alike."""

    plan: LaunchPlan
    stats: Step | None
    merge: Step | None
    last: Step
    bessel: float
    whole: bool = False
    """Whether one launch does all of a call in training."""

    @property
    def launches(self) -> list[Step]:
        """The launches that a call makes."""
        return [step for step in (self.stats, self.merge, self.last) if step is not None]

    @property
    def first(self) -> Step | None:
        """The launch whose blocks leave partial results."""
        return self.stats

    @property
    def rows(self) -> int:
        """Rows of the table of merged statistics: centre, scale, shift; 0 without one."""
        return 0 if self.merge is None else 3

    def run(
        self, launch: Launch, tensors: Arrays, vectors: Arrays, scratch: Pair, frozen: Pair, tracked: Pair,
        rest: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Launch a call.

        ``tensors``: x, residual, y, mask, valid. ``vectors``: weight, bias, what is kept, counts. ``scratch``: partial
        results, and the table of merged ones. ``rest``: the counter, the momentum, where that is on the device, eps,
        the parameter.
        """
        counter, momentum, momentum_at, eps, parameter = rest
        numbers = (*tracked, counter, momentum, momentum_at, self.bessel, eps, parameter)
        if self.whole:
            launch(self.last, (*tensors[:4], *vectors[:3], *numbers))
            return
        partials, table = scratch
        if self.stats is not None:
            launch(self.stats, (tensors[0], tensors[4], partials))
        if self.merge is not None:
            weight, bias, kept, counts = vectors
            launch(self.merge, (partials, kept, counts, table, weight, bias, eps))
            partials, vectors = None, (None, None, kept, None)
        launch(self.last, (*tensors, *frozen, partials, table, *vectors, *numbers))


@dataclass(slots=True, eq=False)
class BackwardSteps:
    """Hold the launches of all backward calls with arguments alike."""

    plan: LaunchPlan
    reduce: Step | None
    last: Step | None
    merge: Step | None
    whole: Step | None = None
    """The only launch, which does all in training."""

    @property
    def launches(self) -> list[Step]:
        """The launches that a call makes."""
        return [step for step in (self.whole, self.reduce, self.merge, self.last) if step is not None]

    @property
    def first(self) -> Step | None:
        """The launch whose blocks leave partial sums."""
        return self.reduce

    @property
    def rows(self) -> int:
        """Rows of the table of merged sums: centre, scale, shift, slope, offset; 0 without one."""
        return 0 if self.merge is None or self.last is None else 5

    def run(
        self, launch: Launch, tensors: Arrays, vectors: Arrays, scratch: Pair, outputs: tuple[Pair, Pair],
        numbers: tuple[float, float], divisor: tuple[float, Array | None],
    ) -> None:  # fmt: skip
        """Launch a call.

        ``tensors``: x, dy, residual, mask, valid. ``vectors``: mean, var, weight, bias. ``scratch``: partial sums, and
        the table of merged ones. ``outputs``: dz and dx, dweight and dbias.
        """
        partials, table = scratch
        written, gradients = outputs
        if self.whole:
            launch(self.whole, (*tensors[:4], *written, *vectors, *gradients, *numbers, divisor[0]))
            return
        if self.reduce is not None:
            on_the_way = written if self.last is None else (None, None)
            launch(self.reduce, (*tensors, *on_the_way, *vectors, partials, *numbers))
        if self.merge is not None:
            parameters = (None, None) if table is None else vectors[2:]
            launch(self.merge, (partials, *vectors[:2], *parameters, *gradients, table, numbers[0], *divisor))
            vectors, partials, gradients, divisor = (None,) * 4, None, (None, None), (0.0, None)
        if self.last is not None:
            launch(
                self.last,
                (*tensors, *written, *vectors, partials, table, None, None, *gradients, *numbers, *divisor),
            )


class Programs(NamedTuple):
    """Describe the programs of a launch.

    Attributes:
        alignment: bytes that the tensors' addresses are multiples of.
        warps, blocks: of a program; several blocks are a cluster.
        most_registers: that a thread may have, if the compiler is not to choose.
    """

    alignment: int = 1
    warps: int = 1
    blocks: int = 1
    most_registers: int | None = None


MERGING = Programs()


class StepBuilder:
    """Plan calls, and make the launches of their kernels.

    Args:
        device: what to plan for, in place of the tensors' device.
        tier: the tier to use, if it serves.
        wide: whether offsets take 64 bits also where 32 would do.
    """

    def __init__(self, device: Device | None, tier: str | None, wide: bool) -> None:
        self._device, self._tier, self._wide = device, tier, wide
        self.clusters = CLUSTERS
        self._devices: dict[Any, Device] = {}

    def do_without_clusters(self) -> None:
        """Plan no clusters from now on."""
        self.clusters = False
        self._devices.clear()

    def forward(self, work: Work, spec: BatchNormSpec, x: Array, extended: bool) -> ForwardSteps:
        """The launches of a forward call; ``extended``: there is a mask or ghost batches."""
        groups, alignment = spec.groups, work.alignment
        act = functions(spec.activation.name)
        count = work.n * work.s
        bessel = count / max(count - 1, 1)
        constants = (act.value, act.drop if work.sign_bits else None)
        if not spec.batch_stats:
            plan = self.plan_once(work, x)
            return ForwardSteps(plan, None, None, self.normalize(plan, x, alignment, constants), bessel)
        plan = self.plan_once(work, x) if extended else self.plan(work, x)
        if plan.tier == "split":
            return ForwardSteps(
                plan,
                self.stats(plan, x, alignment, groups),
                self._merge_moments(plan, x, groups) if self.merges_apart(x) else None,
                self.normalize(plan, x, alignment, constants, groups),
                bessel,
            )
        positions, tiles, warps = held_block(plan, x)
        geometry = Geometry.of(plan)
        step = self._step(
            forward_kernels.bn_forward_kernel, plan, x, (plan.tiling.strips, 1),
            (*geometry.tail, geometry.positions, *constants, tiles, positions, *strip(plan), self._is_wide(geometry),
             compute_dtype(x), may_overflow(x)), Programs(alignment, warps, plan.blocks),
        )  # fmt: skip
        return ForwardSteps(plan, None, None, step, bessel, whole=True)

    def stats(self, plan: LaunchPlan, x: Array, alignment: int, groups: int) -> Step:
        """Make the first of two launches: statistics of each block's part of a channel."""
        geometry, (positions, warps) = Geometry.of(plan, groups), streamed_block(plan, x, SUMMED)
        links = chain(plan, positions)
        most = SUMS_REGISTERS[geometry.columns or self._is_far(plan, geometry)]
        tail = (*geometry.tail, geometry.positions, plan.share, SAMPLES[geometry.columns], links,
                at_once(plan, x), positions, *strip(plan), self._is_wide(geometry), compute_dtype(x),
                may_overflow(x), groups)  # fmt: skip
        step = self._step(
            forward_kernels.bn_stats_kernel, plan, x, (groups * plan.tiling.strips, plan.blocks), tail,
            Programs(alignment, warps, most_registers=most), groups,
        )  # fmt: skip
        dtype = self._dtype_left(x, links)
        planes = (4 if dtype == torch.float32 else 2) + plan.tiling.ragged
        step.leaves = (planes, plan.blocks, groups * plan.tiling.c), dtype
        return step

    def normalize(
        self, plan: LaunchPlan, x: Array, alignment: int, constants: tuple[Any, Any], groups: int = 1
    ) -> Step:
        """Make the last launch: it normalises, and merges the statistics if no launch has."""
        geometry, (positions, warps) = Geometry.of(plan, groups), streamed_block(plan, x)
        tail = (*geometry.tail, geometry.positions, plan.share, *constants, chunk(plan, warps), positions, *strip(plan),
                self._is_wide(geometry), compute_dtype(x), groups)  # fmt: skip
        grid = (groups * plan.tiling.strips, plan.blocks)
        kernel = forward_kernels.bn_normalize_kernel
        return self._step(kernel, plan, x, grid, tail, Programs(alignment, warps), groups)

    def backward(self, call: BackwardCall, need: frozenset[str], batch_stats: bool) -> BackwardSteps:
        """Make the launches of a backward call."""
        wants_dx, wants_dz, wants_sums = "dx" in need, "dresidual" in need, bool(need & {"dweight", "dbias"})
        work = call.work(wants_dx + wants_dz)
        if not wants_sums and not (wants_dx and batch_stats):  # nothing depends on a sum
            plan = self.plan_once(work, call.x)
            return BackwardSteps(plan, None, self.input(plan, call), None)
        if batch_stats:
            plan = self.plan_once(work, call.x) if call.extended else self.plan(work, call.x)
            if plan.tier != "split":
                return BackwardSteps(plan, None, None, None, self._held(plan, call))
            if wants_dx:
                merge = self._merge_sums(plan, call) if self.merges_apart(call.x) else None
                return BackwardSteps(plan, self._reduce(plan, call), self.input(plan, call), merge)
        plan, reduce, merge = self.reduce_and_merge(call, (wants_dz, wants_dx))
        return BackwardSteps(plan, reduce, None, merge)

    def stats_and_merge(self, work: Work, x: Array, groups: int) -> tuple[Step, Step]:
        """The two launches of the statistics alone."""
        plan = self.plan_once(work, x)
        return self.stats(plan, x, work.alignment, groups), self._merge_moments(plan, x, groups)

    def reduce_and_merge(
        self, call: BackwardCall, outputs: tuple[bool, bool], apart: bool = True
    ) -> tuple[LaunchPlan, Step, Step]:
        """The plan of the sums alone, and its two launches.

        ``outputs``: whether dz and dx are written on the way; ``apart``: in the place of no tensor that is read.
        """
        plan = self.plan_once(call.work(sum(outputs), apart), call.x)
        return plan, self._reduce(plan, call, all(outputs)), self._merge_sums(plan, call)

    def merges_apart(self, x: Array) -> bool:
        """Tell whether a launch of its own merges what blocks have found, once for each strip.

        Else every program of the last launch does, in all of its warps. That saves a launch, where double precision is
        fast; where it is slow, it takes longer than one.
        """
        return self._device_of(x).slow_doubles

    def _dtype_left(self, x: Array, links: int) -> torch.dtype:
        """Return the dtype that blocks leave their results in: float32 where their sums are, and doubles are slow.

        What the launch that merges does with them takes no longer; these leave no more bytes.
        """
        floats = self.merges_apart(x) and links == 0 and x.dtype != torch.float64
        return torch.float32 if floats else torch.float64

    def _merge_moments(self, plan: LaunchPlan, x: Array, groups: int) -> Step:
        at_once, channels, elements = merging(plan)
        tail = (plan.tiling.c, elements * plan.tiling.positions, elements * plan.share, plan.blocks, at_once, channels,
                compute_dtype(x), groups, plan.tiling.ragged)  # fmt: skip
        grid = (groups * -(-plan.tiling.c // channels), 1)
        return self._step(forward_kernels.bn_merge_moments_kernel, plan, x, grid, tail, groups=groups)

    def _merge_sums(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        at_once, channels, _ = merging(plan)
        tail = (plan.tiling.c, plan.blocks, at_once, channels, compute_dtype(call.x), call.groups)
        grid = (call.groups * -(-plan.tiling.c // channels), 1)
        return self._step(backward_kernels.bn_merge_sums_kernel, plan, call.x, grid, tail, groups=call.groups)

    def _reduce(self, plan: LaunchPlan, call: BackwardCall, writes_both: bool = False) -> Step:
        masked_groups = call.groups > 1 and call.tensors[-1] is not None
        columns, geometry = plan.tiling.columns, Geometry.of(plan, call.groups)
        shapes = CROWDED if columns or masked_groups else STREAMED
        if self._is_far(plan, geometry) or (writes_both and columns and not masked_groups):
            shapes = SHORT
        positions, warps = streamed_block(plan, call.x, shapes)
        links = chain(plan, positions)
        tail = (*geometry.tail, geometry.positions, plan.share, call.gradient, links, positions,
                *strip(plan), self._is_wide(geometry), compute_dtype(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_reduce_kernel
        step = self._step(kernel, plan, call.x, grid, tail, Programs(call.alignment, warps), call.groups)
        step.leaves = (2, plan.blocks, call.groups * plan.tiling.c), self._dtype_left(call.x, links)
        return step

    def input(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        """Make the launch that writes dx of sums, or of none where statistics are frozen."""
        geometry = Geometry.of(plan, call.groups)
        crowded = SHORT if self._is_wide(geometry) else CROWDED
        shapes = crowded if geometry.columns else STREAMED
        positions, warps = streamed_block(plan, call.x, shapes)
        tail = (*geometry.tail, geometry.positions, plan.share, call.gradient, chunk(plan, warps), positions,
                *strip(plan), self._is_wide(geometry), compute_dtype(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_input_kernel
        return self._step(kernel, plan, call.x, grid, tail, Programs(call.alignment, warps), call.groups)

    def _held(self, plan: LaunchPlan, call: BackwardCall) -> Step:
        """Make the only launch, where a program holds a channel."""
        geometry, (positions, tiles, warps) = Geometry.of(plan), held_block(plan, call.x)
        tail = (*geometry.tail, geometry.positions, call.gradient, tiles, positions, *strip(plan),
                self._is_wide(geometry), compute_dtype(call.x))  # fmt: skip
        grid = (plan.tiling.strips, 1)
        programs = Programs(call.alignment, warps, plan.blocks)
        return self._step(backward_kernels.bn_backward_kernel, plan, call.x, grid, tail, programs)

    def plan(self, work: Work, x: Array) -> LaunchPlan:
        """Return the plan of a call that needs statistics or sums of the batch."""
        return training_plan(work, self._device_of(x), self._tier)

    def plan_once(self, work: Work, x: Array) -> LaunchPlan:
        """Return the plan of launches that go through the tensors once."""
        return one_pass_plan(work, self._device_of(x))

    def _step(
        self, kernel: Any, plan: LaunchPlan, x: Array, grid: tuple[int, int], tail: tuple[Any, ...],
        programs: Programs = MERGING, groups: int = 1,
    ) -> Step:  # fmt: skip
        alignment, warps, blocks, most_registers = programs
        wide = self._is_wide(Geometry.of(plan, groups))
        aligned = TENSORS if alignment == VECTOR_BYTES else frozenset[str]()
        index = -1 if x.device.index is None else x.device.index
        return Step(kernel, grid, tail, warps, blocks, most_registers, wide, aligned, index)

    def _is_wide(self, geometry: Geometry) -> bool:
        return geometry.wide or self._wide

    def _is_far(self, plan: LaunchPlan, geometry: Geometry) -> bool:
        """Tell whether ragged rows have offsets of 64 bits, which take registers."""
        return plan.tiling.ragged and self._is_wide(geometry)

    def _device_of(self, x: Array) -> Device:
        found = self._devices.get(x.device)
        if found is None:
            found = self._device or device_of(x.device)
            found = self._devices[x.device] = found if self.clusters else replace(found, clusters=False)
        return found


def compute_dtype(x: Array) -> Any:
    """Return the dtype that kernels compute in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def partials_of(first: Step, counted: bool = False) -> tuple[tuple[int, int, int], torch.dtype]:
    """Return the shape and the dtype of what a step's blocks leave; with a mask they leave counts too."""
    assert first.leaves is not None
    (planes, blocks, statistics), dtype = first.leaves
    return (planes + counted, blocks, statistics), dtype


def scratch_of(
    steps: ForwardSteps | BackwardSteps, x: Array, groups: int = 1, counted: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return what a call's launches leave each other: the shapes and dtypes of partial and of merged results."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if steps.first is not None:
        found["partials"] = partials_of(steps.first, counted)
    if steps.rows:
        found["table"] = (steps.rows, groups * steps.plan.tiling.c), torch.promote_types(x.dtype, torch.float32)
    return found


def may_overflow(x: Array) -> bool:
    """Tell whether squares of the dtype's numbers may leave float32's range."""
    return x.dtype in (torch.float32, torch.bfloat16)
