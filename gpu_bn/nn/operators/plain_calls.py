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
from gpu_bn.activations import make_activation
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import cpu_calls
from gpu_bn.nn.operators.autograd import (
    PLAIN,
    dispatch_modes,
    gradients_of,
    is_compiling,
    plain_parts,
    tracing_state,
    transforms_active,
    watched,
)
from gpu_bn.nn.running import updates

_grad_enabled = torch.is_grad_enabled


def forward(
    given: tuple[Any, ...], training: bool, momentum: Any, eps: Any, activation: str, parameter: float
) -> Tensor | None:
    """Return ``y``, or ``None`` if the call is of another kind.

    ``given`` are the input, weight, bias, residual, running mean and variance, and in training the counter.
    """
    if (
        is_compiling()
        or dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or (training and updates.off)
        or type(given[0]) not in PLAIN
        or not (momentum is None or (type(momentum) is float and -inf < momentum < inf))
    ):
        return None
    if given[0].is_cpu:
        y = cpu_calls.forward(given, training, momentum, eps, activation, parameter)
        if y is not None:
            return y
    return _by_triton(Call(*given), Options(training, momentum, eps, make_activation(activation, parameter)))


def _by_triton(call: Call, options: Options) -> Tensor | None:
    x, eps = call[0], options[2]
    if tracing_state() is not None or transforms_active() or not (x.is_cuda or x.is_cpu):
        return None
    plain: Any = vars(registry.backend_for(x)).get("plain")  # not by delegation: a wrapper may have calls of its own
    if plain is None:
        return None
    if options[1] is None or type(eps) is not float or not 0.0 < eps < inf:
        return None
    try:
        return plain.forward(call, options, plain_parts, _apply_triton)  # type: ignore[no-any-return]
    except NotImplementedError:  # a tensor that torch.func has left behind has no address
        return None


class _MadeByTriton(Function):
    """Tells autograd of a call that the Triton backend has made."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        ctx.made, y, ctx.to_save = given[-1]
        ctx.materialize_grads = False
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        made = ctx.made
        plain = made[0]
        need, tensors = ctx.needs_input_grad, (dy, *ctx.saved_tensors)
        if not (_grad_enabled() or watched()):
            found = plain.backward(made, tensors, need)
            if found is not None:
                return found  # type: ignore[no-any-return]
        named = dict(zip(made[1].saved_names, tensors, strict=True))
        saved = plain.saved(made, tensors)
        return *gradients_of(plain.engine, dy, saved, named.get("weight"), named.get("bias"), need), None


_apply_triton = super(Function, _MadeByTriton).apply
_MadeByTriton._backward_cls.apply = _MadeByTriton.backward  # type: ignore[attr-defined]
