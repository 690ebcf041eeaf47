"""Checks of a call of torch tensors: a fast predicate for usual calls, and a slow check that says what is wrong."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import is_tensor_like

from gpu_bn import aliasing, spec
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import library
from gpu_bn.nn.operators.autograd import PLAIN, is_plain, watched
from gpu_bn.nn.running import updates
from gpu_bn.spec import MAX_RANK, MIN_RANK, VECTORS

TENSORS = ("input", *VECTORS, "residual", "num_batches_tracked", "mask")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_ordinary(call: Call, options: Options) -> bool:
    """Tell whether :func:`check` allows a call, all tensors are plain, and nobody watches or transforms it.

    It looks at everything in every call and remembers nothing. Where it is not sure it says no.
    """
    x, weight, bias, residual, mean, var, counter, _, _ = call
    training, momentum, eps, *_ = options
    if watched() or forward_ad._current_level >= 0 or not is_plain(x):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if not (
        MIN_RANK <= len(shape) <= MAX_RANK
        and dtype in FLOATS
        and x.layout is torch.strided
        and type(eps) is float
        and 0.0 < eps < inf
        and (momentum is None or (type(momentum) is float and -inf < momentum < inf))
    ):
        return False
    channels = shape[1:2]
    for vector in (mean, var, weight, bias):
        if vector is not None and (
            type(vector) not in PLAIN
            or vector.shape != channels
            or vector.dtype not in FLOATS
            or vector.device != device
            or vector.layout is not torch.strided
            or vector.is_neg()
        ):
            return False
    if mean is None or var is None:
        if not training or mean is not var:
            return False
    elif (torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)) or (
        training and mean.data_ptr() == var.data_ptr()
    ):
        return False
    if training and (
        updates.off
        or x.numel() == channels[0]
        or not (counter is None or (is_plain(counter) and not counter.is_inference()))
        or (mean is not None and var is not None and (mean.is_inference() or var.is_inference()))
    ):
        return False
    return residual is None or (
        is_plain(residual)
        and residual.layout is torch.strided
        and residual.shape == shape
        and residual.dtype is dtype
        and residual.device == device
    )


def check(call: Call, options: Options) -> None:
    """Raise what torch raises for arguments that do not fit."""
    _check_numbers(call.x, options)
    unknown = _unknown_numbers(options)
    if not (call.x.dtype in FLOATS and call.x.layout is torch.strided):
        unknown.insert(0, f"input of {call.x.dtype} and layout {call.x.layout}")
    unknown += _check_vectors(call, options.training)
    if unknown:
        momentum = 0.0 if options.momentum is None else options.momentum
        mean, var = (None if one is None else one.clone() for one in (call.running_mean, call.running_var))
        tensors = (call.x, mean, var, call.weight, call.bias)
        F.batch_norm(*tensors, options.training, momentum, options.eps)  # raises torch's error, if it finds one
        raise TypeError(
            f"gpu_bn.nn expects arguments of {', '.join(map(str, FLOATS))} on one device, got {', '.join(unknown)}"
        )
    for name, vector in (("running_mean", call.running_mean), ("running_var", call.running_var)):
        if vector is not None and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
    if call.residual is not None:
        _check_residual(call.x, call.residual)


def _check_numbers(x: Tensor, options: Options) -> None:
    """Check the rank and size of the input, and the values of ``momentum`` and ``eps``."""
    training, momentum, eps = options[:3]
    if not MIN_RANK <= x.dim() <= MAX_RANK:
        raise ValueError(f"expected {MIN_RANK}D to {MAX_RANK}D input (got {x.dim()}D input)")
    if training and x.numel() == x.shape[1] > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    check_finite(momentum, eps)


def check_finite(momentum: Any, eps: Any) -> None:
    """Check that numbers are finite, so far as they are known: a tensor's may be unread."""
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, float) and not -inf < number < inf:  # isfinite cannot be compiled
            raise ValueError(f"batch_norm {name} must be finite, but got {number}")


def _unknown_numbers(options: Options) -> list[str]:
    """List the numbers that torch's function does not take for numbers."""
    unknown = []
    for name, number in (("momentum", options.momentum), ("eps", options.eps)):
        known = isinstance(number, (float, int)) or (number is None and name == "momentum")
        if isinstance(number, Tensor):
            known = number.dim() == 0 and not number.requires_grad and not number.is_complex()
        if not known:
            unknown.append(f"{name} of type {type(number).__name__}")
    return unknown


def _check_vectors(call: Call, training: bool) -> list[str]:
    """Check what has a value per channel; list those of other kinds, whose errors are torch's own."""
    unknown, channels = [], call.x.shape[1]
    mean, var = call.running_mean, call.running_var
    for name, vector in zip(VECTORS, (mean, var, call.weight, call.bias), strict=True):
        if vector is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
        if vector.dim() != 1:
            raise RuntimeError(f"TensorAccessor expected 1 dims but tensor has {vector.dim()}")
        if vector.dtype not in FLOATS or vector.device != call.x.device or vector.layout is not torch.strided:
            unknown.append(f"{name} of {vector.dtype} and layout {vector.layout} on {vector.device}")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training and mean is not None and var is not None and _share(mean, var):
        raise ValueError("running_mean and running_var must be two tensors: a call in training writes to both")
    return unknown


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(f"residual should have the input's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual should have the input's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise RuntimeError(f"residual should be on the input's device {x.device}, got {residual.device}")
    spec.check_strided("residual", residual)


def _share(a: Tensor, b: Tensor) -> bool:
    """Tell whether two vectors start at one place in memory, as far as this can be seen."""
    if a is b or torch.compiler.is_compiling() or not (_shows_memory(a) and _shows_memory(b)):
        return a is b
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def check_extensions(call: Call, options: Options) -> int:
    """Check what torch's function does not have, and return the number of ghost batches."""
    input, mask, training, renorm = call.x, call.valid, options.training, options.renorm
    virtual_batch_size = options.virtual_batch_size
    shape = input.shape
    groups = 1 if virtual_batch_size is None else spec.check_groups(shape, 1, virtual_batch_size, training)
    if training and input.numel() == groups * shape[1] > 0:
        size = torch.Size((shape[0] // groups, *shape[1:]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask should be a Tensor, got {type(mask).__name__}")
        spec.check_mask(mask, shape, 1)
        if mask.device != input.device:
            raise RuntimeError(f"mask should be on the input's device {input.device}, got {mask.device}")
        spec.check_strided("mask", mask)
    if renorm is not None:
        spec.check_renorm(renorm, training and call.running_mean is not None, groups)
    return groups


def check_tensors(call: Call) -> None:
    """Raise what torch raises for an argument that is no tensor, nor stands for one; only the input must be given."""
    for name, value in named(call).items():
        fits = isinstance(value, Tensor) or (value is None and name != "input") or is_tensor_like(value)
        if not fits and name != "mask":  # torch has no mask
            kind = type(value)
            got = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {got}")


def check_memory(call: Call) -> None:
    """Check that what a call in training writes shares no memory with its other arguments, and may be written."""
    read = {name: one for name, one in named(call).items() if _shows_memory(one)}
    aliasing.check_written({name: read.pop(name) for name in library.TRACKED if name in read}, read)
    for written in (call.running_mean, call.running_var, call.counter):
        if written is not None and written.is_inference():
            written.add_(0)  # adds 0; outside inference mode torch then raises its error


def named(call: Call) -> dict[str, Any]:
    """Return the tensors of a call by the names that :func:`gpu_bn.nn.batch_norm` has for them."""
    x, weight, bias, residual, running_mean, running_var, counter, mask, _ = call
    return dict(zip(TENSORS, (x, running_mean, running_var, weight, bias, residual, counter, mask), strict=True))


def plain_number(value: Any) -> Any:
    """Return a number of NumPy's as Python's; in compiled code, where it is an array, as a tensor."""
    if torch.compiler.is_compiling():
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    return value.item() if isinstance(value, np.generic) else value


def _shows_memory(one: Any) -> bool:
    """Tell whether a tensor lies in memory that may be looked at: not one that ``torch.func`` wraps."""
    return one is not None and is_plain(one) and not library.is_wrapped(one)
