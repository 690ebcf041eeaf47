"""Signatures: all that a prepared call depends on, without addresses. Calls with equal signatures share their steps.

Most are plain tuples, because a call makes about eight of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpu_bn.plan import VECTOR_BYTES

Array = Any
Shape = tuple[int, ...]
InputSignature = tuple[int, Shape, Any, Shape, int]
"""The signature of the input: device, shape, dtype, strides, and the address modulo the size of a vector."""
TensorSignature = tuple[Shape, int, int]
"""The signature of a tensor with the input's shape and dtype: strides, address modulo the size of a vector, device."""
VectorSignature = tuple[Any, Shape, int, int]
"""The signature of a per-channel vector: dtype, strides, the address modulo 8, device."""
VectorSignatures = tuple[VectorSignature | None, ...]
"""The signatures of weight, bias, mean and variance, in this order."""

FLOAT64 = np.dtype(np.float64)


class Signature(NamedTuple):
    """The signature of a call with tensors; ``counted``: only the device knows the count of a ghost batch."""

    tier: str | None
    x: InputSignature
    axis: int
    activation: str
    groups: int
    valid: TensorSignature | None
    counted: bool


def input_signature(x: Array) -> InputSignature:
    """Return the signature of an input."""
    data = x.data
    return data.device_id, x.shape, x.dtype, x.strides, data.ptr % VECTOR_BYTES


def tensor_signature(array: Array | None) -> TensorSignature | None:
    """Return the signature of a tensor with the input's shape and dtype."""
    if array is None:
        return None
    data = array.data
    return array.strides, data.ptr % VECTOR_BYTES, data.device_id


def vector_signature(array: Array | None) -> VectorSignature | None:
    """Return the signature of a per-channel vector."""
    if array is None:
        return None
    data = array.data
    return array.dtype, array.strides, data.ptr % FLOAT64.itemsize, data.device_id


def row_signature(device: int) -> VectorSignature:
    """Return the signature of a vector that a forward call has saved."""
    return FLOAT64, (FLOAT64.itemsize,), 0, device
