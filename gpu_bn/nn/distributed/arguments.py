"""Check the arguments of a SyncBatchNorm's call on one process, before it sends anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_bn import algorithm, aliasing
from gpu_bn.activations import IDENTITY, ROWS, Activation
from gpu_bn.nn.checks import FLOATS
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.running import updates
from gpu_bn.spec import MAX_RANK, MIN_RANK, check_mask

NAMES = ("input", "residual", "mask", "running_mean", "running_var", "weight", "bias", "num_batches_tracked")


class Arguments(NamedTuple):
    """The arguments of a call as they were given.

    Attributes:
        num_features: C, or ``None`` where the input tells.
        tensors: in the order of :data:`NAMES`.
        momentum, eps, activation: as of :func:`gpu_bn.nn.sync_batch_norm`.
        refusal: why the layer cannot make the call, if it cannot.
    """

    num_features: int | None
    tensors: tuple[Any, ...]
    momentum: Any
    eps: Any
    activation: Activation | str | None
    refusal: str = ""


class Checked(NamedTuple):
    """The checked arguments of a call."""

    inputs: tuple[Tensor | None, ...]
    valid: Tensor | None
    tracked: tuple[Tensor | None, ...]
    momentum: Any
    options: tuple[float, str, float]
    signature: list[float]


def check(arguments: Arguments) -> Checked | str:
    """Return the checked arguments, or why the call cannot be made."""
    num_features, given, momentum, eps, activation, refusal = arguments
    if refusal:
        return refusal
    activation = IDENTITY if activation is None else Activation.of(activation)
    for name, value in zip(NAMES, given, strict=True):
        if not (isinstance(value, Tensor) or (value is None and name != "input")):
            return f"{name} should be a Tensor, got {type(value).__name__}"
    input, residual, mask, running_mean, running_var, weight, bias, num_batches_tracked = given
    eps = _number("eps", eps)
    momentum = momentum if momentum is None or isinstance(momentum, Tensor) else _number("momentum", momentum)
    channels = input.shape[1:2].numel() if num_features is None else num_features
    vectors = (running_mean, running_var, weight, bias)
    if text := _mistake(input, vectors, residual, mask, eps, channels):
        return text
    if not torch.compiler.is_compiling():
        if updates.off:
            running_mean = running_var = num_batches_tracked = None
        tensors = dict(zip(NAMES, given, strict=True))
        written = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked}
        aliasing.check_written(written, {name: tensors[name] for name in tensors if name not in written})
    inputs = (input, weight, bias, residual)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    gradient = float(differentiated) + float(differentiated and input.requires_grad)
    presence = (residual, mask, weight, bias, running_mean, num_batches_tracked)
    signature = [
        float(channels),
        float(wire.DTYPES.index(input.dtype)),
        float(list(ROWS).index(activation.name)),
        float(activation.parameter),
        eps,
        wire.NONE if momentum is None else momentum if isinstance(momentum, float) else wire.UNKNOWN,
        *[float(tensor is not None) for tensor in presence],
        gradient,
    ]
    valid = None if mask is None else algorithm.positions(mask, input.shape, 1)
    tracked = (running_mean, running_var, num_batches_tracked)
    options = (eps, activation.name, float(activation.parameter))
    return Checked(inputs, valid, tracked, momentum, options, signature)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} should be a number, got {value!r}") from None


def _mistake(
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    channels: int,
) -> str:
    """Say why the arguments do not fit; nothing if they do."""
    if not MIN_RANK <= x.dim() <= MAX_RANK:
        return f"expected at least 2D input, up to 5D (got {x.dim()}D input)"
    if x.shape[1] != channels:
        return f"expected input with as many channels as the layer has (got {x.shape[1]})"
    if x.dtype not in FLOATS:
        return "input should be float16, bfloat16, float32 or float64"
    alike = residual is None or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    if not alike:
        return "residual should have the input's shape, dtype and device"
    if mask is not None and not _mask_fits(mask, x):
        return "mask should be bool or uint8, broadcast to the input's shape with one channel, and be on its device"
    if not _vectors_fit(vectors, x, channels):
        return (
            "weight, bias, running_mean and running_var should have a floating-point number for each channel, on the "
            "input's device, and running statistics come in a pair"
        )
    if not 0.0 < eps < float("inf"):
        return f"batch_norm eps must be positive during training, but got {eps}"
    return "" if channels else "SyncBatchNorm number of input channels should be non-zero"


def _vectors_fit(vectors: tuple[Tensor | None, ...], x: Tensor, channels: int) -> bool:
    running_mean, running_var, *_ = vectors
    return (running_mean is None) == (running_var is None) and all(
        vector.shape == (channels,) and vector.dtype in FLOATS and vector.device == x.device
        for vector in vectors
        if vector is not None
    )


def _mask_fits(mask: Tensor, x: Tensor) -> bool:
    try:
        check_mask(mask, x.shape, 1)
    except (TypeError, ValueError):
        return False
    return mask.device == x.device
