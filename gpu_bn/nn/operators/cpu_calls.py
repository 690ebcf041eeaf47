"""Calls of the compiled CPU backend with plain tensors, prepared once for all calls of a signature.

A signature is the types, dtypes, shapes, strides and options of a call. A guard from torch's compiler compares all
tensors of a call with a signature in one step. The code touches few objects: behind a convolution, which has evicted
the CPU's caches, memory accesses determine the time of a call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gpu_bn import registry
from gpu_bn.backends.alike import (
    Guard,
    Layout,
    Selector,
    contiguous_layout,
    empty_like_layout,
    empty_on_cpu,
    make_guard,
    make_selector,
)
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import library
from gpu_bn.nn.operators.autograd import backend_gradients, is_intercepted, needs_operator, plain_tensors

MOST, VARIANTS = 512, 8
"""The maximum number of keys in the cache (a shape with options), and of signatures for each key."""
TENSORS = ("x", "weight", "bias", "residual", "mean", "var", "counter")
"""The tensors of a call, in the order of :class:`gpu_bn.call.Call`."""
_increment_version, _grad_enabled = torch._C._increment_version, torch.is_grad_enabled


@dataclass(slots=True, eq=False)
class Forward:
    """The data that all forward calls of one signature share.

    Attributes:
        guard: tells whether tensors have this signature.
        present: selects the tensors of a call that are not ``None``.
        engine, doors, door: the backend, the module with its compiled functions, and the function for these calls.
        written: the index of the first present tensor that a call writes; 0 if it writes none.
        training, activation: options.
        keeps_output: whether y is saved in place of the residual.
        y, dweight, dbias: the layouts of the output and of the gradients.
        statistics: the layout of the saved mean and variance; ``None`` if no backward call can follow.
        backward: guards and compiled functions of backward calls, by the flags of the needed gradients.
    """

    guard: Guard
    present: Selector
    engine: Any
    doors: Any
    door: Any
    written: int
    training: bool
    activation: str
    keeps_output: bool
    y: Layout
    statistics: Layout | None
    dweight: Layout
    dbias: Layout
    backward: dict[Any, tuple[tuple[Guard, Any], ...]] = field(default_factory=dict)


_cache: dict[Any, tuple[Forward, ...]] = {}


def forward(
    tensors: tuple[Any, ...], training: bool, momentum: float | None, eps: float, activation: str, parameter: float
) -> Tensor | None:
    """Return ``y``, or ``None`` if the call cannot take this path; ``tensors`` are those of :data:`TENSORS`."""
    x, weight, bias, residual, mean, var, counter = tensors
    key = (
        registry.backend_for, x.shape, training, _grad_enabled(), activation, weight is None, bias is None,
        residual is None, mean is None, var is None, counter is None,
    )  # fmt: skip
    shared: Forward | None
    for shared in _cache.get(key, ()):
        present = shared.present(tensors)
        if shared.guard(*present):  # it also fails if torch.jit traces or a transform is active
            break
    else:
        shared = _prepare(key, tensors, training, momentum, eps, activation)
        if shared is None:
            return None
        present = shared.present(tensors)
    if type(eps) is not float or not 0.0 < eps < inf:
        return None
    if momentum is None:
        if counter is not None and not counter.is_cpu:
            return None
        momentum = float(library.batch_weight(None, None, counter))
    doors, door = shared.doors, shared.door
    function, record, threads, huge = door[:4]
    if function is None:
        door = doors.with_function(door)
        if door is None:
            return None
        function, record, threads, huge = door[:4]
    y = empty_on_cpu(*shared.y)
    if huge:
        doors.advise(y)
    statistics = None if shared.statistics is None else empty_on_cpu(*shared.statistics)
    if function(
        record, x, residual, y, weight, bias, mean, var, counter, statistics, momentum, eps, parameter,
        doors.scratch_address(), threads,
    ):  # fmt: skip
        return None
    if shared.written:
        _increment_version(present[shared.written :])
    if statistics is None:
        return y
    return _apply(x, weight, bias, residual, (y,), (shared, statistics, eps, parameter))  # type: ignore[no-any-return]


def _prepare(
    key: Any, tensors: tuple[Any, ...], training: bool, momentum: float | None, eps: float, activation: str
) -> Forward | None:
    """Add an entry for calls like this one to the cache and return it; ``None`` if they cannot take this path."""
    x, weight, bias, residual, *_ = tensors
    engine: Any = registry.backend_for(x)
    parts = None if is_intercepted() else plain_tensors(Call(*tensors), Options(training, momentum, eps))
    if "doors" not in vars(engine) or parts is None or x.layout is not torch.strided:
        return None
    door = engine.doors.forward(x, residual, training, activation)
    if door is None:
        return None
    names = [name for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None]
    present = make_selector(TENSORS, names)
    written = next((index for index, name in enumerate(names) if name in TENSORS[4:]), 0) if training else 0
    keeps_output = residual is not None and engine.keeps_output(activation, x.dtype)
    channels = x.shape[1]
    statistics = contiguous_layout((2 * channels,), torch.float64) if parts[-1] else None
    dtypes = [(x if vector is None else vector).dtype for vector in (weight, bias)]
    dweight, dbias = (contiguous_layout((channels,), dtype) for dtype in dtypes)
    shared = Forward(
        make_guard(present(tensors)), present, engine, engine.doors, door, written, training, activation, keeps_output,
        empty_like_layout(x), statistics, dweight, dbias,
    )  # fmt: skip
    if len(_cache) >= MOST:
        _cache.clear()
    _cache[key] = (shared, *_cache.get(key, ())[: VARIANTS - 1])
    return shared


class _CpuCall(Function):
    """The autograd function of a forward call that has already been computed; ``computed`` is ``(y,)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        computed: tuple[Tensor],
        rest: tuple[Any, ...],
    ) -> Tensor:
        shared = rest[0]
        if shared.activation == "identity":  # its gradient reads neither bias nor residual
            ctx.to_save = x, weight, None, None
        else:
            ctx.to_save = x, weight, bias, computed[0] if shared.keeps_output else residual
        ctx.rest = *rest, residual is not None
        ctx.materialize_grads = False
        return computed[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, bias, residual = saved = ctx.saved_tensors  # residual is y if shared.keeps_output
        shared, statistics, eps, parameter, _ = ctx.rest
        need, passes = ctx.needs_input_grad, shared.activation == "identity"  # then the residual's gradient is dy
        if _grad_enabled() or is_intercepted():
            return _gradients_by_backend(ctx, dy, *saved)
        tensors, doors = (x, dy) if residual is None else (x, dy, residual), shared.doors
        for guard, door in shared.backward.get(need, ()):  # noqa: B007
            if guard(*tensors):
                break
        else:
            door = _prepare_backward(shared, tensors, need)
        door = None if door is None else doors.with_function(door)
        if door is None:
            return _gradients_by_backend(ctx, dy, *saved)
        function, record, threads, huge = door[:4]
        dx = empty_on_cpu(*shared.y) if need[0] else None
        dweight = empty_on_cpu(*shared.dweight) if need[1] else None
        dbias = empty_on_cpu(*shared.dbias) if need[2] else None
        dresidual = empty_on_cpu(*shared.y) if need[3] and not passes else None
        if huge:
            for gradient in (dx, dresidual):
                if gradient is not None:
                    doors.advise(gradient)
        if function(
            record, x, residual, dy, dx, dresidual, weight, bias, dweight, dbias, statistics, eps, parameter,
            doors.scratch_address(), threads,
        ):  # fmt: skip
            return _gradients_by_backend(ctx, dy, *saved)
        return dx, dweight, dbias, dy if need[3] and passes else dresidual, None, None


_apply = super(Function, _CpuCall).apply
_CpuCall._backward_cls.apply = _CpuCall.backward  # type: ignore[attr-defined]


def _prepare_backward(shared: Forward, tensors: tuple[Tensor, ...], need: tuple[bool, ...]) -> Any:
    """Return and cache the compiled function of such backward calls, of x, dy and the saved residual or y, if any."""
    x, dy, *added = tensors
    residual = added[0] if added else None
    adds = need[3] and shared.activation != "identity"
    sums = need[1] or need[2] or (need[0] and shared.training)
    if needs_operator(dy, x) or not (sums or adds or need[0]):
        return None
    kernel = shared.activation + shared.doors.OF_Y if shared.keeps_output else shared.activation
    door = shared.doors.backward(x, residual, dy, need[0], adds, sums, shared.training, kernel)
    if door is not None:
        shared.backward[need] = ((make_guard(tensors), door), *shared.backward.get(need, ())[: VARIANTS - 1])
    return door


def _gradients_by_backend(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the backend's general call or by the operator ``backward``."""
    shared, statistics, eps, parameter, has_residual = ctx.rest
    channels = x.shape[1]
    saved = Saved(
        x=x,
        residual=None if shared.keeps_output else residual,
        moments=Moments(x.numel() // channels, statistics[:channels], statistics[channels:]),
        weight=weight,
        bias=bias,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=shared.dbias[2],
        has_residual=has_residual,
        spec=library.options(shared.training, 0.0, eps, shared.activation, parameter),
        mask=residual if shared.keeps_output else None,
    )
    return *backend_gradients(shared.engine, dy, saved, weight, bias, ctx.needs_input_grad), None, None
