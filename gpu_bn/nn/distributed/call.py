"""A call whose batch is spread over several processes.

In the forward call, each process reports the count, mean and variance of its part: an all-gather of 2 + 2 C float64
values per process. All processes merge the same reports in the same order (:mod:`gpu_bn.merge`). In the backward call,
the two sums of each process are gathered likewise and added in the same order. The parts may differ in size and may be
empty. The gradients of weight and bias are those of the process's own part, which DistributedDataParallel reduces.

On CPUs there is one more exchange before any process writes its running statistics; it makes sure that all processes
have computed their outputs. The count over all processes stays on the device. Thus only a layer's first call waits for
a GPU, and CUDA graphs can capture a call.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from gpu_bn.call import Call, Options
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.distributed.arguments import Checked, check
from gpu_bn.nn.distributed.group import Group, exchange, gather
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.operators.sync_second import composed_gradients

if dist.is_available():
    # Import it before a process group exists. Its functions have the default group at import as a default argument. If
    # DistributedDataParallel imports it later, that reference keeps the group's threads alive after
    # destroy_process_group, and a thread that runs when the interpreter exits aborts the process.
    import torch.distributed.nn

_PLACES: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""A layer's place in the order of first calls, by the name of the group; under "", its place in order of creation."""
_COUNTS: Counter[str] = Counter()
"""The number of layers that have a place, by the name of the group; under "", the number of layers created."""


def count_layer(layer: Any) -> None:
    """Record a new layer's place in the order of creation; copies of a layer have none."""
    _PLACES.setdefault(layer, {})[""] = _COUNTS[""]
    _COUNTS[""] += 1


def normalize(process_group: Any, layer: Any, num_features: int | None, call: Call, options: Options) -> Tensor:
    """Normalise over several processes. If anything fails on this process before the exchange, all processes raise.

    Args:
        process_group: a group of :mod:`torch.distributed`; ``None`` is all processes.
        layer: the layer that is called, or ``None`` in a call of the function.
        num_features: C, or ``None`` for the number of channels of the input.
        call: the tensors, not yet checked.
        options: the options, not yet checked.
    """
    group = Group.of(process_group)
    if layer is None or torch.compiler.is_compiling():
        return _normalize(wire.UNKNOWN, group, num_features, call, options)
    places = _PLACES.setdefault(layer, {})
    first = group.name not in places
    if first:
        places[group.name] = _COUNTS[group.name]
        _COUNTS[group.name] += 1
    try:
        if first:
            _compare_layers(layer, group, _tensor_on_device(call))
        return _normalize(float(places[group.name]), group, num_features, call, options)
    except ValueError:  # all processes raise, and some may not have called this layer
        if first:
            _COUNTS[group.name] = places.pop(group.name)
        raise


def _compare_layers(layer: Any, group: Group, like: Tensor) -> None:
    """Check in a layer's first call that all processes call the same layer; this is the only wait for a GPU.

    The layers' places in the order of creation are compared, if all processes have created the same number of layers.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    place = _PLACES[layer].get("", wire.UNKNOWN)
    vector = torch.tensor([place, _COUNTS[""]], dtype=torch.float64, device=like.device)
    header = [wire.FIRST, *[wire.UNKNOWN] * (len(wire.FIELDS) - 3)]
    packets = gather(wire.pack(vector, group.name, header)[0], group).cpu()
    wire.require_equal_headers(packets, group.name)
    places, created = packets[:, wire.HEADER : wire.HEADER + 2].unbind(1)
    if bool((created == created[0]).all() and wire.differing_columns(places[:, None]).any()):
        wire.raise_difference({"layer": places.tolist()})


def _normalize(place: float, group: Group, num_features: int | None, call: Call, options: Options) -> Tensor:
    """Check, exchange, normalise and update the running statistics, for a layer with this place in its group."""
    error, compiling = None, torch.compiler.is_compiling()
    try:
        checked = check(num_features, call, options)
    except Exception as raised:  # any error of this process is reported to the others
        error, checked = raised, wire.describe_error(raised)
    if isinstance(checked, str):
        length = 2 + 2 * num_features if isinstance(num_features, int) else 1
        return _report_error(checked, error, group, length, _tensor_on_device(call))
    x: Any = checked.call.x
    header = [wire.UNKNOWN if compiling else float(wire.CALLS[group.name]), place, *checked.signature]
    packets = sync_operators.report_packets(x.detach(), checked.call.valid, group.name, [wire.FORWARD, *header])
    gathered = exchange(packets, group)
    if compiling or not x.is_cpu:
        y, *moments = _merge_and_normalize(checked, group, header, gathered)
    else:
        try:
            y, *moments = _merge_and_normalize(checked, group, header, gathered)
        except Exception as raised:
            _report_error(wire.describe_error(raised), raised, group, 1, x)
            raise
    fixed, momentum_at = (None, checked.momentum) if isinstance(checked.momentum, Tensor) else (checked.momentum, None)
    end = y.detach(), group.size, group.name, [wire.END, *header]
    sync_operators.finish(*checked.call[4:7], fixed, momentum_at, *moments, *end)
    return y


def _merge_and_normalize(checked: Checked, group: Group, header: list[float], gathered: list[Tensor]) -> list[Tensor]:
    """Return ``y``, and the count, mean and variance over all processes."""
    call, moments = checked.call, sync_operators.merge_packets(gathered, int(checked.signature[0]))
    return [_Normalize.apply(*call[:4], call.valid, *moments, *group, header, *checked.options), *moments]


def _tensor_on_device(call: Call) -> Tensor:
    """Return a tensor on the device of a call: its first tensor that is not "meta", or else an empty one on the CPU."""
    present = [tensor for tensor in call if isinstance(tensor, Tensor) and tensor.device.type != "meta"]
    return (present[0] if present else torch.empty(0, device="cpu")).detach()


def _report_error(text: str, error: Exception | None, group: Group, length: int, like: Tensor) -> Tensor:
    """Send an error's text to the other processes, which gather a vector of this length, and raise it as they do."""
    packet = wire.error_packet(like, group.name, text)
    try:
        for _ in range(wire.packet_count(length)):
            packets = wire.compare(gather(packet, group), group.name)
        # The operator raises. In a compiled graph its result stands for the output.
        return wire.refuse(  # type: ignore[no-any-return]
            like, packets, f"SyncBatchNorm, process {group.rank} of {group.size}: {text}"
        )
    except ValueError as raised:
        raise raised from error


class _Normalize(Function):
    """Normalise by the count, mean and variance of all processes; the gradient includes their dependence on ``x``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, residual, *others = arguments[:8]  # the mask, the count, mean and variance
        ctx.group, ctx.header, ctx.options = Group(*arguments[8:11]), arguments[11], arguments[12:]
        saved_residual = None if ctx.options[1] == "identity" else residual
        ctx.save_for_backward(x, weight, bias, saved_residual, *others)
        return sync_operators.normalize(x, weight, bias, residual, *others, *ctx.options)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, valid, count, mean, var = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            return (*composed_gradients(ctx, dy, x, weight, bias, residual, valid, need), *[None] * 11)
        identity = ctx.options[1] == "identity"
        layer = (x, weight, bias, residual, valid, count, mean, var, *ctx.options)
        arguments, dx = (dy, *layer, need[3] and not identity), None
        if need[0]:
            try:
                header = [wire.BACKWARD, *ctx.header]
                packets, sums, dz = sync_operators.reduce_packets(*arguments, ctx.group.name, header)
            except Exception as error:
                _report_error(wire.describe_error(error), error, ctx.group, 2 * x.shape[1], x)
                raise
            total = wire.add(exchange(packets, ctx.group), sums.numel()).view_as(sums)
            dx = sync_operators.backward_input(dy, *layer, total, dz if dz.numel() else None)
        else:
            sums, dz = sync_operators.reduce(*arguments)
        dweight = sums[1].to(weight.dtype) if weight is not None and need[1] else None
        dbias = sums[0].to(bias.dtype) if bias is not None and need[2] else None
        dresidual = None
        if need[3]:
            dresidual = dz if not identity else dy if valid is None else torch.where(valid, dy, 0)
        return dx, dweight, dbias, dresidual, *[None] * 11
