"""Calls of plain tensors in few steps: one look at all arguments, the backend's own way to its kernel, autograd.

Any other call changes nothing here: :mod:`gpu_bn.nn.functional` makes it. What methods of a ``ctx`` do is written out,
because a call of one takes longer.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gpu_bn import registry
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import library
from gpu_bn.nn.operators.autograd import PLAIN, gradients_of, needs_operator, plain_parts, watched
from gpu_bn.nn.running import updates

_increment_version, _grad_enabled = torch._C._increment_version, torch.is_grad_enabled
_float64, _strided = torch.float64, torch.strided


def forward(call: Call, options: Options) -> Tensor | None:
    """Return ``y``, or ``None`` if the call is of another kind; the counter is given only in training."""
    x, momentum = call[0], options[1]
    if (
        watched()
        or forward_ad._current_level >= 0
        or updates.off
        or type(x) not in PLAIN
        or not (x.is_cuda or x.is_cpu)
        or not (call.valid is None and options.virtual_batch_size is None and options.renorm is None)
        or not (momentum is None or (type(momentum) is float and -inf < momentum < inf))
    ):
        return None
    engine = registry.serving(x)
    ways = vars(engine)  # not by delegation: a wrapper may have calls of its own
    if "plain" in ways:
        return _by_triton(ways["plain"], call, options)
    return _by_cpu(engine, call, options) if "doors" in ways else None


def _by_triton(plain: Any, call: Call, options: Options) -> Tensor | None:
    eps = options[2]
    if options[1] is None or type(eps) is not float or not 0.0 < eps < inf:
        return None
    try:
        found = plain.forward(call, options, plain_parts)
    except NotImplementedError:  # a tensor that torch.func has left behind has no address
        return None
    if found is None:
        return None
    new, made = found
    if made is None:
        return new[0]  # type: ignore[no-any-return]
    x, weight, bias, residual, *_ = call
    return _apply_triton(x, weight, bias, residual, (plain, made, new))  # type: ignore[no-any-return]


class _MadeByTriton(Function):
    """Tells autograd of a call that the Triton backend has made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, found: Any
    ) -> Tensor:
        plain, made, new = found
        ctx.to_save = made[0].saves((x, weight, bias, residual, *new))
        ctx.materialize_grads = False
        ctx.rest = plain, made
        return new[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        plain, made = ctx.rest
        need, tensors = ctx.needs_input_grad, (dy, *ctx.saved_tensors)
        if not (_grad_enabled() or watched()):
            found = plain.backward(made, tensors, need)
            if found is not None:
                return found  # type: ignore[no-any-return]
        named = dict(zip(made[0].saved, tensors, strict=True))
        saved = plain.saved(made, tensors)
        return *gradients_of(plain.engine, dy, saved, named.get("weight"), named.get("bias"), need), None


_apply_triton = super(Function, _MadeByTriton).apply


def _by_cpu(engine: Any, call: Call, options: Options) -> Tensor | None:
    x, weight, bias, residual, running_mean, running_var, counter, _, _ = call
    training, momentum, eps, activation, *_ = options
    doors, parts = engine.doors, plain_parts(call, options)
    if parts is None or x.layout is not _strided:
        return None
    _, tracked, grows = parts
    if momentum is None:
        if counter is not None and not counter.is_cpu:
            return None
        momentum = 0.0 if counter is None else 1.0 / (int(counter) + 1)
    door = doors.forward(x, residual, training, activation.name)
    if door is None:
        return None
    y = torch.empty_like(x)
    if door.huge:
        doors.advise(y)
    statistics = torch.empty(2 * x.shape[1], dtype=_float64) if grows else None
    if door.function(
        door.record, x, residual, y, weight, bias, running_mean, running_var, counter, statistics, momentum, eps,
        activation.parameter, doors.scratch_address(), door.threads,
    ):  # fmt: skip
        return None
    if tracked:
        _increment_version(tracked)
    if grows:
        made = (engine, statistics, training, eps, activation.name, activation.parameter)
        return _apply_cpu(x, weight, bias, residual, (y,), made)  # type: ignore[no-any-return]
    return y


class _MadeByCpu(Function):
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
        engine, activation = rest[0], rest[4]
        of_y = residual is not None and engine.keeps_output(activation, x.dtype)
        if activation == "identity":  # whose gradient reads neither
            ctx.to_save = x, weight, None, None
        else:
            ctx.to_save = x, weight, bias, made[0] if of_y else residual
        ctx.rest = *rest, x.dtype if bias is None else bias.dtype, residual is not None, of_y
        ctx.materialize_grads = False
        return made[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, bias, residual = ctx.saved_tensors  # or y in the residual's place
        engine, statistics, training, eps, activation, parameter, bias_dtype, _, of_y = ctx.rest
        identity, need = activation == "identity", ctx.needs_input_grad
        if needs_operator(dy, x):
            return _gradients_by_backend(ctx, dy, x, weight, bias, residual)
        adds = need[3] and not identity
        sums = need[1] or need[2] or (need[0] and training)
        dx = dresidual = dweight = dbias = None
        if sums or adds or need[0]:
            doors = engine.doors
            kernel = activation + doors.OF_Y if of_y else activation
            door = doors.backward(x, residual, dy, need[0], adds, sums, training, kernel)
            if door is None:
                return _gradients_by_backend(ctx, dy, x, weight, bias, residual)
            if need[0]:
                dx = torch.empty_like(x)
                if door.huge:
                    doors.advise(dx)
            if need[1]:
                dweight = torch.empty_like(weight)
            if need[2]:
                dbias = torch.empty(x.shape[1], dtype=bias_dtype)
            if adds:
                dresidual = torch.empty_like(x)
                if door.huge:
                    doors.advise(dresidual)
            if door.function(
                door.record, x, residual, dy, dx, dresidual, weight, bias, dweight, dbias, statistics, eps, parameter,
                doors.scratch_address(), door.threads,
            ):  # fmt: skip
                return _gradients_by_backend(ctx, dy, x, weight, bias, residual)
        return dx, dweight, dbias, dy if need[3] and identity else dresidual, None, None


_apply_cpu = super(Function, _MadeByCpu).apply
for _made in (_MadeByTriton, _MadeByCpu):  # without a search for other ways to write a derivative
    _made._backward_cls.apply = _made.backward  # type: ignore[attr-defined]


def _gradients_by_backend(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by a backend's own call, or by the operator."""
    engine, statistics, training, eps, activation, parameter, bias_dtype, has_residual, of_y = ctx.rest
    channels = x.shape[1]
    saved = Saved(
        x=x,
        residual=None if of_y else residual,
        moments=Moments(x.numel() // channels, statistics[:channels], statistics[channels:]),
        weight=weight,
        bias=bias,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=bias_dtype,
        has_residual=has_residual,
        spec=library.options(training, 0.0, eps, activation, parameter),
        mask=residual if of_y else None,
    )
    return *gradients_of(engine, dy, saved, weight, bias, ctx.needs_input_grad), None, None
