"""Test that functions that only this package calls have few parameters."""

import ast
import importlib

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "gpu_bn"
MOST = 8
"""The most parameters of an internal function, without ``self``, ``cls`` and ``ctx``. Kernels may have more."""
OWN = ("self", "cls", "ctx")
SCHEMA = "an operator: what PyTorch's dispatcher passes"
EXCEPTIONS = {
    "gpu_bn.nn.fused.layer": "a node of traced graphs, which models are saved with",
    "gpu_bn.nn.modules._Sized.__init__": "the constructor of BatchNorm1d, 2d and 3d, with torch's arguments",
    "gpu_bn.nn.operators.library._train": SCHEMA,
    "gpu_bn.nn.operators.library._infer": SCHEMA,
    "gpu_bn.nn.operators.library._backward": SCHEMA,
}
"""Internal functions that have more, and the reason."""


def functions(node, name):
    """Yield the functions in a module or a class: their names and their ``ast.arguments``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inner, child.args
            yield from functions(child, inner)
        else:
            yield from functions(child, name)


def count_parameters(arguments):
    named = [given.arg for given in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(named) - (named[:1] != [] and named[0] in OWN)


def public_names():
    """Return the qualified names of the public functions and classes."""
    found = set()
    for module in ("gpu_bn", "gpu_bn.nn", "gpu_bn.testing"):
        for name in importlib.import_module(module).__all__:
            one = getattr(importlib.import_module(module), name)
            found.add(f"{getattr(one, '__module__', '')}.{getattr(one, '__qualname__', '')}")
    return found


def test_internal_functions_have_at_most_eight_parameters():
    pytest.importorskip("torch")
    known, long = public_names(), set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("gpu_bn", *path.relative_to(PACKAGE).with_suffix("").parts))
        if module.startswith("gpu_bn.kernels."):
            continue
        for name, arguments in functions(ast.parse(path.read_text()), module):
            if count_parameters(arguments) > MOST and not {name, name.removesuffix(".__init__")} & known:
                long.add(name)
    assert long == EXCEPTIONS.keys(), "a function takes a tuple or a dataclass, or is an exception with a reason"
