"""torch's CPU tensors for the compiled backend: their memory is read where it is, by address and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_bn.backends._layout import check_out, extent
from gpu_bn.spec import FLOAT_DTYPES


class TorchTensors:
    """See :class:`gpu_bn.backends.cpu.arrays.Arrays`."""

    float64 = torch.float64
    code: Any = {getattr(torch, name): code for code, name in enumerate(FLOAT_DTYPES)}.__getitem__
    address = staticmethod(Tensor.data_ptr)
    empty_like: Any = staticmethod(torch.empty_like)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def strides(array: Tensor) -> tuple[int, ...] | None:
        try:
            return None if array.is_neg() or array.data_ptr() % array.element_size() else array.stride()
        except RuntimeError:  # a wrapper that has outlived its transform has no memory of its own
            return None

    @staticmethod
    def spacing(array: Tensor) -> tuple[int, ...]:
        return array.stride()

    @staticmethod
    def dense(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return torch.empty_permuted(x.shape, order, dtype=x.dtype)

    @staticmethod
    @torch.no_grad()
    def assign(target: Tensor, value: Tensor) -> None:
        target.copy_(value)

    @staticmethod
    def number(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

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
        target.zero_()
        target.movedim(axis, 0)[:, valid.squeeze(axis)] = chosen

    @staticmethod
    def check_out(out: Tensor, x: Tensor, residual: Tensor | None, in_place: bool) -> None:
        check_out(_extent(out), _extent(x), None if residual is None else _extent(residual), in_place)


def _extent(tensor: Tensor) -> Any:
    size = tensor.element_size()
    return extent(tensor.data_ptr(), tuple(tensor.shape), tuple([size * stride for stride in tensor.stride()]), size)
