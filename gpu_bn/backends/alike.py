"""Guards that tell whether torch tensors are like those of an earlier call, and the layouts of new tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]
"""A function that tells whether tensors have the types, states, dtypes, devices, shapes and strides of earlier ones."""
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""The shape, strides and dtype of a tensor."""
Selector = Callable[[Any], tuple[Any, ...]]
"""A function that returns a tuple of some items of a sequence."""
_guards: Any = torch._C._dynamo.guards
empty_on_cpu: Callable[..., Tensor] = _guards._empty_strided_cpu
"""Return a new CPU tensor with a given layout, in half the time of ``empty_like``; compiled torch code uses it."""


def make_guard(tensors: Sequence[Tensor], shapes: Any = None, strides: Any = None) -> Guard:
    """Return a guard for tensors like these; ``shapes`` and ``strides`` replace theirs if given."""
    guards = _guards.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    return guards.check  # type: ignore[no-any-return]


def make_selector(names: Sequence[str], wanted: Sequence[str]) -> Selector:
    """Return a selector of the items called ``wanted`` from a sequence whose items are called ``names``."""
    indices = [names.index(name) for name in wanted]
    return itemgetter(*indices) if len(indices) > 1 else itemgetter(slice(indices[0], indices[0] + 1))


def empty_like_layout(tensor: Tensor) -> Layout:
    """Return the layout of ``torch.empty_like(tensor)``."""
    new = torch.empty_like(tensor)
    return tuple(new.shape), new.stride(), new.dtype


def contiguous_layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Return the layout of a contiguous tensor."""
    return shape, tuple([prod(shape[axis + 1 :]) for axis in range(len(shape))]), dtype


def allocator(device: torch.device) -> Callable[..., Tensor]:
    """Return a function that allocates tensors on a device; torch's fast one for GPUs serves the current GPU only."""
    if device.type == "cpu":
        return empty_on_cpu
    if device.type == "cuda" and torch.cuda.device_count() == 1:
        return _guards._empty_strided_cuda  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
