"""Second and higher derivatives of SyncBatchNorm: its gradients by torch operations and sums over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gpu_bn.activations import Activation
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.distributed.group import Group, exchange
from gpu_bn.nn.operators import composition


class _Sum(Function):
    """The sum of (L,) vectors over the processes of a group. The gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, group: Group, header: list[float]) -> Tensor:
        ctx.group, ctx.header = group, header
        packets = wire.pack(vector.contiguous(), group.name, [wire.SECOND, *header])
        return wire.add(exchange(packets, group), vector.shape[0])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(gradient, ctx.group, ctx.header), None, None


def composed_gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    need: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients of x, weight, bias and residual, by torch operations that can be differentiated again."""
    eps, name, parameter = ctx.options
    if name == "identity" and need[3]:
        residual = torch.zeros_like(x, requires_grad=True)  # not saved; its gradient does not depend on its values
    valid = x.new_ones(1, dtype=torch.bool) if valid is None else valid
    axes, shape = [0, *range(2, x.dim())], (1, -1, *(1,) * (x.dim() - 2))
    wide = torch.where(valid, x.to(torch.float64), 0)
    count = valid.expand_as(x).double().sum(axes)[:1]
    sums = _Sum.apply(torch.cat((count, wide.sum(axes))), ctx.group, ctx.header)
    mean = sums[1:] / sums[0]
    centred = torch.where(valid, wide - mean.view(shape), 0)
    var = _Sum.apply(centred.square().sum(axes), ctx.group, ctx.header) / sums[0]
    rest = None if residual is None else torch.where(valid, residual, 0)
    y = composition.batch_norm(wide, mean, var, weight, bias, rest, eps, Activation(name, parameter))
    y = torch.where(valid, y, 0).to(x.dtype)
    inputs = [tensor if needed else None for tensor, needed in zip((x, weight, bias, residual), need, strict=True)]
    wanted = [tensor for tensor in inputs if tensor is not None]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [None if tensor is None else next(gradients) for tensor in inputs]
