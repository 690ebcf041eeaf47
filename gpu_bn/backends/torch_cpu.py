"""torch tensors on the CPU, served by the NumPy backend without a copy.

NumPy works on views of the tensors. Outputs are allocated by ``torch.empty_like`` and have its memory format. A tensor
that is only read is copied first if its elements overlap in memory (an expanded one), or if its memory does not hold
its values (a negated view).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_bn.backends.layout import check_out
from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.backends.protocol import Moments, Saved, Sums

Array = NDArray[Any]


def backend() -> TorchBackend:
    """Return the backend, for :func:`gpu_bn.registry.load`."""
    return TorchBackend()


class TorchBackend:
    """See :class:`gpu_bn.backends.protocol.Backend`."""

    name = "numpy"

    def vector(self, array: Tensor) -> Tensor:
        return array.detach().to(torch.float64, copy=True)

    def cast(self, vector: Tensor, dtype: torch.dtype | str) -> Tensor:
        return vector.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def copy(self, array: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(array)

    def check_out(self, out: Tensor, x: Tensor, residual: Tensor | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    def stats(self, x: Tensor, axis: int, valid: Tensor | None = None, groups: int = 1) -> Moments:
        return _tensor_moments(NUMPY.stats(_ordered(x), axis, _optional(valid), groups))

    def update_running(self, moments: Moments, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
        NUMPY.update_running(_array_moments(moments), as_array(running_mean), as_array(running_var), momentum)

    def normalize(self, saved: Saved, residual: Tensor | None, out: Tensor) -> None:
        NUMPY.normalize(_array_saved(saved), _optional(residual), as_array(out))

    def backward_reduce(self, dy: Tensor, saved: Saved, dz: Tensor | None) -> Sums:
        sums = NUMPY.backward_reduce(_readable(dy), _array_saved(saved), None if dz is None else as_array(dz))
        return Sums(torch.from_numpy(sums.dz), torch.from_numpy(sums.dz_xhat))

    def backward_input(self, dy: Tensor, saved: Saved, sums: Sums | None, out: Tensor) -> None:
        wide = None if sums is None else Sums(sums.dz.numpy(), sums.dz_xhat.numpy())
        NUMPY.backward_input(_readable(dy), _array_saved(saved), wide, as_array(out))


class _Numpy(NumpyBackend):
    """The NumPy backend with torch's allocator and torch's choice of strides."""

    def empty_like(self, x: Array) -> Array:
        return as_array(torch.empty_like(as_tensor(x)))


NUMPY = _Numpy()


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array in the same memory.

    Raises:
        ImportError: the tensor is bfloat16 and the package ml_dtypes, which gives NumPy that dtype, is not installed.
    """
    if tensor.dtype is torch.bfloat16:
        return _shared_array(tensor.detach().view(torch.uint16)).view(_bfloat16())
    return _shared_array(tensor)


_export: Any = getattr(torch._C, "_to_dlpack_versioned", None)
_dispatch_keys = torch._C._dispatch_keys


def _ordinary() -> frozenset[int]:
    """Return the dispatch keys of tensors that are neither negated nor wrapped: their memory holds their values."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    inference = keys(key.CPU) | keys(key.AutocastCPU)
    usual = inference | keys(key.ADInplaceOrView) | keys(key.AutogradCPU)
    return frozenset((inference.raw_repr(), usual.raw_repr()))


_ORDINARY = frozenset[int]() if _export is None else _ordinary()


class _Exported:
    """An object that gives a DLPack capsule to ``np.from_dlpack``."""

    __slots__ = ("capsule",)

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU, device 0


def _shared_array(tensor: Tensor) -> Array:
    """Return an array in the memory of a tensor, by DLPack.

    After ``tensor.numpy()`` the storage can no longer be resized, but FullyShardedDataParallel resizes the storages of
    parameters.
    """
    if _dispatch_keys(tensor).raw_repr() in _ORDINARY:
        array: Array = np.from_dlpack(_Exported(_export(tensor)))
    else:
        array = tensor.detach().numpy()  # raises where the memory does not hold the values
    return array


def as_tensor(array: Array) -> Tensor:
    """Return an array as a tensor in the same memory."""
    if array.dtype.kind == "V":  # bfloat16
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@cache
def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 tensors on the CPU need the package ml_dtypes: pip install ml_dtypes") from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _readable(tensor: Tensor) -> Array:
    """Return a tensor's values as an array; a copy if its memory does not hold them."""
    if _dispatch_keys(tensor).raw_repr() not in _ORDINARY:
        tensor = tensor.detach()
        if tensor.is_neg() or tensor._is_zerotensor():
            tensor = tensor.clone()
    return as_array(tensor)


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _readable(tensor)


def _ordered(x: Tensor) -> Array:
    """Return a tensor as an array; a copy if elements may overlap: torch and NumPy then order axes differently."""
    if not x.is_contiguous():
        strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
        if 0 in strides or len(set(strides)) < len(strides):
            x = x.detach().clone()
    return _readable(x)


def _tensor_moments(moments: Moments) -> Moments:
    count = moments.count if isinstance(moments.count, int) else torch.from_numpy(moments.count)
    return Moments(count, torch.from_numpy(moments.mean), torch.from_numpy(moments.var), moments.wide)


def _array_moments(moments: Moments) -> Moments:
    count = moments.count if isinstance(moments.count, int) else moments.count.numpy()
    return Moments(count, moments.mean.numpy(), moments.var.numpy(), moments.wide)


def _array_saved(saved: Saved) -> Saved:
    return replace(
        saved,
        x=_ordered(saved.x),
        residual=_optional(saved.residual),
        moments=_array_moments(saved.moments),
        weight=_optional(saved.weight),
        bias=_optional(saved.bias),
        valid=_optional(saved.valid),
        weight_dtype=saved.weight_dtype and _array_dtype(saved.weight_dtype),
        bias_dtype=saved.bias_dtype and _array_dtype(saved.bias_dtype),
    )


@cache
def _array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return _bfloat16() if dtype is torch.bfloat16 else np.dtype(str(dtype).rpartition(".")[2])
