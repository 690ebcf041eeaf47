"""Calls of plain tensors on a GPU in few steps: a signature that is known, one or two launches, autograd.

Any other call changes nothing here: :mod:`gpu_bn.nn.functional` makes it.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gpu_bn import registry
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators.autograd import PLAIN, gradients_of, needs_operator, plain_parts, watched

_increment_version = torch._C._increment_version


def forward(call: Call, options: Options) -> Tensor | None:
    """Return ``y``, or ``None`` if the call is of another kind; the counter is given only in training."""
    x, weight, bias, residual, *_ = call
    training, momentum, eps, activation, *_ = options
    if watched() or forward_ad._current_level >= 0 or type(x) not in PLAIN or not (x.is_cuda or x.is_cpu):
        return None
    engine = registry.serving(x)
    plain = vars(engine).get("plain")  # not by delegation: a wrapper may have calls of its own
    if plain is None or type(momentum) is not float or not -inf < momentum < inf:
        return None
    if (parts := plain_parts(call, options)) is None:
        return None
    given, tracked, grows = parts
    try:
        found = plain.forward(call, given, training, momentum, eps, activation, grows)
    except NotImplementedError:  # a tensor that torch.func has left behind has no address
        return None
    if found is None:
        return None
    if tracked:
        _increment_version(tracked)
    if not grows:
        return found[0]  # type: ignore[no-any-return]
    y, mask, made = found
    return _apply(x, weight, bias, residual, mask, (y,), (plain, made))  # type: ignore[no-any-return]


class _Made(Function):
    """Tells autograd of a call that has been made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        made: tuple[Tensor],
        rest: Any,
    ) -> Tensor:
        if rest[1].prepared.activation == "identity":  # whose gradient reads neither
            ctx.save_for_backward(x, weight, None, None, None)
        else:
            ctx.save_for_backward(x, weight, bias, residual if mask is None else None, mask)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return made[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, bias, residual, mask = ctx.saved_tensors
        plain, made = ctx.rest
        found, need = None, ctx.needs_input_grad
        if not needs_operator(dy, x):
            if need[3] and made.prepared.activation == "identity":  # the residual's gradient is dy itself
                found = plain.backward(made, dy, x, None, None, (*need[:3], False))
                found = found and (*found[:3], dy)
            else:
                found = plain.backward(made, dy, x, residual, mask, need[:4])
        if found is None:
            found = gradients_of(plain.engine, dy, made.saved(x, residual, mask), weight, bias, need)
        return *found, None, None, None


_apply = super(Function, _Made).apply
