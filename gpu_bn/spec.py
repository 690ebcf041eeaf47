"""The equations of batch normalisation, and the checks of a call before anything is computed or changed.

For each channel, over the ``n`` positions of the batch and of all other axes (Ioffe & Szegedy 2015, Alg. 1)::

    mean = sum(x) / n                 var = sum((x - mean)**2) / n          (biased)
    rstd = 1 / sqrt(var + eps)        xhat = (x - mean) * rstd
    z = weight * xhat + bias + residual                                     (without absent arguments)
    y = activation(z)

In training, ``mean`` and ``var`` are those of the batch, and the running statistics are updated:
``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance ``var * n / (n - 1)``.
Otherwise they are the running statistics (Alg. 2). With ``g = dz``, the gradients are::

    dbias = sum(g)        dweight = sum(g * xhat)        dresidual = g
    dx = weight * rstd * (g - dbias / n - xhat * dweight / n)               (batch statistics)
    dx = weight * rstd * g                                                  (running statistics)

A *mask* says which positions count: the others are left out of every sum and of ``n``, and ``y``, ``dx`` and
``dresidual`` are 0 there. *Ghost batches* (Hoffer et al. 2017, Alg. 1) are groups of samples that are normalised as if
each were a separate call. *Batch renormalisation* (Ioffe 2017) replaces ``xhat`` by ``xhat * r + d``, with::

    r = clip(sd_batch / sd_running, 1 / r_max, r_max)
    d = clip((mean_batch - mean_running) / sd_running, -d_max, d_max)

where ``sd = sqrt(var + eps)``, the running statistics are those before the update, and the gradient treats ``r`` and
``d`` as constants.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

from gpu_bn.activations import Activation
from gpu_bn.call import Call, Options

Array = Any
"""An array of any library that :mod:`gpu_bn.registry` knows."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
MASK_DTYPES = ("bool", "uint8")
VECTORS = ("running_mean", "running_var", "weight", "bias")
MIN_RANK, MAX_RANK = 2, 5


@dataclass(frozen=True, slots=True)
class BatchNormSpec:
    """The checked options of one call.

    Attributes:
        axis: the channel axis, counted from 0.
        batch_stats: whether ``mean`` and ``var`` are those of the batch (training, or evaluation without running
            statistics).
        momentum: a number, or a 0-d array that holds it, so that it need not be read from a GPU.
        eps: added to the variance.
        activation: the activation that follows.
        groups: the number of ghost batches.
        renorm: ``(r_max, d_max)`` of batch renormalisation, or ``None``.
    """

    axis: int
    batch_stats: bool
    momentum: Any
    eps: float
    activation: Activation
    groups: int = 1
    renorm: tuple[float, float] | None = None


def check_forward(call: Call, options: Options) -> BatchNormSpec:
    """Check a forward call and return its options.

    Raises:
        TypeError: a dtype is not one of ``FLOAT_DTYPES``, or differs from that of the input where it must not.
        ValueError: a shape, a length or an option does not fit.
    """
    x, training = call.x, options.training
    check_float("input", x)
    axis = check_axis(x.shape, options.channel_axis)
    check_options(training, options.momentum, options.eps)
    channels = x.shape[axis]
    for name in VECTORS:
        vector = getattr(call, name)
        if vector is not None:
            check_vector(name, vector, channels)
    check_running(call.running_mean, call.running_var, training)
    size, renorm = options.virtual_batch_size, options.renorm
    groups = 1 if size is None else check_groups(x.shape, axis, size, training)
    if training and math.prod(x.shape) == groups * channels > 0:
        got = (x.shape[0] // groups, *x.shape[1:])
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {got}")
    if call.valid is not None:
        check_mask(call.valid, x.shape, axis)
    if renorm is not None:
        renorm = check_renorm(renorm, training and call.running_mean is not None, groups)
    for name in ("residual", "out"):
        array = getattr(call, name)
        if array is not None:
            check_like(name, array, x)
    if call.out is not None:
        check_writeable("out", call.out)
    return specify(options, axis, groups, renorm)


def specify(options: Options, axis: int, groups: int, renorm: tuple[float, float] | None) -> BatchNormSpec:
    """Return the options of a call whose arguments have been checked, except for the name of the activation."""
    momentum, training = options.momentum, bool(options.training)
    if type(momentum) is not float and isinstance(momentum, Real):
        momentum = float(momentum)
    activation = Activation.of(options.activation)
    return BatchNormSpec(axis, training, momentum, float(options.eps), activation, groups, renorm)


def check_mask(mask: Array, shape: tuple[int, ...], axis: int) -> None:
    """Check that a mask is bool or uint8 and broadcasts to ``shape`` with one channel, with or without that axis."""
    name = str(mask.dtype).rpartition(".")[2]
    if name not in MASK_DTYPES:
        raise TypeError(f"mask should be one of {', '.join(MASK_DTYPES)}, got {name}")
    wanted = (*shape[:axis], 1, *shape[axis + 1 :])
    got = tuple(mask.shape)
    full = got if len(got) == len(shape) else (*got[:axis], 1, *got[axis:])
    fits = len(full) == len(shape) and all(a in (b, 1) for a, b in zip(full, wanted, strict=True))
    if not fits:
        without = (*shape[:axis], *shape[axis + 1 :])
        raise ValueError(f"mask should broadcast to {wanted} or {without}, got {got}")


def check_groups(shape: tuple[int, ...], axis: int, virtual_batch_size: int, training: bool) -> int:
    """Check the size of ghost batches and return their number; 1 in evaluation."""
    size = virtual_batch_size
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"virtual_batch_size should be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"virtual_batch_size should be positive, got {size}")
    if axis == 0:
        raise ValueError("virtual_batch_size divides axis 0, which is the channel axis here")
    if training and shape[0] % size:
        raise ValueError(f"virtual_batch_size should divide the batch of {shape[0]}, got {size}")
    return max(shape[0] // size, 1) if training else 1


def check_renorm(renorm: tuple[float, float], tracked: bool, groups: int = 1) -> tuple[float, float]:
    """Check ``(r_max, d_max)``; ``tracked`` tells whether the call trains and has running statistics."""
    if not isinstance(renorm, tuple) or len(renorm) != 2 or not all(isinstance(limit, Real) for limit in renorm):
        raise TypeError(f"renorm should be two numbers (r_max, d_max), got {renorm!r}")
    r_max, d_max = map(_float, renorm)
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"renorm should have r_max >= 1 and d_max >= 0, got {renorm}")
    if not tracked:
        raise ValueError("renorm needs training and running statistics")
    if groups > 1:
        raise ValueError("renorm cannot be combined with virtual_batch_size: ghost batches have no statistics to share")
    return r_max, d_max


def check_options(training: bool, momentum: float | Array, eps: float) -> None:
    """Check ``momentum``, and that ``eps`` is finite and not negative, in training positive."""
    check_momentum(momentum)
    if not isinstance(eps, Real):
        raise TypeError(f"eps should be a number, got {type(eps).__name__}")
    if math.isinf(_float(eps)):
        raise ValueError(f"batch_norm eps must be finite, but got {eps}")
    if training and not eps > 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_momentum(momentum: float | Array) -> None:
    """Check that ``momentum`` is a finite number or a 0-d array."""
    if not isinstance(momentum, Real) and not _is_real_scalar(momentum):
        raise TypeError(f"momentum should be a number, got {type(momentum).__name__}")
    if isinstance(momentum, Real) and not math.isfinite(_float(momentum)):
        raise ValueError(f"momentum should be finite, got {momentum}")


def _float(number: Any) -> float:
    """Return a number as a float; infinity if it is too large for a float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _is_real_scalar(value: Any) -> bool:
    """Tell whether a value is a 0-d array of real numbers."""
    return getattr(value, "shape", None) == () and dtype_name(value).startswith(("float", "bfloat", "int", "uint"))


def check_axis(shape: tuple[int, ...], channel_axis: int) -> int:
    """Check the rank and return the channel axis counted from 0."""
    rank = len(shape)
    if not MIN_RANK <= rank <= MAX_RANK:
        raise ValueError(f"expected {MIN_RANK}D to {MAX_RANK}D input (got {rank}D input)")
    if not isinstance(channel_axis, int) or isinstance(channel_axis, bool):
        raise TypeError(f"channel_axis should be an int, got {type(channel_axis).__name__}")
    if not -rank <= channel_axis < rank:
        raise ValueError(f"channel_axis should be in [{-rank}, {rank}) for {rank}D input, got {channel_axis}")
    return channel_axis % rank


def check_running(running_mean: Array | None, running_var: Array | None, training: bool) -> None:
    """Check that both or neither running statistics are given: both in evaluation. Training needs to write them."""
    if not training:
        for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
            if vector is None:
                raise ValueError(f"{name} must be defined in evaluation mode")
    elif (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    elif running_mean is not None:
        check_writeable("running_mean", running_mean)
        check_writeable("running_var", running_var)


def check_float(name: str, array: Array) -> None:
    """Check that the dtype is one of ``FLOAT_DTYPES``."""
    if dtype_name(array) not in FLOAT_DTYPES:
        raise TypeError(f"{name} should be one of {', '.join(FLOAT_DTYPES)}, got {dtype_name(array)}")


def check_vector(name: str, vector: Array, channels: int) -> None:
    """Check that a per-channel vector has a float dtype and the shape (channels,)."""
    check_float(name, vector)
    if vector.ndim != 1:
        raise ValueError(f"{name} should have shape ({channels},), got {tuple(vector.shape)}")
    if vector.shape[0] != channels:
        raise ValueError(f"{name} should contain {channels} elements not {vector.shape[0]}")


def check_like(name: str, array: Array, x: Array) -> None:
    """Check that an array has the input's shape and dtype."""
    if tuple(array.shape) != tuple(x.shape):
        raise ValueError(f"{name} should have the input's shape {tuple(x.shape)}, got {tuple(array.shape)}")
    if dtype_name(array) != dtype_name(x):
        raise TypeError(f"{name} should have the input's dtype {dtype_name(x)}, got {dtype_name(array)}")


def check_overlap(name: str, same: bool, in_place: bool) -> None:
    """Raise for an ``out`` that overlaps an input, unless it is the ``same`` memory and the call is ``in_place``."""
    if not in_place:
        raise ValueError(f"out may not be the {name} or overlap it: the backward call reads it (batch_norm allows it)")
    if not same:
        raise ValueError(f"out should be the {name} itself or share no memory with it, but it overlaps")


def check_strided(name: str, tensor: Array) -> None:
    """Check that a torch tensor is strided, neither sparse nor in a layout of oneDNN."""
    if tensor.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name} should be a tensor of layout torch.strided, got {tensor.layout}")


def check_counter(counter: Array) -> None:
    """Check that a counter of batches is an array of numbers that can be written."""
    if not hasattr(counter, "dtype"):
        raise TypeError(f"num_batches_tracked should be an array, got {type(counter).__name__}")
    if not dtype_name(counter).startswith(("int", "uint", "float")):
        raise TypeError(f"num_batches_tracked should be an integer, got {dtype_name(counter)}")
    check_writeable("num_batches_tracked", counter)


def check_writeable(name: str, array: Array) -> None:
    """Check that an array can be written to (only NumPy arrays may be read-only)."""
    flags = getattr(array, "flags", None)
    if not getattr(flags, "writeable", True):
        raise ValueError(f"{name} is written to, but the array given is read-only")


def dtype_name(array: Array) -> str:
    """Return the name of the dtype without the library: ``float32``, not ``torch.float32``."""
    return _dtype_name(array.dtype)


@cache
def _dtype_name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which CuPy uses the device of an array; it does nothing for other libraries."""
    return array.device if is_cupy(array) else _NOWHERE


_NOWHERE = nullcontext()


def is_cupy(array: Any) -> bool:
    """Tell whether this is a CuPy array, without importing CuPy."""
    cupy: Any = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)
