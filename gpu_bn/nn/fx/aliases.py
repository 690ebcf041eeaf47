"""Tell which nodes of a ``torch.fx`` graph may share memory, and which may overwrite it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

MODULES = (torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten, torch.nn.modules.dropout._DropoutNd)
"""The classes of modules that may return a view of their input."""
VIEWS = frozenset({
    "getitem", "getattr", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze",
    "unsqueeze", "expand", "expand_as", "broadcast_to", "broadcast_tensors", "permute", "transpose", "movedim",
    "moveaxis", "swapaxes", "swapdims", "t", "narrow", "select", "chunk", "split", "tensor_split", "hsplit", "vsplit",
    "dsplit", "unbind", "unfold", "diagonal", "as_strided", "detach", "alias", "contiguous", "to", "type", "float",
    "double", "half", "bfloat16", "cpu", "cuda", "real", "imag", "dropout", "dropout1d", "dropout2d", "dropout3d",
})  # fmt: skip
"""The names of functions and methods that may return a view of their input."""
KNOWN = ("torch", "_operator")
"""The Python modules whose other functions return new tensors."""


def aliases(root: torch.nn.Module, node: Node) -> set[Node]:
    """Find the nodes that may share memory with a node: it, its views, the nodes it is a view of, and their views."""
    found, pending = {node}, [node]
    while pending:
        alias = pending.pop()
        neighbours = [user for user in alias.users if _may_be_view(root, user)]
        if _may_be_view(root, alias):
            neighbours += alias.all_input_nodes
        pending += [other for other in neighbours if other not in found]
        found.update(neighbours)
    return found


def may_overwrite(root: torch.nn.Module, node: Node) -> bool:
    """Tell whether a node may write to one of its inputs."""
    module = module_of(root, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = _name(node)
    in_place_operator = _module_name(node) == "_operator" and name.startswith(("i", "set"))
    requested = any(value is True for value in node.args) or not node.kwargs.keys().isdisjoint(("inplace", "out"))
    return name.endswith("_") or in_place_operator or requested


def is_opaque(module: Any) -> bool:
    """Tell whether a module may run code that a graph does not show, which may overwrite the module's inputs."""
    if module is None:
        return False
    return type(module) is torch.nn.Sequential or not type(module).__module__.startswith(("torch.nn.", "gpu_bn."))


def module_of(root: torch.nn.Module, node: Any) -> torch.nn.Module | None:
    """Return the module that a node calls; ``None`` if it calls none."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def _may_be_view(root: torch.nn.Module, node: Node) -> bool:
    if node.op == "call_module":
        module = module_of(root, node)
        return isinstance(module, MODULES) or is_opaque(module)
    return _name(node) in VIEWS or (node.op == "call_function" and not _module_name(node).startswith(KNOWN))


def _name(node: Node) -> str:
    """Return the name of a node's function or method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _module_name(node: Node) -> str:
    """Return the name of the Python module that defines a node's function."""
    return str(getattr(node.target, "__module__", ""))
