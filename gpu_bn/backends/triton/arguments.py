"""Prepare the arguments of calls as Triton's kernels take them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gpu_bn.backends.layout import Layout
from gpu_bn.backends.protocol import Saved
from gpu_bn.backends.sign_bits import mask_bytes
from gpu_bn.backends.triton.strides import View, aligned, contiguous_view, dense, view_of
from gpu_bn.kernels.triton.activations import functions
from gpu_bn.plan import VECTOR_BYTES, Work, alignment

Array = Any


class BackwardCall(NamedTuple):
    """Hold the arguments of a backward call as kernels take them, and the launches prepared for all calls like it."""

    key: tuple[Any, ...]
    view: View
    x: Array
    tensors: tuple[Array | None, ...]
    """x, dy, residual, mask, valid."""
    vectors: tuple[Array | None, ...]
    """mean, var, weight, bias."""
    numbers: tuple[float, float]
    """eps, the activation's parameter."""
    gradient: Any
    alignment: int
    groups: int
    extended: bool
    """Whether the split tier has to serve: there is a mask, or the count is not known here."""

    def work(self, writes: int, apart: bool = True) -> Work:
        """What the call moves; ``apart``: it writes tensors of its own, which share no memory with those it reads."""
        _, _, residual, mask, valid = self.tensors
        given = residual is not None
        return work_of(
            of_one_group(self.view.layout, self.groups), self.x, self.alignment, backward=True, reads=2 + given,
            writes=writes, staged=2 + given, sign_bits=mask is not None,
            ragged=apart and valid is None and self.groups == 1,
        )  # fmt: skip


def backward_call(dy: Array, saved: Saved, need: frozenset[str]) -> BackwardCall:
    """Prepare the arguments of a backward call as kernels take them."""
    groups = saved.spec.groups
    view = grouped_view(saved.x, saved.spec.axis, groups)
    x, dy, positions = dense(saved.x, view), dense(dy, view), position_bytes(saved.valid, view)
    activation, mask, residual = saved.spec.activation, saved.mask, saved.residual
    if mask is not None:  # it has a byte for each whole vector
        x, dy = aligned(x, VECTOR_BYTES), aligned(dy, VECTOR_BYTES)
        positions = None if positions is None else aligned(positions, VECTOR_BYTES)
    elif residual is not None:
        residual = dense(residual, view)
    alignment = alignment_of(x, dy, residual, positions)
    moments = saved.moments
    vectors = (moments.mean.contiguous(), moments.var.contiguous(), saved.weight, saved.bias)
    key = (
        view, x.dtype, x.device, alignment, residual is None, mask is None, activation.name,
        saved.spec.batch_stats, *[None if v is None else v.dtype for v in vectors],
        saved.weight_dtype, saved.bias_dtype, need, positions is None, groups, isinstance(moments.count, int),
    )  # fmt: skip
    act = functions(activation.name)
    return BackwardCall(
        key, view, x, (x, dy, residual, mask, positions), vectors, (saved.spec.eps, activation.parameter),
        act.gradient if mask is None else act.masked_gradient, alignment, groups,
        positions is not None or not isinstance(moments.count, int),
    )  # fmt: skip


def work_of(layout: Layout, x: Array, alignment: int, **moved: Any) -> Work:
    """What a call moves, for the planner; ``moved`` are fields of :class:`gpu_bn.plan.Work`."""
    return Work(layout.n, layout.c, layout.s, x.element_size(), alignment=alignment, **moved)


def of_one_group(layout: Layout, groups: int) -> Layout:
    """Of a ghost batch, what a plan needs to know."""
    return layout if groups == 1 else replace(layout, n=layout.n // groups)


def grouped_view(x: Array, axis: int, groups: int) -> View:
    """Return the view of a tensor; one with the batch outermost if that is cut into ghost batches."""
    view = view_of(x, axis)
    return view if groups == 1 or view.layout.order[0] == 0 else contiguous_view(x, axis)


def position_bytes(valid: Array | None, view: View) -> Array | None:
    """Return the mask as kernels take it: bytes in the order of the tensor's positions."""
    return None if valid is None else valid.permute(view.layout.order).contiguous().view(torch.uint8)


def rows_of_groups(kept: Array, groups: int) -> tuple[Array, ...]:
    """Return what is kept of ghost batches: their means, their variances, weight, bias."""
    mean, var = kept[: 2 * groups].view(2, -1)
    return mean, var, kept[2 * groups], kept[2 * groups + 1]


def give_back(written: tuple[Array | None, ...], given: tuple[Array | None, ...]) -> None:
    """Copy vectors to those in whose place they were."""
    for mine, theirs in zip(written, given, strict=True):
        if theirs is not None and mine is not theirs:
            theirs.copy_(mine)


def momentum_of(momentum: Any, device: Any) -> tuple[float, Array | None]:
    """Return a number, or else where it is on the device."""
    if not isinstance(momentum, torch.Tensor) or (momentum.is_cpu and device.type != "cpu"):
        return float(momentum), None
    momentum = momentum.to(device)
    return 0.0, momentum if momentum.is_floating_point() else momentum.double()


def divisor_of(saved: Saved) -> tuple[float, Array | None]:
    """Return what a kernel divides by: 1 / count, or the counts where they are."""
    count = saved.moments.count
    return (0.0, count.contiguous()) if isinstance(count, torch.Tensor) else (1.0 / count, None)


def alignment_of(*arrays: Array | None) -> int:
    """Return how many bytes the addresses are multiples of, 16 at most."""
    return alignment([array.data_ptr() for array in arrays if array is not None])


@lru_cache(1024)
def mask_size(view: View, axis: int, itemsize: int, activation: str, groups: int) -> int:
    order = view.layout.order
    return mask_bytes([view.layout.shape[at] for at in order], order.index(axis), itemsize, activation, groups)
