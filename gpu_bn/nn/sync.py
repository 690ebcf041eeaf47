"""Batch normalisation of a batch that is spread over several processes: the function and the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase

from gpu_bn.activations import Activation
from gpu_bn.call import Call, Options
from gpu_bn.nn import functional, modules
from gpu_bn.nn.activated import component_classes
from gpu_bn.nn.conversion import convert, set_class
from gpu_bn.nn.distributed import call
from gpu_bn.nn.distributed.group import has_peers
from gpu_bn.nn.fused import Fused
from gpu_bn.nn.known_layers import CLASSES, class_of


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    num_features: int | None = None,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    num_batches_tracked: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute :func:`gpu_bn.nn.batch_norm` in training, with the statistics of the batch of a whole process group.

    Every process of the group must make the same call, even if its part is empty, and the same backward call. With a
    single process, or without an initialised process group, it computes :func:`gpu_bn.nn.batch_norm`.

    The other arguments are those of :func:`gpu_bn.nn.batch_norm`.

    Args:
        input: (N, C, ...), this process's part, in float16, bfloat16, float32 or float64; N may be 0 and may differ
            between processes.
        process_group: a group of :mod:`torch.distributed`; ``None`` is all processes.
        num_features: C; with several processes, an input with another number of channels is an error. ``None`` takes
            the number of channels of ``input``.
        mask: which positions count; they are counted over all processes.

    Returns:
        ``y`` for this process's part, with ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: the arguments of a process do not fit, or the calls differ. With tensors on CPUs every process
            raises it, and the text names the process. On GPUs the process with the error raises it; the others, which
            do not wait for its report, compute NaN and raise in a later call.
        RuntimeError: a process has ended, or did not take part within the group's timeout.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> nn.sync_batch_norm(x)  # without a process group: the batch of this process
        tensor([[-1.0000],
                [ 1.0000]])

    Source: ``torch.nn.SyncBatchNorm``; the statistics are merged as in Chan, Golub & LeVeque 1983.
    """
    tensors = Call(input, weight, bias, residual, running_mean, running_var, num_batches_tracked, mask)
    if has_peers(process_group):
        return call.normalize(process_group, None, num_features, tensors, Options(True, momentum, eps, activation))
    return functional.normalize(tensors, Options(True, momentum, eps, Activation.of(activation)))


class SyncBatchNorm(Fused):
    """Normalise by the statistics of the batch of all processes, on CPUs and GPUs, as ``torch.nn.SyncBatchNorm`` does.

    In evaluation, when it is frozen, or with a single process, it computes what :class:`gpu_bn.nn.BatchNorm` does. It
    is not a subclass of ``torch.nn.SyncBatchNorm``, which DistributedDataParallel refuses on CPUs. Call it with
    ``(input, residual=None, activation=None, mask=None)``: ``input`` is this process's part of the batch, (N, C, ...);
    N may be 0 and may differ between processes.

    The other arguments are those of :class:`gpu_bn.nn.BatchNorm`.

    Args:
        process_group: the group of processes; ``None`` is all processes.

    Raises:
        ValueError: a wrong call, or one that differs between processes; see :func:`gpu_bn.nn.sync_batch_norm`.
        RuntimeError: a process has ended, or did not take part within the group's timeout.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.SyncBatchNorm(4, activation="relu")  # without a process group: a plain layer
        >>> layer(torch.randn(8, 4)).shape
        torch.Size([8, 4])

    Source: ``torch.nn.SyncBatchNorm``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._drop_bias(bias)
        self.process_group = process_group
        self.activation = Activation.of(activation)
        call.count_layer(self)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalise this process's part of the batch, add the residual, and apply the activation.

        Raises:
            ValueError, RuntimeError: the errors of :func:`sync_batch_norm`.
        """
        if not (self.training and not self.frozen and has_peers(self.process_group)):
            return super().forward(input, residual, activation, mask)
        if activation is None and self._modules and not self.replaces_children():
            return self._call_children(input, residual, mask)  # type: ignore[no-any-return]
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        counter = self.num_batches_tracked if self.track_running_stats else None
        tensors = Call(input, self.weight, self.bias, residual, *running, counter, mask)
        activation = self.activation if activation is None else activation
        options = Options(True, self.momentum, self.eps, activation, 1, self.virtual_batch_size, self.renorm)
        return call.normalize(self.process_group, self, self.num_features, tensors, options)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> Any:
        """Convert the BatchNorm layers of a model, torch's and ours, to layers of this class, in place.

        The layers stay the same objects and keep their parameters, buffers, hooks, flags and fused activations.
        :func:`gpu_bn.nn.revert` undoes it.

        Args:
            module: a model, or a layer.
            process_group: the group whose processes share statistics; ``None`` is all processes.

        Returns:
            ``module``.

        Raises:
            ValueError: a lazy layer has not seen its first input yet.
        """
        layers = module.named_modules()
        modules.require_channels(name for name, layer in layers if isinstance(layer, _LazyNormBase))
        for layer in convert(module).modules():
            original = component_classes(class_of(layer))[0]
            if original in SYNCHRONISED:
                layer.__dict__.setdefault("_converted_from", getattr(torch.nn, original.__name__, original))
                set_class(layer, SyncBatchNorm)
                setattr(layer, "process_group", process_group)  # noqa: B010 - torch.nn.Module declares no such attribute
                call.count_layer(layer)
        return module


SYNCHRONISED = (modules.BatchNorm, modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d, SyncBatchNorm)
"""The classes that are converted to SyncBatchNorm; subclasses are not, for they may compute something else."""

CLASSES["torch.nn.modules.batchnorm.SyncBatchNorm"] = SyncBatchNorm
