"""Describe the memory of torch tensors, and copy those that kernels cannot read: not dense, or not aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gpu_bn.backends.layout import Layout

Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The memory layout of tensors of one shape, strides and channel axis.

    Attributes:
        layout: the axes in memory order, as (N, C, S).
        strides: the strides, in elements.
        inverse: the permutation from memory order back to the order of the tensor's axes.
        dense: whether there are no gaps between the elements.
        dense_strides: the strides of a dense tensor of that layout.
    """

    layout: Layout
    strides: tuple[int, ...]
    inverse: tuple[int, ...]
    dense: bool
    dense_strides: tuple[int, ...]


def view_of(x: Array, axis: int) -> View:
    """Return the view of a tensor; it is the same object for equal shapes, strides and axes."""
    return _view(x.shape, x.stride(), axis)


def contiguous_view(x: Array, axis: int) -> View:
    """Return the view of a contiguous tensor of the same shape."""
    return _view(x.shape, _contiguous_strides(x.shape), axis)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@lru_cache(4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> View:
    shape = tuple(shape)
    contiguous = _contiguous_strides(shape)
    is_contiguous = all(a == b or size == 1 for a, b, size in zip(strides, contiguous, shape, strict=True))
    layout = Layout.from_strides(shape, tuple(max(s, 1) for s in contiguous) if is_contiguous else strides, axis)
    inverse = tuple(int(axis) for axis in np.argsort(layout.order))
    ordered = _contiguous_strides([shape[axis] for axis in layout.order])
    dense_strides = tuple(ordered[axis] for axis in inverse)
    dense = all(a == b or size == 1 for a, b, size in zip(strides, dense_strides, shape, strict=True))
    return View(layout, strides, inverse, dense, strides if dense else dense_strides)


def is_dense(array: Array, view: View) -> bool:
    """Tell whether a tensor of the view's shape is dense in the view's order, at a multiple of its element size."""
    has_no_gaps = (view.dense and array.stride() == view.strides) or array.permute(view.layout.order).is_contiguous()
    return bool(has_no_gaps and array.data_ptr() % array.element_size() == 0)


def dense(array: Array, view: View) -> Array:
    """Return the tensor if it is dense in the view's order, or else a copy that is."""
    if is_dense(array, view):
        return array
    return array.permute(view.layout.order).clone(memory_format=torch.contiguous_format).permute(view.inverse)


def aligned(array: Array, size: int) -> Array:
    """Return the dense tensor if its address is a multiple of ``size`` bytes, or else an aligned copy."""
    return array if array.data_ptr() % size == 0 else array.clone(memory_format=torch.preserve_format)
