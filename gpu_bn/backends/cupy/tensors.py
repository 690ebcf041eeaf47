"""The CuPy backend for CUDA tensors of torch, for calls with ``backend="cupy"``. DLPack converts without copies.

Kernels run on torch's current stream and the tensors' device. CuPy allocates the outputs: their memory belongs to
CuPy's pool, not to torch's, and returns there when the tensors are deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gpu_bn.backends.cupy import backend as cupy_backend
from gpu_bn.backends.protocol import BackendUnavailableError


def backend() -> CupyForTorch:
    """Return the backend, for :func:`gpu_bn.registry.load`."""
    return CupyForTorch(cupy_backend.backend())


class CupyForTorch:
    """Implement :class:`gpu_bn.backends.protocol.Backend` and ``FusedBackend`` for torch tensors by a CuPy backend."""

    name = "cupy"

    def __init__(self, inner: cupy_backend.CupyBackend) -> None:
        self.inner = inner

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or not hasattr(self.inner, method):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {method!r}")
        return partial(self._call, method)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the CuPy backend with arrays instead of tensors, on torch's current stream."""
        tensor = next(_tensors(arguments))
        views = _Views()
        with ExitStack() as stack:
            if tensor.is_cuda:
                stack.enter_context(cupy.cuda.Device(tensor.device.index))
            stack.enter_context(cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(tensor.device))))
            result = getattr(self.inner, method)(*[views.to_arrays(argument) for argument in arguments])
            return views.to_tensors(result)


class _Stream:
    """A torch stream with the CUDA stream protocol, which not all versions of torch implement."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


class _Views:
    """The arrays that share memory with tensors, in one call."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Any, Tensor]] = {}

    def to_arrays(self, value: Any) -> Any:
        """Replace tensors in a value by arrays, and torch dtypes by NumPy dtypes."""
        return _replace(value, (Tensor, torch.dtype), self._array)

    def to_tensors(self, value: Any) -> Any:
        """Replace arrays in a value by tensors; an argument of the call becomes the same tensor object again."""
        return _replace(value, cupy.ndarray, self._tensor)

    def _array(self, tensor: Tensor | torch.dtype) -> Any:
        if isinstance(tensor, torch.dtype):
            return as_dtype(tensor)
        array = as_array(tensor)
        self.tensors[id(array)] = array, tensor
        return array

    def _tensor(self, array: Any) -> Tensor:
        return self.tensors[id(array)][1] if id(array) in self.tensors else as_tensor(array)


def as_array(tensor: Tensor) -> Any:
    """Return a CuPy array that shares memory with a tensor.

    Raises:
        BackendUnavailableError: the tensor is bfloat16, and the package ml_dtypes is not installed.
    """
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return cupy.from_dlpack(tensor.view(torch.int16)).view(_bfloat16())
    return cupy.from_dlpack(tensor)


def as_tensor(array: Any) -> Tensor:
    """Return a tensor that shares memory with a CuPy array."""
    if array.dtype.name == "bfloat16":
        return from_dlpack(array.view("int16")).view(torch.bfloat16)
    return from_dlpack(array)


def as_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype for a torch dtype; raise the same error as :func:`as_array`."""
    return np.dtype(_bfloat16() if dtype is torch.bfloat16 else str(dtype).rpartition(".")[2])


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendUnavailableError(
            "bfloat16 with backend='cupy' needs the package ml_dtypes: pip install ml_dtypes"
        ) from error
    return ml_dtypes.bfloat16


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, in its sequences and in its dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _replace(value: Any, kind: type | tuple[type, ...], convert: Any) -> Any:
    """Apply ``convert`` to all instances of ``kind`` in a value, in its sequences and in its dataclasses."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, tuple | list):
        parts = [_replace(part, kind, convert) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _replace(getattr(value, field.name), kind, convert) for field in fields(value)}
        return replace(value, **changed)
    return value
