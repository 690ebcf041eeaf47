"""What torch's tensors of calls alike have in common: guards, which torch has for compiled code, and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]
"""Tells whether tensors have the types, states, dtypes, devices, shapes and strides of others."""
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""A tensor's shape, strides and dtype."""
Choice = Callable[[Any], tuple[Any, ...]]
"""Chooses some of a tuple."""
_for_compilers: Any = torch._C._dynamo.guards
new_on_cpu: Callable[..., Tensor] = _for_compilers._empty_strided_cpu
"""Make a tensor of a layout: torch's, made for compiled code, in half the time of ``empty_like``."""


def guard_of(tensors: Sequence[Tensor], shapes: Any = None, strides: Any = None) -> Guard:
    """Return what tells whether tensors are like these, with other shapes and strides if they are given."""
    guards = _for_compilers.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    return guards.check  # type: ignore[no-any-return]


def chooser(names: Sequence[str], wanted: Sequence[str]) -> Choice:
    """Return what chooses the wanted of named things."""
    places = [names.index(name) for name in wanted]
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def layout_of(tensor: Tensor) -> Layout:
    """Return the layout of what ``empty_like`` makes of a tensor."""
    like = torch.empty_like(tensor)
    return tuple(like.shape), like.stride(), like.dtype


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Return the layout of a contiguous tensor."""
    return shape, tuple([prod(shape[axis + 1 :]) for axis in range(len(shape))]), dtype


def allocator(device: torch.device) -> Callable[..., Tensor]:
    """Return what makes tensors of a layout on a device; torch's fast ones take the current GPU."""
    if device.type == "cpu":
        return new_on_cpu
    if device.type == "cuda" and torch.cuda.device_count() == 1:
        return _for_compilers._empty_strided_cuda  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
