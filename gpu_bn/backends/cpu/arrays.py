"""The operations that the compiled backend needs from an array library: addresses, strides and new arrays."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_bn.backends.layout import Layout
from gpu_bn.spec import FLOAT_DTYPES

Array = Any
ALIGNED = 64
"""Large outputs begin at a multiple of this many bytes, so that kernels can write them past the caches."""
LARGE = 1 << 20
"""Bytes from which on an output is large."""
TAGS = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}
DATA_OFFSET = object.__basicsize__
"""The offset, in a NumPy array object, of the pointer to its elements; C code compiled for NumPy reads it there, too.

``__array_interface__`` has the address as well, but takes five times as long."""
_pointer = ctypes.c_void_p.from_address


class Arrays(Protocol):
    """The operations of one array library."""

    float64: Any

    def code(self, dtype: Any) -> int:
        """Return the index of a dtype in :data:`gpu_bn.spec.FLOAT_DTYPES`."""

    def address(self, array: Array) -> int:
        """Return the address of the first element."""

    def strides(self, array: Array) -> tuple[int, ...] | None:
        """Return the strides in elements; ``None`` if kernels cannot read the memory as elements of this dtype."""

    def byte_strides(self, array: Array) -> tuple[int, ...]:
        """Return the strides in any one unit; they only serve to order the axes."""

    def layout(self, array: Array) -> Hashable:
        """Return a key of all that kernels depend on except the address: dtype, shape, strides and alignment."""

    def empty_float64(self, length: int) -> Array:
        """Return a new float64 vector."""

    def tagged_address(self, vector: Array) -> int:
        """Return the address of a contiguous float32 vector, or 1 more for float64; -1 for any other vector."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new contiguous array."""

    def empty_like(self, x: Array) -> Array:
        """Return a new array with the shape, dtype and memory format of ``x``."""

    def empty_ordered(self, x: Array, order: tuple[int, ...]) -> Array:
        """Return a new array like ``x``, without gaps, in native byte order, whose axes have this memory order."""

    def assign(self, target: Array, value: Array) -> None:
        """Copy ``value`` to ``target`` and convert it to its dtype."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array of zeros."""

    def scalar(self, value: float) -> Array:
        """Return a float64 array of shape (1,)."""

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Return the vectors joined end to end."""

    def select_valid(self, x: Array, axis: int, valid: Array) -> Array:
        """Return a contiguous copy of the valid positions of ``x``, (C, positions)."""

    def scatter_valid(self, target: Array, axis: int, valid: Array, selected: Array) -> None:
        """Write ``selected``, (C, positions), to the valid positions of ``target``, and 0 to the others."""


class NumpyArrays:
    """The operations of NumPy; see :class:`Arrays`."""

    float64 = np.dtype(np.float64)

    @staticmethod
    def code(dtype: np.dtype[Any]) -> int:
        return _code(dtype)

    @staticmethod
    def address(array: NDArray[Any]) -> int:
        address: int | None = _pointer(id(array) + DATA_OFFSET).value if array.size else None
        return address or 0

    @staticmethod
    def strides(array: NDArray[Any]) -> tuple[int, ...] | None:
        size = array.itemsize
        if not (array.flags.aligned and array.dtype.isnative) or any(stride % size for stride in array.strides):
            return None
        return tuple([stride // size for stride in array.strides])

    @staticmethod
    def byte_strides(array: NDArray[Any]) -> tuple[int, ...]:
        return array.strides

    @staticmethod
    def layout(array: NDArray[Any]) -> Hashable:
        return array.dtype, array.shape, array.strides, array.flags.aligned

    @staticmethod
    def empty_float64(length: int) -> NDArray[Any]:
        return np.empty(length)

    def tagged_address(self, vector: NDArray[Any]) -> int:
        tag = TAGS.get(vector.dtype)
        if tag is None or not vector.flags.c_contiguous or not vector.flags.aligned:
            return -1
        return self.address(vector) + tag

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < LARGE:
            return np.empty(shape, dtype)
        room = np.empty(nbytes + ALIGNED, np.uint8)
        start = -room.__array_interface__["data"][0] % ALIGNED
        array: NDArray[Any] = room[start : start + nbytes].view(dtype).reshape(shape)
        return array

    def empty_like(self, x: NDArray[Any]) -> NDArray[Any]:
        if x.flags.c_contiguous:
            return self.empty(x.shape, x.dtype)
        return self._empty_ordered(x.shape, Layout.from_array(x, 0).order, x.dtype)

    def empty_ordered(self, x: NDArray[Any], order: tuple[int, ...]) -> NDArray[Any]:
        return self._empty_ordered(x.shape, order, x.dtype.newbyteorder("="))

    def _empty_ordered(self, shape: tuple[int, ...], order: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return self.empty(tuple([shape[axis] for axis in order]), dtype).transpose(np.argsort(order))

    @staticmethod
    def assign(target: NDArray[Any], value: NDArray[Any]) -> None:
        with np.errstate(all="ignore"):
            np.copyto(target, value, casting="unsafe")

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    @staticmethod
    def scalar(value: float) -> NDArray[Any]:
        return np.array([value])

    @staticmethod
    def concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(arrays)

    @staticmethod
    def select_valid(x: NDArray[Any], axis: int, valid: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.moveaxis(x, axis, 0)[:, valid.squeeze(axis)])

    @staticmethod
    def scatter_valid(target: NDArray[Any], axis: int, valid: NDArray[Any], selected: NDArray[Any]) -> None:
        np.copyto(target, np.zeros((), target.dtype), where=~valid)
        np.moveaxis(target, axis, 0)[:, valid.squeeze(axis)] = selected


@cache
def _code(dtype: np.dtype[Any]) -> int:
    return FLOAT_DTYPES.index(dtype.name)
