"""Folding: batch normalisation with fixed statistics is affine, so the layer before it can absorb it."""

from __future__ import annotations

import math
from typing import Any, Protocol

from gpu_bn import registry, spec
from gpu_bn.backends.protocol import Backend, Moments
from gpu_bn.call import Call, Options

Array = Any


class Norm(Protocol):
    """The attributes of a layer that folding reads; :class:`gpu_bn.BatchNorm` and torch's layers have them."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    eps: float


def batch_moments(
    x: Array, eps: float = 1e-5, *, channel_axis: int = 1, backend: Backend | str | None = None
) -> Moments:
    """Return the count, and mean and biased variance of each channel, (C,) in the backend's accumulation dtype.

    Raises:
        TypeError, ValueError: for the reasons given at :func:`gpu_bn.batch_norm` in training; also for an empty batch.
    """
    engine = registry.select(backend, input=x)
    options = spec.check_forward(Call(x), Options(True, eps=eps, channel_axis=channel_axis))
    if math.prod(x.shape) == 0:
        raise ValueError(f"expected more than 1 value per channel, got input size {tuple(x.shape)}")
    return engine.stats(x, options.axis)


def identity_affine(
    x: Array, eps: float = 1e-5, *, channel_axis: int = 1, backend: Backend | str | None = None
) -> tuple[Array, Array]:
    """Compute the weight and bias with which batch normalisation of ``x`` is the identity.

    They are ``sqrt(var + eps)`` and ``mean``. So a layer with a learned weight and bias can represent the identity.

    Args:
        x: 2-D to 5-D, C channels along ``channel_axis``, more than one value per channel; float16, bfloat16, float32
            or float64.
        eps: the value that the normalisation will add to the variance.
        channel_axis: the axis of the channels.
        backend: a backend's name, or ``None`` for the one that serves ``x``.

    Returns:
        ``(weight, bias)``, (C,) each, in float64 for float64 input and float32 for all others.

    Raises:
        TypeError: for the reasons given at :func:`gpu_bn.batch_norm`, in training.
        ValueError: for the reasons given at :func:`gpu_bn.batch_norm`, in training; also for an empty batch.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> weight, bias = gpu_bn.identity_affine(x)
        >>> gpu_bn.batch_norm(x, None, None, weight, bias, training=True).round(9)
        array([[ 1., 10.],
               [ 3., 30.]])

    Source: Ioffe & Szegedy 2015, section 3.
    """
    moments = batch_moments(x, eps, channel_axis=channel_axis, backend=backend)
    engine = registry.select(backend, input=x)
    dtype = "float64" if spec.dtype_name(x) == "float64" else "float32"
    with spec.on_device_of(x):
        return engine.cast((moments.var + eps) ** 0.5, dtype), engine.cast(moments.mean, dtype)


def fold(
    weight: Array, bias: Array | None, norm: Norm, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Fold a normalisation with its running statistics into the convolution or linear layer before it.

    ``norm(conv(x, weight, bias))`` in evaluation mode equals ``conv(x, *fold(weight, bias, norm))``. An activation of
    ``norm`` is not included and must still be applied.

    Args:
        weight: (out, in / groups, ...) of a convolution or (out, in) of a linear layer; of a transposed convolution
            (in, out / groups, ...). Any array library: NumPy, CuPy, torch.
        bias: (out,), or ``None``.
        norm: a layer with running statistics over the ``out`` channels.
        transposed: whether ``weight`` belongs to a transposed convolution.
        groups: the number of groups of a transposed convolution.

    Returns:
        ``(weight, bias)``: one like ``weight``, the other (out,) in its dtype; computed in float64, then rounded.

    Raises:
        TypeError: ``norm`` holds arrays of another library than ``weight``, or ``weight`` is not floating-point.
        ValueError: ``norm`` has no running statistics, or another number of channels than ``weight`` has outputs;
            ``bias`` is not (out,), or ``weight`` has fewer than two axes.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> norm = gpu_bn.BatchNorm(2).eval()
        >>> norm.running_mean[:], norm.running_var[:] = [1.0, 2.0], [4.0, 9.0]
        >>> weight, bias = gpu_bn.fold(np.eye(2, dtype=np.float32), None, norm)
        >>> x = np.array([[3.0, 5.0]], np.float32)
        >>> np.testing.assert_allclose(x @ weight.T + bias, norm(x), rtol=1e-6)

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
    with spec.on_device_of(weight):
        scale, shift = _scale_and_shift(norm, weight)
        factors = _broadcast(scale, weight, bias, transposed, groups)
        folded = _to_float64(weight) * factors
        offset = shift if bias is None else _to_float64(bias) * scale + shift
        return _cast_like(folded, weight), _cast_like(offset, weight)


def unfold(
    weight: Array, bias: Array | None, norm: Norm, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Undo :func:`fold`: compute the weight and bias of the layer before ``norm`` was folded into it.

    Args:
        weight: the folded weight, in one of the shapes given at :func:`fold`.
        bias: the folded bias, (out,), or ``None`` for 0.
        norm: the layer that was folded.
        transposed: whether ``weight`` belongs to a transposed convolution.
        groups: the number of groups of a transposed convolution.

    Returns:
        ``(weight, bias)``: one like ``weight``, the other (out,) in its dtype. If :func:`fold` got no bias, it is 0 to
        rounding.

    Raises:
        TypeError: for the reasons given at :func:`fold`.
        ValueError: for the reasons given at :func:`fold`; also if ``norm.weight`` is 0 in a channel, for then the
            layer's weight is lost.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> norm = gpu_bn.BatchNorm(2).eval()
        >>> norm.running_mean[:], norm.running_var[:] = [1.0, 2.0], [4.0, 9.0]
        >>> before = np.eye(2, dtype=np.float32)
        >>> after, _ = gpu_bn.unfold(*gpu_bn.fold(before, None, norm), norm)
        >>> np.testing.assert_allclose(after, before, rtol=1e-6)
    """
    with spec.on_device_of(weight):
        scale, shift = _scale_and_shift(norm, weight)
        if bool((scale == 0).any()):
            raise ValueError("norm has channels of weight 0: folding them cannot be undone")
        factors = _broadcast(scale, weight, bias, transposed, groups)
        offset = -shift if bias is None else _to_float64(bias) - shift
        return _cast_like(_to_float64(weight) / factors, weight), _cast_like(offset / scale, weight)


def _scale_and_shift(norm: Norm, weight: Array) -> tuple[Array, Array]:
    """Return the float64 scale and shift, (C,) each, of ``norm(x) = x * scale + shift`` in evaluation."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"folding needs running statistics, but {norm!r} has none")
    libraries = [type(array).__module__.partition(".")[0] for array in (weight, norm.running_var)]
    spec.check_float("weight", weight)
    if libraries[0] != libraries[1]:
        raise TypeError(f"weight and norm should hold arrays of one library, got {' and '.join(libraries)}")
    scale = (_to_float64(norm.running_var) + norm.eps) ** -0.5
    if norm.weight is not None:
        scale = scale * _to_float64(norm.weight)
    shift = -_to_float64(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _to_float64(norm.bias)


def _broadcast(vector: Array, weight: Array, bias: Array | None, transposed: bool, groups: int) -> Array:
    """Reshape a vector over the outputs to broadcast against the weight; check the shapes of weight and bias."""
    if len(weight.shape) < 2:
        expected = "(out, in, ...), or (in, out, ...) if transposed"
        raise ValueError(f"weight should have shape {expected}, got {tuple(weight.shape)}")
    channels = vector.shape[0]
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if outputs != channels:
        raise ValueError(f"norm should have as many channels as the weight has outputs, {outputs}, got {channels}")
    if bias is not None:
        spec.check_vector("bias", bias, channels)
    kernel = (1,) * (len(weight.shape) - 2)
    if not transposed:
        return vector.reshape((channels, 1, *kernel))
    # Input i belongs to one group, whose outputs it feeds: for each input, take the row of its group.
    group_of_input = [i * groups // weight.shape[0] for i in range(weight.shape[0])]
    return vector.reshape((groups, -1))[group_of_input].reshape((weight.shape[0], weight.shape[1], *kernel))


def _to_float64(array: Array) -> Array:
    return array.astype("float64") if hasattr(array, "astype") else array.double()


def _cast_like(array: Array, like: Array) -> Array:
    return array.astype(like.dtype) if hasattr(array, "astype") else array.to(like.dtype)
