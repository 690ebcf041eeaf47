"""torch's CPU tensors for the compiled backend: their memory is read where it is, by address and strides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_bn.aliasing import extent
from gpu_bn.backends.cpu.backend import CpuBackend
from gpu_bn.backends.layout import check_out
from gpu_bn.spec import FLOAT_DTYPES


def backend() -> CpuBackend:
    """The backend of torch's CPU tensors, for :func:`gpu_bn.registry.load`."""
    from gpu_bn.backends.cpu import doors

    return CpuBackend(TENSORS, doors)


_TAGS = {torch.float32: 0, torch.float64: 1}


def _place(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 if they do not, as those of a negated view, or of zeros that take no memory."""
    try:
        return 0 if tensor.is_neg() else tensor.data_ptr()
    except RuntimeError:  # a wrapper that has outlived its transform
        return 0


_ALIGNMENTS = {getattr(torch, name): getattr(torch, name).itemsize - 1 for name in FLOAT_DTYPES}


class TorchTensors:
    """See :class:`gpu_bn.backends.cpu.arrays.Arrays`.

    New tensors name their device: kernels write to their addresses, and ``torch.device("cuda")`` sets another default.
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
        dtype, at = array.dtype, _place(array)
        return dtype, array.shape, array.stride(), not at or at & _ALIGNMENTS[dtype]

    @staticmethod
    def tagged(vector: Tensor) -> int:
        tag = _TAGS.get(vector.dtype)
        if tag is None or not vector.is_contiguous():
            return -1
        at = _place(vector)
        return at + tag if at and at % 4 == 0 else -1

    @staticmethod
    def double(length: int) -> Tensor:
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
        at = _place(array)
        return array.stride() if at and at % array.element_size() == 0 else None

    @staticmethod
    def dense(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return torch.empty_permuted(x.shape, order, dtype=x.dtype, device="cpu")

    @staticmethod
    @torch.no_grad()
    def assign(target: Tensor, value: Tensor) -> None:
        target.copy_(value)

    @staticmethod
    def number(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device="cpu")

    @staticmethod
    def concatenate(arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays))

    @staticmethod
    @torch.no_grad()
    def chosen(x: Tensor, axis: int, valid: Tensor) -> Tensor:
        return x.movedim(axis, 0)[:, valid.squeeze(axis)].contiguous()

    @staticmethod
    @torch.no_grad()
    def scatter(target: Tensor, axis: int, valid: Tensor, chosen: Tensor) -> None:
        target.masked_fill_(~valid, 0)
        target.movedim(axis, 0)[:, valid.squeeze(axis)] = chosen

    @staticmethod
    def check_out(out: Tensor, x: Tensor, residual: Tensor | None, in_place: bool) -> None:
        check_out(_extent(out), _extent(x), None if residual is None else _extent(residual), in_place)


TENSORS = TorchTensors()


def _extent(tensor: Tensor) -> Any:
    size = tensor.element_size()
    return extent(tensor.data_ptr(), tuple(tensor.shape), tuple([size * stride for stride in tensor.stride()]), size)
