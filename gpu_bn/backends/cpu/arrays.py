"""What the compiled backend must know of an array library: where elements are, and how to make arrays."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_bn.backends.layout import Layout, check_out
from gpu_bn.spec import FLOAT_DTYPES

Array = Any
ALIGNED = 64
"""Bytes: large outputs begin at a multiple, so that they can be written past the caches."""
LARGE = 1 << 20
TAGS = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}
AT = object.__basicsize__
"""Where an array's object has the address of its elements: C code compiled for NumPy reads it there, too.

``__array_interface__``, which has the address among much else, takes five times as long."""
_pointer = ctypes.c_void_p.from_address


class Arrays(Protocol):
    """One library."""

    float64: Any

    def code(self, dtype: Any) -> int:
        """A dtype's place in :data:`gpu_bn.spec.FLOAT_DTYPES`."""

    def address(self, array: Array) -> int:
        """Where the first element is."""

    def strides(self, array: Array) -> tuple[int, ...] | None:
        """In elements; ``None`` if the memory cannot be read as such elements."""

    def byte_strides(self, array: Array) -> tuple[int, ...]:
        """In bytes, or any other unit."""

    def layout(self, array: Array) -> Hashable:
        """All that kernels depend on but the address, its alignment included."""

    def double(self, length: int) -> Array:
        """A new float64 vector."""

    def tagged(self, vector: Array) -> int:
        """The tagged address of a dense vector of float32 or float64; -1 for any other."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new dense array."""

    def empty_like(self, x: Array) -> Array:
        """A new array of an array's shape, dtype and memory format."""

    def dense(self, x: Array, order: tuple[int, ...]) -> Array:
        """A new dense array whose axes lie in memory in this order, in native byte order."""

    def assign(self, target: Array, value: Array) -> None:
        """Copy, with a change of dtype where they differ."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array: ...

    def number(self, value: float) -> Array:
        """(1,) float64."""

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Vectors in one."""

    def chosen(self, x: Array, axis: int, valid: Array) -> Array:
        """The positions that count, (C, positions)."""

    def scatter(self, target: Array, axis: int, valid: Array, chosen: Array) -> None:
        """Write zeros where positions do not count, then such an array to where its elements come from."""

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        """See :class:`gpu_bn.backends.protocol.Backend`."""


class NumpyArrays:
    """NumPy's."""

    float64 = np.dtype(np.float64)

    @staticmethod
    def code(dtype: np.dtype[Any]) -> int:
        return _code(dtype)

    @staticmethod
    def address(array: NDArray[Any]) -> int:
        address: int | None = _pointer(id(array) + AT).value if array.size else None
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
    def double(length: int) -> NDArray[Any]:
        return np.empty(length)

    def tagged(self, vector: NDArray[Any]) -> int:
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
        at = -room.__array_interface__["data"][0] % ALIGNED
        array: NDArray[Any] = room[at : at + nbytes].view(dtype).reshape(shape)
        return array

    def empty_like(self, x: NDArray[Any]) -> NDArray[Any]:
        if x.flags.c_contiguous:
            return self.empty(x.shape, x.dtype)
        return self._ordered(x.shape, Layout.from_array(x, 0).order, x.dtype)

    def dense(self, x: NDArray[Any], order: tuple[int, ...]) -> NDArray[Any]:
        return self._ordered(x.shape, order, x.dtype.newbyteorder("="))

    def _ordered(self, shape: tuple[int, ...], order: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return self.empty(tuple([shape[axis] for axis in order]), dtype).transpose(np.argsort(order))

    @staticmethod
    def assign(target: NDArray[Any], value: NDArray[Any]) -> None:
        with np.errstate(all="ignore"):
            np.copyto(target, value, casting="unsafe")

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    @staticmethod
    def number(value: float) -> NDArray[Any]:
        return np.array([value])

    @staticmethod
    def concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(arrays)

    @staticmethod
    def chosen(x: NDArray[Any], axis: int, valid: NDArray[Any]) -> NDArray[Any]:
        chosen: NDArray[Any] = np.moveaxis(x, axis, 0)[:, valid.squeeze(axis)]
        return np.ascontiguousarray(chosen)

    @staticmethod
    def scatter(target: NDArray[Any], axis: int, valid: NDArray[Any], chosen: NDArray[Any]) -> None:
        np.copyto(target, np.zeros((), target.dtype), where=~valid)
        np.moveaxis(target, axis, 0)[:, valid.squeeze(axis)] = chosen

    @staticmethod
    def check_out(out: NDArray[Any], x: NDArray[Any], residual: NDArray[Any] | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)


@cache
def _code(dtype: np.dtype[Any]) -> int:
    return FLOAT_DTYPES.index(dtype.name)
