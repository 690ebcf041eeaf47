"""The fastest path of a call with plain tensors: one check of all arguments, the backend's fast call, then autograd.

For any other call :func:`forward` returns ``None`` without effect, and :mod:`gpu_bn.nn.functional` computes it. The
autograd functions set attributes of ``ctx`` instead of calling its methods, which takes longer.
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
    backend_gradients,
    dispatch_modes,
    is_compiling,
    is_intercepted,
    plain_tensors,
    tracing_state,
    transforms_active,
)
from gpu_bn.nn.running import updates

_grad_enabled = torch.is_grad_enabled


def forward(
    tensors: tuple[Any, ...], training: bool, momentum: Any, eps: Any, activation: str, parameter: float
) -> Tensor | None:
    """Return ``y``, or ``None`` if the call cannot take this path.

    ``tensors``: input, weight, bias, residual, running mean, running variance, and in training the counter.
    """
    if (
        is_compiling()
        or dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or (training and updates.off)
        or type(tensors[0]) not in PLAIN
        or not (momentum is None or (type(momentum) is float and -inf < momentum < inf))
    ):
        return None
    if tensors[0].is_cpu:
        y = cpu_calls.forward(tensors, training, momentum, eps, activation, parameter)
        if y is not None:
            return y
    return _forward_by_triton(Call(*tensors), Options(training, momentum, eps, make_activation(activation, parameter)))


def _forward_by_triton(call: Call, options: Options) -> Tensor | None:
    """Return ``y`` of a Triton kernel, or ``None`` if the call cannot take this path."""
    x, eps = call[0], options[2]
    if tracing_state() is not None or transforms_active() or not (x.is_cuda or x.is_cpu):
        return None
    plain: Any = vars(registry.backend_for(x)).get("plain")  # getattr would also find that of a backend that is wrapped
    if plain is None:
        return None
    if options[1] is None or type(eps) is not float or not 0.0 < eps < inf:
        return None
    try:
        return plain.forward(call, options, plain_tensors, _apply_triton)  # type: ignore[no-any-return]
    except NotImplementedError:  # a tensor that a torch.func transform wrapped has no address
        return None


class _TritonCall(Function):
    """The autograd function of a forward call that the Triton backend has already computed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.record, y, ctx.to_save = arguments[-1]
        ctx.materialize_grads = False
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        record = ctx.record
        plain = record[0]
        need, tensors = ctx.needs_input_grad, (dy, *ctx.saved_tensors)
        if not (_grad_enabled() or is_intercepted()):
            gradients = plain.backward(record, tensors, need)
            if gradients is not None:
                return gradients  # type: ignore[no-any-return]
        by_name = dict(zip(record[1].saved_names, tensors, strict=True))
        saved = plain.saved(record, tensors)
        return *backend_gradients(plain.engine, dy, saved, by_name.get("weight"), by_name.get("bias"), need), None


_apply_triton = super(Function, _TritonCall).apply
_TritonCall._backward_cls.apply = _TritonCall.backward  # type: ignore[attr-defined]
