"""Graphs of models, by ``torch.fx``: merging activations and sums into our layers."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from gpu_bn.activations import Activation
from gpu_bn.nn import _activations
from gpu_bn.nn._activations import TARGETS, activation_of
from gpu_bn.nn._aliases import aliases, may_overwrite, module_of
from gpu_bn.nn._known import counterpart, is_watched
from gpu_bn.nn.modules import FrozenBatchNorm2d, Fused

ORIGINAL = "gpu_bn_original"
"""Where a graph module's ``meta`` has the model that it was made from."""

IN_PLACE = (operator.iadd, "add_")
ADDITIONS = (operator.add, torch.add, "add", *IN_PLACE)


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # else what is computed of a buffer would stay what it is now

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or super().is_leaf_module(m, module_qualified_name)


def is_layer(module: torch.nn.Module) -> bool:
    """Whether a module is a batch normalisation, which graphs call as a whole."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm2d)) or counterpart(type(module)) is not None


def trace(model: torch.nn.Module) -> GraphModule:
    """A graph module over the model's own layers.

    Raises:
        ValueError: the model cannot be traced, or does something else in training than in evaluation outside its
            layers, which a graph would fix.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        (graph, constants), evaluation = (_traced(model.train(mode)) for mode in (True, False))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    if not _same((graph, constants), evaluation):
        raise ValueError(
            f"{type(model).__name__} takes other steps in training than in evaluation (a functional dropout?), "
            "which a graph cannot"
        )
    model.__dict__.update(constants)
    try:
        traced = GraphModule(model, graph, type(model).__name__)
    finally:
        _take_out(model, constants)
    traced.training = model.training
    traced.meta[ORIGINAL] = model
    return traced


def _traced(model: torch.nn.Module) -> tuple[Graph, dict[str, Any]]:
    """A model's graph, and the constants that torch.fx would leave in the model for it."""
    before = set(model.__dict__)
    try:
        graph = _Tracer().trace(model)
    finally:
        constants = _take_out(model, model.__dict__.keys() - before)
    return graph, constants


def _take_out(model: torch.nn.Module, names: Iterable[str]) -> dict[str, Any]:
    return {name: model.__dict__.pop(name) for name in sorted(names)}


def _same(one: tuple[Graph, dict[str, Any]], other: tuple[Graph, dict[str, Any]]) -> bool:
    """Whether two graphs take the same steps, with the same constants."""
    if str(one[0]) != str(other[0]) or one[1].keys() != other[1].keys():
        return False
    pairs = ((value, other[1][name]) for name, value in one[1].items())
    return all(a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.isclose(a, b, 0, 0, equal_nan=True).all())


def fuse_activations(traced: GraphModule) -> GraphModule:
    """Have layers of ours do the activations, and the sums before these, that follow them in what was traced."""
    _keep(traced)
    for name, module in traced.meta[ORIGINAL].named_modules():
        traced.get_submodule(name).training = module.training
    traced._deepcopy_hooks.append(_keep)
    for node in reversed(list(traced.graph.nodes)):  # of a sum's two layers the later one takes the other's output
        if norm_of(traced, node) is not None and len(node.args) == 1 and not node.kwargs:
            _fuse(traced, node)
    traced.graph.lint()
    traced.recompile()
    return traced


def _complete(traced: Any, model: Any, done: dict[Any, Any]) -> Any:
    """Give a graph module what its graph does not use of its model too, in the model's order, for the state has it.

    What torch.fx made for a module that has several names becomes one again, which is returned.
    """
    twin = done.setdefault(model, traced)
    plain = traced._buffers.keys() - model._buffers.keys()  # constants, and tensors that are no buffers of the model
    twin._non_persistent_buffers_set = model._non_persistent_buffers_set | plain | twin._non_persistent_buffers_set
    twin._buffers = {**model._buffers, **traced._buffers, **twin._buffers}
    twin._parameters = {**model._parameters, **traced._parameters, **twin._parameters}
    children = {}
    for name, child in model._modules.items():
        mine = traced._modules[name] if name in traced._modules else done.get(child, child)
        children[name] = _complete(mine, child, done) if type(mine) is torch.nn.Module else mine
    twin._modules = {**children, **{name: mine for name, mine in twin._modules.items() if name not in children}}
    return twin


def _keep(traced: GraphModule) -> None:
    """Keep what torch.fx leaves out of a graph module, and torch's copying out of a copy."""
    if (model := traced.meta.get(ORIGINAL)) is not None:
        _complete(traced, model, {})
        type(traced).train = _train  # type: ignore[assignment,method-assign] # each graph module has a class of its own


def _train(traced: GraphModule, mode: bool = True) -> GraphModule:
    """As the model's own ``train``, which may leave layers in evaluation mode."""
    torch.nn.Module.train(traced, mode)
    if (model := traced.meta.get(ORIGINAL)) is not None:
        model.train(mode)
    return traced


def origins(model: torch.nn.Module) -> list[torch.nn.Module]:
    """A model, what it was made from, what that was made from, and so on."""
    found = [model]
    while (before := getattr(found[-1], "meta", {}).get(ORIGINAL)) is not None:
        found.append(before)
    return found


def give_back(model: torch.nn.Module, traced: torch.nn.Module) -> None:
    """Give a model what its graph module has now: values, modes, and layers."""
    model.training = traced.training
    tensors: Any
    for tensors, present in ((model._parameters, traced._parameters), (model._buffers, traced._buffers)):
        tensors.update((name, present[name]) for name in tensors.keys() & present.keys())
    for name, child in model._modules.items():
        now = traced._modules.get(name)
        if child is not None and type(now) is torch.nn.Module:  # torch.fx's, for a module that the graph goes into
            give_back(child, now)
        elif now is not None:
            model._modules[name] = now


def unfuse(traced: GraphModule) -> None:
    """Have torch's functions do the activations and sums that calls of our layers do in a graph."""
    for node in list(traced.graph.nodes):
        given = arguments(node)
        if norm_of(traced, node) is None or given.keys() <= {"input"} or given.get("mask") is not None:
            continue
        with traced.graph.inserting_before(node):
            alone = traced.graph.call_module(str(node.target), (given["input"],))
        replace_call(traced.graph, node, alone, given.get("residual"), Activation.of(given.get("activation")))
    for node in reversed(traced.graph.nodes):
        if node.target is Activation and not node.users:
            traced.graph.erase_node(node)
    traced.recompile()


def norm_of(traced: GraphModule, node: Node) -> Any:
    """The layer of ours that a node calls."""
    module = module_of(traced, node)
    return module if isinstance(module, (Fused, FrozenBatchNorm2d)) else None


def arguments(node: Node) -> dict[str, Any]:
    """What a layer's call is given, by name."""
    given: dict[str, Any] = dict(zip(("input", "residual", "activation", "mask"), node.args, strict=False))
    given.update(node.kwargs)
    chosen = given.get("activation")
    if isinstance(chosen, Node) and chosen.target is Activation:  # one with a parameter is a node of its own
        given["activation"] = Activation(*chosen.args, **chosen.kwargs)  # type: ignore[arg-type]
    return given


def replace_call(graph: Graph, node: Node, value: Node, residual: Any, activation: Activation) -> None:
    """Replace a layer's call by a value, and torch's functions for the sum and the activation after it."""
    with graph.inserting_before(node):
        if residual is not None:
            value = graph.call_function(torch.add, (value, residual))
        if not activation.is_identity:
            call, options = _activations.function(activation)
            value = graph.call_function(call, (value,), options)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _fuse(traced: GraphModule, node: Node) -> None:
    """Merge a layer's node with what follows it, where its last input is read: there, or at the sum."""
    norm = norm_of(traced, node)
    if not norm.activation.is_identity or is_watched(norm):
        return
    chain, place = [node], node
    residual = None
    following = _following(traced, chain)
    if following is not None and (other := _other_term(following, chain[-1])) is not None:
        if not _may_merge(traced, node, other, following):
            return
        residual, place = other, following
        chain.append(following)
        following = _following(traced, chain)
    activation = None if following is None else _activation(traced, following)
    if following is None or activation is None or activation.is_identity:
        return
    graph = traced.graph
    with graph.inserting_before(place):
        chosen: Any = activation.name
        if activation.row.parameter:
            chosen = graph.call_function(Activation, (activation.name, activation.parameter))
        inputs = node.args if residual is None else (*node.args, residual)
        merged = graph.call_module(str(node.target), inputs, {"activation": chosen})
    following.replace_all_uses_with(merged)
    for done in (following, *reversed(chain)):
        graph.erase_node(done)


def _following(traced: GraphModule, chain: list[Node]) -> Node | None:
    """The only user of a chain's end; identities on the way join the chain."""
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        module = module_of(traced, user)
        if type(module) is not torch.nn.Identity or is_watched(module):
            return user
        chain.append(user)
    return None


def _other_term(node: Node, term: Node) -> Node | None:
    """What a plain addition adds to a term; one in place overwrites nothing but that."""
    if node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    if node.target in IN_PLACE and node.args[0] is not term:
        return None
    others = [other for other in node.args if other is not term]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _may_merge(traced: GraphModule, call: Node, residual: Node, addition: Node) -> bool:
    """Whether a layer's call can wait for the residual, and keep it: nothing overwrites a tensor or calls the layer
    until then, and nothing overwrites the residual at all."""
    node = call.next
    while node is not addition:
        if may_overwrite(traced, node) or module_of(traced, node) is module_of(traced, call):
            return False
        node = node.next
    readers = {user for alias in aliases(traced, residual) for user in alias.users}
    return not any(user is not addition and may_overwrite(traced, user) for user in readers)


def _activation(traced: GraphModule, node: Node) -> Activation | None:
    module = module_of(traced, node)
    if module is not None:
        return None if is_watched(module) else activation_of(module)
    extra = {name for name in node.kwargs if name != "inplace"}
    if node.op not in ("call_function", "call_method") or len(node.args) != 1 or extra:
        return None
    return TARGETS.get(node.target)
