"""Run Triton kernels on torch's CUDA tensors (with ``TRITON_INTERPRET=1`` on its CPU tensors, slowly).

Forward is one launch where a program can hold a channel in its registers and otherwise two, backward the same; which,
:mod:`gpu_bn.plan` decides. Nothing waits for the device, all runs on torch's current stream, and no address outlives
a call, so that calls can be captured in CUDA graphs. What is saved of the statistics is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from gpu_bn.backends.alike import allocator
from gpu_bn.backends.layout import check_out
from gpu_bn.backends.protocol import Grads, Moments, OnPlan, Saved, Sums
from gpu_bn.backends.triton.arguments import (
    BackwardCall,
    alignment_of,
    backward_call,
    divisor_of,
    give_back,
    grouped_view,
    mask_size,
    momentum_of,
    of_one_group,
    position_bytes,
    rows_of_groups,
    work_of,
)
from gpu_bn.backends.triton.launch import ClusterError, Launch, Recent, Step, interpreting, launch
from gpu_bn.backends.triton.plain import PlainCalls
from gpu_bn.backends.triton.programs import ELSEWHERE
from gpu_bn.backends.triton.steps import BackwardSteps, ForwardSteps, StepBuilder, partials_of, scratch_of
from gpu_bn.backends.triton.strides import aligned, dense, is_dense, view_of
from gpu_bn.backends.triton.sync import SharedStatistics
from gpu_bn.call import Call
from gpu_bn.kernels.triton.activations import functions
from gpu_bn.plan import VECTOR_BYTES, Device
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
            self.do_without_clusters()
            return method(self, *args, **options)

    return cast(Method, call)


PREPARED = 1024
"""Calls that a backend keeps the launches of."""


def backend() -> TritonBackend:
    """Return the backend, for :func:`gpu_bn.registry.load`.

    Raises:
        RuntimeError: there is nothing to run kernels on.
    """
    if not (interpreting() or torch.cuda.is_available()):
        raise RuntimeError(f"torch sees no CUDA device ({ELSEWHERE})")
    return TritonBackend()


class TritonBackend(SharedStatistics):
    """See :class:`gpu_bn.backends.protocol.Backend`; ``forward`` and ``backward`` are of ``FusedBackend``.

    Args:
        launch: what launches a :class:`~gpu_bn.backends.triton.launch.Step`; tests run kernels elsewhere.
        device: what to plan for, in place of the tensors' device.
        tier: the tier to use, if it serves.
        wide: whether offsets take 64 bits also where 32 would do.
        on_plan: is told the plan of each call that is prepared.
    """

    name = "triton"
    keeps_bits = True
    """Whether a mask may take the place of a residual."""
    updates_after_output = True
    """Whether a call with a mask or ghost batches takes memory for its running statistics after its output."""
    converts_vectors = True
    """Whether kernels read weight and bias in any dtype, so that the phases need no wider copies."""

    def __init__(
        self,
        launch: Launch = launch,
        device: Device | None = None,
        tier: str | None = None,
        wide: bool = False,
        on_plan: OnPlan | None = None,
    ) -> None:
        self.launch, self._on_plan = launch, on_plan
        self.builder = StepBuilder(device, tier, wide)
        self._prepared = Recent(PREPARED)
        self.plain = PlainCalls(self, PREPARED)

    def do_without_clusters(self) -> None:
        """Plan all calls again, without clusters."""
        self.builder.do_without_clusters()
        self._prepared.clear()
        self.plain.known.clear()

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
        view = grouped_view(x, axis, groups)
        layout = of_one_group(view.layout, groups)
        if x.numel() == 0:
            zeros = torch.zeros((2, groups * layout.c), dtype=torch.float64, device=x.device)
            return Moments(0, zeros[0], zeros[1])
        x, valid_bytes = dense(x, view), position_bytes(valid, view)
        alignment = alignment_of(x, valid_bytes)
        key = ("stats", view, x.dtype, alignment, x.device, valid is None, groups)

        def make() -> tuple[Step, Step]:
            work = work_of(layout, x, alignment, ragged=valid is None and groups == 1)
            return self.builder.stats_and_merge(work, x, groups)

        first, merge = self.prepare(key, make)
        partials = self._partials(first, x, valid is not None)
        saved = self.new((2, groups * layout.c), None, torch.float64, x.device)
        counts = None if valid is None else self.new((groups,), None, torch.float64, x.device)
        self.launch(first, (x, valid_bytes, partials))
        self.launch(merge, (partials, saved, counts, None, None, None, 0.0))
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
        view = grouped_view(saved.x, saved.spec.axis, groups)
        layout = of_one_group(view.layout, groups)
        x, residual = dense(saved.x, view), None if residual is None else dense(residual, view)
        y, valid_bytes = out if is_dense(out, view) else self.empty_like(x), position_bytes(saved.valid, view)
        alignment, activation = alignment_of(x, residual, y, valid_bytes), saved.spec.activation
        vectors = (saved.moments.mean, saved.moments.var, saved.weight, saved.bias)
        key = ("normalize", view, x.dtype, x.device, alignment, residual is None, activation.name, valid_bytes is None,
               groups, *[None if v is None else v.dtype for v in vectors])  # fmt: skip
        value = functions(activation.name).value

        def make() -> Step:
            plan = self.builder.plan_once(work_of(layout, x, alignment, reads=1 + (residual is not None)), x)
            return self.builder.normalize(plan, x, alignment, (value, None), groups)

        step = self.prepare(key, make)
        mean, var, weight, bias = (None if v is None else v.contiguous() for v in vectors)
        tensors = (x, residual, y, None, valid_bytes, mean, var, None, None, weight, bias, None, None)
        untracked = (None, None, None, 0.0, None, 1.0)  # no running statistics, counter, momentum
        self.launch(step, (*tensors, *untracked, saved.spec.eps, activation.parameter))
        if y is not out:
            out.copy_(y)

    @torch.no_grad()
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        call = backward_call(dy, saved, frozenset())
        outputs = (dz is not None, False)
        key = "reduce", call.key, dz is None
        _, reduce, merge = self.prepare(key, lambda: self.builder.reduce_and_merge(call, outputs, dz is None))
        target = None if dz is None else self._target(dz, call)
        partials = self._partials(reduce, call.x)
        sums = self.new((2, call.groups * call.view.layout.c), None, torch.float64, call.x.device)
        self.launch(reduce, (*call.tensors, target, None, *call.vectors, partials, *call.numbers))
        written = (None, None, sums[1], sums[0], None)
        self.launch(merge, (partials, *call.vectors[:2], *written, saved.spec.eps, 0.0, None))
        if dz is not None and target is not dz:
            dz.copy_(target)
        return Sums(sums[0], sums[1])

    @torch.no_grad()
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        call, steps = backward_call(dy, saved, frozenset()), self.builder
        key = "input" if sums is None else "input after sums", call.key
        step = self.prepare(key, lambda: steps.input(steps.plan_once(call.work(1, apart=False), call.x), call))
        dx = self._target(out, call)
        given = (None, None) if sums is None else (sums.dz.contiguous(), sums.dz_xhat.contiguous())
        tail = (*given, None, None, *call.numbers, *divisor_of(saved))
        self.launch(step, (*call.tensors, None, dx, *call.vectors, None, None, *tail))
        if dx is not out:
            out.copy_(dx)

    def _target(self, given: Array, call: BackwardCall) -> Array:
        """The tensor given for a gradient, or a new one if kernels of the call cannot write that."""
        fits = is_dense(given, call.view) and alignment_of(given) >= call.alignment
        return given if fits else self.empty_like(call.x)

    # ------------------------------------------------------------------------------------------------------- forward
    @_planned_again
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True, counts: bool = False) -> tuple[Array, Saved]:
        """Make a forward call; ``counts``: its last launch increments ``call.counter``; not for ghost batches."""
        x, weight, bias, residual, running_mean, running_var, counter, valid, out = call
        counter = counter if counts else None
        groups = spec.groups
        view, given = grouped_view(x, spec.axis, groups), residual
        if groups > 1 and view is not view_of(x, spec.axis) and out is None:
            out = self.empty_like(x)
        layout, valid_bytes = of_one_group(view.layout, groups), position_bytes(valid, view)
        dense_x, residual = dense(x, view), None if residual is None else dense(residual, view)
        bits = 0
        if residual is not None and (keep or spec.batch_stats):
            bits = mask_size(view, spec.axis, x.element_size(), spec.activation.name, groups)
        if bits:  # a byte serves a whole vector, wherever tensors begin
            dense_x, residual = aligned(dense_x, VECTOR_BYTES), aligned(residual, VECTOR_BYTES)
            valid_bytes = None if valid_bytes is None else aligned(valid_bytes, VECTOR_BYTES)
        usable = out is not None and is_dense(out, view) and not (bits and out.data_ptr() % VECTOR_BYTES)
        y = out if usable else self.new(x.shape, view.dense_strides, x.dtype, x.device)
        alignment = alignment_of(dense_x, residual, y, valid_bytes)
        vectors = (running_mean, running_var, weight, bias)
        number, at = momentum_of(spec.momentum, x.device)
        key = (
            "forward", view, x.dtype, x.device, alignment, residual is None, spec.activation.name, spec.batch_stats,
            *[None if v is None else v.dtype for v in vectors], None if at is None else at.dtype, valid is None, groups,
            bits > 0, counter is None, usable,
        )  # fmt: skip
        extended = valid is not None or groups > 1

        def make() -> ForwardSteps:
            reads, apart = 1 + (residual is not None), not (extended or usable)
            work = work_of(layout, x, alignment, reads=reads, sign_bits=bits > 0, ragged=apart)
            return self.builder.forward(work, spec, dense_x, extended)

        steps = self.prepare(key, make)
        running_mean, running_var, weight, bias = (None if v is None else v.contiguous() for v in vectors)
        kept = self.new((2 * groups + 2, layout.c), None, torch.float64, x.device)
        positions = None
        if valid is not None and spec.batch_stats:
            positions = self.new((groups,), None, torch.float64, x.device)
        mask = self.new((bits,), None, torch.uint8, x.device) if bits else None
        pair, none = (running_mean, running_var), (None, None)
        frozen, tracked = (none, none if extended else pair) if spec.batch_stats else (pair, none)
        steps.run(
            self.launch, (dense_x, residual, y, mask, valid_bytes), (weight, bias, kept, positions),
            self._scratch(steps, x, groups, valid is not None), frozen, tracked,
            (counter, number, at, spec.eps, spec.activation.parameter),
        )  # fmt: skip
        mean, var, kept_weight, kept_bias = kept.unbind() if groups == 1 else rows_of_groups(kept, groups)
        moments = Moments(layout.count if positions is None else positions, mean, var)
        if spec.batch_stats and extended and vectors[0] is not None:
            self.update_running(moments, vectors[0], vectors[1], spec.momentum)
        elif spec.batch_stats:
            give_back((running_mean, running_var), vectors[:2])
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

    def forward_at_once(self, call: Call, spec: BatchNormSpec) -> tuple[Array, Saved] | None:
        """Make a :meth:`forward` call in training whose last launch also counts the batch; ``None`` for others."""
        return self.forward(call, spec, counts=True) if spec.batch_stats else None

    # ------------------------------------------------------------------------------------------------------ backward
    @_planned_again
    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        if not need:
            return Grads(None, None, None, None)
        call, batch_stats = backward_call(dy, saved, need), saved.spec.batch_stats
        x, device = call.x, call.x.device
        if call.groups > 1:
            return self._backward_of_groups(call, dy, saved, need)
        dx = self._like(call, saved) if "dx" in need else None
        dz = self._like(call, saved) if "dresidual" in need else None
        c = call.view.layout.c
        dweight = self.new((c,), None, saved.weight_dtype, device) if "dweight" in need else None
        dbias = self.new((c,), None, saved.bias_dtype, device) if "dbias" in need else None
        steps = self.prepare(("backward", call.key), lambda: self.builder.backward(call, need, batch_stats))
        outputs, scratch = ((dz, dx), (dweight, dbias)), self._scratch(steps, x)
        steps.run(self.launch, call.tensors, call.vectors, scratch, outputs, call.numbers, divisor_of(saved))
        return Grads(dx, dweight, dbias, dz)

    def _backward_of_groups(self, call: BackwardCall, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        """Make a backward call of ghost batches, whose sums are added up in their order."""
        dx = self.empty_like(saved.x) if "dx" in need else None
        dz = self.empty_like(saved.x) if "dresidual" in need else None
        sums = self.backward_reduce(dy, saved, dz)
        if dx is not None:
            self.backward_input(dy, saved, sums, dx)
        dz_xhat, dz_sum = (vector.view(call.groups, -1).sum(0) for vector in (sums.dz_xhat, sums.dz))
        dweight = self.cast(dz_xhat, saved.weight_dtype) if "dweight" in need else None
        return Grads(dx, dweight, self.cast(dz_sum, saved.bias_dtype) if "dbias" in need else None, dz)

    # ------------------------------------------------------------------------------------------------------- helpers
    def prepare(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what calls with this key have in common, made once."""
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = make()
            if self._on_plan is not None and isinstance(found, ForwardSteps | BackwardSteps):
                self._on_plan(found.plan, found.launches)
        return found

    allocator = staticmethod(allocator)
    """What makes new tensors, not initialised."""

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: Any) -> Array:
        """Allocate memory that is not initialised, contiguous unless ``strides`` are given."""
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def _like(self, call: BackwardCall, saved: Saved) -> Array:
        """Allocate an output like the call's input."""
        view = call.view
        return (
            self.new(saved.x.shape, view.strides, saved.x.dtype, saved.x.device)
            if view.dense
            else self.empty_like(saved.x)
        )

    def _scratch(
        self, steps: ForwardSteps | BackwardSteps, x: Array, groups: int = 1, counted: bool = False
    ) -> tuple[Array | None, Array | None]:
        """Allocate what the launches of a call leave each other: partial results, and the table of merged ones."""
        forms = scratch_of(steps, x, groups, counted).items()
        made = {name: self.new(shape, None, dtype, x.device) for name, (shape, dtype) in forms}
        return made.get("partials"), made.get("table")

    def _partials(self, first: Step, x: Array, counted: bool = False) -> Array:
        shape, dtype = partials_of(first, counted)
        return self.new(shape, None, dtype, x.device)
