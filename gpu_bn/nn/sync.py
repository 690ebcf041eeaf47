"""Batch normalisation whose batch is spread over several processes.

Forward, each process reports the count, mean and variance of its part, and all merge the same reports in the same order
(:mod:`gpu_bn.merge`): one gathering of 2 + 2 C float64 numbers a process. Backward, the two sums are gathered alike and
added in the same order. What the processes hold may differ in size, and be nothing. Gradients of weight and bias stay
those of the process's own part, which DistributedDataParallel reduces.

On CPUs the processes exchange once more before any of them writes its statistics: each then knows that the others have
their outputs. The count over all processes stays on the device, so that nothing waits for a GPU but a layer's first
call, and CUDA graphs can capture a call.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from gpu_bn.activations import Activation
from gpu_bn.nn import functional
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.distributed.arguments import Call, call_of
from gpu_bn.nn.distributed.group import Group, exchange, gather, several
from gpu_bn.nn.modules import Fused
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.operators.sync_second import composed_gradients

if dist.is_available():
    # Its functions keep the default group of the time of import, as a default argument. DistributedDataParallel imports
    # it when there is a group, whose threads destroy_process_group then cannot end: one at work when the interpreter
    # ends aborts the process.
    import torch.distributed.nn


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
    """Do what :func:`gpu_bn.nn.batch_norm` does in training, with the statistics of the batch of a whole process group.

    Every process of the group must make the call, also one whose part is empty, and go through the backward call alike.
    With one process, or none initialised, it is that function.

    Args:
        input: (N, C, ...), this process's part, in float16, bfloat16, float32 or float64; N may be 0 and may differ
            between processes.
        running_mean: (C,), updated in place, or ``None``.
        running_var: (C,), updated in place, or ``None``.
        weight: (C,); absent, it is 1.
        bias: (C,); absent, it is 0.
        momentum: the weight of the batch in the running update; ``None`` averages over all batches so far.
        eps: added to the variance.
        process_group: of :mod:`torch.distributed`; ``None`` is all processes.
        num_features: C, where the input's own may be wrong.
        residual: added before the activation; like ``input``.
        activation: a name or an ``Activation``, as in :func:`gpu_bn.nn.batch_norm`.
        num_batches_tracked: 0-d int64, incremented.
        mask: which positions count; they are counted over all processes.

    Returns:
        ``y`` of this process's part, like ``input``.

    Raises:
        ValueError: on every process, with tensors on the CPU, if the arguments of one do not fit; the text names it. On
            GPUs it is raised on that process; the others, which do not wait for reports, get NaN, and raise in a later
            call.
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
    if not several(process_group):
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            True,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            num_batches_tracked=num_batches_tracked,
            mask=mask,
        )
    tensors = (input, residual, mask, running_mean, running_var, weight, bias, num_batches_tracked)
    return _together(process_group, None, num_features, tensors, momentum, eps, activation)


def _together(
    process_group: Any,
    layer: Any,
    num_features: int | None,
    tensors: tuple[Any, ...],
    momentum: Any,
    eps: Any,
    activation: Any,
    forbidden: str = "",
) -> Tensor:
    """A call over several processes. Whatever fails on this one before the exchange, all are told."""
    group = Group.of(process_group)
    if layer is None or torch.compiler.is_compiling():
        return _numbered(wire.UNKNOWN, group, num_features, tensors, momentum, eps, activation, forbidden)
    numbers = _numbers.setdefault(layer, {})
    new = group.name not in numbers
    if new:
        numbers[group.name] = _known[group.name]
        _known[group.name] += 1
    try:
        if new:
            _meet(layer, group, _on_the_device(tensors))
        number = float(numbers[group.name])
        return _numbered(number, group, num_features, tensors, momentum, eps, activation, forbidden)
    except ValueError:  # all processes raise, some of which may not have called this layer
        if new:
            _known[group.name] = numbers.pop(group.name)
        raise


_numbers: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""The place of a layer among those of a group, in the order of their first calls; of "" among all that were made."""
_known: Counter[str] = Counter()
"""How many there are."""


def note_made(layer: Any) -> None:
    """Give a new layer its place; a copy has none."""
    _numbers.setdefault(layer, {})[""] = _known[""]
    _known[""] += 1


def _meet(layer: Any, group: Group, like: Tensor) -> None:
    """Make sure of a layer's first call that it is the same layer on all processes; this alone waits for a GPU.

    That is told by the layers' places, where all processes have made equally many.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    place = _numbers[layer].get("", wire.UNKNOWN)
    vector = torch.tensor([place, _known[""]], dtype=torch.float64, device=like.device)
    header = [wire.FIRST, *[wire.UNKNOWN] * (len(wire.FIELDS) - 3)]
    packets = gather(wire.pack(vector, group.name, header)[0], group).cpu()
    wire.require_alike(packets, group.name)
    places, total = packets[:, wire.HEADER : wire.HEADER + 2].unbind(1)
    if bool((total == total[0]).all() and wire.differing(places[:, None]).any()):
        wire.raise_different({"layer": places.tolist()})


def _numbered(
    number: float,
    group: Group,
    num_features: int | None,
    tensors: tuple[Any, ...],
    momentum: Any,
    eps: Any,
    activation: Any,
    forbidden: str,
) -> Tensor:
    """:func:`_together` of a layer with a number."""
    error, compiling = None, torch.compiler.is_compiling()
    try:
        call = forbidden or call_of(num_features, tensors, momentum, eps, activation)
    except Exception as raised:  # of any type, on this process alone
        error, call = raised, wire.told(raised)
    if isinstance(call, str):
        length = 2 + 2 * num_features if isinstance(num_features, int) else 1
        return _report_mistake(call, error, group, length, _on_the_device(tensors))
    x: Any = call.inputs[0]
    header = [wire.UNKNOWN if compiling else float(wire.CALLS[group.name]), number, *call.signature]
    packets = sync_operators.report_packets(x.detach(), call.valid, group.name, [wire.FORWARD, *header])
    found = exchange(packets, group)
    if compiling or not x.is_cpu:
        y, *moments = _normalized(call, group, header, found)
    else:
        try:
            y, *moments = _normalized(call, group, header, found)
        except Exception as raised:
            _report_mistake(wire.told(raised), raised, group, 1, x)
            raise
    fixed, at = (None, call.momentum) if isinstance(call.momentum, Tensor) else (call.momentum, None)
    end = y.detach(), group.size, group.name, [wire.END, *header]
    sync_operators.finish(*call.tracked, fixed, at, *moments, *end)
    return y


def _normalized(call: Call, group: Group, header: list[float], found: list[Tensor]) -> tuple[Tensor, ...]:
    """``y``, and the count, mean and variance of all processes."""
    channels = int(call.signature[0])
    moments = sync_operators.merge_packets(found, channels)
    return _SyncBatchNorm.apply(*call.inputs, call.valid, *moments, *group, header, *call.options), *moments


def _on_the_device(tensors: tuple[Any, ...]) -> Tensor:
    """A tensor of a call that is where what is exchanged has to be; what is given may be no tensors."""
    present = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.device.type != "meta"]
    return (present[0] if present else torch.empty(0)).detach()


def _report_mistake(text: str, error: Exception | None, group: Group, length: int, like: Tensor) -> Tensor:
    """Tell the other processes, which would gather a vector of this length, and raise what they raise."""
    packet = wire.mistake(like, group.name, text)
    try:
        for _ in range(wire.packets_of(length)):
            packets = wire.compare(gather(packet, group), group.name)
        # In compiled code this stands for the output, for what is recorded cannot raise.
        return wire.refuse(  # type: ignore[no-any-return]
            like, packets, f"SyncBatchNorm, process {group.rank} of {group.size}: {text}"
        )
    except ValueError as told:
        raise told from error


class SyncBatchNorm(Fused):
    """Normalise by the statistics of the batch of all processes, on CPUs and GPUs, as ``torch.nn.SyncBatchNorm`` does.

    In evaluation, frozen, or with one process, it is :class:`gpu_bn.nn.BatchNorm`. It is no subclass of torch's class,
    which DistributedDataParallel refuses on CPUs. Call it with ``(input, residual=None, activation=None, mask=None)``:
    ``input`` is this process's part of the batch, (N, C, ...); N may be 0 and may differ between processes.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; ``None`` averages over all batches so far.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics; without them, evaluation uses the batch's.
        process_group: the group of processes; ``None`` is all processes.
        device: of parameters and buffers.
        dtype: of parameters and buffers, a float dtype; torch's default unless given.
        bias: whether ``affine`` includes a bias.
        activation: the activation that follows; :func:`gpu_bn.nn.batch_norm` lists the names.

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
        note_made(self)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Fused.forward`, of this process's part of the batch.

        Raises:
            ValueError, RuntimeError: as :func:`sync_batch_norm`.
        """
        if not (self.training and not self.frozen and several(self.process_group)):
            return super().forward(input, residual, activation, mask)
        if activation is None and self._modules and not self._is_whole():
            return self._in_parts(input, residual, mask)  # type: ignore[no-any-return]
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        counter = self.num_batches_tracked if self.track_running_stats else None
        tensors = (input, residual, mask, *running, self.weight, self.bias, counter)
        chosen = self.activation if activation is None else activation
        forbidden = ""
        if self.virtual_batch_size is not None or self.renorm is not None:
            forbidden = "a SyncBatchNorm over several processes has neither virtual_batch_size nor renorm"
        return _together(
            self.process_group, self, self.num_features, tensors, self.momentum, self.eps, chosen, forbidden
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> Any:
        """Make the BatchNorm layers of a model, torch's and ours, layers of this class, in place.

        Parameters, buffers, hooks, flags and fused activations are kept, for the layers stay the objects they are.
        :func:`gpu_bn.nn.revert` undoes it.

        Args:
            module: a model, or a layer.
            process_group: whose statistics are shared; ``None`` is all processes.

        Returns:
            ``module``.

        Raises:
            ValueError: a lazy layer has not seen its first input yet.
        """
        from gpu_bn.nn.conversion import synchronise

        return synchronise(module, process_group)


class _SyncBatchNorm(Function):
    """Gives ``y``, of the count, mean and variance of all processes, which follow from all inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        valid: Tensor | None,
        count: Tensor,
        mean: Tensor,
        var: Tensor,
        *others: Any,
    ) -> Tensor:
        ctx.group, ctx.header, ctx.options = Group(*others[:3]), others[3], others[4:]
        kept = None if ctx.options[1] == "identity" else residual
        ctx.save_for_backward(x, weight, bias, kept, valid, count, mean, var)
        layer = (x, weight, bias, residual, valid, count, mean, var, *ctx.options)
        return sync_operators.normalize(*layer)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, valid, count, mean, var = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            return (*composed_gradients(ctx, dy, x, weight, bias, residual, valid, need), *[None] * 11)
        identity = ctx.options[1] == "identity"
        layer = (x, weight, bias, residual, valid, count, mean, var, *ctx.options)
        given, dx = (dy, *layer, need[3] and not identity), None
        if need[0]:
            try:
                packets, sums, dz = sync_operators.reduce_packets(*given, ctx.group.name, [wire.BACKWARD, *ctx.header])
            except Exception as error:
                _report_mistake(wire.told(error), error, ctx.group, 2 * x.shape[1], x)
                raise
            total = wire.add(exchange(packets, ctx.group), sums.numel()).view_as(sums)
            dx = sync_operators.backward_input(dy, *layer, total, dz if dz.numel() else None)
        else:
            sums, dz = sync_operators.reduce(*given)
        dweight = sums[1].to(weight.dtype) if weight is not None and need[1] else None
        dbias = sums[0].to(bias.dtype) if bias is not None and need[2] else None
        dresidual = None
        if need[3]:
            dresidual = dz if not identity else dy if valid is None else torch.where(valid, dy, 0)
        return dx, dweight, dbias, dresidual, *[None] * 11
