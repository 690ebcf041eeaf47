"""Find the values that a module's code reads beside its inputs.

A graph holds these values as they were when it was recorded. It must not run after they have changed.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Set
from functools import cached_property, lru_cache
from inspect import getattr_static
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch.fx import Graph

from gpu_bn.nn.fx.forward import INTERNAL, SIMPLE, ConditionError, is_same

MAX_VALUES = 100
"""The most values in containers and objects that are compared in each call. A module that reads more is refused."""
CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)
OPAQUE = (torch.nn.Module, torch.Tensor, type, ModuleType, FunctionType)
"""The types whose attributes are not compared here. A plan compares those of modules itself."""


def modules_read(root: torch.nn.Module, graph: Graph, entered: Iterable[Any], codes: Iterable[CodeType]) -> list[Any]:
    """Find the modules whose attributes code reads, and the modules that contain those which the graph calls.

    Entered modules and the parts of called ones are left out.
    """
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    outer = {path for target in targets for path in _prefixes(target)}
    names = {name for code in codes for name in _attributes_read(code)[1]}
    inner, excluded = tuple(f"{path}." for path in called), set(entered)
    modules = []
    for path, module in root.named_modules():
        if module in excluded or path.startswith(inner):
            continue
        read = not names.isdisjoint(vars(module).keys() - INTERNAL | {"training"})
        if read or path in outer or isinstance(module, CONTAINERS):
            modules.append(module)
    return modules


def _prefixes(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module, from the innermost."""
    while path := path.rpartition(".")[0]:
        yield path


def reachable_code(codes: dict[CodeType, dict[str, Any]], entered: Iterable[torch.nn.Module]) -> Set[CodeType]:
    """Return some code and that of all functions, methods and properties which it names, directly or indirectly.

    Functions are looked up in the globals of the code, methods and properties in the classes of the entered modules.
    """
    pending, kinds = list(codes.items()), {type(module) for module in entered}
    reachable = set(codes)
    while pending:
        code, scope = pending.pop()
        for name in set().union(*_attributes_read(code), code.co_names):
            for value in (scope.get(name), *(getattr_static(kind, name, None) for kind in kinds)):
                function = getattr(value, "fget", None) or getattr(value, "func", None)
                function = function if isinstance(value, (property, cached_property)) else value
                function = getattr(function, "__func__", function)
                if not isinstance(function, FunctionType) or function.__module__.startswith(("torch.", "gpu_bn.")):
                    continue
                if function.__code__ not in reachable:
                    reachable.add(function.__code__)
                    pending.append((function.__code__, function.__globals__))
    return reachable


def class_attribute_read(modules: Iterable[torch.nn.Module], codes: Iterable[CodeType]) -> str:
    """Return the name of a class attribute that code reads, else ""; an instance may hide it, and no graph notices."""
    names = _names_read(codes)
    for module in modules:
        for kind in type(module).__mro__:
            if kind.__module__.startswith(("torch.", "builtins", "typing")):
                continue
            if read := names & _values_of(kind) - vars(module).keys():
                return min(read)
    return ""


def _values_of(kind: type) -> set[str]:
    """Return the names of a class's attributes that are plain values or containers."""
    plain = (type(None), *SIMPLE, tuple, list, dict, set)
    return {name for name, value in vars(kind).items() if type(value) in plain and not name.startswith("__")}


class Unchanged:
    """Check that containers and objects hold the same values as when this was created. Graphs call it first."""

    __name__ = "unchanged"

    def __init__(self, modules: Iterable[torch.nn.Module], codes: Iterable[CodeType]) -> None:
        self.held: list[tuple[Any, Any]] = []
        self.names = _names_read(codes)
        for module in modules:
            for name in self.names & vars(module).keys() - INTERNAL:
                self._record(vars(module)[name], set())

    def _record(self, value: Any, visited: set[int]) -> None:
        """Remember the items of a value and of the values in it."""
        if id(value) in visited or isinstance(value, (*SIMPLE, *OPAQUE)):
            return
        visited.add(id(value))
        names: Set[str] = set()
        if isinstance(getattr(value, "__dict__", None), dict):
            names = self.names & (vars(value).keys() | set().union(*map(_values_of, type(value).__mro__)))
        items = _items(value, names)
        if isinstance(value, (dict, list, set)) or (items and not isinstance(value, (tuple, frozenset))):
            self.held.append((value, items))
        for each in items.values():
            self._record(each, visited)

    def __len__(self) -> int:
        """Return the number of values that are compared."""
        return sum(len(items) for _, items in self.held)

    def __call__(self) -> None:
        for owner, items in self.held:
            now = _items(owner, items)
            if now.keys() != items.keys():
                raise ConditionError
            if not all(is_same(now[name], value) for name, value in items.items()):
                raise ConditionError


def _items(owner: Any, names: Iterable[Any]) -> dict[Any, Any]:
    """Return the items of a container by key, index or value, or the named attributes of another object."""
    if isinstance(owner, dict):
        return dict(owner)
    if isinstance(owner, (list, tuple)):
        return dict(enumerate(owner))
    if isinstance(owner, (set, frozenset)):
        return dict.fromkeys(owner)
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _names_read(codes: Iterable[CodeType]) -> set[str]:
    """Return the names of all attributes that some code reads."""
    return {name for code in codes for read in _attributes_read(code) for name in read}


@lru_cache(1024)
def _attributes_read(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of attributes that a function reads of its first argument, and of others, with its strings."""
    own: set[str] = set()
    others = {value for value in code.co_consts if isinstance(value, str)}  # arguments of getattr
    before: Any = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            of_first = before.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and code.co_varnames[:1] == (loaded,)
            (own if of_first else others).add(step.argval)
        before = step
    for value in code.co_consts:
        if isinstance(value, CodeType):
            for read, inner in zip((own, others), _attributes_read(value), strict=True):
                read |= inner
    return frozenset(own), frozenset(others)
