"""How a tensor of any rank, channel axis and strides is seen as (N, C, S): outer axes, channels, inner axes.

And whether two tensors overlap, and how one is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpu_bn.aliasing import extent as extent
from gpu_bn.aliasing import overlap, view
from gpu_bn.spec import check_overlap

Array = NDArray[Any]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's axes in the order in which they lie in memory, and its (N, C, S) shape in that order.

    Channels-last tensors have S = 1. The order is the input's; outputs are made in the same one.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    n: int
    c: int
    s: int

    @staticmethod
    def of(x: Array, axis: int) -> Layout:
        """Return the layout of an array with its channels along ``axis``."""
        if x.flags.c_contiguous:
            return _layout(x.shape, tuple(range(x.ndim)), axis)
        return Layout.of_strides(x.shape, x.strides, axis)

    @staticmethod
    def of_strides(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Layout:
        """Return the layout of any library's array, from its shape and its strides in any unit."""
        return _layout(shape, memory_order(shape, strides), axis)

    @property
    def count(self) -> int:
        """Positions a channel."""
        return self.n * self.s

    def empty(self, dtype: Any) -> Array:
        """Return a new array of this layout."""
        dense = np.empty([self.shape[axis] for axis in self.order], dtype)
        return dense.transpose(np.argsort(self.order)) if self.order != tuple(range(len(self.order))) else dense


def check_out(out: Any, x: Any, residual: Any, in_place: bool) -> None:
    """Do the work of :meth:`Backend.check_out <gpu_bn.backends.protocol.Backend.check_out>`, for any library's arrays.

    No two devices of a process have addresses in common.
    """
    target = view(out)
    for name, array in (("input", x), ("residual", residual)):
        if array is not None and overlap(target, other := view(array)):
            starts = [one.__array_interface__["data"][0] for one in (target, other)]  # .ctypes would import a module
            check_overlap(name, starts[0] == starts[1] and target.strides == other.strides, in_place)


@lru_cache(1024)
def _layout(shape: tuple[int, ...], order: tuple[int, ...], axis: int) -> Layout:
    ordered = [shape[a] for a in order]
    at = order.index(axis)
    return Layout(shape, order, math.prod(ordered[:at]), shape[axis], math.prod(ordered[at + 1 :]))


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes from the largest stride to the smallest; a broadcast array has no order of its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(strides, shape, strict=True)):
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda axis: -abs(strides[axis])))


@lru_cache(256)
def block_sizes(
    shape: tuple[int, ...], order: tuple[int, ...], kept: tuple[int, ...], elements: int, channels: int
) -> tuple[int, ...]:
    """Return a block's size along each axis: at most ``elements`` in all, the axes of ``order`` cut from the first on.

    Along the axes ``kept``, which are not summed over, it has at most ``channels``, or more where positions are few.
    """
    steps = [max(size, 1) for size in shape]
    # With fewer positions, vectors would be as large as the block.
    positions = max(8, math.prod(steps) // math.prod(steps[axis] for axis in kept))
    for axes, most in ((kept, max(elements // positions, channels)), (order, elements)):
        for axis in (axis for axis in order if axis in axes):
            others = math.prod(steps[other] for other in axes if other != axis)
            pieces = -(-steps[axis] // max(1, most // others))
            steps[axis] = -(-steps[axis] // pieces)
    return tuple(steps)


def each(
    blocks: Iterable[tuple[slice, ...]], axes: tuple[int, ...], work: Callable[..., None], *arguments: Any
) -> None:
    """Do some work on each block; where memory does not suffice for a whole one, on its halves along some axes.

    The work writes last, in one call, so that it can be done again: while ``out`` is written there is no way back.
    """
    for block in blocks:
        try:
            work(block, *arguments)
        except MemoryError:
            if not (both := halves(block, axes)):
                raise
            each(both, axes, work, *arguments)


def made_for(
    block: tuple[slice, ...], axes: tuple[int, ...], make: Callable[[tuple[slice, ...]], Made]
) -> Iterator[tuple[tuple[slice, ...], Made]]:
    """Yield a block with what is made for it; where memory does not suffice, each of its halves along some axes."""
    try:
        made = make(block)
    except MemoryError:
        if both := halves(block, axes):
            for half in both:
                yield from made_for(half, axes, make)
            return
        made = make(block)  # one channel: there may be memory for it now
    yield block, made


def at(vector: Any, block: tuple[slice, ...]) -> Any:
    """Return a view of some channels of per-channel values, or of a block of a mask."""
    return vector[tuple([part if size > 1 else slice(None) for part, size in zip(block, vector.shape, strict=True)])]


def halves(block: tuple[slice, ...], axes: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Cut a block in two along the longest of some axes; return nothing if it is too small."""
    sizes = {axis: block[axis].stop - block[axis].start for axis in axes}
    axis = max(axes, key=sizes.__getitem__)
    if sizes[axis] < 2:
        return []
    middle = block[axis].start + sizes[axis] // 2
    ends = (slice(block[axis].start, middle), slice(middle, block[axis].stop))
    return [(*block[:axis], end, *block[axis + 1 :]) for end in ends]
