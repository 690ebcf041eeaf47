"""The calls of the CuPy backend, prepared: what each allocates, copies and launches, made from its signature alone.

A *signature* is a call's options and what :func:`tensor`, :func:`place` and :func:`vector` tell of its arrays. Calls of
one signature differ in addresses and numbers only, so that the steps made for the first serve all. Steps find arrays
and numbers in a frame, by the names of the kernels' arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_bn.backends.cupy.builder import FLOAT64, NONE, Draft, Place, Steps, Tensor, Vector
from gpu_bn.backends.cupy.steps import Frame, Step
from gpu_bn.plan import VECTOR_BYTES

Array = Any

SAVED = ("mean", "var", "weight", "bias")
"""The vectors that a forward call saves: rows of one array."""
ABSENT: Frame = dict.fromkeys(
    ("x", "dy", "residual", "y", "mask", "weight", "bias", "running_mean", "running_var", "momentum_at", "rows", "mean",
     "var", "partials", "counters", "valid", "counts", "sums", "dx", "dresidual", "dweight", "dbias", NONE)
)  # fmt: skip
"""A frame in which a call puts what it has."""


def tensor(x: Array) -> Tensor:
    """The input's part of a signature: device, shape, dtype, strides, and the address as far as vectors care."""
    data = x.data
    return data.device_id, x.shape, x.dtype, x.strides, data.ptr % VECTOR_BYTES


def place(array: Array | None) -> Place | None:
    """The part of a tensor whose shape and dtype follow from the input's."""
    if array is None:
        return None
    data = array.data
    return array.strides, data.ptr % VECTOR_BYTES, data.device_id


def vector(array: Array | None) -> Vector | None:
    """The part of a per-channel vector."""
    if array is None:
        return None
    data = array.data
    return array.dtype, array.strides, data.ptr % FLOAT64.itemsize, data.device_id


def row(device: int) -> Vector:
    """The part of a vector that a forward call has saved."""
    return FLOAT64, (FLOAT64.itemsize,), 0, device


class Call:
    """A prepared call.

    Attributes:
        steps: what is done, in order.
        keeps: what the backward call takes the place of the residual in ``z`` from: ``"mask"``, ``"residual"`` or
            nothing.
        count: positions that a channel has in a group, if they are not counted on the device.
    """

    def __init__(self, steps: Sequence[Step], keeps: str = "", count: int = 0) -> None:
        self.steps, self.keeps, self.count = tuple(steps), keeps, count

    def __call__(self, frame: Frame) -> None:
        for step in self.steps:
            step(frame)


# ------------------------------------------------------------------------------------------------ whole calls
def forward(
    tier: str | None, x: Tensor, axis: int, activation: str, groups: int, valid: Place | None, batch_stats: bool,
    residual: Place | None, out: Place | None, weight: Vector | None, bias: Vector | None,
    running_mean: Vector | None, running_var: Vector | None, bits: bool,
) -> Call:  # fmt: skip
    """Fills ``y``, ``rows`` (:data:`SAVED`), and, if it has them, ``mask`` and ``counts``.

    ``bits``: whether a mask may take the place of the residual.
    """
    counted = batch_stats and valid is not None
    draft = Draft(tier, x, axis, activation, groups, valid, counted, bits and residual is not None)
    draft.reads("residual", residual)
    draft.writes("y", out)
    draft.vectors(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    keeps = "residual" if residual is not None and activation != "identity" else ""
    if draft.mask_bytes:
        keeps = "mask"
    variant = residual is not None, keeps == "mask"
    if batch_stats:
        reads = 1 + (residual is not None)
        plan = draft.plan("forward", variant, reads=reads, mask=keeps == "mask")
    else:
        plan = draft.once()
    if keeps == "mask":
        draft.new("mask", draft.mask_bytes, np.uint8)
    if draft.counted:
        draft.new("counts", groups)
    draft.new("rows", (len(SAVED), draft.statistics))
    if not batch_stats:
        draft.normalize(plan, variant, ("running_mean", "running_var", "weight", "bias"), "rows")
    elif plan.tier != "split":
        draft.forward(plan, variant)
    else:
        draft.stats(plan, tracked=running_mean is not None)
        draft.normalize(plan, variant, draft.saved_rows())
    draft.gives_back("y", *(("running_mean", "running_var") if batch_stats else ()))
    return Call(draft.steps, keeps, draft.count)


def backward(
    tier: str | None, x: Tensor, axis: int, activation: str, groups: int, valid: Place | None, counted: bool,
    batch_stats: bool, dy: Place, residual: Place | None, mask: bool, saved: Sequence[Vector | None],
    need: frozenset[str], weight_dtype: Any, bias_dtype: Any,
) -> Call:  # fmt: skip
    """Fills what is in ``need``; ``saved`` are the vectors of a forward call."""
    draft = Draft(tier, x, axis, activation, groups, valid, counted, mask)
    draft.reads("dy", dy)
    draft.reads("residual", residual)
    draft.vectors(**dict(zip(SAVED, saved, strict=True)))
    for name in ("dx", "dresidual"):
        if name in need:
            draft.writes(name)
    for name, dtype in (("dweight", weight_dtype), ("dbias", bias_dtype)):
        if name in need:
            draft.new(name, draft.channels, dtype)
            draft.dtypes[name] = dtype.name
    source = _source(activation, mask, residual)
    dx, dresidual, parameters = "dx" in need, "dresidual" in need, not need.isdisjoint(("dweight", "dbias"))
    if batch_stats and dx:
        reads = 2 + (residual is not None)
        plan = draft.plan(
            "backward", (source,), backward=True, reads=reads, staged=reads, writes=1 + dresidual, mask=mask
        )
        if plan.tier == "split":
            draft.backward_reduce(plan, source, NONE, "dresidual")
            draft.backward_input(plan, source, "sums", NONE)
        else:
            draft.backward(plan, source)
    elif parameters or not dx:
        draft.backward_reduce(draft.once(), source, "dx", "dresidual")
    else:
        draft.backward_input(draft.once(), source, NONE, "dresidual")
    draft.gives_back("dx", "dresidual")
    return Call(draft.steps)


# ------------------------------------------------------------------------------------------------------ phases
def stats(tier: str | None, x: Tensor, axis: int, groups: int, valid: Place | None) -> Call:
    """Fills the ``rows`` given, and ``counts``."""
    draft = Draft(tier, x, axis, "identity", groups, valid, counted=valid is not None)
    if draft.counted:
        draft.new("counts", groups)
    draft.stats(draft.once())
    return Call(draft.steps, count=draft.count)


def normalize(
    tier: str | None, x: Tensor, axis: int, activation: str, groups: int, valid: Place | None, counted: bool,
    residual: Place | None, out: Place, saved: Sequence[Vector | None],
) -> Call:  # fmt: skip
    """Fills the ``y`` given."""
    draft = Draft(tier, x, axis, activation, groups, valid, counted)
    draft.reads("residual", residual)
    draft.writes("y", out)
    draft.vectors(**dict(zip(SAVED, saved, strict=True)))
    draft.normalize(draft.once(), (residual is not None, False), SAVED)
    draft.gives_back("y")
    return Call(draft.steps)


def backward_phase(
    tier: str | None, x: Tensor, axis: int, activation: str, groups: int, valid: Place | None, counted: bool,
    dy: Place, residual: Place | None, saved: Sequence[Vector | None], fills: str, out: Place | None,
) -> Call:  # fmt: skip
    """Fills ``sums`` and the ``dresidual`` given, if any; or, from ``sums`` if there are any, the ``dx`` given."""
    draft = Draft(tier, x, axis, activation, groups, valid, counted)
    draft.reads("dy", dy)
    draft.reads("residual", residual)
    if out is not None:
        draft.writes(fills, out)
    draft.vectors(**dict(zip(SAVED, saved, strict=True)))
    source = _source(activation, False, residual)
    if fills == "dx":
        draft.backward_input(draft.once(), source, "sums", NONE)
    else:
        draft.backward_reduce(draft.once(), source, NONE, "dresidual")
    draft.gives_back(fills)
    return Call(draft.steps)


def track(device: int, channels: int, groups: int, count: int, vectors: Sequence[Vector | None]) -> Call:
    """Moves ``running_mean`` and ``running_var`` towards ``mean`` and ``var``, group after group."""
    steps = Steps(device, channels)
    steps.vectors(**dict(zip(("mean", "var", "running_mean", "running_var"), vectors, strict=True)))
    steps.track(groups, count, "mean", "var")
    steps.gives_back("running_mean", "running_var")
    return Call(steps.steps)


def _source(activation: str, mask: bool, residual: Place | None) -> str:
    """What a backward kernel takes the activation's gradient from."""
    if activation == "identity":
        return "DY"
    return "FROM_MASK" if mask else "FROM_X" if residual is None else "FROM_RESIDUAL"
