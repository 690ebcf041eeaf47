"""What batch normalisation computes, and the checks every call passes before anything is computed or changed.

For each channel, over the ``n`` positions of the batch and of all other axes (Ioffe & Szegedy 2015, Alg. 1)::

    mean = sum(x) / n                 var = sum((x - mean)**2) / n          (biased)
    rstd = 1 / sqrt(var + eps)        xhat = (x - mean) * rstd
    z = weight * xhat + bias + residual                                     (absent parts drop out)
    y = activation(z)

In training, ``mean`` and ``var`` are the batch's, and the running statistics move towards them:
``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance ``var * n / (n - 1)``.
Otherwise they are the running statistics (Alg. 2). With ``g = dz``, the gradients are::

    dbias = sum(g)        dweight = sum(g * xhat)        dresidual = g
    dx = weight * rstd * (g - dbias / n - xhat * dweight / n)               (batch statistics)
    dx = weight * rstd * g                                                  (running statistics)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

from gpu_bn.activations import Activation

Array = Any
"""An array of whichever library serves the call; :mod:`gpu_bn.dispatch` knows which."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
MIN_RANK, MAX_RANK = 2, 5


@dataclass(frozen=True, slots=True)
class BatchNormSpec:
    """The options of one call, checked.

    ``momentum`` is a number, or a 0-d array that holds it, so that it need not be read from a GPU.
    ``batch_stats`` tells whether ``mean`` and ``var`` come from the batch (training, or evaluation without
    running statistics); ``axis`` is the channel axis, counted from 0.
    """

    axis: int
    batch_stats: bool
    momentum: Any
    eps: float
    activation: Activation
    groups: int = 1


def check_forward(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float | Array,
    eps: float,
    residual: Array | None,
    activation: Activation | str | None,
    channel_axis: int,
    out: Array | None,
) -> BatchNormSpec:
    """Check a forward call and return its options.

    Raises:
        TypeError: a dtype that is not one of ``FLOAT_DTYPES`` or not the one required.
        ValueError: a shape, a length or an option that does not fit.
    """
    check_float("input", x)
    axis = check_axis(x.shape, channel_axis)
    check_options(training, momentum, eps)
    channels = x.shape[axis]
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None:
            check_vector(name, vector, channels)
    check_running(running_mean, running_var, training)
    if training and math.prod(x.shape) == channels > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    for name, like in (("residual", residual), ("out", out)):
        if like is not None:
            check_like(name, like, x)
    if out is not None:
        check_writeable("out", out)
    return BatchNormSpec(axis, training, _momentum(momentum), float(eps), Activation.of(activation))


def check_options(training: bool, momentum: float | Array, eps: float) -> None:
    """Check ``momentum``, a real number or 0-d array, and ``eps``, positive in training and never negative."""
    if not isinstance(momentum, Real) and getattr(momentum, "shape", None) != ():
        raise TypeError(f"momentum should be a number, got {type(momentum).__name__}")
    if not isinstance(eps, Real):
        raise TypeError(f"eps should be a number, got {type(eps).__name__}")
    if training and not eps > 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def _momentum(momentum: float | Array) -> float | Array:
    return float(momentum) if isinstance(momentum, Real) else momentum


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
    """Running statistics come as a pair; evaluation needs them and training writes them."""
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
    """Check a per-channel vector: float dtype, one axis, one element a channel."""
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


def check_writeable(name: str, array: Array) -> None:
    """Check that an array can be written to (only NumPy's can be read-only)."""
    flags = getattr(array, "flags", None)
    if not getattr(flags, "writeable", True):
        raise ValueError(f"{name} is written to, but the array given is read-only")


def dtype_name(array: Array) -> str:
    """The dtype's bare name in any array library (``float32``, not ``torch.float32``)."""
    return _dtype_name(array.dtype)


@cache
def _dtype_name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
