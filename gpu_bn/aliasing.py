"""Checks of shared memory: an array that is written may share memory with no other, nor overlap itself.

The arrays may belong to any library. Where the bounds of two arrays overlap, their strides decide exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_bn.call import Call

Array = Any
LIMIT = 100_000
"""The limit of NumPy's search for common elements, in steps; if it is exceeded, arrays count as overlapping."""


def check_call(call: Call, writes: bool) -> bool:
    """Call :func:`check_written` for a forward call, which ``writes`` or reads its running statistics and counter."""
    state = call[4:7]
    written, read = ((call.out, *state), call[:4]) if writes else ((call.out,), call[:7])
    targets = [array for array in written if array is not None]
    if not targets or _plainly_distinct(targets, [array for array in read if array is not None]):
        return True
    names = ("input", "weight", "bias", "residual", "running_mean", "running_var", "num_batches_tracked")
    named = dict(zip(names, call, strict=False))
    tracked = {name: named.pop(name) for name in names[4:]} if writes else {}
    return check_written({"out": call.out, **tracked}, named)


def check_written(written: dict[str, Array | None], read: dict[str, Array | None]) -> bool:
    """Check that each written array shares memory with no other, and that no two of its elements overlap.

    ``out`` may share memory with the input and the residual: :meth:`Backend.check_out
    <gpu_bn.backends.protocol.Backend.check_out>` says when.

    Returns:
        ``True`` if no two arrays share memory; ``False`` if ``out`` may share some with the input or the residual.

    Raises:
        ValueError: two arrays share memory, or one overlaps itself; the message names them.
    """
    targets = [array for array in written.values() if array is not None]
    if not targets or _plainly_distinct(targets, [array for array in read.values() if array is not None]):
        return True
    views = {name: numpy_view(array) for name, array in (written | read).items() if array is not None}
    names = list(views)
    for i, name in enumerate(names[: len(targets)]):
        if overlaps_itself(views[name]):
            raise ValueError(f"{name} is written to, but some of its elements share memory")
        for other in names[i + 1 :]:
            if not (name == "out" and other in ("input", "residual")) and overlaps(views[name], views[other]):
                raise ValueError(f"{name} is written to, so it may not share memory with {other}")
    return False


def _plainly_distinct(targets: list[Array], others: list[Array]) -> bool:
    """Tell quickly whether ownership or bounds alone show that no memory is shared, as in most calls."""
    if not isinstance(targets[0], np.ndarray):
        return _bounds_are_distinct(targets, others)
    arrays = targets + others
    if all(type(array) is np.ndarray and array.flags.owndata for array in arrays):
        distinct = set(map(id, targets))
        return len(distinct) == len(targets) and distinct.isdisjoint(map(id, others))
    for i, array in enumerate(targets):
        if not array.flags.c_contiguous:
            return False
        for other in arrays[i + 1 :]:
            if np.may_share_memory(array, other):
                return False
    return True


def _bounds_are_distinct(targets: list[Array], others: list[Array]) -> bool:
    """Tell whether the bounds of torch tensors or CuPy arrays show that no memory is shared."""
    bounds = []
    for array in [*targets, *{id(array): array for array in others}.values()]:
        if hasattr(array, "data_ptr"):
            start, dense = array.data_ptr(), array.is_contiguous()
        else:
            start, dense = array.data.ptr, array.flags.c_contiguous
        if dense:
            bounds.append((start, start + array.nbytes))
        elif len(bounds) < len(targets):  # a target with gaps might overlap itself
            return False
        elif hasattr(array, "data_ptr"):  # torch's strides are not negative
            last = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
            bounds.append((start, start + (last + 1) * array.element_size()))
        else:
            bounds.append(np.lib.array_utils.byte_bounds(numpy_view(array)))
    bounds.sort()
    return all(one[1] <= after[0] for one, after in pairwise(bounds))


def numpy_view(array: Array) -> NDArray[Any]:
    """Return a NumPy array at the memory of an array of any library, to compare addresses; do not read it."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "data_ptr"):
        itemsize = array.element_size()
        return memory_view(array.data_ptr(), tuple(array.shape), tuple(s * itemsize for s in array.stride()), itemsize)
    return memory_view(array.data.ptr, array.shape, array.strides, array.dtype.itemsize)


def memory_view(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> NDArray[Any]:
    """Return a NumPy array at an address, to compare addresses; do not read it. Strides are in bytes."""
    interface = {"version": 3, "typestr": f"|V{itemsize}", "shape": shape, "strides": strides, "data": (address, False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def overlaps(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Tell whether two arrays have a byte in common."""
    if not np.may_share_memory(one, other):
        return False
    try:
        return np.shares_memory(one, other, max_work=LIMIT)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: NDArray[Any]) -> bool:
    """Tell whether two elements of an array have a byte in common."""
    if array.flags.c_contiguous or array.size < 2:
        return False
    covered = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if stride < covered:
                break
            covered += (size - 1) * stride
    else:
        return False
    # Axes may interleave without overlap. Halves along an axis have equal strides, so one of them stands for both.
    while array.size > 1:
        axis = max(range(array.ndim), key=array.shape.__getitem__)
        half = math.ceil(array.shape[axis] / 2)
        first, second = np.split(array, [half], axis)
        if overlaps(first, second):
            return True
        array = first
    return False
