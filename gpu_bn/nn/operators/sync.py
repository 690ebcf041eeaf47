"""The steps of a SyncBatchNorm's call as operators ``torch.ops.gpu_bn.sync_*``.

Each process reports the statistics of its part of the batch, in packets (:mod:`gpu_bn.nn.distributed.wire`). A report
is a float64 vector of length 2 + 2 C, ``[error, count, mean.., var..]``. If one report's error is not 0, the merged
statistics are NaN. :mod:`gpu_bn.nn.distributed.call` has the derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu_bn import algorithm, registry
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.merge import Pool, merge
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.distributed.group import Group, exchange
from gpu_bn.nn.operators.library import is_countable, mark_written, register, stack_vectors, vector_for
from gpu_bn.nn.running import moved_statistics, update_running, write
from gpu_bn.spec import BatchNormSpec

_LAYER = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor count, Tensor mean, Tensor var"
)
_OPTIONS = "float eps, str activation, float parameter"
_TRACKED = (
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, "
    "Tensor? momentum_at, Tensor count, Tensor mean, Tensor var"
)
_HEADER = "str group, float[] signature"
_POOL = "(Tensor count, Tensor mean, Tensor var)"


# ----------------------------------------------------------------------------------------------------------- kernels
def _report(x: Tensor, valid: Tensor | None) -> Tensor:
    moments = registry.backend_for(x).stats(x, 1, valid)
    channels = x.shape[1]
    report = torch.empty(2 + 2 * channels, dtype=torch.float64, device=x.device)
    report[0] = 0.0
    report[1:2] = moments.count
    report[2 : 2 + channels] = moments.mean
    report[2 + channels :] = moments.var
    return report


def _report_packets(x: Tensor, valid: Tensor | None, group: str, signature: Sequence[float]) -> Tensor:
    """Return the packets of this process's report, or packets that tell the other processes of an error."""
    try:
        # Allocate the output once before the exchange, so that an out-of-memory error is raised now.
        registry.backend_for(x).empty_like(x)  # torch's allocator keeps the memory
        return wire.make_packets(_report(x, valid), group, signature)
    except Exception as error:
        return wire.make_error_packets(error, x, group, 2 + 2 * x.shape[1])


def _merge_reports(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge (W, 2 + 2 C) reports to the count, (1,), the mean and the variance, (C,); these are NaN after an error."""
    channels = (reports.shape[1] - 2) // 2
    error, count, mean, var = reports.split((1, 1, channels, channels), dim=1)
    total = merge(Pool(count, mean, var * count))
    nan_or_zero = torch.where((error != 0).any(), torch.nan, 0.0)
    return total.count, total.mean + nan_or_zero, total.var + nan_or_zero


def _merge_packets(packets: Sequence[Tensor], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the reports in packets like :func:`_merge_reports`, in one launch if the backend has a kernel for it."""
    fused = getattr(registry.backend_for(packets[0]), "merge_packets", None)
    if fused is None:
        return _merge_reports(wire.extract_reports(packets, channels))
    return fused(packets, channels, wire.HEADER, wire.ROOM, wire.UNKNOWN)  # type: ignore[no-any-return]


def _finish(*arguments: Any) -> None:
    """Update the running statistics; on CPUs, on all processes or, if one has failed, on none."""
    *update, _, size, group, signature = arguments
    mean, var, counter, momentum, momentum_at, count, batch_mean, batch_var = update
    if not (count.is_cpu and group):
        if not (mean is var is counter is None):
            _update(*update)
        return
    try:
        batch = Pool(count, batch_mean, batch_var * count)
        moved = moved_statistics((mean, var, counter), momentum if momentum_at is None else momentum_at, batch)
        packets = wire.make_packets(count.new_zeros(1), group, signature)
    except Exception as error:
        packets = wire.make_error_packets(error, count, group, 1)
    exchange(packets, Group(group, size, 0))
    write(moved)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    momentum_at: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
) -> None:
    """Update the running statistics and the counter, in one launch if the backend has a kernel for it."""
    tracked = (running_mean, running_var, num_batches_tracked)
    fused = getattr(registry.backend_for(mean), "update_shared", None)
    if fused is None or not is_countable(num_batches_tracked, mean):
        batch = Pool(count, mean, var * count)
        update_running(tracked, momentum if momentum_at is None else momentum_at, batch)
    else:
        fused(*tracked, momentum, None if momentum_at is None else momentum_at.to(mean.device), count, mean, var)
        mark_written(tracked)


def _normalize(x: Tensor, *arguments: Any) -> Tensor:
    engine = registry.backend_for(x)
    y = engine.empty_like(x)
    if x.numel():
        engine.normalize(_saved(x, *arguments), arguments[2], y)
    return y  # type: ignore[no-any-return]


def _reduce(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the sums of dz and dz * xhat over this process's part, (2, C), and dz, which is empty if not needed."""
    *layer, need_dz = arguments
    engine = registry.backend_for(x)
    dz = engine.empty_like(x) if need_dz else None
    result = x.new_empty(0) if dz is None else dz
    if not x.numel():
        return x.new_zeros((2, x.shape[1]), dtype=torch.float64), result
    sums = engine.backward_reduce(dy, _saved(x, *layer), dz)
    return stack_vectors(sums.dz, sums.dz_xhat), result


def _reduce_packets(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return packets, the sums and dz of :func:`_reduce`; the packets hold the sums, or tell of an error."""
    *rest, group, signature = arguments
    try:
        registry.backend_for(x).empty_like(x)  # make sure of memory for dx, as in _report_packets
        sums, dz = _reduce(dy, x, *rest)
        return wire.make_packets(sums.flatten(), group, signature), sums, dz
    except Exception as error:
        sums = x.new_full((2, x.shape[1]), torch.nan, dtype=torch.float64)
        # Compiled code relies on the strides of dz.
        dz = registry.backend_for(x).empty_like(x) if rest[-1] else x.new_empty(0)
        return wire.make_error_packets(error, x, group, sums.numel()), sums, dz


def _input(dy: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    """Return dx, computed from the sums and the count of all processes."""
    *layer, sums, _ = arguments
    engine = registry.backend_for(x)
    dx = engine.empty_like(x)
    if x.numel():
        engine.backward_input(dy, _saved(x, *layer), Sums(sums[0], sums[1]), dx)
    return dx  # type: ignore[no-any-return]


def _saved(x: Tensor, *layer: Any) -> Saved:
    """Return the values that a forward call saves, from the operators' arguments between x and the sums."""
    weight, bias, residual, valid, *moments, eps, activation, parameter = layer
    engine = registry.backend_for(x)
    spec = BatchNormSpec(1, True, 0.0, eps, Activation(activation, parameter))
    saved = algorithm.save(engine, Call(x, residual=residual, valid=valid), spec, Moments(*moments))
    return replace(saved, weight=vector_for(engine, weight), bias=vector_for(engine, bias))


# ------------------------------------------------------------------------------------------------------------- fakes
def _report_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2 + 2 * x.shape[1], dtype=torch.float64)


def _report_packets_fake(x: Tensor, valid: Tensor | None, group: str, signature: Sequence[float]) -> Tensor:
    return wire.make_packets_fake(_report_fake(x, valid), group, signature)


def _merge_packets_fake(packets: Sequence[Tensor], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    first = packets[0]
    return first.new_empty(1), first.new_empty(channels), first.new_empty(channels)


def _reduce_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    del dy
    dz = torch.empty_like(x) if arguments[-1] else x.new_empty(0)
    return x.new_empty((2, x.shape[1]), dtype=torch.float64), dz


def _reduce_packets_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, group, signature = arguments
    sums, dz = _reduce_fake(dy, x, *rest)
    return wire.make_packets_fake(sums.flatten(), group, signature), sums, dz


report = register("sync_report(Tensor x, Tensor? valid) -> Tensor", _report, _report_fake)
merge_reports = register(
    f"sync_merge(Tensor reports) -> {_POOL}",
    _merge_reports,
    lambda reports: _merge_packets_fake((reports,), (reports.shape[1] - 2) // 2),
)
merge_packets = register(
    f"sync_merge_packets(Tensor[] packets, int channels) -> {_POOL}", _merge_packets, _merge_packets_fake
)
update = register(f"sync_update({_TRACKED}) -> ()", _update, lambda *_: None)
finish = register(f"sync_finish({_TRACKED}, Tensor y, int size, {_HEADER}) -> ()", _finish, lambda *_: None)
normalize = register(f"sync_normalize({_LAYER}, {_OPTIONS}) -> Tensor", _normalize, lambda x, *_: torch.empty_like(x))
reduce = register(
    f"sync_reduce(Tensor dy, {_LAYER}, {_OPTIONS}, bool need_dz) -> (Tensor sums, Tensor dz)", _reduce, _reduce_fake
)
report_packets = register(
    f"sync_report_packets(Tensor x, Tensor? valid, {_HEADER}) -> Tensor", _report_packets, _report_packets_fake
)
reduce_packets = register(
    f"sync_reduce_packets(Tensor dy, {_LAYER}, {_OPTIONS}, bool need_dz, {_HEADER}) "
    "-> (Tensor packets, Tensor sums, Tensor dz)",
    _reduce_packets,
    _reduce_packets_fake,
)
backward_input = register(
    f"sync_input(Tensor dy, {_LAYER}, {_OPTIONS}, Tensor sums, Tensor? dz) -> Tensor",
    _input,
    lambda dy, x, *_: torch.empty_like(x),  # noqa: ARG005
)
