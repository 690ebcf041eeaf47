"""Code of a model that asks what a normalisation is or holds: it would find an identity in place of a folded one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType
from typing import Any

import torch

HELD = frozenset({
    "eps", "momentum", "affine", "track_running_stats", "num_features", "running_mean", "running_var",
    "num_batches_tracked",
})  # fmt: skip
"""The attributes that a normalisation loses and other layers rarely have."""
OWN = ("torch.", "gpu_bn.")
"""Modules whose code is not a model's."""


def is_inspected(norm: torch.nn.Module, root: CodeType) -> bool:
    """Whether a function that has led to a normalisation's call, since ``root`` ran, names its class or attributes."""
    kinds = [kind for kind in type(norm).__mro__ if not issubclass(torch.nn.Identity, kind)]
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not root:
        if not frame.f_globals.get("__name__", "").startswith(OWN):
            names = _names(frame.f_code)
            own = frame.f_locals.get("self")
            if any(name in names and not hasattr(own, name) for name in HELD):
                return True
            if any(kind.__name__ in names for kind in kinds):
                return True
            if any(_is_one_of(frame.f_globals.get(name), kinds) for name in names):
                return True
        frame = frame.f_back
    return False


@contextmanager
def readers_told(norms: Iterable[torch.nn.Module], tell: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Tell of each normalisation whose parameters or buffers a model's code reads."""
    held = [vars(norm) for norm in norms]
    for norm, attributes in zip(norms, held, strict=True):
        for name in ("_parameters", "_buffers"):
            attributes[name] = _Told(attributes[name], norm, tell)
    try:
        yield
    finally:
        for attributes in held:
            for name in ("_parameters", "_buffers"):
                attributes[name] = dict(attributes[name])


class _Told(dict[str, Any]):
    """A normalisation's parameters or buffers."""

    def __init__(self, held: dict[str, Any], norm: torch.nn.Module, tell: Callable[[torch.nn.Module], None]) -> None:
        super().__init__(held)
        self.norm, self.tell = norm, tell

    def __getitem__(self, name: str) -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
            frame = frame.f_back
        if frame is not None and not frame.f_globals.get("__name__", "").startswith(OWN):
            self.tell(self.norm)
        return super().__getitem__(name)


@lru_cache(1024)
def _names(code: CodeType) -> frozenset[str]:
    """The global names, attributes and texts in a function, and in the functions in it."""
    constants = list(_constants(code.co_consts))
    texts = (value for value in constants if isinstance(value, str))
    inner = (_names(value) for value in constants if isinstance(value, CodeType))
    return frozenset({*code.co_names, *texts}).union(*inner)


def _constants(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _constants(value)
        else:
            yield value


def _is_one_of(value: Any, kinds: list[type]) -> bool:
    """Whether a global is one of these classes, or a tuple or set that holds one."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(_is_one_of(each, kinds) for each in value)
    return isinstance(value, type) and value in kinds
