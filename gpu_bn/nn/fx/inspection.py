"""Code of a model that asks what a normalisation is or holds: it would find an identity in place of a folded one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import dropwhile
from types import CodeType
from typing import Any

import torch

HELD = frozenset({
    "eps", "momentum", "affine", "track_running_stats", "num_features", "running_mean", "running_var",
    "num_batches_tracked",
})  # fmt: skip
"""The attributes that a normalisation loses and other layers rarely have."""


def callers(root: CodeType | None = None) -> Iterator[Any]:
    """Yield the frames that have led here since ``root`` ran, from the innermost."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not root:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def module_name(frame: Any) -> str:
    """Return the name of the module whose code a frame runs."""
    return str(frame.f_globals.get("__name__", ""))


def is_models(frame: Any) -> bool:
    """Tell whether a frame runs code of a model, and not torch's or ours."""
    return not module_name(frame).startswith(("torch.", "gpu_bn."))


def is_inspected(norm: torch.nn.Module, root: CodeType) -> bool:
    """Tell whether a function that led to a normalisation's call, since ``root`` ran, names its class or attributes."""
    kinds = [kind for kind in type(norm).__mro__ if not issubclass(torch.nn.Identity, kind)]
    for frame in filter(is_models, callers(root)):
        names, own = names_in(frame.f_code), frame.f_locals.get("self")
        read = any(name in names and not hasattr(own, name) for name in HELD)
        if read or any(kind.__name__ in names for kind in kinds):
            return True
        if any(_is_one_of(frame.f_globals.get(name), kinds) for name in names):
            return True
    return False


@contextmanager
def readers_told(norms: Iterable[torch.nn.Module], tell: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Tell of each normalisation whose parameters or buffers a model's code reads."""
    held = [(norm, vars(norm), name) for norm in norms for name in ("_parameters", "_buffers")]
    for norm, attributes, name in held:
        attributes[name] = _Told(attributes[name], norm, tell)
    try:
        yield
    finally:
        for _, attributes, name in held:
            attributes[name] = dict(attributes[name])


class _Told(dict[str, Any]):
    """A normalisation's parameters or buffers."""

    def __init__(self, held: dict[str, Any], norm: torch.nn.Module, tell: Callable[[torch.nn.Module], None]) -> None:
        super().__init__(held)
        self.norm, self.tell = norm, tell

    def __getitem__(self, name: str) -> Any:
        reader = next(dropwhile(lambda frame: module_name(frame).startswith("torch."), callers()), None)
        if reader is not None and is_models(reader):
            self.tell(self.norm)
        return super().__getitem__(name)


@lru_cache(1024)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the global names, attributes and texts in a function, and in the functions in it."""
    names, left = set(code.co_names), list(code.co_consts)
    while left:
        value = left.pop()
        if isinstance(value, tuple):
            left += value
        elif isinstance(value, CodeType):
            names |= names_in(value)
        elif isinstance(value, str):
            names.add(value)
    return frozenset(names)


def _is_one_of(value: Any, kinds: list[type]) -> bool:
    """Tell whether a global is one of these classes, or a tuple or set that holds one."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(_is_one_of(each, kinds) for each in value)
    return isinstance(value, type) and value in kinds
