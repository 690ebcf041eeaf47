"""Convert the arguments of calls into those of Triton kernels."""

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
    """The arguments of a backward call as kernels take them."""

    key: tuple[Any, ...]  # equal for calls that have the same launches
    view: View  # of the input; with ghost batches, the batch is its outermost axis
    x: Array
    tensors: tuple[Array | None, ...]  # x, dy, residual, mask, valid
    vectors: tuple[Array | None, ...]  # mean, var, weight, bias
    numbers: tuple[float, float]  # eps, the activation's parameter
    gradient: Any  # the kernel function for the gradient of the activation
    alignment: int  # bytes that all addresses of tensors are multiples of, at most 16
    groups: int  # number of ghost batches
    split: bool  # whether the split tier must serve: there is a mask, or only the device knows the count

    def work(self, writes: int, new_outputs: bool = True) -> Work:
        """Return the work of the call; ``new_outputs``: no written tensor shares memory with one that is read."""
        _, _, residual, mask, valid = self.tensors
        reads = 2 + (residual is not None)
        return work_of(
            group_layout(self.view.layout, self.groups), self.x, self.alignment, backward=True, reads=reads,
            writes=writes, staged=reads, sign_bits=mask is not None,
            ragged=new_outputs and valid is None and self.groups == 1,
        )  # fmt: skip


def backward_call(dy: Array, saved: Saved, need: frozenset[str]) -> BackwardCall:
    """Return the arguments of a backward call as kernels take them."""
    groups = saved.spec.groups
    view = grouped_view(saved.x, saved.spec.axis, groups)
    x, dy, positions = dense(saved.x, view), dense(dy, view), position_bytes(saved.valid, view)
    activation, mask, residual = saved.spec.activation, saved.mask, saved.residual
    if mask is not None:  # it has a byte for each aligned vector
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
    """Return the work of a call, for the planner; ``moved`` are more fields of :class:`gpu_bn.plan.Work`."""
    return Work(layout.n, layout.c, layout.s, x.element_size(), alignment=alignment, **moved)


def group_layout(layout: Layout, groups: int) -> Layout:
    """Return a layout with the (N, C, S) of one ghost batch, for the planner."""
    return layout if groups == 1 else replace(layout, n=layout.n // groups)


def grouped_view(x: Array, axis: int, groups: int) -> View:
    """Return the view of a tensor; with ghost batches, one whose outermost axis is the batch."""
    view = view_of(x, axis)
    return view if groups == 1 or view.layout.order[0] == 0 else contiguous_view(x, axis)


def position_bytes(valid: Array | None, view: View) -> Array | None:
    """Return the mask as contiguous bytes in the memory order of the tensor's positions."""
    return None if valid is None else valid.permute(view.layout.order).contiguous().view(torch.uint8)


def split_rows(rows: Array, groups: int) -> tuple[Array, ...]:
    """Split the [2 * groups + 2, C] saved rows into mean and variance, (groups * C,), and weight and bias, (C,)."""
    mean, var = rows[: 2 * groups].view(2, -1)
    return mean, var, rows[2 * groups], rows[2 * groups + 1]


def copy_back(written: tuple[Array | None, ...], given: tuple[Array | None, ...]) -> None:
    """Copy each written vector to the given one, unless they are the same tensor or ``None``."""
    for source, target in zip(written, given, strict=True):
        if target is not None and source is not target:
            target.copy_(source)


def momentum_of(momentum: Any, device: Any) -> tuple[float, Array | None]:
    """Return the momentum as a number and ``None``, or as 0.0 and a floating-point tensor on the device."""
    if not isinstance(momentum, torch.Tensor) or (momentum.is_cpu and device.type != "cpu"):
        return float(momentum), None
    momentum = momentum.to(device)
    return 0.0, momentum if momentum.is_floating_point() else momentum.double()


def divisor_of(saved: Saved) -> tuple[float, Array | None]:
    """Return 1 / count and ``None``, or 0.0 and the tensor of counts if only the device knows them."""
    count = saved.moments.count
    return (0.0, count.contiguous()) if isinstance(count, torch.Tensor) else (1.0 / count, None)


def alignment_of(*arrays: Array | None) -> int:
    """Return the largest power of two up to 16 that all addresses are multiples of."""
    return alignment([array.data_ptr() for array in arrays if array is not None])


@lru_cache(1024)
def mask_size(view: View, axis: int, itemsize: int, activation: str, groups: int) -> int:
    """Return the bytes of the sign bits that a forward call keeps; 0 if it keeps none."""
    order = view.layout.order
    return mask_bytes([view.layout.shape[at] for at in order], order.index(axis), itemsize, activation, groups)
