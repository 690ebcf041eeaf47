"""Run Triton kernels on CUDA tensors of torch, or slowly on its CPU tensors with ``TRITON_INTERPRET=1``.

A forward or backward call is one launch if a program can hold a strip in registers, and otherwise two or three:
:mod:`gpu_bn.plan` decides. All launches are on torch's current stream, nothing waits for the device, and no address is
kept after a call, so that calls can be captured in CUDA graphs. Saved statistics are float64.
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
    copy_back,
    divisor_of,
    group_layout,
    grouped_view,
    mask_size,
    momentum_of,
    position_bytes,
    split_rows,
    work_of,
)
from gpu_bn.backends.triton.launch import ClusterError, Launch, Recent, Step, interpreting, launch
from gpu_bn.backends.triton.plain import PlainCalls
from gpu_bn.backends.triton.programs import INTERPRETER_HINT
from gpu_bn.backends.triton.steps import BackwardSteps, ForwardSteps, StepBuilder, partials_of, scratch_of
from gpu_bn.backends.triton.strides import aligned, dense, is_dense, view_of
from gpu_bn.backends.triton.sync import SharedStatistics
from gpu_bn.call import Call
from gpu_bn.kernels.triton.activations import functions
from gpu_bn.plan import VECTOR_BYTES, Device
from gpu_bn.spec import BatchNormSpec

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])


def _replan_without_clusters(method: Method) -> Method:
    """Repeat a call without clusters if they fail. A call in a cluster is one launch, so nothing has run before."""

    @wraps(method)
    def call(self: TritonBackend, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except ClusterError:
            self.do_without_clusters()
            return method(self, *args, **options)

    return cast(Method, call)


PREPARED = 1024
"""The most keys of calls whose launches a backend keeps."""


def backend() -> TritonBackend:
    """Return the backend, for :func:`gpu_bn.registry.load`.

    Raises:
        RuntimeError: torch has no CUDA device, and kernels do not run in the interpreter.
    """
    if not (interpreting() or torch.cuda.is_available()):
        raise RuntimeError(f"torch sees no CUDA device ({INTERPRETER_HINT})")
    return TritonBackend()


class TritonBackend(SharedStatistics):
    """Implement :class:`gpu_bn.backends.protocol.Backend` and ``FusedBackend`` by Triton kernels.

    Args:
        launch: launches a :class:`~gpu_bn.backends.triton.launch.Step`; tests pass another function.
        device: a device to plan for instead of that of the tensors.
        tier: the tier to use if it can serve a call.
        wide: whether offsets have 64 bits even if 32 suffice.
        on_plan: is called with the plan of each prepared call.
    """

    name = "triton"
    keeps_bits = True
    """Whether a forward call may keep sign bits instead of a residual."""
    updates_after_output = True
    """Whether a call with a mask or ghost batches allocates memory for its running statistics after its output."""
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
        layout = group_layout(view.layout, groups)
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
        groups, count = len(moments.mean) // len(running_mean), moments.count
        shares = momentum.to(torch.float64) if isinstance(momentum, torch.Tensor) else momentum
        if isinstance(count, torch.Tensor):  # only the device knows it; an empty ghost batch has a share of 0
            count = count.reshape(groups, 1)
            shares, bessel = shares * (count > 0).double(), count / (count - 1).clip(1)
        else:
            bessel = count / max(count - 1, 1)
        kept = 1 - shares
        if groups > 1:  # a ghost batch keeps so much of all that came before it
            ones = moments.mean.new_ones((groups, 1))
            kept = (ones * kept).flip(0).cumprod(0).flip(0)
            shares, kept = shares * torch.cat((kept[1:], ones[:1])), kept[:1]
        new = [shares * moments.mean.reshape(groups, -1), shares * bessel * moments.var.reshape(groups, -1)]
        if groups > 1:
            new = [part.sum(0, keepdim=True) for part in new]
        mean, var = kept * running_mean.double()[None] + new[0], kept * running_var.double()[None] + new[1]
        torch._foreach_copy_([running_mean, running_var], [mean[0], var[0]])  # both or neither

    @torch.no_grad()
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        groups = saved.spec.groups
        view = grouped_view(saved.x, saved.spec.axis, groups)
        layout = group_layout(view.layout, groups)
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
        _, first, merge = self.prepare(key, lambda: self.builder.reduce_and_merge(call, outputs, dz is None))
        target = None if dz is None else self._target(dz, call)
        partials = self._partials(first, call.x)
        sums = self.new((2, call.groups * call.view.layout.c), None, torch.float64, call.x.device)
        self.launch(first, (*call.tensors, target, None, *call.vectors, partials, *call.numbers))
        written = (None, None, sums[1], sums[0], None)
        self.launch(merge, (partials, *call.vectors[:2], *written, saved.spec.eps, 0.0, None))
        if dz is not None and target is not dz:
            dz.copy_(target)
        return Sums(sums[0], sums[1])

    @torch.no_grad()
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        call, steps = backward_call(dy, saved, frozenset()), self.builder
        key = "input" if sums is None else "input after sums", call.key
        step = self.prepare(key, lambda: steps.input(steps.plan_once(call.work(1, new_outputs=False), call.x), call))
        dx = self._target(out, call)
        pair = (None, None) if sums is None else (sums.dz.contiguous(), sums.dz_xhat.contiguous())
        tail = (*pair, None, None, *call.numbers, *divisor_of(saved))
        self.launch(step, (*call.tensors, None, dx, *call.vectors, None, None, *tail))
        if dx is not out:
            out.copy_(dx)

    def _target(self, out: Array, call: BackwardCall) -> Array:
        """Return the tensor to write a gradient to: ``out``, or a new one if the call's kernels cannot write it."""
        writable = is_dense(out, call.view) and alignment_of(out) >= call.alignment
        return out if writable else self.empty_like(call.x)

    # ------------------------------------------------------------------------------------------------------- forward
    @_replan_without_clusters
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True, counts: bool = False) -> tuple[Array, Saved]:
        """Return y and what a backward call needs. ``counts`` (no ghost batches): also increment ``call.counter``."""
        x, weight, bias, residual, running_mean, running_var, counter, valid, out = call
        counter = counter if counts else None
        groups = spec.groups
        view = grouped_view(x, spec.axis, groups)
        if groups > 1 and view is not view_of(x, spec.axis) and out is None:
            out = self.empty_like(x)
        layout, valid_bytes = group_layout(view.layout, groups), position_bytes(valid, view)
        dense_x, residual = dense(x, view), None if residual is None else dense(residual, view)
        bits = 0
        if residual is not None and (keep or spec.batch_stats):
            bits = mask_size(view, spec.axis, x.element_size(), spec.activation.name, groups)
        if bits:  # a byte of sign bits belongs to an aligned vector
            dense_x, residual = aligned(dense_x, VECTOR_BYTES), aligned(residual, VECTOR_BYTES)
            valid_bytes = None if valid_bytes is None else aligned(valid_bytes, VECTOR_BYTES)
        writable = out is not None and is_dense(out, view) and not (bits and out.data_ptr() % VECTOR_BYTES)
        y = out if writable else self.new(x.shape, view.dense_strides, x.dtype, x.device)
        alignment = alignment_of(dense_x, residual, y, valid_bytes)
        vectors = (running_mean, running_var, weight, bias)
        momentum, momentum_at = momentum_of(spec.momentum, x.device)
        key = (
            "forward", view, x.dtype, x.device, alignment, residual is None, spec.activation.name, spec.batch_stats,
            *[None if v is None else v.dtype for v in vectors], None if momentum_at is None else momentum_at.dtype,
            valid is None, groups, bits > 0, counter is None, writable,
        )  # fmt: skip
        split = valid is not None or groups > 1

        def make() -> ForwardSteps:
            reads, ragged = 1 + (residual is not None), not (split or writable)
            work = work_of(layout, x, alignment, reads=reads, sign_bits=bits > 0, ragged=ragged)
            return self.builder.forward(work, spec, dense_x, split)

        steps = self.prepare(key, make)
        running_mean, running_var, weight, bias = (None if v is None else v.contiguous() for v in vectors)
        rows = self.new((2 * groups + 2, layout.c), None, torch.float64, x.device)
        positions = None
        if valid is not None and spec.batch_stats:
            positions = self.new((groups,), None, torch.float64, x.device)
        mask = self.new((bits,), None, torch.uint8, x.device) if bits else None
        pair, none = (running_mean, running_var), (None, None)
        frozen, tracked = (none, none if split else pair) if spec.batch_stats else (pair, none)
        steps.run(
            self.launch, (dense_x, residual, y, mask, valid_bytes), (weight, bias, rows, positions),
            self._scratch(steps, x, groups, valid is not None), frozen, tracked,
            (counter, momentum, momentum_at, spec.eps, spec.activation.parameter),
        )  # fmt: skip
        mean, var, saved_weight, saved_bias = rows.unbind() if groups == 1 else split_rows(rows, groups)
        moments = Moments(layout.count if positions is None else positions, mean, var)
        if spec.batch_stats and split and vectors[0] is not None:
            self.update_running(moments, vectors[0], vectors[1], spec.momentum)
        elif spec.batch_stats:
            copy_back((running_mean, running_var), vectors[:2])
        if out is not None and y is not out:
            out.copy_(y)
            y = out
        return y, Saved(
            x=x,
            residual=None if spec.activation.is_identity or mask is not None else call.residual,
            moments=moments,
            weight=None if weight is None else saved_weight,
            bias=None if bias is None else saved_bias,
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            has_residual=call.residual is not None,
            spec=spec,
            mask=mask,
            valid=valid,
        )

    def forward_at_once(self, call: Call, spec: BatchNormSpec) -> tuple[Array, Saved] | None:
        """Make a :meth:`forward` call that also counts the batch; return ``None`` for frozen statistics."""
        return self.forward(call, spec, counts=True) if spec.batch_stats else None

    # ------------------------------------------------------------------------------------------------------ backward
    @_replan_without_clusters
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
        """Make a backward call with ghost batches, and add up their sums for the parameters' gradients."""
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
        """Return the steps of calls with this key; call ``make`` for the first of them."""
        steps = self._prepared.get(key)
        if steps is None:
            steps = self._prepared[key] = make()
            if self._on_plan is not None and isinstance(steps, ForwardSteps | BackwardSteps):
                self._on_plan(steps.plan, steps.launches)
        return steps

    allocator = staticmethod(allocator)
    """Return a function that allocates uninitialised tensors on a device."""

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: Any) -> Array:
        """Return a new tensor that is not initialised; it is contiguous unless ``strides`` are given."""
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def _like(self, call: BackwardCall, saved: Saved) -> Array:
        """Allocate an output like the call's input."""
        x = saved.x
        return self.new(x.shape, call.view.strides, x.dtype, x.device) if call.view.dense else self.empty_like(x)

    def _scratch(
        self, steps: ForwardSteps | BackwardSteps, x: Array, groups: int = 1, counted: bool = False
    ) -> tuple[Array | None, Array | None]:
        """Allocate the partial results of a call and the table of merged ones; ``None`` for one that is not used."""
        forms = scratch_of(steps, x, groups, counted).items()
        scratch = {name: self.new(shape, None, dtype, x.device) for name, (shape, dtype) in forms}
        return scratch.get("partials"), scratch.get("table")

    def _partials(self, first: Step, x: Array, counted: bool = False) -> Array:
        shape, dtype = partials_of(first, counted)
        return self.new(shape, None, dtype, x.device)
