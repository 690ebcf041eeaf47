"""What torch's tensors of calls alike have in common: guards, which torch has for compiled code, and likenesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]
"""Tells whether tensors have the types, states, dtypes, devices, shapes and strides of others."""
Choice = Callable[[Any], tuple[Any, ...]]
"""Chooses some of a tuple."""
_guards: Any = torch._C._dynamo.guards.TensorGuards


def guard_of(tensors: Sequence[Tensor], shapes: Any = None, strides: Any = None) -> Guard:
    """Return what tells whether tensors are like these, with other shapes and strides if they are given."""
    guards = _guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    return guards.check  # type: ignore[no-any-return]


def chooser(names: Sequence[str], wanted: Sequence[str]) -> Choice:
    """Return what chooses the wanted of named things."""
    places = [names.index(name) for name in wanted]
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


@cache
def _memory(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=device)


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``empty_like`` makes a contiguous tensor of, in a third of the time that options take; one number."""
    return _memory(dtype, device).expand(shape)
