"""Layouts: a tensor of any rank, channel axis and strides as (N, C, S): outer axes, channels, inner axes.

Also the check that an output overlaps no input, and the division of a tensor into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpu_bn.aliasing import numpy_view, overlaps
from gpu_bn.spec import check_overlap

Array = NDArray[Any]
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of a tensor in memory order, and its (N, C, S) shape in that order.

    Channels-last tensors have S = 1. Outputs have the memory order of the input.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    n: int
    c: int
    s: int

    @staticmethod
    def from_array(x: Array, axis: int) -> Layout:
        """Return the layout of an array with its channels along ``axis``."""
        if x.flags.c_contiguous:
            return _layout(x.shape, tuple(range(x.ndim)), axis)
        return Layout.from_strides(x.shape, x.strides, axis)

    @staticmethod
    def from_strides(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> Layout:
        """Return the layout of an array of any library from its shape and its strides, in any unit."""
        return _layout(shape, memory_order(shape, strides), axis)

    @property
    def count(self) -> int:
        """The number of positions of a channel."""
        return self.n * self.s

    def empty(self, dtype: Any) -> Array:
        """Return a new array with this layout."""
        dense = np.empty([self.shape[axis] for axis in self.order], dtype)
        return dense.transpose(np.argsort(self.order)) if self.order != tuple(range(len(self.order))) else dense


def check_out(out: Any, x: Any, residual: Any, in_place: bool) -> None:
    """Implement :meth:`Backend.check_out <gpu_bn.backends.protocol.Backend.check_out>` for arrays of any library.

    Devices are not compared, because no two devices of a process share an address.
    """
    target = numpy_view(out)
    for name, array in (("input", x), ("residual", residual)):
        if array is not None and overlaps(target, other := numpy_view(array)):
            starts = [one.__array_interface__["data"][0] for one in (target, other)]  # .ctypes would import a module
            check_overlap(name, starts[0] == starts[1] and target.strides == other.strides, in_place)


@lru_cache(1024)
def _layout(shape: tuple[int, ...], order: tuple[int, ...], axis: int) -> Layout:
    ordered = [shape[a] for a in order]
    place = order.index(axis)
    return Layout(shape, order, math.prod(ordered[:place]), shape[axis], math.prod(ordered[place + 1 :]))


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes from the largest stride to the smallest, or in their given order if one has stride 0."""
    if any(stride == 0 and size > 1 for stride, size in zip(strides, shape, strict=True)):
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda axis: -abs(strides[axis])))


@lru_cache(256)
def block_sizes(
    shape: tuple[int, ...], order: tuple[int, ...], kept: tuple[int, ...], elements: int, channels: int
) -> tuple[int, ...]:
    """Return the size of a block along each axis: at most ``elements`` in all, with the axes cut in ``order``.

    Along the axes ``kept``, which are not summed over, a block has at most ``channels`` elements, or more where
    channels have few positions.
    """
    sizes = [max(size, 1) for size in shape]
    # At least 8, so that per-channel vectors are much smaller than the block.
    positions = max(8, math.prod(sizes) // math.prod(sizes[axis] for axis in kept))
    for axes, limit in ((kept, max(elements // positions, channels)), (order, elements)):
        for axis in (axis for axis in order if axis in axes):
            others = math.prod(sizes[other] for other in axes if other != axis)
            blocks = -(-sizes[axis] // max(1, limit // others))
            sizes[axis] = -(-sizes[axis] // blocks)
    return tuple(sizes)


def for_each_block(
    blocks: Iterable[tuple[slice, ...]], axes: tuple[int, ...], work: Callable[..., None], *arguments: Any
) -> None:
    """Call ``work(block, *arguments)`` for each block; where memory runs out, for its halves along one of the axes.

    The work is repeated on the halves, so it must allocate first and write its result last, in one call.
    """
    for block in blocks:
        try:
            work(block, *arguments)
        except MemoryError:
            if not (halves := halve(block, axes)):
                raise
            for_each_block(halves, axes, work, *arguments)


def prepared_blocks(
    block: tuple[slice, ...], axes: tuple[int, ...], prepare: Callable[[tuple[slice, ...]], Prepared]
) -> Iterator[tuple[tuple[slice, ...], Prepared]]:
    """Yield ``(block, prepare(block))``; where memory runs out, the same for its halves along one of the axes."""
    try:
        prepared = prepare(block)
    except MemoryError:
        if halves := halve(block, axes):
            for half in halves:
                yield from prepared_blocks(half, axes, prepare)
            return
        prepared = prepare(block)  # one channel cannot be halved; try once more, for memory may be free now
    yield block, prepared


def select(vector: Any, block: tuple[slice, ...]) -> Any:
    """Return a view of the block of per-channel values or of a mask; axes of size 1 are broadcast, not cut."""
    return vector[tuple([part if size > 1 else slice(None) for part, size in zip(block, vector.shape, strict=True)])]


def halve(block: tuple[slice, ...], axes: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Return the halves of a block along the longest of the axes; an empty list if that axis has one element."""
    sizes = {axis: block[axis].stop - block[axis].start for axis in axes}
    axis = max(axes, key=sizes.__getitem__)
    if sizes[axis] < 2:
        return []
    middle = block[axis].start + sizes[axis] // 2
    ends = (slice(block[axis].start, middle), slice(middle, block[axis].stop))
    return [(*block[:axis], end, *block[axis + 1 :]) for end in ends]
