"""Checks of a call with torch tensors: a fast predicate for usual calls, and a slow check that says what is wrong."""

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
from gpu_bn.nn.operators.autograd import PLAIN, is_intercepted, is_plain
from gpu_bn.nn.running import updates
from gpu_bn.spec import MAX_RANK, MIN_RANK, VECTORS

TENSORS = ("input", *VECTORS, "residual", "num_batches_tracked", "mask")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_ordinary(call: Call, options: Options) -> bool:
    """Tell whether :func:`check` accepts a call, all tensors are plain, and nothing traces or transforms the call.

    Nothing is cached. It returns False in doubt.
    """
    x, weight, bias, residual, mean, var, counter, _, _ = call
    training, momentum, eps, *_ = options
    if is_intercepted() or forward_ad._current_level >= 0 or not is_plain(x):
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
    """Raise an error if arguments do not fit: torch's error, if torch raises one."""
    _check_numbers(call.x, options)
    unsupported = _unsupported_numbers(options)
    if not (call.x.dtype in FLOATS and call.x.layout is torch.strided):
        unsupported.insert(0, f"input of {call.x.dtype} and layout {call.x.layout}")
    unsupported += _check_vectors(call, options.training)
    if unsupported:
        momentum = 0.0 if options.momentum is None else options.momentum
        mean, var = (None if vector is None else vector.clone() for vector in (call.running_mean, call.running_var))
        tensors = (call.x, mean, var, call.weight, call.bias)
        F.batch_norm(*tensors, options.training, momentum, options.eps)  # raises torch's error, if there is one
        raise TypeError(
            f"gpu_bn.nn expects arguments of {', '.join(map(str, FLOATS))} on one device, got {', '.join(unsupported)}"
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
    """Check that ``momentum`` and ``eps`` are finite. A tensor is not checked, for it may not be read."""
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, float) and not -inf < number < inf:  # torch.compile does not support isfinite
            raise ValueError(f"batch_norm {name} must be finite, but got {number}")


def _unsupported_numbers(options: Options) -> list[str]:
    """Describe ``momentum`` and ``eps`` where they have types that torch's function does not accept."""
    unsupported = []
    for name, number in (("momentum", options.momentum), ("eps", options.eps)):
        supported = isinstance(number, (float, int)) or (number is None and name == "momentum")
        if isinstance(number, Tensor):
            supported = number.dim() == 0 and not number.requires_grad and not number.is_complex()
        if not supported:
            unsupported.append(f"{name} of type {type(number).__name__}")
    return unsupported


def _check_vectors(call: Call, training: bool) -> list[str]:
    """Check the vectors with a value per channel; describe those of a wrong dtype, device or layout."""
    unsupported, channels = [], call.x.shape[1]
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
            unsupported.append(f"{name} of {vector.dtype} and layout {vector.layout} on {vector.device}")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training and mean is not None and var is not None and _share_memory(mean, var):
        raise ValueError("running_mean and running_var must be two tensors: a call in training writes to both")
    return unsupported


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(f"residual should have the input's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual should have the input's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise RuntimeError(f"residual should be on the input's device {x.device}, got {residual.device}")
    spec.check_strided("residual", residual)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two vectors are one object or, as far as addresses can be read, start at the same address."""
    if a is b or torch.compiler.is_compiling() or not (_has_address(a) and _has_address(b)):
        return a is b
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def check_extensions(call: Call, options: Options) -> int:
    """Check the mask, the ghost batches and the renormalisation of a call, and return the number of ghost batches."""
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
    """Raise torch's error for an argument, except the mask, that is no tensor; all but the input may be ``None``."""
    for name, value in tensors_by_name(call).items():
        fits = isinstance(value, Tensor) or (value is None and name != "input") or is_tensor_like(value)
        if not fits and name != "mask":
            cls = type(value)
            got = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
            raise TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {got}")


def check_memory(call: Call) -> None:
    """Check that the tensors that a call in training writes are writeable and share no memory with the others."""
    read = {name: tensor for name, tensor in tensors_by_name(call).items() if _has_address(tensor)}
    aliasing.check_written({name: read.pop(name) for name in library.TRACKED if name in read}, read)
    check_inference((call.running_mean, call.running_var, call.counter))


def check_inference(written: tuple[Tensor | None, ...]) -> None:
    """Raise torch's error if a tensor that is to be written is an inference tensor, outside inference mode."""
    for tensor in written:
        if tensor is not None and tensor.is_inference():
            tensor.add_(0)  # changes nothing; torch raises the error


def tensors_by_name(call: Call) -> dict[str, Any]:
    """Return the tensors of a call, or ``None``, by the names of :func:`gpu_bn.nn.batch_norm`'s arguments."""
    x, weight, bias, residual, running_mean, running_var, counter, mask, _ = call
    return dict(zip(TENSORS, (x, running_mean, running_var, weight, bias, residual, counter, mask), strict=True))


def plain_number(value: Any) -> Any:
    """Convert a NumPy number to a Python number; in compiled code, where it is an array, to a tensor."""
    if torch.compiler.is_compiling():
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    return value.item() if isinstance(value, np.generic) else value


def _has_address(tensor: Any) -> bool:
    """Tell whether a tensor's address can be read; false for ``None`` and for tensors that ``torch.func`` wraps."""
    return tensor is not None and is_plain(tensor) and not library.is_wrapped(tensor)
