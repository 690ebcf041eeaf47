"""See torch tensors as kernels do: dense in some order of their axes, at an address, apart from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gpu_bn.backends.layout import Layout

Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Describe how tensors of one shape, strides and channel axis lie in memory.

    Attributes:
        layout: their axes in memory order, as (N, C, S).
        strides: in elements.
        inverse: from memory order back to the tensor's own.
        dense: whether there is nothing between their elements.
        dense_strides: what a dense tensor of that layout has.
    """

    layout: Layout
    strides: tuple[int, ...]
    inverse: tuple[int, ...]
    dense: bool
    dense_strides: tuple[int, ...]


def view_of(x: Array, axis: int) -> View:
    """Return the view of a tensor; the same one for tensors alike."""
    return _view(x.shape, x.stride(), axis)


def contiguous_view(x: Array, axis: int) -> View:
    """Return the view of a contiguous tensor of the same shape."""
    return _view(x.shape, tuple(math.prod(x.shape[at + 1 :]) for at in range(x.dim())), axis)


@lru_cache(4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> View:
    shape = tuple(shape)
    contiguous = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    plain = all(a == b or size == 1 for a, b, size in zip(strides, contiguous, shape, strict=True))
    layout = Layout.from_strides(shape, tuple(max(s, 1) for s in contiguous) if plain else strides, axis)
    sizes = [shape[at] for at in layout.order]
    inverse = tuple(int(at) for at in np.argsort(layout.order))
    ordered = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    wanted = tuple(ordered[at] for at in inverse)
    dense = all(a == b or size == 1 for a, b, size in zip(strides, wanted, shape, strict=True))
    return View(layout, strides, inverse, dense, strides if dense else wanted)


def is_dense(array: Array, view: View) -> bool:
    """Tell whether a kernel can read or write a tensor of the view's shape where it is."""
    usual = view.dense and array.stride() == view.strides
    whole = usual or array.permute(view.layout.order).is_contiguous()
    return bool(whole and array.data_ptr() % array.element_size() == 0)


def dense(array: Array, view: View) -> Array:
    """Return the tensor, or a copy of it, with its axes in the view's order and nothing between its elements."""
    if is_dense(array, view):
        return array
    return array.permute(view.layout.order).clone(memory_format=torch.contiguous_format).permute(view.inverse)


def aligned(array: Array, size: int) -> Array:
    """Return the dense tensor, or a copy of it at a multiple of ``size`` bytes."""
    return array if array.data_ptr() % size == 0 else array.clone(memory_format=torch.preserve_format)
