"""torch CPU tensors for the compiled backend, which reads their memory in place, by address and strides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_bn.backends.cpu.backend import CpuBackend
from gpu_bn.spec import FLOAT_DTYPES


def backend() -> CpuBackend:
    """Return the backend of torch CPU tensors, for :func:`gpu_bn.registry.load`."""
    from gpu_bn.backends.cpu import doors

    return CpuBackend(TENSORS, doors)


_TAGS = {torch.float32: 0, torch.float64: 1}


def _data_address(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 if they are not in memory, as for a negated view or virtual zeros."""
    try:
        return 0 if tensor.is_neg() else tensor.data_ptr()
    except RuntimeError:  # a wrapper that has outlived its transform
        return 0


_ALIGNMENT_MASKS = {getattr(torch, name): getattr(torch, name).itemsize - 1 for name in FLOAT_DTYPES}


class TorchTensors:
    """The operations of torch on CPU tensors; see :class:`gpu_bn.backends.cpu.arrays.Arrays`.

    New tensors name their device, for ``with torch.device("cuda")`` changes the default.
    """

    float64 = torch.float64
    code: Any = {getattr(torch, name): code for code, name in enumerate(FLOAT_DTYPES)}.__getitem__
    address = staticmethod(Tensor.data_ptr)
    empty_like: Any = staticmethod(torch.empty_like)

    @staticmethod
    def byte_strides(array: Tensor) -> tuple[int, ...]:
        return array.stride()

    @staticmethod
    def layout(array: Tensor) -> Hashable:
        dtype, address = array.dtype, _data_address(array)
        return dtype, array.shape, array.stride(), not address or address & _ALIGNMENT_MASKS[dtype]

    @staticmethod
    def tagged_address(vector: Tensor) -> int:
        tag = _TAGS.get(vector.dtype)
        if tag is None or not vector.is_contiguous():
            return -1
        address = _data_address(vector)
        return address + tag if address and address % 4 == 0 else -1

    @staticmethod
    def empty_float64(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.float64, device="cpu")

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: torch.dtype | str) -> Tensor:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return torch.empty(shape, dtype=dtype, device="cpu")

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    @staticmethod
    def strides(array: Tensor) -> tuple[int, ...] | None:
        address = _data_address(array)
        return array.stride() if address and address % array.element_size() == 0 else None

    @staticmethod
    def empty_ordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return torch.empty_permuted(x.shape, order, dtype=x.dtype, device="cpu")

    @staticmethod
    @torch.no_grad()
    def assign(target: Tensor, value: Tensor) -> None:
        target.copy_(value)

    @staticmethod
    def scalar(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device="cpu")

    @staticmethod
    def concatenate(arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays))

    @staticmethod
    @torch.no_grad()
    def select_valid(x: Tensor, axis: int, valid: Tensor) -> Tensor:
        return x.movedim(axis, 0)[:, valid.squeeze(axis)].contiguous()

    @staticmethod
    @torch.no_grad()
    def scatter_valid(target: Tensor, axis: int, valid: Tensor, selected: Tensor) -> None:
        target.masked_fill_(~valid, 0)
        target.movedim(axis, 0)[:, valid.squeeze(axis)] = selected


TENSORS = TorchTensors()
