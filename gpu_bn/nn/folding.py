"""Folding normalisations into the convolutions and linear layers before them, for inference; torch's names."""

from __future__ import annotations

import copy
from collections import Counter
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvTransposeNd

from gpu_bn import folding
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import _activations
from gpu_bn.nn._aliases import module_of
from gpu_bn.nn._graph import arguments, is_layer, replace_call, trace
from gpu_bn.nn._known import is_watched, known_norm

FOLDED = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""What a normalisation is folded into."""


def fuse_conv_bn_weights(
    conv_w: Tensor,
    conv_b: Tensor | None,
    bn_rm: Tensor,
    bn_rv: Tensor,
    bn_eps: float,
    bn_w: Tensor | None,
    bn_b: Tensor | None,
    transpose: bool = False,
    groups: int = 1,
) -> tuple[Parameter, Parameter]:
    """``torch.nn.utils.fuse_conv_bn_weights``, computed in float64; ``groups`` is for transposed convolutions."""
    norm: Any = SimpleNamespace(weight=bn_w, bias=bn_b, running_mean=bn_rm, running_var=bn_rv, eps=bn_eps)
    with torch.no_grad():
        weight, bias = folding.fold(conv_w, conv_b, norm, transposed=transpose, groups=groups)
    learned = conv_b is not None and conv_b.requires_grad
    return Parameter(weight, conv_w.requires_grad), Parameter(bias, learned)


def fuse_linear_bn_weights(
    linear_w: Tensor,
    linear_b: Tensor | None,
    bn_rm: Tensor,
    bn_rv: Tensor,
    bn_eps: float,
    bn_w: Tensor | None,
    bn_b: Tensor | None,
) -> tuple[Parameter, Parameter]:
    """``torch.nn.utils.fuse_linear_bn_weights``, computed in float64; a single channel is that of all outputs."""
    if len(bn_rm) == 1:
        vectors = (None if vector is None else vector.expand(len(linear_w)) for vector in (bn_rm, bn_rv, bn_w, bn_b))
        bn_rm, bn_rv, bn_w, bn_b = vectors  # type: ignore[assignment]
    return fuse_conv_bn_weights(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)


def fuse_conv_bn_eval(conv: Any, bn: Any, transpose: bool = False) -> Any:
    """``torch.nn.utils.fuse_conv_bn_eval``: a convolution that includes the normalisation.

    Transposed convolutions and their groups are recognised. If ``bn`` has an activation, the result is a
    ``Sequential`` of the convolution and the activation.

    Raises:
        AssertionError: not both are in evaluation mode.
        ValueError: ``bn`` has no running statistics, or another number of channels.
    """
    return _fuse_eval(conv, bn, transpose)


def fuse_linear_bn_eval(linear: Any, bn: Any) -> Any:
    """``torch.nn.utils.fuse_linear_bn_eval``, as :func:`fuse_conv_bn_eval`; ``bn`` may also have a single channel."""
    return _fuse_eval(linear, bn, False)


def fold(model: nn.Module, *inputs: Any) -> GraphModule:
    """A copy of a model for inference, in which no normalisation is left behind a convolution or a linear layer.

    Activations and sums that layers of ours did become torch's own, so that a compiler may fuse them. What cannot be
    folded stays: subclasses of the known layers, and layers that have hooks or parametrisations, are called or read
    more than once, or whose outputs are not the channels of the normalisation.

    Args:
        model: with torch's layers, ours or those that :func:`convert` knows. It is left as it is.
        inputs: a batch, with which the copy is called once to see how many axes a linear layer's outputs have. Without
            it they are taken to be 2D, as ``torch.nn.utils.fuse_linear_bn_eval`` takes them, if their number fits, and
            what is returned raises a ``ValueError`` for others.

    Raises:
        ValueError: the model cannot be traced by ``torch.fx``.
    """
    traced = copy.deepcopy(model).eval()
    if not isinstance(traced, GraphModule):
        traced = trace(nn.Sequential(traced) if is_layer(traced) else traced)
    if inputs:
        with torch.no_grad():
            ShapeProp(traced).propagate(*inputs)
    nodes = list(traced.graph.nodes)
    calls = Counter(module_of(traced, node) for node in nodes)
    readers = _readers(traced)
    for node in nodes:
        given = arguments(node)
        source, norm = given.pop("input", None), module_of(traced, node)
        layer: Any = module_of(traced, source)
        if not _can_fold(layer, norm) or given.get("mask") is not None:
            continue
        alone = calls[layer] == len(source.users) == 1 and all(
            readers[id(tensor)] == 1 for tensor in layer.parameters()
        )
        seen = source.meta.get("tensor_meta")
        if alone and (seen is None or len(seen.shape) == layer.weight.dim()):
            _fold(traced.graph, node, source, layer, norm)
    traced.graph.lint()
    return GraphModule(traced, traced.graph, type(traced).__name__).eval()  # without what its graph does not use


def _readers(traced: GraphModule) -> Counter[int]:
    """How many modules and nodes read a tensor, by its id."""
    tensors = [tensor for module in traced.modules() for tensor in module.parameters(recurse=False)]
    read = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    return Counter(map(id, tensors + [attrgetter(name)(traced) for name in read]))


def _can_fold(layer: Any, norm: Any) -> bool:
    known = known_norm(norm)
    if known is None or norm.running_mean is None or norm.training:
        return False
    if type(layer) not in FOLDED or is_watched(layer):
        return False
    ranks = getattr(known[0], "ranks", (4,))
    outputs = layer.out_features if type(layer) is nn.Linear else layer.out_channels
    return len(norm.running_mean) == outputs and (not ranks or layer.weight.dim() in ranks)


def _fold(graph: Graph, node: Node, source: Node, layer: Any, norm: Any) -> None:
    _, own = known_norm(norm) or (None, IDENTITY)
    given = arguments(node)
    layer.weight, layer.bias = _folded(layer, norm)
    value = source
    if isinstance(layer, nn.Linear):
        with graph.inserting_before(node):
            value = graph.call_function(_two_axes, (source,))
    replace_call(graph, node, value, given.get("residual"), Activation.of(given.get("activation") or own))


def _two_axes(y: Tensor) -> Tensor:
    """What a folded linear layer gives; with more axes the normalisation was not over its outputs."""
    if y.dim() != 2:
        raise ValueError(
            f"a linear layer was folded with the normalisation of 2D inputs, got {y.dim()}D: give nn.fold such a batch"
        )
    return y


def _fuse_eval(layer: Any, bn: Any, transposed: bool) -> Any:
    if layer.training or bn.training:
        raise AssertionError("Fusion only for eval!")
    fused = copy.deepcopy(layer)
    fused.weight, fused.bias = _folded(layer, bn, transposed)
    activation = getattr(bn, "activation", IDENTITY)
    return fused if activation.is_identity else nn.Sequential(fused, _Activation(activation))


def _folded(layer: Any, bn: Any, transposed: bool = False) -> tuple[Parameter, Parameter]:
    tensors = (layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_weights(*tensors)
    transposed = transposed or isinstance(layer, _ConvTransposeNd)
    return fuse_conv_bn_weights(*tensors, transposed, layer.groups if transposed else 1)


class _Activation(nn.Module):
    """An activation of ours as a layer."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return _activations.activate(input, self.activation)

    def extra_repr(self) -> str:
        return repr(self.activation)
