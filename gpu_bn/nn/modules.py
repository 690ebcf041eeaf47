"""``BatchNorm1d/2d/3d``: torch's layers, with an activation, a residual and a switch that freezes the statistics.

They are subclasses of the torch layers, with the same parameters, buffers, state_dict and errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from gpu_bn.activations import Activation
from gpu_bn.nn.activated import Activated
from gpu_bn.nn.fused import Fused, layer

torch.fx.wrap("layer")  # a tracer that enters a layer of this file also records one node


class _Sized(Fused):
    """A layer with a given number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | str | None = None,
        virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._drop_bias(bias)
        self._set_options(activation, virtual_batch_size, renorm)


class _Lazy(Fused):
    """A layer that takes its number of channels from its first input."""

    def __init__(
        self,
        *arguments: Any,
        bias: bool = True,
        activation: Activation | str | None = None,
        virtual_batch_size: int | None = None,
        renorm: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._drop_bias(bias)
        self._set_options(activation, virtual_batch_size, renorm)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        biased = self.bias is not None
        if self.affine and not biased:  # torch 2.11 sizes weight and bias together
            parameter: Any = UninitializedParameter
            self.bias = parameter(device=self.weight.device, dtype=self.weight.dtype)
        super().initialize_parameters(input)  # type: ignore[misc]
        self._drop_bias(biased)


class BatchNorm(_Sized):
    """Normalise inputs of any rank from 2 to 5, with torch's parameters and defaults.

    Call it with ``(input, residual=None, activation=None, mask=None)``: ``input`` is (N, C, ...) in float16, bfloat16,
    float32 or float64; ``residual`` has ``input``'s shape and dtype and is added before the activation; ``mask`` says
    which positions count. The result has ``input``'s shape, dtype and memory format.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; ``None`` averages over all batches so far.
        affine: whether the layer has ``weight`` and ``bias``.
        track_running_stats: whether the layer has running statistics; without them, evaluation uses the batch's.
        device: the device of parameters and buffers.
        dtype: the floating-point dtype of parameters and buffers; ``None`` is torch's default.
        bias: whether ``affine`` includes a bias.
        activation: the activation that follows; :func:`gpu_bn.nn.batch_norm` lists the names.
        virtual_batch_size: how many samples are normalised together in training; ``None`` is all.
        renorm: ``(r_max, d_max)`` of batch renormalisation in training, or ``None``.

    Raises:
        ValueError: an input that is not 2-D to 5-D, or an option that does not fit; the error has torch's text where
            torch has one.
        RuntimeError: tensors on different devices.
        TypeError: a residual of another dtype than the input.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm(4, activation="relu")
        >>> layer(torch.randn(8, 4)).shape, layer(torch.randn(8, 4, 5, 5)).min().item()
        (torch.Size([8, 4]), 0.0)

    Source: Ioffe & Szegedy 2015.
    """


class BatchNorm1d(_Sized, torch.nn.BatchNorm1d):
    """Normalise as ``torch.nn.BatchNorm1d`` does, with an activation, and a residual in the call.

    The input is (N, C) or (N, C, L). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(4, activation="relu")
        >>> x = torch.randn(8, 4, 9)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (2, 3)


class BatchNorm2d(_Sized, torch.nn.BatchNorm2d):
    """Normalise as ``torch.nn.BatchNorm2d`` does, with an activation, and a residual in the call.

    The input is (N, C, H, W). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm2d(4, activation="relu")
        >>> x = torch.randn(8, 4, 5, 5)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (4,)


class BatchNorm3d(_Sized, torch.nn.BatchNorm3d):
    """Normalise as ``torch.nn.BatchNorm3d`` does, with an activation, and a residual in the call.

    The input is (N, C, D, H, W). The arguments, the call and its errors are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm3d(4, activation="relu")
        >>> x = torch.randn(2, 4, 3, 5, 5)
        >>> layer(x, residual=x).min().item()
        0.0
    """

    ranks = (5,)


def require_channels(lazy: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names these lazy layers, which have not seen their first input; none is fine."""
    if names := ", ".join(map(repr, lazy)):
        raise ValueError(f"lazy layers do not know their channels yet: run a batch through {names} first")


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d):
    """Take the number of channels from the first input, (N, C) or (N, C, L), as ``torch.nn.LazyBatchNorm1d`` does.

    The layer then becomes a :class:`BatchNorm1d`. The other arguments are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm1d(activation="relu")
        >>> y = layer(torch.randn(8, 4, 9))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm1d', 4)
    """

    cls_to_become = BatchNorm1d
    ranks = (2, 3)


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d):
    """Take the number of channels from the first input, (N, C, H, W), as ``torch.nn.LazyBatchNorm2d`` does.

    The layer then becomes a :class:`BatchNorm2d`. The other arguments are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm2d(activation="relu")
        >>> y = layer(torch.randn(8, 4, 5, 5))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm2d', 4)
    """

    cls_to_become = BatchNorm2d
    ranks = (4,)


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d):
    """Take the number of channels from the first input, (N, C, D, H, W), as ``torch.nn.LazyBatchNorm3d`` does.

    The layer then becomes a :class:`BatchNorm3d`. The other arguments are those of :class:`BatchNorm`.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.LazyBatchNorm3d(activation="relu")
        >>> y = layer(torch.randn(2, 4, 3, 5, 5))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm3d', 4)
    """

    cls_to_become = BatchNorm3d
    ranks = (5,)


class FrozenBatchNorm2d(Activated):
    """Apply fixed statistics and parameters, which are all buffers, as torchvision's ``FrozenBatchNorm2d`` does.

    Call it with ``(input, residual=None, activation=None)``: ``input`` is (N, C, H, W) in float16, bfloat16, float32 or
    float64; ``residual`` has ``input``'s shape and dtype and is added before the activation. The result has ``input``'s
    shape, dtype and memory format.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        activation: the activation that follows; :func:`gpu_bn.nn.batch_norm` lists the names.

    Raises:
        ValueError: an input that is not 4-D, or an unknown activation.
        RuntimeError: tensors on different devices.
        TypeError: a residual of another dtype than the input.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.FrozenBatchNorm2d(4, activation="relu")
        >>> list(layer.parameters()), layer(torch.randn(2, 4, 3, 3)).min().item()
        ([], 0.0)

    Source: ``torchvision.ops.FrozenBatchNorm2d``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, activation: Activation | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.activation = Activation.of(activation)
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(num_features))

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: Activation | str | None = None
    ) -> Tensor:
        """Normalise by the fixed statistics, add the residual, and apply the activation."""
        if activation is None and self._modules and not self.replaces_children():
            return self._call_children(input, residual)  # type: ignore[no-any-return]
        activation = self.activation if activation is None else Activation.of(activation)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        rest: Any = (residual, activation.name, activation.parameter, None, (4,))
        return layer(input, *vectors, False, 0.0, self._eps, *rest)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # the counter of a layer that was not frozen
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        text = f"{len(self.weight)}, eps={self.eps}"
        return text if self.activation.is_identity else f"{text}, activation={self.activation!r}"
