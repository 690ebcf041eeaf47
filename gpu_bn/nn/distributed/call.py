"""A call whose batch is spread over several processes.

Forward, each process reports the count, mean and variance of its part, and all merge the same reports in the same order
(:mod:`gpu_bn.merge`): one all-gather of 2 + 2 C float64 values per process. Backward, the two sums are gathered alike
and added in the same order. The parts may differ in size and may be empty. Gradients of weight and bias stay those of
the process's own part, which DistributedDataParallel reduces.

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

from gpu_bn.call import Call, Options
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.distributed.arguments import Checked, check
from gpu_bn.nn.distributed.group import Group, exchange, gather
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.operators.sync_second import composed_gradients

if dist.is_available():
    # Its functions keep the default group of the time of import, as a default argument. DistributedDataParallel imports
    # it when there is a group, whose threads destroy_process_group then cannot end: one at work when the interpreter
    # ends aborts the process.
    import torch.distributed.nn

_PLACES: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""The place of a layer among those of a group, in the order of first calls; under "", among all that were made."""
_COUNTS: Counter[str] = Counter()
"""How many layers have a place, by group; under "", how many were made."""


def count_layer(layer: Any) -> None:
    """Give a new layer its place among all that were made; a copy has none."""
    _PLACES.setdefault(layer, {})[""] = _COUNTS[""]
    _COUNTS[""] += 1


def normalize(process_group: Any, layer: Any, num_features: int | None, given: Call, options: Options) -> Tensor:
    """Normalise over several processes. If anything fails on this process before the exchange, all are told.

    Args:
        process_group: of :mod:`torch.distributed`; ``None`` is all processes.
        layer: whose call it is; ``None`` of the function.
        num_features: C, or ``None`` where the input tells.
        given: the tensors as they were given.
        options: as they were given.
    """
    group = Group.of(process_group)
    if layer is None or torch.compiler.is_compiling():
        return _normalize(wire.UNKNOWN, group, num_features, given, options)
    places = _PLACES.setdefault(layer, {})
    first = group.name not in places
    if first:
        places[group.name] = _COUNTS[group.name]
        _COUNTS[group.name] += 1
    try:
        if first:
            _compare_layers(layer, group, _on_the_device(given))
        return _normalize(float(places[group.name]), group, num_features, given, options)
    except ValueError:  # all processes raise, some of which may not have called this layer
        if first:
            _COUNTS[group.name] = places.pop(group.name)
        raise


def _compare_layers(layer: Any, group: Group, like: Tensor) -> None:
    """Make sure in a layer's first call that it is the same layer on all processes; this alone waits for a GPU.

    The layers' places tell, where all processes have made equally many.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    place = _PLACES[layer].get("", wire.UNKNOWN)
    vector = torch.tensor([place, _COUNTS[""]], dtype=torch.float64, device=like.device)
    header = [wire.FIRST, *[wire.UNKNOWN] * (len(wire.FIELDS) - 3)]
    packets = gather(wire.pack(vector, group.name, header)[0], group).cpu()
    wire.require_alike(packets, group.name)
    places, total = packets[:, wire.HEADER : wire.HEADER + 2].unbind(1)
    if bool((total == total[0]).all() and wire.differing(places[:, None]).any()):
        wire.raise_different({"layer": places.tolist()})


def _normalize(place: float, group: Group, num_features: int | None, given: Call, options: Options) -> Tensor:
    """Check, exchange, normalise and update the running statistics, for a layer with this place in its group."""
    error, compiling = None, torch.compiler.is_compiling()
    try:
        checked = check(num_features, given, options)
    except Exception as raised:  # whatever failed, on this process alone
        error, checked = raised, wire.told(raised)
    if isinstance(checked, str):
        length = 2 + 2 * num_features if isinstance(num_features, int) else 1
        return _report_mistake(checked, error, group, length, _on_the_device(given))
    x: Any = checked.call.x
    header = [wire.UNKNOWN if compiling else float(wire.CALLS[group.name]), place, *checked.signature]
    packets = sync_operators.report_packets(x.detach(), checked.call.valid, group.name, [wire.FORWARD, *header])
    found = exchange(packets, group)
    if compiling or not x.is_cpu:
        y, *moments = _merge_and_normalize(checked, group, header, found)
    else:
        try:
            y, *moments = _merge_and_normalize(checked, group, header, found)
        except Exception as raised:
            _report_mistake(wire.told(raised), raised, group, 1, x)
            raise
    fixed, at = (None, checked.momentum) if isinstance(checked.momentum, Tensor) else (checked.momentum, None)
    end = y.detach(), group.size, group.name, [wire.END, *header]
    sync_operators.finish(*checked.call[4:7], fixed, at, *moments, *end)
    return y


def _merge_and_normalize(checked: Checked, group: Group, header: list[float], found: list[Tensor]) -> list[Tensor]:
    """Return ``y``, and the count, mean and variance of all processes."""
    call, moments = checked.call, sync_operators.merge_packets(found, int(checked.signature[0]))
    return [_Normalize.apply(*call[:4], call.valid, *moments, *group, header, *checked.options), *moments]


def _on_the_device(given: Call) -> Tensor:
    """Pick a tensor of a call that is where the exchanged tensors have to be; the arguments may be no tensors."""
    present = [tensor for tensor in given if isinstance(tensor, Tensor) and tensor.device.type != "meta"]
    return (present[0] if present else torch.empty(0, device="cpu")).detach()


def _report_mistake(text: str, error: Exception | None, group: Group, length: int, like: Tensor) -> Tensor:
    """Tell the other processes, which would gather a vector of this length, and raise what they raise."""
    packet = wire.mistake(like, group.name, text)
    try:
        for _ in range(wire.packets_of(length)):
            packets = wire.compare(gather(packet, group), group.name)
        # Recorded code cannot raise: there this stands for the output.
        return wire.refuse(  # type: ignore[no-any-return]
            like, packets, f"SyncBatchNorm, process {group.rank} of {group.size}: {text}"
        )
    except ValueError as told:
        raise told from error


class _Normalize(Function):
    """Normalise by the count, mean and variance of all processes; the gradient counts that these follow from ``x``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, residual, *others = arguments[:8]  # the mask, the count, mean and variance
        ctx.group, ctx.header, ctx.options = Group(*arguments[8:11]), arguments[11], arguments[12:]
        kept = None if ctx.options[1] == "identity" else residual
        ctx.save_for_backward(x, weight, bias, kept, *others)
        return sync_operators.normalize(x, weight, bias, residual, *others, *ctx.options)  # type: ignore[no-any-return]

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
