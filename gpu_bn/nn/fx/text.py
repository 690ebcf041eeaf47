"""Merge activations in the source text of a ``forward`` that cannot be traced.

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
"""The name of the merged call, which no model uses for anything else."""


def text_plan(module: torch.nn.Module, layers: set[torch.nn.Module]) -> tuple[Plan | None, list[Merge]]:
    """Merge activations into ``layers`` in the text of a ``forward``. Return a plan or ``None``, and the merges."""
    forward = type(module).forward
    function = _parse(forward)
    if function is None or not _has_defaults(function, forward):
        return None, []
    merger = _Merger(module, layers, forward.__globals__)
    factory: Any = ast.parse(f"def make({NORMALISE}): return {function.name}").body[0]
    factory.body.insert(0, merger.visit(function))
    if not merger.merges:
        return None, []
    source = ast.unparse(ast.fix_missing_locations(ast.Module([factory], [])))
    return TextPlan(module, source, merger.merges), merger.merges


def _parse(forward: Any) -> Any:
    """Parse the text of a method. Return ``None`` if it is decorated, has free variables, or has changed."""
    code = getattr(forward, "__code__", None)
    if code is None or code.co_freevars or any(map(_is_mangled, names_in(code))):
        return None
    linecache.checkcache(code.co_filename)
    try:
        tree, codes = _parse_file("".join(linecache.getlines(code.co_filename, forward.__globals__)))
    except (SyntaxError, ValueError):
        return None
    if code not in codes or not code.co_argcount:
        return None
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name)
    return copy.deepcopy(next((node for node in functions if node.lineno == code.co_firstlineno), None))


def _has_defaults(function: ast.FunctionDef, forward: Any) -> bool:
    """Tell whether the defaults in a function's text, evaluated with its globals, equal those of the function."""
    parameters = function.args
    named = forward.__kwdefaults__ or {}
    pairs = list(zip(parameters.defaults, forward.__defaults__ or (), strict=True))
    keyword_only = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    pairs += [(node, named.get(arg.arg)) for arg, node in keyword_only if node]
    try:
        values = [(eval(ast.unparse(node), forward.__globals__), value) for node, value in pairs]
    except Exception:  # a default may be a name of the class around it
        return False
    return all(text is value or (type(text) in SIMPLE and repr(text) == repr(value)) for text, value in values)


def _count_bindings(function: ast.FunctionDef) -> Counter[str]:
    """Count how often a function and the functions within it bind each name."""
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
def _parse_file(text: str) -> tuple[ast.Module, set[CodeType]]:
    """Return the syntax tree of a file, and the code of all functions in it."""
    tree = ast.parse(text)
    pending, codes = [compile(tree, "", "exec", dont_inherit=True)], set()
    while pending:
        inner = [each for each in pending.pop().co_consts if isinstance(each, CodeType)]
        pending += inner
        codes.update(inner)
    return tree, codes


def _is_mangled(name: str) -> bool:
    """Tell whether Python may have mangled a private name of a class to this name."""
    return name.startswith("_") and "__" in name[1:] and not name.endswith("__")


class _Merger(ast.NodeTransformer):
    """Rewrite a ``forward`` so that one call computes a layer and its activation. ``merges`` lists the merges.

    Only layers and activations that are children of the module are merged: its plan checks the children in each call.
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
        self.bound = _count_bindings(node)
        return node if self.bound[self.owner] > 1 else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        return self._merge(node, node.args[0]) if node.args else node

    def generic_visit(self, node: Any) -> Any:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                setattr(node, name, self._statements(getattr(node, name)) or [ast.Pass()] * (name == "body"))
        return node

    def _statements(self, body: list[Any]) -> list[Any]:
        """Return a body without known conditions, and with two assignments to one variable merged where possible."""
        statements: list[Any] = []
        for node in (each for statement in body for each in self._unconditional(statement)):
            before: Any = statements[-1] if statements else None
            name = _assigned_name(node)
            call: Any = node.value if name and name == _assigned_name(before) else None
            if isinstance(call, ast.Call) and call.args and getattr(call.args[0], "id", None) == name:
                merged = self._merge(call, before.value)
                if merged is not call:
                    statements[-1] = ast.copy_location(ast.Assign(before.targets, merged), before)
                    continue
            statements.append(node)
        return statements

    def _unconditional(self, node: Any) -> list[Any]:
        """Return the body of ``if self.child is not None`` if the child exists; for other statements, the statement."""
        test = getattr(node, "test", None)
        if not (isinstance(node, ast.If) and isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)):
            return [node]
        against: Any = test.comparators[0]
        known = self._is_own(test.left) and len(test.ops) == 1 and isinstance(against, ast.Constant)
        if known and against.value is None and self._child(test.left) is not None:
            return list(node.body)
        return [node]

    def _merge(self, call: ast.Call, inner: Any) -> Any:
        """Return ``activation(norm(x))`` as one call, or ``call`` unchanged; ``inner`` is ``norm(x)``."""
        plain_inner = isinstance(inner, ast.Call) and len(inner.args) == 1 and not inner.keywords
        if not plain_inner or isinstance(inner.args[0], ast.Starred):
            return call
        norm, act = self._child(inner.func), self._child(call.func)
        plain = len(call.args) == 1 and not call.keywords
        activation = self._activation(call) if act is None else activation_of(act) if plain else None
        watched = norm is None or is_watched(norm) or (act is not None and is_watched(act))
        if norm not in self.layers or watched or activation is None or activation.is_identity:
            return call
        self.merges.append(Merge(norm, repr(activation), [] if act is None else [act]))
        options: list[Any] = [None, activation.name, activation.parameter, False, False]
        arguments = [inner.func, inner.args[0], *map(ast.Constant, options)]
        return ast.copy_location(ast.Call(ast.Name(NORMALISE, ast.Load()), arguments, []), call)

    def _is_own(self, node: Any) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.owner

    def _child(self, node: Any) -> torch.nn.Module | None:
        return self.module._modules.get(node.attr) if self._is_own(node) else None

    def _activation(self, call: ast.Call) -> Activation | None:
        """Return the activation that a function call computes; ``None`` if it is another or has variable options."""
        try:
            rest = [ast.literal_eval(each) for each in call.args[1:]]
            options = {each.arg or "": ast.literal_eval(each.value) for each in call.keywords if each.arg != "inplace"}
        except (ValueError, TypeError, SyntaxError):
            return None
        return activation_of_call(self._look_up(call.func), rest, options)

    def _look_up(self, node: Any) -> Any:
        """Return the function that a dotted name refers to in the globals; ``None`` if it refers to none."""
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


def _assigned_name(node: Any) -> str | None:
    """Return the variable that a statement assigns to, if it is an assignment to just one."""
    single = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if single else None
