"""Training and evaluation with a mask, ghost batches or renormalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpu_bn import algorithm
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import autograd, composition


def batch_norm(call: Call, options: Options, groups: int) -> Tensor:
    """Compute a checked call that has a mask, ghost batches or renormalisation; ``call.valid`` is the user's mask."""
    x, valid, residual = call.x, call.valid, call.residual
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError("mask, virtual_batch_size and renorm do not work under torch.func or in forward mode")
    valid = None if valid is None else algorithm.valid_positions(valid, x.shape, 1)
    if options.training:
        if not torch.compiler.is_compiling() and autograd.tracing_state() is not None:
            raise NotImplementedError(
                "torch.jit.trace and torch.onnx cannot record training with mask, virtual_batch_size or renorm: call "
                "model.eval() first, or use torch.export"
            )
        return autograd.forward(Call(*call[:7], valid), options, groups)
    assert valid is not None
    valid = torch.empty_like(x[:, :1], dtype=torch.bool).copy_(valid)  # torch.where gives its result this memory format
    if torch.is_grad_enabled():  # masked elements, which may be NaN, must not enter the gradients of the parameters
        x = torch.where(valid, x, 0)
        residual = None if residual is None else torch.where(valid, residual, 0)
    clean = Call(x, call.weight, call.bias, residual, call.running_mean, call.running_var)
    if torch.compiler.is_compiling() or autograd.tracing_state() is not None:
        y = composition.evaluated(clean, options)
    else:
        y = autograd.forward(clean, options)
    return torch.where(valid, y, 0)
