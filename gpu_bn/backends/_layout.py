"""How a tensor of any rank, channel axis and strides is seen as (N, C, S): outer axes, channels, inner axes.

And whether two tensors overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_bn.spec import check_overlap

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's axes in the order in which they lie in memory, and its (N, C, S) shape in that order.

    Channels-last tensors have S = 1. The order is the input's; outputs are made in the same one. ``by_channel`` is that
    order with the channels before all else.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    n: int
    c: int
    s: int
    by_channel: tuple[int, ...]

    @staticmethod
    def of(x: Array, axis: int) -> Layout:
        """The layout of an array with its channels along ``axis``."""
        if x.flags.c_contiguous:
            return _layout(x.shape, tuple(range(x.ndim)), axis)
        return Layout.of_strides(x.shape, x.strides, axis)

    @staticmethod
    def of_strides(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Layout:
        """The layout of any library's array, from its shape and its strides in any unit."""
        return _layout(shape, memory_order(shape, strides), axis)

    @property
    def count(self) -> int:
        """Positions a channel."""
        return self.n * self.s

    def empty(self, dtype: Any) -> Array:
        """A new array of this layout."""
        dense = np.empty([self.shape[axis] for axis in self.order], dtype)
        return dense.transpose(np.argsort(self.order)) if self.order != tuple(range(len(self.order))) else dense

    def read(self, array: Array) -> Array:
        """An array seen as (N, C, S), copied if its strides do not allow it."""
        return array.transpose(self.order).reshape(self.n, self.c, self.s)

    def hidden(self, valid: Array | None) -> Array | None:
        """Which positions do not count, as (N, 1, S) in this layout's order; ``valid`` has one channel."""
        return None if valid is None else ~valid.transpose(self.order).reshape(self.n, 1, self.s)

    def write(self, array: Array) -> Array | None:
        """An array seen as (N, C, S), or ``None`` if its strides do not allow it."""
        try:
            return array.transpose(self.order).reshape((self.n, self.c, self.s), copy=False)
        except ValueError:
            return None

    def assign(self, out: Array, value: Array) -> None:
        """Write an (N, C, S) array to one of this layout's shape, with any strides."""
        ordered = out.transpose(self.order)
        np.copyto(ordered, value.reshape(ordered.shape), casting="unsafe")


def extent(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Array:
    """Another library's array as NumPy sees its memory, to be compared with others and never read; strides in bytes."""
    seen = {"version": 3, "typestr": f"|V{itemsize}", "shape": shape, "strides": strides, "data": (address, False)}
    return np.asarray(SimpleNamespace(__array_interface__=seen))


def check_out(out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
    """:meth:`Backend.check_out <gpu_bn.backends.protocol.Backend.check_out>` of arrays, or of extents.

    No two devices of a process have addresses in common.
    """
    for name, array in (("input", x), ("residual", residual)):
        if array is not None and np.shares_memory(out, array):
            check_overlap(name, (out.ctypes.data, out.strides) == (array.ctypes.data, array.strides), in_place)


@lru_cache(1024)
def _layout(shape: tuple[int, ...], order: tuple[int, ...], axis: int) -> Layout:
    ordered = [shape[a] for a in order]
    at = order.index(axis)
    by_channel = (axis, *order[:at], *order[at + 1 :])
    return Layout(shape, order, math.prod(ordered[:at]), shape[axis], math.prod(ordered[at + 1 :]), by_channel)


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The axes from the largest stride to the smallest; a broadcast array has no order of its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(strides, shape, strict=True)):
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda axis: -abs(strides[axis])))
