"""Checks of a SyncBatchNorm's arguments on one process, before it sends anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_bn import algorithm
from gpu_bn.activations import ROWS, Activation
from gpu_bn.call import Call, Options
from gpu_bn.nn.checks import FLOATS, check_memory, tensors_by_name
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.running import updates
from gpu_bn.spec import MAX_RANK, MIN_RANK, check_mask


class Checked(NamedTuple):
    """A checked call; ``signature`` has the values of :data:`gpu_bn.nn.distributed.wire.FIELDS` from channels on."""

    call: Call
    momentum: Any
    options: tuple[float, str, float]
    signature: list[float]


def check(num_features: int | None, call: Call, options: Options) -> Checked | str:
    """Check a call; return it, or the text of an error. ``num_features`` is C, or ``None`` for that of the input."""
    if options.virtual_batch_size is not None or options.renorm is not None:
        return "a SyncBatchNorm over several processes has neither virtual_batch_size nor renorm"
    activation = Activation.of(options.activation)
    for name, value in tensors_by_name(call).items():
        if not (isinstance(value, Tensor) or (value is None and name != "input")):
            return f"{name} should be a Tensor, got {type(value).__name__}"
    x, eps, momentum = call.x, _number("eps", options.eps), options.momentum
    momentum = momentum if momentum is None or isinstance(momentum, Tensor) else _number("momentum", momentum)
    channels = x.shape[1:2].numel() if num_features is None else num_features
    if text := _reason_against(call, eps, channels):
        return text
    if not torch.compiler.is_compiling():
        call = call._replace(running_mean=None, running_var=None, counter=None) if updates.off else call
        check_memory(call)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:4])
    presence = (call.residual, call.valid, call.weight, call.bias, call.running_mean, call.counter)
    signature = [
        float(channels),
        float(wire.DTYPES.index(x.dtype)),
        float(list(ROWS).index(activation.name)),
        float(activation.parameter),
        eps,
        wire.NONE if momentum is None else momentum if isinstance(momentum, float) else wire.UNKNOWN,
        *[float(tensor is not None) for tensor in presence],
        float(differentiated) + float(differentiated and x.requires_grad),
    ]
    valid = None if call.valid is None else algorithm.valid_positions(call.valid, x.shape, 1)
    return Checked(Call(*call[:7], valid), momentum, (eps, activation.name, float(activation.parameter)), signature)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} should be a number, got {value!r}") from None


def _reason_against(call: Call, eps: float, channels: int) -> str:
    """Return the text of an error if the arguments do not fit, else ""."""
    x, weight, bias, residual, mean, var, *_ = call
    if not MIN_RANK <= x.dim() <= MAX_RANK:
        return f"expected at least 2D input, up to 5D (got {x.dim()}D input)"
    if x.shape[1] != channels:
        return f"expected input with as many channels as the layer has (got {x.shape[1]})"
    if x.dtype not in FLOATS:
        return "input should be float16, bfloat16, float32 or float64"
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        return "residual should have the input's shape, dtype and device"
    if call.valid is not None and not _mask_fits(call.valid, x):
        return "mask should be bool or uint8, broadcast to the input's shape with one channel, and be on its device"
    vectors = [vector for vector in (weight, bias, mean, var) if vector is not None]
    alike = all(v.shape == (channels,) and v.dtype in FLOATS and v.device == x.device for v in vectors)
    if not alike or (mean is None) != (var is None):
        return (
            "weight, bias, running_mean and running_var should have a floating-point number for each channel, on the "
            "input's device, and running statistics come in a pair"
        )
    if not 0.0 < eps < float("inf"):
        return f"batch_norm eps must be positive during training, but got {eps}"
    return "" if channels else "SyncBatchNorm number of input channels should be non-zero"


def _mask_fits(mask: Tensor, x: Tensor) -> bool:
    try:
        check_mask(mask, x.shape, 1)
    except (TypeError, ValueError):
        return False
    return mask.device == x.device
