"""A call by a backend that was asked for by name where another serves the tensors: one Function, one derivative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from gpu_bn import ops
from gpu_bn.backends.protocol import Backend
from gpu_bn.spec import BatchNormSpec


def batch_norm(
    engine: Backend,
    spec: BatchNormSpec,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``y`` by ``engine``; arguments have been checked. ``create_graph=True`` raises NotImplementedError."""
    y: Tensor = _BatchNorm.apply(x, weight, bias, residual, running_mean, running_var, valid, engine, spec)
    for updated in (running_mean, running_var):
        if spec.batch_stats and updated is not None:
            increment_version(updated)
    return y


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        valid: Tensor | None,
        engine: Backend,
        spec: BatchNormSpec,
    ) -> Tensor:
        vectors = (running_mean, running_var, weight, bias)
        keep = any(ctx.needs_input_grad)
        y, saved = ops.forward(engine, x, spec, *vectors, residual, None, False, valid, keep)
        ctx.save_for_backward(saved.x, saved.residual)
        ctx.engine, ctx.saved = engine, replace(saved, x=None, residual=None)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(f"backend {ctx.engine.name!r} has no second derivative: leave backend out")
        x, residual = ctx.saved_tensors
        names = ("dx", "dweight", "dbias", "dresidual")
        need = frozenset(name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed)
        grads = ops.backward(ctx.engine, dy, replace(ctx.saved, x=x, residual=residual), need)
        return (*grads, None, None, None, None, None)
