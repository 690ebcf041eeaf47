"""Tell which nodes of a graph of ``torch.fx`` may share memory, and which may overwrite it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

MODULES = (torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten, torch.nn.modules.dropout._DropoutNd)
"""The modules that may return a view of their input."""
VIEWS = frozenset({
    "getitem", "getattr", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze",
    "unsqueeze", "expand", "expand_as", "broadcast_to", "broadcast_tensors", "permute", "transpose", "movedim",
    "moveaxis", "swapaxes", "swapdims", "t", "narrow", "select", "chunk", "split", "tensor_split", "hsplit", "vsplit",
    "dsplit", "unbind", "unfold", "diagonal", "as_strided", "detach", "alias", "contiguous", "to", "type", "float",
    "double", "half", "bfloat16", "cpu", "cuda", "real", "imag", "dropout", "dropout1d", "dropout2d", "dropout3d",
})  # fmt: skip
"""The functions and methods that may return one."""
KNOWN = ("torch", "_operator")
"""The modules whose other functions return new tensors."""


def aliases(root: torch.nn.Module, node: Node) -> set[Node]:
    """Find the nodes that may share memory with a node: its views, what it is a view of, and so on."""
    found, left = {node}, [node]
    while left:
        alias = left.pop()
        near = [user for user in alias.users if _may_be_view(root, user)]
        if _may_be_view(root, alias):
            near += alias.all_input_nodes
        left += [other for other in near if other not in found]
        found.update(near)
    return found


def may_overwrite(root: torch.nn.Module, node: Node) -> bool:
    """Tell whether a node may write to one of its inputs."""
    module = module_of(root, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = _name(node)
    by_operator = _module_name(node) == "_operator" and name.startswith(("i", "set"))
    asked = any(given is True for given in node.args) or not node.kwargs.keys().isdisjoint(("inplace", "out"))
    return name.endswith("_") or by_operator or asked


def is_opaque(module: Any) -> bool:
    """Tell whether a graph does not look into a module that may overwrite its inputs."""
    if module is None or type(module) is torch.nn.Sequential:
        return module is not None
    return not type(module).__module__.startswith(("torch.nn.", "gpu_bn."))


def module_of(root: torch.nn.Module, node: Any) -> torch.nn.Module | None:
    """Return the module that a node calls."""
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
    """Return the name of the Python module that a node's function is from."""
    return str(getattr(node.target, "__module__", ""))
