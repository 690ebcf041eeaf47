"""Merge by the text of a ``forward`` that cannot be traced.

In ``self.act(self.norm(x))``, and in ``v = self.norm(x)`` with ``v = self.act(v)`` as the next statement, only the
activation reads the layer's output, whatever the rest of the text does.
"""

from __future__ import annotations

import ast
import copy
import linecache
from collections import Counter
from functools import lru_cache
from types import CodeType
from typing import Any

import torch

from gpu_bn.activations import Activation
from gpu_bn.nn.fx.activations import activation_of, activation_of_call
from gpu_bn.nn.fx.forward import SIMPLE, Merge, Plan, TextPlan, is_watched
from gpu_bn.nn.fx.inspection import names_in

NORMALISE = "normalise_of_gpu_bn"
"""The name of the merged call, which no model has."""


def text_plan(module: torch.nn.Module, layers: set[torch.nn.Module]) -> tuple[Plan | None, list[Merge]]:
    """Return a plan of a module's own text, and what each layer also does in it, if anything can be merged."""
    forward = type(module).forward
    function = _text_of(forward)
    if function is None or not _has_defaults(function, forward):
        return None, []
    merger = _Merger(module, layers, forward.__globals__)
    factory: Any = ast.parse(f"def make({NORMALISE}): return {function.name}").body[0]
    factory.body.insert(0, merger.visit(function))
    if not merger.merges:
        return None, []
    source = ast.unparse(ast.fix_missing_locations(ast.Module([factory], [])))
    return TextPlan(module, source, merger.merges), merger.merges


def _text_of(forward: Any) -> Any:
    """Parse a method's text, if it has no decorator and no cells, and its file is still the one that was compiled."""
    code = getattr(forward, "__code__", None)
    if code is None or code.co_freevars or any(map(_is_mangled, names_in(code))):
        return None
    linecache.checkcache(code.co_filename)
    try:
        tree, codes = _compiled("".join(linecache.getlines(code.co_filename, forward.__globals__)))
    except (SyntaxError, ValueError):
        return None
    if code not in codes or not code.co_argcount:
        return None
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name)
    return copy.deepcopy(next((node for node in functions if node.lineno == code.co_firstlineno), None))


def _has_defaults(function: ast.FunctionDef, forward: Any) -> bool:
    """Tell whether the defaults in a function's text, evaluated in its file, are those that it has."""
    given = function.args
    named = forward.__kwdefaults__ or {}
    pairs = list(zip(given.defaults, forward.__defaults__ or (), strict=True))
    pairs += [(node, named.get(arg.arg)) for arg, node in zip(given.kwonlyargs, given.kw_defaults, strict=True) if node]
    try:
        found = [(eval(ast.unparse(node), forward.__globals__), value) for node, value in pairs]
    except Exception:  # a name of the class around it
        return False
    return all(one is value or (type(one) in SIMPLE and repr(one) == repr(value)) for one, value in found)


def _names_bound(function: ast.FunctionDef) -> Counter[str]:
    """Count how often a function, and functions in it, bind each name."""
    bound: Counter[str] = Counter()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] += 1
        elif isinstance(node, ast.alias):
            bound[(node.asname or node.name).partition(".")[0]] += 1
        elif not isinstance(node, ast.keyword):  # parameters, functions and classes, exceptions, patterns
            bound.update(str(getattr(node, field, None)) for field in ("arg", "name", "rest"))
    return bound


@lru_cache(16)
def _compiled(text: str) -> tuple[ast.Module, set[CodeType]]:
    """Return a file's tree, and the code of all functions in it."""
    tree = ast.parse(text)
    left, codes = [compile(tree, "", "exec", dont_inherit=True)], set()
    while left:
        inner = [each for each in left.pop().co_consts if isinstance(each, CodeType)]
        left += inner
        codes.update(inner)
    return tree, codes


def _is_mangled(name: str) -> bool:
    """Tell whether a name may be one that Python has mangled in a class."""
    return name.startswith("_") and "__" in name[1:] and not name.endswith("__")


class _Merger(ast.NodeTransformer):
    """Rewrite a text so that one call does a layer and its activation; ``merges`` lists which.

    Only a module's own children count: its plan makes sure in each call that they are the same.
    """

    def __init__(self, module: torch.nn.Module, layers: set[torch.nn.Module], scope: dict[str, Any]) -> None:
        self.module, self.layers, self.scope = module, layers, scope
        self.owner = ""
        self.bound: Counter[str] = Counter()
        self.merges: list[Merge] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if self.owner:  # a function within the function has its own names
            return node
        self.owner = node.args.args[0].arg
        self.bound = _names_bound(node)
        return node if self.bound[self.owner] > 1 else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        return self._merged(node, node.args[0]) if node.args else node

    def generic_visit(self, node: Any) -> Any:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                setattr(node, name, self._statements(getattr(node, name)) or [ast.Pass()] * (name == "body"))
        return node

    def _statements(self, given: list[Any]) -> list[Any]:
        """Return statements without known conditions; two that set one variable may have become one."""
        found: list[Any] = []
        for node in (each for one in given for each in self._chosen(one)):
            before: Any = found[-1] if found else None
            name = _name_set(node)
            call: Any = node.value if name and name == _name_set(before) else None
            if isinstance(call, ast.Call) and call.args and getattr(call.args[0], "id", None) == name:
                merged = self._merged(call, before.value)
                if merged is not call:
                    found[-1] = ast.copy_location(ast.Assign(before.targets, merged), before)
                    continue
            found.append(node)
        return found

    def _chosen(self, node: Any) -> list[Any]:
        """Return the statements of a branch that depends only on whether a child exists."""
        test = getattr(node, "test", None)
        if not (isinstance(node, ast.If) and isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)):
            return [node]
        against: Any = test.comparators[0]
        known = self._is_own(test.left) and len(test.ops) == 1 and isinstance(against, ast.Constant)
        if known and against.value is None and self._child(test.left) is not None:
            return list(node.body)
        return [node]

    def _merged(self, call: ast.Call, inner: Any) -> Any:
        """Return ``activation(norm(x))`` as one call, or the activation's call as it is."""
        alone = isinstance(inner, ast.Call) and len(inner.args) == 1 and not inner.keywords
        if not alone or isinstance(inner.args[0], ast.Starred):
            return call
        norm, act = self._child(inner.func), self._child(call.func)
        plain = len(call.args) == 1 and not call.keywords
        chosen = self._function(call) if act is None else activation_of(act) if plain else None
        watched = norm is None or is_watched(norm) or (act is not None and is_watched(act))
        if norm not in self.layers or watched or chosen is None or chosen.is_identity:
            return call
        self.merges.append(Merge(norm, repr(chosen), [] if act is None else [act]))
        options: list[Any] = [None, chosen.name, chosen.parameter, False, False]
        arguments = [inner.func, inner.args[0], *map(ast.Constant, options)]
        return ast.copy_location(ast.Call(ast.Name(NORMALISE, ast.Load()), arguments, []), call)

    def _is_own(self, node: Any) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.owner

    def _child(self, node: Any) -> torch.nn.Module | None:
        return self.module._modules.get(node.attr) if self._is_own(node) else None

    def _function(self, call: ast.Call) -> Activation | None:
        """Return the activation that a call of a function with constants is."""
        try:
            rest = [ast.literal_eval(each) for each in call.args[1:]]
            options = {each.arg or "": ast.literal_eval(each.value) for each in call.keywords if each.arg != "inplace"}
        except (ValueError, TypeError, SyntaxError):
            return None
        return activation_of_call(self._global(call.func), rest, options)

    def _global(self, node: Any) -> Any:
        """Look up the function that a dotted name means in the text's file."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or self.bound[node.id]:
            return None
        value = self.scope.get(node.id)
        for name in names:
            value = getattr(value, name, None)
        return value if callable(value) else None


def _name_set(node: Any) -> str | None:
    """Return the name of the only variable that a statement sets, if it is such an assignment."""
    single = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if single else None
