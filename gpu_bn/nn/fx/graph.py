"""Merge activations and sums into the layers of gpu_bn, module by module.

A module that calls a layer and then an activation gets a ``forward`` in which the layer does both
(:mod:`gpu_bn.nn.fx.forward`); nothing else about it changes. Its graph calls the modules in it as they are. The steps
of such a module become part of the graph only if it ends with a layer, begins with the activation of the layer before
it, or is called with more than tensors.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from gpu_bn.activations import Activation
from gpu_bn.nn.activated import Activated
from gpu_bn.nn.fx.activations import activation_of, activation_of_call, torch_function
from gpu_bn.nn.fx.aliases import aliases, is_opaque, may_overwrite, module_of
from gpu_bn.nn.fx.forward import Forward, Merge, Plan, Steps, is_patched, is_watched, normalise, restore_forwards
from gpu_bn.nn.fx.text import text_plan
from gpu_bn.nn.fx.trace import Refused, in_mode, record_steps
from gpu_bn.nn.known_layers import counterpart, looks_frozen
from gpu_bn.nn.report import Report

IN_PLACE = (operator.iadd, "add_")
ADDITIONS = (operator.add, torch.add, "add", *IN_PLACE)
CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
LEAVES = ("torch.nn.", "torch.ao.nn.")


def is_layer(module: torch.nn.Module) -> bool:
    """Tell whether a module is a batch normalisation of any library. Graphs call these as a whole."""
    known = isinstance(module, (_BatchNorm, Activated)) or counterpart(type(module)) is not None
    return known or looks_frozen(module)


def fuse_activations(model: torch.nn.Module, report: Report) -> None:
    """Merge activations into the layers that they follow anywhere in a model, and the sums between the two."""
    names = {module: name for name, module in model.named_modules()}
    plans: dict[torch.nn.Module, dict[bool, Plan]] = {}
    reasons: dict[torch.nn.Module, str] = {}
    merged: dict[torch.nn.Module, set[str]] = {}
    for training in (True, False):
        with in_mode(model.modules(), training):
            fusion = _Fusion(model)
            for module in reversed(list(names)):  # inner modules first
                if module not in fusion.holders or is_patched(module):
                    continue
                plan: Plan | None = None
                steps = fusion.steps(module)
                if isinstance(steps, Refused):
                    reasons.setdefault(module, f"{type(module).__name__} {names[module]!r}: {steps}")
                    plan, merges = text_plan(module, set(filter(is_ours, module.children())))
                elif merges := _merge(module, steps.graph):
                    plan = Plan(steps, merges)
                if plan is not None:
                    plans.setdefault(module, {})[training] = plan
                for norm, what, _ in merges:
                    merged.setdefault(norm, set()).add(what)
    for module, by_mode in plans.items():
        module.__dict__["forward"] = Forward(module, by_mode)
    for norm, name in names.items():
        if norm in merged:
            report.merged[name] = norm.__dict__["_merged"] = " or ".join(sorted(merged[norm]))
        elif isinstance(norm, Activated) and norm.activation.is_identity:
            report.left[name] = _reason(model, norm, name, reasons)


def _reason(model: torch.nn.Module, norm: torch.nn.Module, name: str, reasons: dict[torch.nn.Module, str]) -> str:
    """Return why nothing was merged into a layer, for the report."""
    if is_watched(norm):
        return "it has hooks or a patched forward"
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        if module in reasons:
            return reasons[module]
        if type(module) not in CONTAINERS:
            break
    return "no known activation alone reads its output"


class _Fusion:
    """The graphs of a model's modules in one mode."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.holders = {
            module for module in model.modules() if not is_leaf(module) and any(map(is_ours, module.modules()))
        }
        self.recorded: dict[torch.nn.Module, Steps | Refused] = {}

    def steps(self, module: torch.nn.Module) -> Steps | Refused:
        """Return the recorded steps of a module, or the reason why they cannot be recorded."""
        if module not in self.recorded:
            try:
                self.recorded[module] = record_steps(module, self.enters)
            except Refused as error:
                self.recorded[module] = error
        return self.recorded[module]

    def enters(self, module: torch.nn.Module, arguments: Any, options: Any) -> bool:
        """Tell whether the own steps of a called module become part of the graph; see the head of this file."""
        if is_watched(module):
            return False
        inputs = (*arguments, *options.values())
        if module not in self.holders:
            begins = type(module) is torch.nn.Sequential and len(module) > 0 and activation_of(module[0]) is not None
            return begins and any(is_ours(module_of(value.tracer.root, value.node)) for value in inputs)
        return not all(isinstance(value, torch.fx.Proxy) for value in inputs) or self.ends_with_layer(module)

    def ends_with_layer(self, module: torch.nn.Module) -> bool:
        """Tell whether a module returns the output of a layer, directly or through identities."""
        if is_ours(module):
            return True
        if module not in self.holders or is_watched(module) or isinstance(steps := self.steps(module), Refused):
            return False
        (last,) = (node for node in steps.graph.nodes if node.op == "output")
        result = last.args[0]
        while type(called := module_of(module, result)) is torch.nn.Identity:
            result = result.args[0]
        return called is not None and self.ends_with_layer(called)


def is_leaf(module: torch.nn.Module) -> bool:
    """Tell whether graphs call a module as a whole: normalisations, scripted modules, and torch's except Sequential."""
    from_torch = type(module).__module__.startswith(LEAVES) and type(module) is not torch.nn.Sequential
    return from_torch or is_layer(module) or isinstance(module, torch.jit.ScriptModule)


def is_ours(module: Any) -> bool:
    """Tell whether a module is a layer of gpu_bn."""
    return isinstance(module, Activated)


def _merge(module: torch.nn.Module, graph: Graph) -> list[Merge]:
    """Merge what can be merged in a module's graph, and list it."""
    merges = []
    for node in reversed(list(graph.nodes)):  # of two layers whose outputs are added, the later takes the sum
        if is_ours(module_of(module, node)) and len(node.args) == 1 and not node.kwargs:
            merges += _merge_node(module, graph, node)
    graph.lint()
    return merges


def _merge_node(root: torch.nn.Module, graph: Graph, node: Node) -> list[Merge]:
    """Merge a layer's node with the activation after it, or with a sum and the activation after that.

    The merged call stands where the layer was called, or with a sum where the sum was.
    """
    norm: Any = module_of(root, node)
    if not norm.activation.is_identity or is_watched(norm):
        return []
    chain, place = [node], node
    residual, in_place, reverse = None, False, False
    following = _following(root, chain)
    if following is not None and (other := _other_term(following, chain[-1])) is not None:
        if not _may_merge(root, node, other, following):
            return []
        residual, place = other, following
        in_place, reverse = following.target in IN_PLACE, following.args[0] is other
        chain.append(following)
        following = _following(root, chain)
    activation = None if following is None else _activation(root, following)
    if following is None or activation is None or activation.is_identity:
        return []
    with graph.inserting_before(place):
        layer = graph.create_node("get_attr", str(node.target))
        options = (activation.name, activation.parameter, in_place, reverse)
        merged = graph.call_function(normalise, (layer, node.args[0], residual, *options))
    following.replace_all_uses_with(merged)
    parts = [called for each in (*chain[1:], following) if (called := module_of(root, each)) is not None]
    for unused in (following, *reversed(chain)):
        graph.erase_node(unused)
    return [Merge(norm, f"{'sum, ' * (residual is not None)}{activation!r}", parts)]


def _following(root: torch.nn.Module, chain: list[Node]) -> Node | None:
    """Return the only user of a chain's last node, or ``None``. Identities are skipped and appended to the chain."""
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        module = module_of(root, user)
        if type(module) is not torch.nn.Identity or is_watched(module):
            return user
        chain.append(user)
    return None


def _other_term(node: Node, term: Node) -> Node | None:
    """Return the other term of a sum of two nodes, ``None`` for other nodes; a sum in place must overwrite ``term``."""
    if node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    if node.target in IN_PLACE and node.args[0] is not term:
        return None
    others = [other for other in node.args if other is not term]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _may_merge(root: torch.nn.Module, call: Node, residual: Node, addition: Node) -> bool:
    """Tell whether a layer's call can be moved to the sum with a residual, which the layer then saves for its gradient.

    It can if no tensor is overwritten and the layer is not called again before the sum, and if the residual is never
    overwritten.
    """
    layer: Any = module_of(root, call)
    inputs = aliases(root, call.all_input_nodes[0])
    node, passed = call.next, False
    readers = {user for alias in aliases(root, residual) for user in alias.users} - {addition}
    while node.op != "root":
        called = module_of(root, node)
        if node is addition:
            passed = True
        elif not passed and (may_overwrite(root, node) or called is layer):
            return False
        elif called is not None and is_opaque(called):
            reads = (node in readers) if passed else bool(inputs.intersection(node.all_input_nodes))
            if reads or (not passed and layer in called.modules()):
                return False
        node = node.next
    return not any(may_overwrite(root, user) for user in readers)


def _activation(root: torch.nn.Module, node: Node) -> Activation | None:
    """Return the activation that a node computes, or ``None``."""
    module = module_of(root, node)
    if module is not None:
        return None if is_watched(module) else activation_of(module)
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    return activation_of_call(node.target, node.args[1:], node.kwargs)


def undo(model: torch.nn.Module) -> None:
    """Give modules their original ``forward`` back; in graph modules, let torch compute activations and sums."""
    restore_forwards(model)
    for traced in model.modules():
        if isinstance(traced, GraphModule):
            for node in list(traced.graph.nodes):
                if is_ours(module_of(traced, node)):
                    _undo_call(traced.graph, node)
            for node in reversed(traced.graph.nodes):
                if node.target is Activation and not node.users:
                    traced.graph.erase_node(node)
            traced.recompile()


def _undo_call(graph: Graph, node: Node) -> None:
    """Take the sum and the activation out of a layer's call in a graph."""
    arguments: dict[str, Any] = dict(zip(("input", "residual", "activation", "mask"), node.args, strict=False))
    arguments.update(node.kwargs)
    if arguments.keys() <= {"input"} or arguments.get("mask") is not None:
        return
    chosen = arguments.get("activation")
    if isinstance(chosen, Node) and chosen.target is Activation:  # an activation with a parameter is a separate node
        chosen = Activation(*chosen.args, **chosen.kwargs)  # type: ignore[arg-type]
    activation = Activation.of(chosen)
    with graph.inserting_before(node):
        value = graph.call_module(str(node.target), (arguments["input"],))
        if arguments.get("residual") is not None:
            value = graph.call_function(torch.add, (value, arguments["residual"]))
        if not activation.is_identity:
            call, options = torch_function(activation)
            value = graph.call_function(call, (value,), options)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
