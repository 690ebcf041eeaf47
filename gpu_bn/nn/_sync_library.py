"""The phases of a call as operators ``torch.ops.gpu_bn.sync_*``, for statistics that several processes share.

A process sends a report of its part: ``(2 + 2 C,)`` in float64, ``[trouble, count, mean.., var..]``, in packets
(:mod:`gpu_bn.nn._packets`); with trouble on any process merged statistics are NaN. Nothing here is differentiated:
:mod:`gpu_bn.nn.sync` does that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_bn import dispatch, ops
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved, Sums
from gpu_bn.merge import Pool, merge
from gpu_bn.nn._library import LIBRARY, TAGS
from gpu_bn.spec import BatchNormSpec

_LAYER = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor count, Tensor mean, Tensor var"
)
_OPTIONS = "float eps, str activation, float parameter"
for _schema in (
    "sync_report(Tensor x, Tensor? valid) -> Tensor",
    "sync_merge(Tensor reports) -> (Tensor count, Tensor mean, Tensor var)",
    f"sync_normalize({_LAYER}, {_OPTIONS}) -> Tensor",
    f"sync_reduce(Tensor dy, {_LAYER}, {_OPTIONS}, bool need_dz) -> (Tensor sums, Tensor dz)",
    f"sync_input(Tensor dy, {_LAYER}, {_OPTIONS}, Tensor sums, Tensor? dz) -> Tensor",
):
    LIBRARY.define(_schema, tags=TAGS)


# ------------------------------------------------------------------------------------------------- what they compute
def _report(x: Tensor, valid: Tensor | None) -> Tensor:
    moments = dispatch.serving(x).stats(x, 1, valid)
    channels = x.shape[1]
    report = torch.empty(2 + 2 * channels, dtype=torch.float64, device=x.device)
    report[0] = 0.0
    report[1:2] = moments.count
    report[2 : 2 + channels] = moments.mean
    report[2 + channels :] = moments.var
    return report


def _merge(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (W, 2 + 2 C) the merged count, a tensor of one element, mean and variance; NaN if a report is of trouble."""
    return merged(reports)


def merged(reports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reports merge to; if one is of trouble, NaN."""
    channels = (reports.shape[1] - 2) // 2
    trouble, count, mean, var = reports.split((1, 1, channels, channels), dim=1)
    whole = merge(Pool(count, mean, var * count))
    poison = torch.where((trouble != 0).any(), torch.nan, 0.0)
    return whole.count, whole.mean + poison, whole.var + poison


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
    return ops.kept(engine, x, spec, Moments(count, mean, var), weight, bias, residual, valid)


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
    ("sync_normalize", _normalize, _like_fake),
    ("sync_reduce", _reduce, _reduce_fake),
    ("sync_input", _input, _input_fake),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"gpu_bn::{_name}", _fake, lib=LIBRARY)

report = torch.ops.gpu_bn.sync_report.default
merge_reports = torch.ops.gpu_bn.sync_merge.default
normalize = torch.ops.gpu_bn.sync_normalize.default
reduce = torch.ops.gpu_bn.sync_reduce.default
backward_input = torch.ops.gpu_bn.sync_input.default
