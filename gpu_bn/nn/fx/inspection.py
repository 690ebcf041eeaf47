"""Find code of a model that inspects a normalisation. If that were folded, the code would find an identity instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import dropwhile
from types import CodeType
from typing import Any

import torch

NORM_ATTRIBUTES = frozenset({
    "eps", "momentum", "affine", "track_running_stats", "num_features", "running_mean", "running_var",
    "num_batches_tracked",
})  # fmt: skip
"""The attributes that folding removes and that other layers rarely have."""


def callers(root: CodeType | None = None) -> Iterator[Any]:
    """Yield the frames of the caller's callers, from the innermost up to the code ``root``, which is left out."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not root:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def module_name(frame: Any) -> str:
    """Return the name of the Python module whose code a frame runs."""
    return str(frame.f_globals.get("__name__", ""))


def runs_model_code(frame: Any) -> bool:
    """Tell whether a frame runs code of a model, rather than that of torch or gpu_bn."""
    return not module_name(frame).startswith(("torch.", "gpu_bn."))


def is_inspected(norm: torch.nn.Module, root: CodeType) -> bool:
    """Tell whether a model's function between ``root`` and a normalisation's call names its class or attributes."""
    kinds = [kind for kind in type(norm).__mro__ if not issubclass(torch.nn.Identity, kind)]
    for frame in filter(runs_model_code, callers(root)):
        names, own = names_in(frame.f_code), frame.f_locals.get("self")
        read = any(name in names and not hasattr(own, name) for name in NORM_ATTRIBUTES)
        if read or any(kind.__name__ in names for kind in kinds):
            return True
        if any(_is_one_of(frame.f_globals.get(name), kinds) for name in names):
            return True
    return False


@contextmanager
def report_reads(norms: Iterable[torch.nn.Module], report: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Within this context, call ``report(norm)`` whenever a model's code reads a parameter or buffer of one of them."""
    dicts = [(norm, vars(norm), name) for norm in norms for name in ("_parameters", "_buffers")]
    for norm, attributes, name in dicts:
        attributes[name] = _ReportingDict(attributes[name], norm, report)
    try:
        yield
    finally:
        for _, attributes, name in dicts:
            attributes[name] = dict(attributes[name])


class _ReportingDict(dict[str, Any]):
    """The parameters or buffers of a normalisation, which report that a model's code reads one."""

    def __init__(
        self, tensors: dict[str, Any], norm: torch.nn.Module, report: Callable[[torch.nn.Module], None]
    ) -> None:
        super().__init__(tensors)
        self.norm, self.report = norm, report

    def __getitem__(self, name: str) -> Any:
        reader = next(dropwhile(lambda frame: module_name(frame).startswith("torch."), callers()), None)
        if reader is not None and runs_model_code(reader):
            self.report(self.norm)
        return super().__getitem__(name)


@lru_cache(1024)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the global names, attribute names and string constants in a function and in the functions within it."""
    names, pending = set(code.co_names), list(code.co_consts)
    while pending:
        value = pending.pop()
        if isinstance(value, tuple):
            pending += value
        elif isinstance(value, CodeType):
            names |= names_in(value)
        elif isinstance(value, str):
            names.add(value)
    return frozenset(names)


def _is_one_of(value: Any, kinds: list[type]) -> bool:
    """Tell whether a value is one of some classes, or a list, tuple or set that holds one."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(_is_one_of(each, kinds) for each in value)
    return isinstance(value, type) and value in kinds
