"""Make plain calls in few steps: of tensors that kernels read as they lie, prepared once for all calls of a signature.

A signature is all that two calls alike have in common: dtypes, shapes, strides, devices, options. Addresses are looked
at in every call. Where something has to be copied, converted or refused, nothing is done here: ``None`` is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from operator import add, attrgetter, le
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Grads, Moments, Saved
from gpu_bn.backends.triton.arguments import backward_call, mask_size, work_of
from gpu_bn.backends.triton.launch import ClusterError, Recent
from gpu_bn.backends.triton.programs import planes
from gpu_bn.backends.triton.steps import BackwardSteps, ForwardSteps, table_dtype
from gpu_bn.backends.triton.strides import view_of
from gpu_bn.call import Call
from gpu_bn.plan import VECTOR_BYTES
from gpu_bn.spec import MAX_RANK, MIN_RANK, BatchNormSpec

NOTHING = None, None
"""In the place of two running statistics."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Scratch = tuple[Tensor | None, Tensor | None]
"""Partial results, and the table of merged ones."""
_form = attrgetter("dtype", "shape", "device", "layout")
_stride, _address = Tensor.stride, Tensor.data_ptr


@dataclass(slots=True, eq=False)
class Prepared:
    """Hold what calls of one signature have in common.

    Attributes:
        steps: the launches.
        training, activation: options.
        sizes: bytes of each tensor.
        count: positions of a channel.
        form, stride: of the input.
        kept, mask, scratch, weight, bias: what new tensors are like; they have next to no memory.
        has_weight, has_bias, has_residual: which arguments there are.
        backward: the launches of backward calls and what their scratch is like, by what is needed.
    """

    steps: ForwardSteps
    training: bool
    activation: str
    sizes: list[int]
    count: int
    form: Any
    stride: tuple[int, ...]
    kept: Tensor
    mask: Tensor | None
    scratch: Scratch
    weight: Tensor
    bias: Tensor
    has_weight: bool
    has_bias: bool
    has_residual: bool
    backward: dict[Sequence[bool], tuple[BackwardSteps, Scratch]] = field(default_factory=dict)


class Made(NamedTuple):
    """Keep a forward call that has been made, for its backward call."""

    prepared: Prepared
    kept: Tensor
    """(4, C): mean, variance, weight, bias."""
    eps: float
    parameter: float

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """Return mean, variance, weight and bias."""
        mean, var, weight, bias = self.kept.unbind()
        return mean, var, weight if self.prepared.has_weight else None, bias if self.prepared.has_bias else None

    def saved(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Saved:
        """Return the same for a backward call that is not plain."""
        prepared, (mean, var, weight, bias) = self.prepared, self.vectors
        activation = Activation(prepared.activation, self.parameter)
        spec = BatchNormSpec(1, prepared.training, 0.0, self.eps, activation)
        moments, weight_dtype = (
            Moments(prepared.count, mean, var),
            prepared.weight.dtype if prepared.has_weight else None,
        )
        return Saved(
            x, residual, moments, weight, bias, weight_dtype, prepared.bias.dtype, prepared.has_residual, spec, mask
        )


class PlainCalls:
    """Make plain calls for a backend.

    Args:
        engine: the backend, a ``TritonBackend``.
        most: signatures that are remembered.
    """

    def __init__(self, engine: Any, most: int) -> None:
        self.engine = engine
        self.known = Recent(most)
        """``None`` for calls that go another way."""

    def forward(
        self, call: Call, given: list[Tensor], training: bool, momentum: float, eps: float, activation: Activation,
        grows: bool,
    ) -> tuple[Tensor, Tensor | None, Made] | None:  # fmt: skip
        """Return ``y``, the mask, and what else a backward call needs, which may follow if the call ``grows`` a graph.

        ``given``: the call's tensors: x, residual, weight, bias, running mean and variance, counter; no absent ones.
        """
        x, weight, bias, residual, mean, var, counter, _, _ = call
        key = (
            training, grows, activation.name, residual is None, weight is None, bias is None, mean is None,
            counter is None, *map(_form, given), *map(_stride, given),
        )  # fmt: skip
        try:
            prepared: Prepared | None = self.known[key]
        except KeyError:
            spec = BatchNormSpec(1, training, momentum, eps, activation)
            prepared = self.known[key] = self._prepare(key, call, spec, given, grows)
        if prepared is None or not _served(given, prepared, counter is not None):
            return None
        engine, like = self.engine, self.engine.like
        y, kept, steps = like(x), like(prepared.kept), prepared.steps
        mask = None if prepared.mask is None else like(prepared.mask)
        partials, table = prepared.scratch
        scratch = (None if partials is None else like(partials), None if table is None else like(table))
        frozen, tracked = (NOTHING, (mean, var)) if training else ((mean, var), NOTHING)
        tensors, vectors = (x, residual, y, mask, None), (weight, bias, kept, None)
        rest = counter, momentum, None, eps, activation.parameter
        try:
            steps.run(engine.launch, tensors, vectors, scratch, frozen, tracked, rest)
        except ClusterError:
            engine.do_without_clusters()
            return None
        return y, mask, Made(prepared, kept, eps, activation.parameter)

    def backward(
        self, made: Made, dy: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, need: Sequence[bool]
    ) -> Grads | None:
        """Return the gradients of x, weight, bias and residual that are needed."""
        prepared, _, eps, parameter = made
        if not any(need):
            return Grads(None, None, None, None)
        if not (prepared.form == _form(x) == _form(dy) and prepared.stride == x.stride() == dy.stride()):
            return None
        if (x.data_ptr() | dy.data_ptr() | (0 if residual is None else residual.data_ptr())) % VECTOR_BYTES:
            return None
        try:
            steps, (partials, table) = prepared.backward[need]
        except KeyError:
            found = self._prepare_backward(dy, made.saved(x, residual, mask), need)
            steps, (partials, table) = prepared.backward[need] = found
        engine, like = self.engine, self.engine.like
        dx, dz = like(x) if need[0] else None, like(x) if need[3] else None
        dweight, dbias = like(prepared.weight) if need[1] else None, like(prepared.bias) if need[2] else None
        tensors, outputs = (x, dy, residual, mask, None), ((dz, dx), (dweight, dbias))
        scratch = (None if partials is None else like(partials), None if table is None else like(table))
        numbers = (eps, parameter)
        try:
            steps.run(engine.launch, tensors, made.vectors, scratch, outputs, numbers, (1.0 / prepared.count, None))
        except ClusterError:
            engine.do_without_clusters()
            return None
        return Grads(dx, dweight, dbias, dz)

    def _prepare(self, key: Any, call: Call, spec: BatchNormSpec, given: list[Tensor], grows: bool) -> Prepared | None:
        x, residual, engine = call.x, call.residual, self.engine
        if not _is_plain(call, given) or (spec.batch_stats and x.numel() == x.shape[1]):
            return None
        view = view_of(x, 1)
        if not (view.dense and torch.empty_like(x).stride() == x.stride()):
            return None
        bits = 0
        if residual is not None and (grows or spec.batch_stats):
            bits = mask_size(view, 1, x.element_size(), spec.activation.name, 1)
        work = work_of(view.layout, x, VECTOR_BYTES, reads=1 + (residual is not None), sign_bits=bits > 0, ragged=True)
        steps = engine.prepare(("plain", key), lambda: engine.builder.forward(work, spec, x, False))
        channels = x.shape[1]
        weight, bias = (
            _blank((channels,), x.dtype if one is None else one.dtype, x.device) for one in (call.weight, call.bias)
        )
        return Prepared(
            steps, spec.batch_stats, spec.activation.name, [one.nbytes for one in given], x.numel() // channels,
            _form(x), x.stride(), _blank((4, channels), torch.float64, x.device),
            _blank((bits,), torch.uint8, x.device) if bits else None,
            _scratch(steps, x),
            weight, bias, call.weight is not None, call.bias is not None, residual is not None,
        )  # fmt: skip

    def _prepare_backward(self, dy: Tensor, saved: Saved, need: Sequence[bool]) -> tuple[BackwardSteps, Scratch]:
        names = frozenset(compress(("dx", "dweight", "dbias", "dresidual"), need))
        call = backward_call(dy, saved, names)
        steps = self.engine.prepare(
            ("plain", call.key), lambda: self.engine.builder.backward(call, names, saved.spec.batch_stats)
        )
        return steps, _scratch(steps, call.x)


def _served(given: list[Tensor], prepared: Prepared, counts: bool) -> bool:
    """Tell whether tensors begin where kernels can read them, and, in training, all lie apart from each other."""
    starts = list(map(_address, given))
    if starts[0] % VECTOR_BYTES or (prepared.has_residual and starts[1] % VECTOR_BYTES):
        return False
    if not prepared.training:
        return True
    if counts and starts[-1] % 8:
        return False
    ends = list(map(add, starts, prepared.sizes))
    starts.sort()
    ends.sort()
    return all(map(le, ends, starts[1:]))  # each ends before the next begins


def _is_plain(call: Call, given: list[Tensor]) -> bool:
    """Tell whether kernels can read tensors of such dtypes, shapes, strides and devices."""
    x, residual, counter = call.x, call.residual, call.counter
    vectors = [one for one in (call.weight, call.bias, call.running_mean, call.running_var) if one is not None]
    return (
        MIN_RANK <= x.dim() <= MAX_RANK
        and 0 not in x.shape
        and all(one.layout is torch.strided and one.device == x.device for one in given)
        and all(one.dtype in FLOATS for one in (x, *vectors))
        and all(one.shape == x.shape[1:2] and one.is_contiguous() for one in vectors)
        and (residual is None or (_form(residual), residual.stride()) == (_form(x), x.stride()))
        and (counter is None or (counter.dtype is torch.int64 and counter.numel() == 1))
    )


@cache
def _memory(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=device)


def _blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``empty_like`` makes a contiguous tensor of, in a third of the time that options take; one number."""
    return _memory(dtype, device).expand(shape)


def _scratch(steps: ForwardSteps | BackwardSteps, x: Tensor) -> Scratch:
    plan = steps.plan
    shape = planes(plan), plan.blocks, plan.tiling.c
    return (
        _blank(shape, torch.float64, x.device) if steps.has_partials else None,
        _blank((steps.rows, plan.tiling.c), table_dtype(x), x.device) if steps.rows else None,
    )
