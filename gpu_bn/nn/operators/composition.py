"""Batch normalisation composed of torch's differentiable operations.

It replaces our operators in second and higher derivatives, in compiled evaluation (where the compiler fuses it with
neighbouring operations), in exports, and under ``torch.func`` and forward-mode differentiation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_bn.activations import Activation
from gpu_bn.call import Call, Options
from gpu_bn.nn.fx.activations import activate
from gpu_bn.nn.running import write


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Normalise by ``mean`` and ``var``, or by the batch's statistics; compute in float32 or wider and round once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean is not None:
        dtype = torch.promote_types(dtype, mean.dtype)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    wide = x.to(dtype)
    if mean is None or var is None:
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    scale = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    z = (wide - mean.to(dtype).view(shape)) * scale.view(shape)
    if bias is not None:
        z = z + bias.to(dtype).view(shape)
    if residual is not None:
        z = z + residual.to(dtype)
    return activate(z, activation).to(x.dtype)


def masked_batch_norm(
    call: Call, eps: float, activation: Activation, groups: int, renorm: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Normalise each ghost batch by the statistics of its valid positions; ``renorm`` is (r, d) of renormalisation."""
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    dtype = torch.promote_types(x.dtype, torch.float32)
    valid = x.new_ones((1,) * x.dim(), dtype=torch.bool) if call.valid is None else call.valid
    counted = valid.expand(x.shape[0], 1, *x.shape[2:]).unflatten(0, (groups, -1))
    wide = torch.where(valid, x.to(dtype), 0).unflatten(0, (groups, -1))
    axes = [1, *range(3, wide.dim())]
    count = counted.sum(axes, keepdim=True).clamp(min=1)
    mean = wide.sum(axes, keepdim=True) / count
    centred = (wide - mean) * counted
    xhat = (centred * (centred.square().sum(axes, keepdim=True) / count + eps).rsqrt()).flatten(0, 1)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if renorm is not None:
        r, d = (vector.to(dtype).view(shape) for vector in renorm)
        xhat = xhat * r + d
    z = xhat if weight is None else xhat * weight.to(dtype).view(shape)
    if bias is not None:
        z = z + bias.to(dtype).view(shape)
    if residual is not None:
        z = z + torch.where(valid, residual.to(dtype), 0)
    return torch.where(valid, activate(z, activation), 0).to(x.dtype)


def evaluated(call: Call, options: Options) -> Tensor:
    """Compute a call in evaluation, by the running statistics."""
    tensors = (call.x, call.running_mean, call.running_var, call.weight, call.bias, call.residual)
    return batch_norm(*tensors, options.eps, options.activation)


def wide_batch_norm(call: Call, options: Options) -> Tensor:
    """Compute a call under ``torch.func`` or forward-mode differentiation: in float64, rounded once."""
    x = call.x
    if options.training:
        wide = x.double()
        with torch.no_grad():
            _move_running(wide.detach(), call, _momentum(options.momentum, call.counter), options.eps)
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    else:
        assert call.running_mean is not None
        assert call.running_var is not None
        mean, var = call.running_mean.double(), call.running_var.double()
    return batch_norm(x, mean, var, call.weight, call.bias, call.residual, options.eps, options.activation)


def _move_running(wide: Tensor, call: Call, momentum: float, eps: float) -> None:
    """Update the running statistics by torch's function, which raises if a transform does not allow it."""
    running = (call.running_mean, call.running_var)
    mean, var = (None if vector is None else vector.to(torch.float64, copy=True) for vector in running)
    F.batch_norm(wide, mean, var, None, None, True, momentum, eps)
    counted = None if call.counter is None else call.counter.clone().add_(1)
    pairs = zip((call.counter, *running), (counted, mean, var), strict=True)
    write([(old, new) for old, new in pairs if old is not None and new is not None])


def _momentum(momentum: float | None, num_batches_tracked: Tensor | None) -> float:
    """Return the weight of a batch: the momentum, or for ``None`` 1 / n for the n-th batch and 0 without a counter."""
    if momentum is not None:
        return momentum
    return 0.0 if num_batches_tracked is None else 1.0 / (float(num_batches_tracked) + 1)


def torch_batch_norm(call: Call, options: Options) -> Tensor:
    """Compute a call by ``torch.nn.functional.batch_norm``, which exporters support."""
    momentum = _momentum(options.momentum, call.counter)
    tensors = (call.x, call.running_mean, call.running_var, call.weight, call.bias)
    z = F.batch_norm(*tensors, options.training, momentum, options.eps)
    if call.counter is not None:
        call.counter.add_(1)
    if call.residual is not None:
        z = z + call.residual
    return activate(z, options.activation)
