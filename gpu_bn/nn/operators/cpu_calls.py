"""Make plain calls by the compiled CPU backend.

What calls alike have in common is remembered: a guard of torch's compares all tensors of a call with it in one step.
After a convolution, which has emptied the caches, a call takes as long as it touches memory: objects, code, keys.
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
from gpu_bn.nn.operators.autograd import gradients_of, needs_operator, plain_parts, watched

MOST, VARIANTS = 512, 8
"""Shapes, with their options, that are remembered, and signatures of each."""
GIVEN = ("x", "weight", "bias", "residual", "mean", "var", "counter")
"""The tensors of a call, in its order."""
_increment_version, _grad_enabled = torch._C._increment_version, torch.is_grad_enabled


@dataclass(slots=True, eq=False)
class Forward:
    """Hold what forward calls of one signature have in common.

    Attributes:
        guard, given: the signature; the tensors that there are of a call's.
        engine, doors, door: the backend, the module that finds its compiled functions, and the one for these calls.
        written: the place of the first tensor that is written; 0 if none is.
        training, activation: options.
        of_y: whether y is kept in place of the residual.
        y, dweight, dbias: the layouts of the output and of gradients.
        statistics: the layout of those that are kept; ``None`` if no backward call can follow.
        backward: the backward calls that have followed, by what was needed: their guards and compiled functions.
    """

    guard: Guard
    given: Selector
    engine: Any
    doors: Any
    door: Any
    written: int
    training: bool
    activation: str
    of_y: bool
    y: Layout
    statistics: Layout | None
    dweight: Layout
    dbias: Layout
    backward: dict[Any, tuple[tuple[Guard, Any], ...]] = field(default_factory=dict)


_known: dict[Any, tuple[Forward, ...]] = {}


def forward(
    given: tuple[Any, ...], training: bool, momentum: float | None, eps: float, activation: str, parameter: float
) -> Tensor | None:
    """Return ``y``, or ``None`` if the call is of another kind."""
    x, weight, bias, residual, mean, var, counter = given
    key = (
        registry.backend_for, x.shape, training, _grad_enabled(), activation, weight is None, bias is None,
        residual is None, mean is None, var is None, counter is None,
    )  # fmt: skip
    way: Forward | None
    for way in _known.get(key, ()):
        tensors = way.given(given)
        if way.guard(*tensors):  # which tells too whether torch.jit traces, or a transform is active
            break
    else:
        way = _prepare(key, given, training, momentum, eps, activation)
        if way is None:
            return None
        tensors = way.given(given)
    if type(eps) is not float or not 0.0 < eps < inf:
        return None
    if momentum is None:
        if counter is not None and not counter.is_cpu:
            return None
        momentum = float(library.batch_weight(None, None, counter))
    doors, door = way.doors, way.door
    function, record, threads, huge = door[:4]
    if function is None:
        door = doors.with_function(door)
        if door is None:
            return None
        function, record, threads, huge = door[:4]
    y = empty_on_cpu(*way.y)
    if huge:
        doors.advise(y)
    statistics = None if way.statistics is None else empty_on_cpu(*way.statistics)
    if function(
        record, x, residual, y, weight, bias, mean, var, counter, statistics, momentum, eps, parameter,
        doors.scratch_address(), threads,
    ):  # fmt: skip
        return None
    if way.written:
        _increment_version(tensors[way.written :])
    if statistics is None:
        return y
    return _apply(x, weight, bias, residual, (y,), (way, statistics, eps, parameter))  # type: ignore[no-any-return]


def _prepare(
    key: Any, given: tuple[Any, ...], training: bool, momentum: float | None, eps: float, activation: str
) -> Forward | None:
    """Remember what calls like this one have in common; ``None`` if they go another way."""
    x, weight, bias, residual, *_ = given
    engine: Any = registry.backend_for(x)
    parts = None if watched() else plain_parts(Call(*given), Options(training, momentum, eps))
    if "doors" not in vars(engine) or parts is None or x.layout is not torch.strided:
        return None
    door = engine.doors.forward(x, residual, training, activation)
    if door is None:
        return None
    names = [name for name, one in zip(GIVEN, given, strict=True) if one is not None]
    choose = make_selector(GIVEN, names)
    written = next((place for place, name in enumerate(names) if name in GIVEN[4:]), 0) if training else 0
    of_y = residual is not None and engine.keeps_output(activation, x.dtype)
    channels = x.shape[1]
    statistics = contiguous_layout((2 * channels,), torch.float64) if parts[-1] else None
    dweight, dbias = (contiguous_layout((channels,), x.dtype if one is None else one.dtype) for one in (weight, bias))
    way = Forward(
        make_guard(choose(given)), choose, engine, engine.doors, door, written, training, activation, of_y,
        empty_like_layout(x), statistics, dweight, dbias,
    )  # fmt: skip
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = (way, *_known.get(key, ())[: VARIANTS - 1])
    return way


class _Made(Function):
    """Tells autograd of a call that the compiled backend has made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        made: tuple[Tensor],
        rest: tuple[Any, ...],
    ) -> Tensor:
        way = rest[0]
        if way.activation == "identity":  # whose gradient reads neither
            ctx.to_save = x, weight, None, None
        else:
            ctx.to_save = x, weight, bias, made[0] if way.of_y else residual
        ctx.rest = *rest, residual is not None
        ctx.materialize_grads = False
        return made[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, bias, residual = saved = ctx.saved_tensors  # or y in the residual's place
        way, statistics, eps, parameter, _ = ctx.rest
        need, passes = ctx.needs_input_grad, way.activation == "identity"  # the residual's gradient is dy itself
        if _grad_enabled() or watched():
            return _gradients_by_backend(ctx, dy, *saved)
        given, doors = (x, dy) if residual is None else (x, dy, residual), way.doors
        for guard, found in way.backward.get(need, ()):  # noqa: B007
            if guard(*given):
                break
        else:
            found = _prepare_backward(way, given, need)
        door = None if found is None else doors.with_function(found)
        if door is None:
            return _gradients_by_backend(ctx, dy, *saved)
        function, record, threads, huge = door[:4]
        dx = empty_on_cpu(*way.y) if need[0] else None
        dweight = empty_on_cpu(*way.dweight) if need[1] else None
        dbias = empty_on_cpu(*way.dbias) if need[2] else None
        dresidual = empty_on_cpu(*way.y) if need[3] and not passes else None
        if huge:
            for one in (dx, dresidual):
                if one is not None:
                    doors.advise(one)
        if function(
            record, x, residual, dy, dx, dresidual, weight, bias, dweight, dbias, statistics, eps, parameter,
            doors.scratch_address(), threads,
        ):  # fmt: skip
            return _gradients_by_backend(ctx, dy, *saved)
        return dx, dweight, dbias, dy if need[3] and passes else dresidual, None, None


_apply = super(Function, _Made).apply
_Made._backward_cls.apply = _Made.backward  # type: ignore[attr-defined]


def _prepare_backward(way: Forward, given: tuple[Tensor, ...], need: tuple[bool, ...]) -> Any:
    """Return the compiled function of backward calls like this one, of x, dy, and the residual or y; else ``None``."""
    x, dy, *added = given
    residual = added[0] if added else None
    adds = need[3] and way.activation != "identity"
    sums = need[1] or need[2] or (need[0] and way.training)
    if needs_operator(dy, x) or not (sums or adds or need[0]):
        return None
    kernel = way.activation + way.doors.OF_Y if way.of_y else way.activation
    door = way.doors.backward(x, residual, dy, need[0], adds, sums, way.training, kernel)
    if door is not None:
        way.backward[need] = ((make_guard(given), door), *way.backward.get(need, ())[: VARIANTS - 1])
    return door


def _gradients_by_backend(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the backend's own call, or by the operator."""
    way, statistics, eps, parameter, has_residual = ctx.rest
    channels = x.shape[1]
    saved = Saved(
        x=x,
        residual=None if way.of_y else residual,
        moments=Moments(x.numel() // channels, statistics[:channels], statistics[channels:]),
        weight=weight,
        bias=bias,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=way.dbias[2],
        has_residual=has_residual,
        spec=library.options(way.training, 0.0, eps, way.activation, parameter),
        mask=residual if way.of_y else None,
    )
    return *gradients_of(way.engine, dy, saved, weight, bias, ctx.needs_input_grad), None, None
