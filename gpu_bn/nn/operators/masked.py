"""Training and evaluation with a mask, in ghost batches or with renormalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpu_bn import algorithm
from gpu_bn.activations import Activation
from gpu_bn.nn.operators import autograd, composition


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
    num_batches_tracked: Tensor | None,
    mask: Tensor | None,
    groups: int,
    renorm: tuple[float, float] | None,
) -> Tensor:
    """A checked call of :func:`gpu_bn.nn.functional.batch_norm` with any of the last three."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError("mask, virtual_batch_size and renorm do not work under torch.func or in forward mode")
    valid = None if mask is None else algorithm.positions(mask, input.shape, 1)
    options = (eps, activation.name, activation.parameter)
    if training:
        if not torch.compiler.is_compiling() and autograd._tracing() is not None:
            raise NotImplementedError(
                "torch.jit.trace and torch.onnx cannot record training with mask, virtual_batch_size or renorm: call "
                "model.eval() first, or use torch.export"
            )
        tensors = (input, weight, bias, residual, running_mean, running_var, num_batches_tracked)
        return autograd.call(*tensors, True, momentum, *options, valid, groups, renorm or ())
    assert valid is not None
    valid = torch.empty_like(input[:, :1], dtype=torch.bool).copy_(valid)  # torch.where takes the order of its axes
    if torch.is_grad_enabled():  # the sums of the parameters' gradients must not meet what is hidden
        input = torch.where(valid, input, 0)
        residual = None if residual is None else torch.where(valid, residual, 0)
    if torch.compiler.is_compiling() or autograd._tracing() is not None:
        y = composition.batch_norm(input, running_mean, running_var, weight, bias, residual, eps, activation)
    else:
        tensors = (input, weight, bias, residual, running_mean, running_var, None)
        y = autograd.call(*tensors, False, 0.0, *options)
    return torch.where(valid, y, 0)
