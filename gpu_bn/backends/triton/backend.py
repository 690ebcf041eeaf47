"""Triton kernels on torch's CUDA tensors (with ``TRITON_INTERPRET=1`` on its CPU tensors, slowly).

Forward is one launch where a program can hold a channel in its registers and otherwise two, backward the same; which,
:mod:`gpu_bn.plan` decides. Nothing waits for the device, all runs on torch's current stream, and no address outlives
a call, so that calls can be captured in CUDA graphs. What is saved of the statistics is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton.language as tl

from gpu_bn.backends.layout import Layout, check_out
from gpu_bn.backends.protocol import Moments, Saved, Sums
from gpu_bn.backends.sign_bits import mask_bytes
from gpu_bn.backends.triton.launch import CLUSTERS, ClusterError, Launch, Recent, Step, interpreting, launch
from gpu_bn.backends.triton.programs import (
    CROWDED,
    ELSEWHERE,
    SAMPLES,
    SHORT,
    STREAMED,
    Geometry,
    chain,
    chunk,
    device_of,
    held_block,
    one_pass_plan,
    streamed_block,
    strip,
    training_plan,
)
from gpu_bn.backends.triton.strides import View, aligned, contiguous_view, dense, is_dense, view_of
from gpu_bn.backends.triton.sync import SharedStatistics
from gpu_bn.kernels.triton import backward as backward_kernels
from gpu_bn.kernels.triton import forward as forward_kernels
from gpu_bn.kernels.triton.activations import functions
from gpu_bn.plan import VECTOR_BYTES, Device, LaunchPlan, Work, alignment
from gpu_bn.spec import BatchNormSpec

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])


def _planned_again(method: Method) -> Method:
    """Plan a call again without clusters where they fail: a call in a cluster is one launch, so nothing has run."""

    @wraps(method)
    def call(self: TritonBackend, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except ClusterError:
            self._clusters = False
            self._devices.clear()
            self._prepared.clear()
            return method(self, *args, **options)

    return cast(Method, call)


def backend() -> TritonBackend:
    """The backend, for :func:`gpu_bn.registry.load`.

    Raises:
        RuntimeError: there is nothing to run kernels on.
    """
    if not (interpreting() or torch.cuda.is_available()):
        raise RuntimeError(f"torch sees no CUDA device ({ELSEWHERE})")
    return TritonBackend()


@dataclass(slots=True, eq=False)
class _Forward:
    """The launches of all forward calls with arguments alike."""

    plan: LaunchPlan
    stats: Step | None
    last: Step
    bessel: float


@dataclass(slots=True, eq=False)
class _Backward:
    """The launches of all backward calls with arguments alike."""

    plan: LaunchPlan
    reduce: Step | None
    last: Step | None
    merge: Step | None


class _BackwardCall(NamedTuple):
    """The arguments of a backward call as kernels take them, and the launches prepared for all calls like it."""

    backend: TritonBackend
    key: tuple[Any, ...]
    view: View
    x: Array
    tensors: tuple[Array | None, ...]
    """x, dy, residual, mask, valid."""
    vectors: tuple[Array | None, ...]
    """mean, var, weight, bias."""
    numbers: tuple[float, float]
    """eps, the activation's parameter."""
    gradient: Any
    alignment: int
    groups: int
    extended: bool
    """Whether the split tier has to serve: there is a mask, or the count is not known here."""

    def prepared(self, name: str, make: Callable[[], Any]) -> Any:
        key = (name, self.key)
        found = self.backend._prepared.get(key)
        if found is None:
            found = self.backend._prepared[key] = make()
        return found

    def work(self, writes: int) -> Work:
        _, _, residual, mask, _ = self.tensors
        return self.backend._work(
            _one_of(self.view.layout, self.groups), self.x, self.alignment, backward=True,
            reads=2 + (residual is not None), writes=writes, staged=2 + (residual is not None), mask=mask is not None,
        )  # fmt: skip


class TritonBackend(SharedStatistics):
    """See :class:`gpu_bn.backends.protocol.Backend`; ``forward`` and ``backward`` are of ``Fused``.

    Args:
        launch: what launches a :class:`~gpu_bn.backends.triton.launch.Step`; tests run kernels elsewhere.
        device: what to plan for, in place of the tensors' device.
        tier: the tier to use, if it serves.
    """

    name = "triton"
    keeps_bits = True
    """Whether a mask may take the place of a residual."""
    converts_vectors = True
    """Whether kernels read weight and bias in any dtype, so that the phases need no wider copies."""

    def __init__(
        self, launch: Launch = launch, device: Device | None = None, tier: str | None = None, wide: bool = False
    ) -> None:
        self._launch = launch
        self._device = device
        self._tier = tier
        self._wide = wide
        self._clusters = CLUSTERS
        self._prepared = Recent(PREPARED)
        self._devices: dict[Any, Device] = {}

    # ---------------------------------------------------------------------------------------------------- the phases
    @torch.no_grad()
    def vector(self, array: Array) -> Array:
        return array.to(torch.float64, copy=True)

    @torch.no_grad()
    def cast(self, vector: Array, dtype: Any) -> Array:
        return vector.to(dtype)

    def empty_like(self, x: Array) -> Array:
        return self.new(x.shape, view_of(x, 0).dense_strides, x.dtype, x.device)

    @torch.no_grad()
    def copy(self, array: Array, like: Array) -> Array:
        return self.empty_like(like).copy_(array)

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    @torch.no_grad()
    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        view = _grouped_view(x, axis, groups)
        layout = _one_of(view.layout, groups)
        if x.numel() == 0:
            zeros = torch.zeros((2, groups * layout.c), dtype=torch.float64, device=x.device)
            return Moments(0, zeros[0], zeros[1])
        x, there = dense(x, view), _there(valid, view)
        alignment = _alignment(x, there)
        key = ("stats", view, x.dtype, alignment, x.device, valid is None, groups)
        steps = self._prepared.get(key)
        if steps is None:
            plan = self._once(self._work(layout, x, alignment), x)
            step = self._step(
                forward_kernels.bn_merge_moments_kernel, plan, x, (groups * plan.tiling.strips, 1),
                (plan.tiling.c, plan.tiling.positions, plan.share, plan.blocks, chunk(plan), *strip(plan), groups),
                groups=groups,
            )  # fmt: skip
            steps = self._prepared[key] = (plan, self._stats_step(plan, x, alignment, groups), step)
        plan, first, merge = steps
        partials = self._partials(plan, x, groups, valid is not None)
        saved = self.new((2, groups * layout.c), None, torch.float64, x.device)
        counts = None if valid is None else self.new((groups,), None, torch.float64, x.device)
        self._launch(first, (x, there, partials))
        self._launch(merge, (partials, saved, counts))
        return Moments(layout.count if counts is None else counts, saved[0], saved[1])

    @torch.no_grad()
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = momentum.to(torch.float64) if isinstance(momentum, torch.Tensor) else momentum
        mean, var = running_mean.double(), running_var.double()
        for part in moments.parts(len(moments.mean) // len(mean)):
            count, weighs = part.count, momentum
            if isinstance(count, torch.Tensor):  # known to the device only: nothing changes where it is 0
                weighs = momentum * (count > 0).double()
                bessel = count / (count - 1).clip(1)
            else:
                bessel = count / max(count - 1, 1)
            mean = (1 - weighs) * mean + weighs * part.mean
            var = (1 - weighs) * var + (weighs * bessel) * part.var
        torch._foreach_copy_([running_mean, running_var], [mean, var])  # both, or none

    @torch.no_grad()
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        groups = saved.spec.groups
        view = _grouped_view(saved.x, saved.spec.axis, groups)
        layout = _one_of(view.layout, groups)
        x, residual = dense(saved.x, view), None if residual is None else dense(residual, view)
        y, there = out if is_dense(out, view) else self.empty_like(x), _there(saved.valid, view)
        alignment, activation = _alignment(x, residual, y, there), saved.spec.activation
        vectors = (saved.moments.mean, saved.moments.var, saved.weight, saved.bias)
        key = ("normalize", view, x.dtype, x.device, alignment, residual is None, activation.name, there is None,
               groups, *[None if v is None else v.dtype for v in vectors])  # fmt: skip
        step = self._prepared.get(key)
        if step is None:
            plan = self._once(self._work(layout, x, alignment, reads=1 + (residual is not None)), x)
            step = self._prepared[key] = self._normalize_step(
                plan, x, alignment, (functions(activation.name).value, None), groups
            )
        mean, var, weight, bias = (None if v is None else v.contiguous() for v in vectors)
        self._launch(
            step,
            (x, residual, y, None, there, mean, var, None, weight, bias, None, None, None, None, None, 0.0, None, 1.0,
             saved.spec.eps, activation.parameter),
        )  # fmt: skip
        if y is not out:
            out.copy_(y)

    @torch.no_grad()
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        call = self._call(dy, saved, frozenset())
        vectors = call.prepared("reduce", lambda: self._reduce_and_merge(call, outputs=(dz is not None, False)))
        plan, reduce, merge = vectors
        target = None if dz is None else (dz if is_dense(dz, call.view) else self.empty_like(call.x))
        partials, sums = (
            self._partials(plan, call.x, call.groups),
            self.new((2, call.groups * call.view.layout.c), None, torch.float64, call.x.device),
        )
        self._launch(reduce, (*call.tensors, target, None, *call.vectors, partials, *call.numbers))
        self._launch(merge, (partials, *call.vectors[:2], sums[1], sums[0], saved.spec.eps))
        if dz is not None and target is not dz:
            dz.copy_(target)
        return Sums(sums[0], sums[1])

    @torch.no_grad()
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        call = self._call(dy, saved, frozenset())
        key = "input" if sums is None else "input after sums"
        step = call.prepared(key, lambda: self._input_step(self._once(call.work(1), call.x), call))
        dx = out if is_dense(out, call.view) else self.empty_like(call.x)
        given = (None, None) if sums is None else (sums.dz.contiguous(), sums.dz_xhat.contiguous())
        tail = (*given, None, None, *call.numbers, *_counted(saved))
        self._launch(step, (*call.tensors, None, dx, *call.vectors, None, *tail))
        if dx is not out:
            out.copy_(dx)

    # ------------------------------------------------------------------------------------------------------- forward
    @_planned_again
    def forward(
        self,
        x: Array,
        spec: BatchNormSpec,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        out: Array | None,
        valid: Array | None = None,
        keep: bool = True,
        counter: Array | None = None,
    ) -> tuple[Array, Saved]:
        """``counter``, of int64, is increased by 1 with the running statistics; not of ghost batches."""
        groups = spec.groups
        view, given = _grouped_view(x, spec.axis, groups), residual
        if groups > 1 and view is not view_of(x, spec.axis) and out is None:
            out = self.empty_like(x)
        layout, there = _one_of(view.layout, groups), _there(valid, view)
        x_there, residual = dense(x, view), None if residual is None else dense(residual, view)
        bits = 0
        if residual is not None and (keep or spec.batch_stats):
            bits = _mask_size(view, spec.axis, x.element_size(), spec.activation.name, groups)
        if bits:  # a byte serves a whole vector, wherever tensors begin
            x_there, residual = aligned(x_there, VECTOR_BYTES), aligned(residual, VECTOR_BYTES)
            there = None if there is None else aligned(there, VECTOR_BYTES)
        usable = out is not None and is_dense(out, view) and not (bits and out.data_ptr() % VECTOR_BYTES)
        y = out if usable else self.new(x.shape, view.dense_strides, x.dtype, x.device)
        alignment = _alignment(x_there, residual, y, there)
        vectors = (running_mean, running_var, weight, bias)
        number, at = _momentum(spec.momentum, x.device)
        key = (
            "forward", view, x.dtype, x.device, alignment, residual is None, spec.activation.name, spec.batch_stats,
            *[None if v is None else v.dtype for v in vectors], None if at is None else at.dtype, valid is None, groups,
            bits > 0, counter is None,
        )  # fmt: skip
        extended = valid is not None or groups > 1
        steps = self._prepared.get(key)
        if steps is None:
            steps = self._prepared[key] = self._prepare_forward(
                layout, spec, x_there, residual is not None, bits > 0, alignment, extended
            )
        running_mean, running_var, weight, bias = (None if v is None else v.contiguous() for v in vectors)
        kept = self.new((2 * groups + 2, layout.c), None, torch.float64, x.device)
        counts = None
        if valid is not None and spec.batch_stats:
            counts = self.new((groups,), None, torch.float64, x.device)
        mask = self.new((bits,), None, torch.uint8, x.device) if bits else None
        tracked = (running_mean, running_var) if spec.batch_stats and not extended else (None, None)
        numbers = (*tracked, counter, number, at, steps.bessel, spec.eps, spec.activation.parameter)
        if steps.stats is None and spec.batch_stats:
            self._launch(steps.last, (x_there, residual, y, mask, weight, bias, kept, *numbers))
        else:
            partials = None
            if steps.stats is not None:
                partials = self._partials(steps.plan, x, groups, valid is not None)
                self._launch(steps.stats, (x_there, there, partials))
            frozen = (None, None) if spec.batch_stats else (running_mean, running_var)
            self._launch(
                steps.last, (x_there, residual, y, mask, there, *frozen, partials, weight, bias, kept, counts, *numbers)
            )
        mean, var, kept_weight, kept_bias = kept.unbind() if groups == 1 else _rows_of_groups(kept, groups)
        moments = Moments(layout.count if counts is None else counts, mean, var)
        if spec.batch_stats and extended and vectors[0] is not None:
            self.update_running(moments, vectors[0], vectors[1], spec.momentum)
        elif spec.batch_stats:
            _give_back((running_mean, running_var), vectors[:2])
        if out is not None and y is not out:
            out.copy_(y)
            y = out
        return y, Saved(
            x=x,
            residual=None if spec.activation.is_identity or mask is not None else given,
            moments=moments,
            weight=None if weight is None else kept_weight,
            bias=None if bias is None else kept_bias,
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            has_residual=given is not None,
            spec=spec,
            mask=mask,
            valid=valid,
        )

    def forward_at_once(
        self,
        x: Array,
        spec: BatchNormSpec,
        running_mean: Array | None,
        running_var: Array | None,
        counter: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
    ) -> tuple[Array, Saved] | None:
        """:meth:`forward` in training, whose last launch also counts the batch; ``None`` for other calls."""
        if not spec.batch_stats:
            return None
        vectors = (running_mean, running_var, weight, bias)
        found: tuple[Array, Saved] = self.forward(x, spec, *vectors, residual, None, counter=counter)
        return found

    def _prepare_forward(
        self,
        layout: Layout,
        spec: BatchNormSpec,
        x: Array,
        residual: bool,
        masked: bool,
        alignment: int,
        extended: bool,
    ) -> _Forward:
        """``masked``: whether a mask takes the place of the residual."""
        groups = spec.groups
        act = functions(spec.activation.name)
        bessel = layout.count / max(layout.count - 1, 1)
        work = replace(self._work(layout, x, alignment, reads=1 + residual), sign_bits=masked)
        constants = (act.value, act.drop if masked else None)
        if not spec.batch_stats:
            plan = self._once(work, x)
            return _Forward(plan, None, self._normalize_step(plan, x, alignment, constants), bessel)
        plan = self._once(work, x) if extended else self._plan(work, x)
        if plan.tier == "split":
            return _Forward(
                plan,
                self._stats_step(plan, x, alignment, groups),
                self._normalize_step(plan, x, alignment, constants, groups),
                bessel,
            )
        positions, tiles, warps = held_block(plan, x)
        geometry = Geometry.of(plan)
        step = self._step(
            forward_kernels.bn_forward_kernel, plan, x, (plan.tiling.strips, 1),
            (*geometry.tail, geometry.positions, *constants, tiles, positions, *strip(plan), self._is_wide(geometry),
             _compute(x), _range(x)), alignment, warps, plan.blocks,
        )  # fmt: skip
        return _Forward(plan, None, step, bessel)

    def _stats_step(self, plan: LaunchPlan, x: Array, alignment: int, groups: int) -> Step:
        geometry, (positions, warps) = Geometry.of(plan, groups), streamed_block(plan, x)
        tail = (*geometry.tail, geometry.positions, plan.share, SAMPLES[geometry.columns], chain(plan, positions),
                positions, *strip(plan), self._is_wide(geometry), _compute(x), _range(x), groups)  # fmt: skip
        grid = (groups * plan.tiling.strips, plan.blocks)
        return self._step(forward_kernels.bn_stats_kernel, plan, x, grid, tail, alignment, warps, groups=groups)

    def _normalize_step(
        self, plan: LaunchPlan, x: Array, alignment: int, constants: tuple[Any, Any], groups: int = 1
    ) -> Step:
        geometry, (positions, warps) = Geometry.of(plan, groups), streamed_block(plan, x)
        tail = (*geometry.tail, geometry.positions, plan.share, *constants, chunk(plan), positions, *strip(plan),
                self._is_wide(geometry), _compute(x), groups)  # fmt: skip
        grid = (groups * plan.tiling.strips, plan.blocks)
        return self._step(forward_kernels.bn_normalize_kernel, plan, x, grid, tail, alignment, warps, groups=groups)

    # ------------------------------------------------------------------------------------------------------ backward
    @_planned_again
    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> tuple[Array | None, ...]:
        call, batch_stats = self._call(dy, saved, need), saved.spec.batch_stats
        x, device = call.x, call.x.device
        if call.groups > 1:
            return self._backward_of_groups(call, dy, saved, need)
        dx = self._like(call, saved) if "dx" in need else None
        dz = self._like(call, saved) if "dresidual" in need else None
        c = call.view.layout.c
        dweight = self.new((c,), None, saved.weight_dtype, device) if "dweight" in need else None
        dbias = self.new((c,), None, saved.bias_dtype, device) if "dbias" in need else None
        summed = dweight is not None or dbias is not None
        steps = call.prepared("backward", lambda: self._prepare_backward(call, need, batch_stats))
        tail = (dweight, dbias, *call.numbers, *_counted(saved))
        if steps.merge is not None:
            partials = self._partials(steps.plan, x)
            self._launch(steps.reduce, (*call.tensors, dz, dx, *call.vectors, partials, *call.numbers))
            self._launch(steps.merge, (partials, *call.vectors[:2], dweight, dbias, saved.spec.eps))
        elif steps.reduce is not None:
            partials = self._partials(steps.plan, x)
            self._launch(steps.reduce, (*call.tensors, None, None, *call.vectors, partials, *call.numbers))
            self._launch(steps.last, (*call.tensors, dz, dx, *call.vectors, partials, None, None, *tail))
        elif batch_stats and (dx is not None or summed):
            self._launch(steps.last, (*call.tensors[:4], dz, dx, *call.vectors, *tail[:-1]))
        elif dx is not None or dz is not None:
            self._launch(steps.last, (*call.tensors, dz, dx, *call.vectors, None, None, None, *tail))
        return dx, dweight, dbias, dz

    def _backward_of_groups(
        self, call: _BackwardCall, dy: Array, saved: Saved, need: frozenset[str]
    ) -> tuple[Array | None, ...]:
        """The same of ghost batches, whose sums are added up in their order."""
        dx = self.empty_like(saved.x) if "dx" in need else None
        dz = self.empty_like(saved.x) if "dresidual" in need else None
        sums = self.backward_reduce(dy, saved, dz)
        if dx is not None:
            self.backward_input(dy, saved, sums, dx)
        dz_xhat, dz_sum = (vector.view(call.groups, -1).sum(0) for vector in (sums.dz_xhat, sums.dz))
        dweight = self.cast(dz_xhat, saved.weight_dtype) if "dweight" in need else None
        return dx, dweight, self.cast(dz_sum, saved.bias_dtype) if "dbias" in need else None, dz

    def _prepare_backward(self, call: _BackwardCall, need: frozenset[str], batch_stats: bool) -> _Backward:
        wants_dx, wants_dz, wants_sums = "dx" in need, "dresidual" in need, bool(need & {"dweight", "dbias"})
        work = call.work(wants_dx + wants_dz)
        if not wants_sums and not (wants_dx and batch_stats):  # nothing depends on a sum
            plan = self._once(work, call.x)
            return _Backward(plan, None, self._input_step(plan, call), None)
        if batch_stats:
            plan = self._once(work, call.x) if call.extended else self._plan(work, call.x)
            if plan.tier != "split":
                return _Backward(plan, None, self._held_step(plan, call), None)
            if wants_dx:
                return _Backward(plan, self._reduce_step(plan, call), self._input_step(plan, call), None)
        plan, reduce, merge = self._reduce_and_merge(call, (wants_dz, wants_dx))
        return _Backward(plan, reduce, None, merge)

    def _call(self, dy: Array, saved: Saved, need: frozenset[str]) -> _BackwardCall:
        groups = saved.spec.groups
        view = _grouped_view(saved.x, saved.spec.axis, groups)
        x, dy, there = dense(saved.x, view), dense(dy, view), _there(saved.valid, view)
        activation, mask, residual = saved.spec.activation, saved.mask, saved.residual
        if mask is not None:  # it has a byte for each whole vector
            x, dy = aligned(x, VECTOR_BYTES), aligned(dy, VECTOR_BYTES)
            there = None if there is None else aligned(there, VECTOR_BYTES)
        elif residual is not None:
            residual = dense(residual, view)
        alignment = _alignment(x, dy, residual, there)
        moments = saved.moments
        vectors = (moments.mean.contiguous(), moments.var.contiguous(), saved.weight, saved.bias)
        key = (
            view, x.dtype, x.device, alignment, residual is None, mask is None, activation.name,
            saved.spec.batch_stats, *[None if v is None else v.dtype for v in vectors],
            saved.weight_dtype, saved.bias_dtype, need, there is None, groups, isinstance(moments.count, int),
        )  # fmt: skip
        act = functions(activation.name)
        return _BackwardCall(
            self, key, view, x, (x, dy, residual, mask, there), vectors, (saved.spec.eps, activation.parameter),
            act.gradient if mask is None else act.masked_gradient, alignment, groups,
            there is not None or not isinstance(moments.count, int),
        )  # fmt: skip

    def _reduce_and_merge(self, call: _BackwardCall, outputs: tuple[bool, bool]) -> tuple[LaunchPlan, Step, Step]:
        plan = self._once(call.work(sum(outputs)), call.x)
        tail = (plan.tiling.c, plan.blocks, chunk(plan), *strip(plan), _compute(call.x), call.groups)
        grid = (call.groups * plan.tiling.strips, 1)
        merge = self._step(backward_kernels.bn_merge_sums_kernel, plan, call.x, grid, tail, groups=call.groups)
        return plan, self._reduce_step(plan, call, all(outputs)), merge

    def _reduce_step(self, plan: LaunchPlan, call: _BackwardCall, writes_both: bool = False) -> Step:
        masked_groups = call.groups > 1 and call.tensors[-1] is not None
        shapes = CROWDED if masked_groups else SHORT if writes_both and plan.tiling.columns else STREAMED
        geometry, (positions, warps) = Geometry.of(plan, call.groups), streamed_block(plan, call.x, shapes)
        tail = (*geometry.tail, geometry.positions, plan.share, call.gradient, chain(plan, positions), positions,
                *strip(plan), self._is_wide(geometry), _compute(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_reduce_kernel
        return self._step(kernel, plan, call.x, grid, tail, call.alignment, warps, groups=call.groups)

    def _input_step(self, plan: LaunchPlan, call: _BackwardCall) -> Step:
        geometry, (positions, warps) = Geometry.of(plan, call.groups), streamed_block(plan, call.x)
        tail = (*geometry.tail, geometry.positions, plan.share, call.gradient, chunk(plan), positions, *strip(plan),
                self._is_wide(geometry), _compute(call.x), call.groups)  # fmt: skip
        grid = (call.groups * plan.tiling.strips, plan.blocks)
        kernel = backward_kernels.bn_backward_input_kernel
        return self._step(kernel, plan, call.x, grid, tail, call.alignment, warps, groups=call.groups)

    def _held_step(self, plan: LaunchPlan, call: _BackwardCall) -> Step:
        geometry, (positions, tiles, warps) = Geometry.of(plan), held_block(plan, call.x)
        tail = (*geometry.tail, geometry.positions, call.gradient, tiles, positions, *strip(plan),
                self._is_wide(geometry), _compute(call.x))  # fmt: skip
        grid = (plan.tiling.strips, 1)
        return self._step(
            backward_kernels.bn_backward_kernel, plan, call.x, grid, tail, call.alignment, warps, plan.blocks
        )

    # ------------------------------------------------------------------------------------------------------- helpers
    def new(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: Any) -> Array:
        """Memory that is not initialised, contiguous unless ``strides`` are given."""
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def _like(self, call: _BackwardCall, saved: Saved) -> Array:
        """An output like the call's input."""
        view = call.view
        return (
            self.new(saved.x.shape, view.strides, saved.x.dtype, saved.x.device)
            if view.dense
            else self.empty_like(saved.x)
        )

    def _partials(self, plan: LaunchPlan, x: Array, groups: int = 1, counted: bool = False) -> Array:
        return self.new((2 + counted, plan.blocks, groups * plan.tiling.c), None, torch.float64, x.device)

    def _work(
        self, layout: Layout, x: Array, alignment: int, *, backward: bool = False, reads: int = 1, writes: int = 1,
        staged: int = 1, mask: bool = False,
    ) -> Work:  # fmt: skip
        return Work(
            layout.n, layout.c, layout.s, x.element_size(), backward, alignment, reads, writes, staged, mask
        )  # fmt: skip

    def _plan(self, work: Work, x: Array) -> LaunchPlan:
        return training_plan(work, self._device_of(x), self._tier)

    def _once(self, work: Work, x: Array) -> LaunchPlan:
        return one_pass_plan(work, self._device_of(x))

    def _step(
        self, kernel: Any, plan: LaunchPlan, x: Array, grid: tuple[int, int], tail: tuple[Any, ...],
        alignment: int = 1, num_warps: int = 4, num_ctas: int = 1, groups: int = 1,
    ) -> Step:  # fmt: skip
        geometry = Geometry.of(plan, groups)
        aligned = TENSORS if alignment == VECTOR_BYTES else frozenset[str]()
        index = -1 if x.device.index is None else x.device.index
        return Step(kernel, grid, tail, num_warps, num_ctas, self._is_wide(geometry), aligned, index)

    def _is_wide(self, geometry: Geometry) -> bool:
        return geometry.wide or self._wide

    def _device_of(self, x: Array) -> Device:
        found = self._devices.get(x.device)
        if found is None:
            found = self._device or device_of(x.device)
            found = self._devices[x.device] = found if self._clusters else replace(found, clusters=False)
        return found


PREPARED = 1024
"""Calls that a backend keeps the launches of."""
TENSORS = frozenset({"x", "dy", "y", "residual", "dz", "dx", "valid"})


def _grouped_view(x: Array, axis: int, groups: int) -> View:
    """The view of a tensor; one with the batch outermost if that is cut into ghost batches."""
    view = view_of(x, axis)
    return view if groups == 1 or view.layout.order[0] == 0 else contiguous_view(x, axis)


def _one_of(layout: Layout, groups: int) -> Layout:
    """Of a ghost batch, what a plan needs to know."""
    return layout if groups == 1 else replace(layout, n=layout.n // groups)


def _there(valid: Array | None, view: View) -> Array | None:
    """The mask as kernels take it: bytes in the order of the tensor's positions."""
    return None if valid is None else valid.permute(view.layout.order).contiguous().view(torch.uint8)


def _rows_of_groups(kept: Array, groups: int) -> tuple[Array, ...]:
    """What is kept of ghost batches: their means, their variances, weight, bias."""
    mean, var = kept[: 2 * groups].view(2, -1)
    return mean, var, kept[2 * groups], kept[2 * groups + 1]


def _give_back(written: tuple[Array | None, ...], given: tuple[Array | None, ...]) -> None:
    """Copy vectors to those in whose place they were."""
    for mine, theirs in zip(written, given, strict=True):
        if theirs is not None and mine is not theirs:
            theirs.copy_(mine)


def _momentum(momentum: Any, device: Any) -> tuple[float, Array | None]:
    """A number, or else where it is on the device."""
    if not isinstance(momentum, torch.Tensor) or (momentum.is_cpu and device.type != "cpu"):
        return float(momentum), None
    momentum = momentum.to(device)
    return 0.0, momentum if momentum.is_floating_point() else momentum.double()


def _counted(saved: Saved) -> tuple[float, Array | None]:
    """What a kernel divides by: 1 / count, or the counts where they are."""
    count = saved.moments.count
    return (0.0, count.contiguous()) if isinstance(count, torch.Tensor) else (1.0 / count, None)


def _alignment(*arrays: Array | None) -> int:
    """Bytes that the addresses are multiples of, 16 at most."""
    return alignment([array.data_ptr() for array in arrays if array is not None])


@lru_cache(1024)
def _mask_size(view: View, axis: int, itemsize: int, activation: str, groups: int) -> int:
    order = view.layout.order
    return mask_bytes([view.layout.shape[at] for at in order], order.index(axis), itemsize, activation, groups)


def _compute(x: Array) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _range(x: Array) -> bool:
    """Whether squares of the dtype's numbers may leave float32's range."""
    return x.dtype in (torch.float32, torch.bfloat16)
