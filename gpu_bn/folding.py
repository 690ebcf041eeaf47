"""Batch normalisation with fixed statistics is affine: it can be the identity, and it can be folded away."""

from __future__ import annotations

import math
from typing import Any, Protocol

from gpu_bn import registry, spec
from gpu_bn.backends.protocol import Backend, Moments
from gpu_bn.call import Call, Options

Array = Any


class Norm(Protocol):
    """What folding reads of a layer: a :class:`gpu_bn.BatchNorm` has it, and so has torch's."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    eps: float


def batch_moments(
    x: Array, eps: float = 1e-5, *, channel_axis: int = 1, backend: Backend | str | None = None
) -> Moments:
    """Return count, mean and biased variance of a batch's channels, (C,) in the backend's accumulation dtype.

    Raises:
        TypeError, ValueError: as :func:`gpu_bn.batch_norm` in training; also for an empty batch.
    """
    engine = registry.select(backend, input=x)
    options = spec.check_forward(Call(x), Options(True, eps=eps, channel_axis=channel_axis))
    if math.prod(x.shape) == 0:
        raise ValueError(f"expected more than 1 value per channel, got input size {tuple(x.shape)}")
    return engine.stats(x, options.axis)


def identity_affine(
    x: Array, eps: float = 1e-5, *, channel_axis: int = 1, backend: Backend | str | None = None
) -> tuple[Array, Array]:
    """Compute the pair that makes batch normalisation of ``x`` the identity, ``sqrt(var + eps)`` and ``mean``.

    This is why the learned pair preserves a network's capacity.

    Args:
        x: 2-D to 5-D, C channels along ``channel_axis``, more than one value a channel; float16, bfloat16, float32 or
            float64.
        eps: what the normalisation will add to the variance.
        channel_axis: the axis of the channels.
        backend: as in :func:`gpu_bn.batch_norm`.

    Returns:
        ``(weight, bias)``, (C,) each, in float64 for float64 input and float32 for all others.

    Raises:
        TypeError: as :func:`gpu_bn.batch_norm` in training.
        ValueError: as :func:`gpu_bn.batch_norm` in training; also for an empty batch.

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
    ``norm`` is not part of it and remains to be applied.

    Args:
        weight: (out, in / groups, ...) of a convolution or (out, in) of a linear layer; of a transposed convolution
            (in, out / groups, ...). Any array library: NumPy, CuPy, torch.
        bias: (out,), or ``None``.
        norm: a layer with running statistics over the ``out`` channels.
        transposed: whether ``weight`` belongs to a transposed convolution.
        groups: of the transposed convolution.

    Returns:
        ``(weight, bias)``, like ``weight``, and (out,) in its dtype; computed in float64, then rounded.

    Raises:
        TypeError: ``norm`` holds arrays of another library than ``weight``.
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
        by_output = _by_output(scale, weight, bias, transposed, groups)
        folded = _wide(weight) * by_output
        offset = shift if bias is None else _wide(bias) * scale + shift
        return _like(folded, weight), _like(offset, weight)


def unfold(
    weight: Array, bias: Array | None, norm: Norm, *, transposed: bool = False, groups: int = 1
) -> tuple[Array, Array]:
    """Undo :func:`fold`: compute the weight and bias with which ``norm`` behind the layer gives the same outputs.

    Args:
        weight: as in :func:`fold`.
        bias: (out,), or ``None``; then it comes back as zeros to rounding where :func:`fold` was given ``None``.
        norm: as in :func:`fold`.
        transposed: as in :func:`fold`.
        groups: as in :func:`fold`.

    Returns:
        ``(weight, bias)``, as :func:`fold`.

    Raises:
        TypeError: as :func:`fold`.
        ValueError: as :func:`fold`; also if a channel's ``norm.weight`` is 0, which loses the layer.

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
        by_output = _by_output(scale, weight, bias, transposed, groups)
        offset = -shift if bias is None else _wide(bias) - shift
        return _like(_wide(weight) / by_output, weight), _like(offset / scale, weight)


def _scale_and_shift(norm: Norm, weight: Array) -> tuple[Array, Array]:
    """Return scale and shift of ``norm(x) = x * scale + shift`` in evaluation, (C,) each in float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"folding needs running statistics, but {norm!r} has none")
    libraries = [type(array).__module__.partition(".")[0] for array in (weight, norm.running_var)]
    spec.check_float("weight", weight)
    if libraries[0] != libraries[1]:
        raise TypeError(f"weight and norm should hold arrays of one library, got {' and '.join(libraries)}")
    scale = (_wide(norm.running_var) + norm.eps) ** -0.5
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    shift = -_wide(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _wide(norm.bias)


def _by_output(vector: Array, weight: Array, bias: Array | None, transposed: bool, groups: int) -> Array:
    """Shape a vector over the outputs to broadcast against the weight, and check that the bias is one, too."""
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
    # Input i of group g meets the outputs of group g: one row of the groups' table for each input.
    group_of_input = [i * groups // weight.shape[0] for i in range(weight.shape[0])]
    return vector.reshape((groups, -1))[group_of_input].reshape((weight.shape[0], weight.shape[1], *kernel))


def _wide(array: Array) -> Array:
    return array.astype("float64") if hasattr(array, "astype") else array.double()


def _like(array: Array, like: Array) -> Array:
    return array.astype(like.dtype) if hasattr(array, "astype") else array.to(like.dtype)
