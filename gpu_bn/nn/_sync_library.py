"""The phases of a call as operators ``torch.ops.gpu_bn.sync_*``, for statistics that several processes share.

A process sends a report of its part: ``(2 + 2 C,)`` in float64, ``[trouble, count, mean.., var..]``. ``trouble`` is
0, or the number of the check that its arguments failed, with what was found in place of the count: the other
processes, which wait for its report, raise what it raises. Nothing here is differentiated: :mod:`gpu_bn.nn.sync` does
that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gpu_bn import dispatch, ops
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved, Sums
from gpu_bn.merge import Pool, merge
from gpu_bn.nn._library import LIBRARY
from gpu_bn.spec import BatchNormSpec

_LAYER = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor count, Tensor mean, Tensor var"
)
_OPTIONS = "float eps, str activation, float parameter"
for _schema in (
    "sync_report(Tensor x, Tensor? valid) -> Tensor",
    "sync_merge(Tensor reports) -> (Tensor count, Tensor mean, Tensor var)",
    "sync_fail(Tensor x, Tensor reports, int rank, int trouble, int found) -> Tensor",
    f"sync_normalize({_LAYER}, {_OPTIONS}) -> Tensor",
    f"sync_reduce(Tensor dy, {_LAYER}, {_OPTIONS}, bool need_dz) -> (Tensor sums, Tensor dz)",
    f"sync_input(Tensor dy, {_LAYER}, {_OPTIONS}, Tensor sums, Tensor? dz) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

TROUBLES = {
    1: "expected at least 2D input, up to 5D (got {}D input)",
    2: "expected input with as many channels as the layer has (got {})",
    3: "input should be float16, bfloat16, float32 or float64",
    4: "residual should have the input's shape, dtype and device",
    5: "batch_norm eps must be positive during training",
    6: "SyncBatchNorm number of input channels should be non-zero",
    7: "mask should be bool or uint8, broadcast to the input's shape with one channel, and be on its device",
    8: "weight, bias, running_mean and running_var should have a floating-point number for each channel, on the "
    "input's device, and running statistics come in a pair",
}
"""The checks that arguments can fail on one process alone, by number."""


def trouble_report(trouble: int, found: int, channels: int, device: torch.device) -> Tensor:
    """The report of a process that failed a check, as long as the others' reports are."""
    head = torch.tensor([float(trouble), float(found)], dtype=torch.float64, device=device)
    return torch.cat((head, head.new_zeros(2 * channels)))


def _raise(rank: int, size: int, trouble: int, found: int) -> NoReturn:
    """What every process raises when one has failed a check."""
    raise ValueError(f"SyncBatchNorm, process {rank} of {size}: {TROUBLES[trouble].format(found)}")


# ------------------------------------------------------------------------------------------------- what they compute
def _report(x: Tensor, valid: Tensor | None) -> Tensor:
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        look_at_arrivals()
    moments = dispatch.serving(x).stats(x, 1, valid)
    channels = x.shape[1]
    report = torch.empty(2 + 2 * channels, dtype=torch.float64, device=x.device)
    report[0] = 0.0
    report[1:2] = moments.count
    report[2 : 2 + channels] = moments.mean
    report[2 + channels :] = -moments.var if moments.wide else moments.var  # the sign keeps Moments.wide, as elsewhere
    return report


def _merge(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (W, 2 + 2 C) the merged count, a tensor of one element, mean and variance.

    On the CPU a report of trouble is an error here. On a GPU statistics become NaN and nothing is waited for: reports
    are looked at when they have arrived, in a later call.
    """
    if reports.is_cpu:
        _require_no_trouble(reports)
    elif reports.is_cuda and not torch.cuda.is_current_stream_capturing():
        ARRIVALS.append(_send(reports[:, :2]))
    return merged(reports)


ARRIVALS: deque[tuple[Callable[[], bool], Tensor]] = deque()
"""Heads of reports on their way from a GPU: whether they have arrived, and where."""


def look_at_arrivals() -> None:
    """Raise what an earlier call would have raised, had it waited for its reports."""
    while ARRIVALS and ARRIVALS[0][0]():
        _require_no_trouble(ARRIVALS.popleft()[1])


def _send(heads: Tensor) -> tuple[Callable[[], bool], Tensor]:
    host = torch.empty(heads.shape, dtype=heads.dtype, pin_memory=True)
    host.copy_(heads, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(heads.device))
    return event.query, host


def _require_no_trouble(reports: Tensor) -> None:
    if bool(reports[:, 0].any()):
        rank = int((reports[:, 0] != 0).to(torch.int8).argmax())
        _raise(rank, len(reports), int(reports[rank, 0]), int(reports[rank, 1]))


def merged(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reports merge to; if one is of trouble, NaN."""
    channels = (reports.shape[1] - 2) // 2
    trouble, count, mean, var = reports.split((1, 1, channels, channels), dim=1)
    whole = merge(Pool(count, mean, var.abs() * count))
    poison = torch.where((trouble != 0).any(), torch.nan, 0.0)
    total = (whole.var + poison).abs()
    wide = (var.signbit() & var.isfinite()).any()
    return whole.count, whole.mean + poison, torch.where(wide, -total, total)


def _fail(x: Tensor, reports: Tensor, rank: int, trouble: int, found: int) -> Tensor:
    """Raise, on the process that failed a check. An operator, so that compiled code first sends its report."""
    del x
    _raise(rank, len(reports), trouble, found)


def _normalize(x: Tensor, *arguments: Any) -> Tensor:
    engine = dispatch.serving(x)
    y = engine.empty_like(x)
    if x.numel():
        engine.normalize(_saved(x, *arguments), arguments[2], y)
    return y  # type: ignore[no-any-return]


def _reduce(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(2, C) this process's sums of dz and of dz * xhat; and dz if it is asked for, else nothing."""
    *layer, need_dz = arguments
    engine = dispatch.serving(x)
    dz = engine.empty_like(x) if need_dz else None
    nothing = x.new_empty(0) if dz is None else dz
    if not x.numel():
        return x.new_zeros((2, x.shape[1]), dtype=torch.float64), nothing
    sums = engine.backward_reduce(dy, _saved(x, *layer), dz)
    return torch.stack((sums.dz, sums.dz_xhat)), nothing


def _input(dy: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    """dx, of the sums and the count of all processes."""
    *layer, sums, _ = arguments
    engine = dispatch.serving(x)
    dx = engine.empty_like(x)
    if x.numel():
        engine.backward_input(dy, _saved(x, *layer), Sums(sums[0], sums[1]), dx)
    return dx  # type: ignore[no-any-return]


def _saved(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    parameter: float,
) -> Saved:
    engine = dispatch.serving(x)
    spec = BatchNormSpec(1, True, 0.0, eps, Activation(activation, parameter))
    wide = var.is_cpu and bool(var.signbit().any())
    return ops.kept(engine, x, spec, Moments(count, mean, var.abs(), wide), weight, bias, residual, valid)


# ------------------------------------------------------------------------------------------ what they would return
def _report_fake(x: Tensor, valid: Tensor | None) -> Tensor:
    del valid
    return x.new_empty(2 + 2 * x.shape[1], dtype=torch.float64)


def _merge_fake(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = (reports.shape[1] - 2) // 2
    return reports.new_empty(1), reports.new_empty(channels), reports.new_empty(channels)


def _like_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _reduce_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    del dy
    dz = torch.empty_like(x) if arguments[-1] else x.new_empty(0)
    return x.new_empty((2, x.shape[1]), dtype=torch.float64), dz


def _input_fake(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    del dy
    return torch.empty_like(x)


for _name, _kernel, _fake in (
    ("sync_report", _report, _report_fake),
    ("sync_merge", _merge, _merge_fake),
    ("sync_fail", _fail, _like_fake),
    ("sync_normalize", _normalize, _like_fake),
    ("sync_reduce", _reduce, _reduce_fake),
    ("sync_input", _input, _input_fake),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"gpu_bn::{_name}", _fake, lib=LIBRARY)

report = torch.ops.gpu_bn.sync_report.default
merge_reports = torch.ops.gpu_bn.sync_merge.default
fail = torch.ops.gpu_bn.sync_fail.default
normalize = torch.ops.gpu_bn.sync_normalize.default
reduce = torch.ops.gpu_bn.sync_reduce.default
backward_input = torch.ops.gpu_bn.sync_input.default
