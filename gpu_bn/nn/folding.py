"""Folding normalisations into the convolutions and linear layers before them, for inference; torch's names."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gpu_bn import folding
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import _activations
from gpu_bn.nn._graph import ORIGINAL, module_of, trace
from gpu_bn.nn.modules import FrozenBatchNorm2d


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
    """``torch.nn.utils.fuse_linear_bn_weights``, computed in float64."""
    return fuse_conv_bn_weights(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)


def fuse_conv_bn_eval(conv: Any, bn: Any, transpose: bool = False) -> Any:
    """``torch.nn.utils.fuse_conv_bn_eval``: a convolution that includes the normalisation.

    Transposed convolutions and their groups are recognised. If ``bn`` has an activation, the result is a
    ``Sequential`` of the convolution and the activation.

    Raises:
        AssertionError: not both are in evaluation mode.
        ValueError: ``bn`` has no running statistics, or another number of channels.
    """
    transpose = transpose or isinstance(conv, _ConvTransposeNd)
    return _fuse_eval(conv, bn, transpose, conv.groups if transpose else 1)


def fuse_linear_bn_eval(linear: Any, bn: Any) -> Any:
    """``torch.nn.utils.fuse_linear_bn_eval``, as :func:`fuse_conv_bn_eval`."""
    return _fuse_eval(linear, bn, False, 1)


def fold(model: torch.nn.Module) -> GraphModule:
    """A copy of a model for inference, in which no normalisation is left behind a convolution or a linear layer.

    Activations and sums that layers of ours did become torch's own, so that a compiler may fuse them.

    Args:
        model: with torch's layers or ours. It is left as it is.

    Raises:
        ValueError: the model cannot be traced by ``torch.fx``.
    """
    traced = copy.deepcopy(model).eval()
    if not isinstance(traced, GraphModule):
        traced = trace(traced)
    traced.meta.pop(ORIGINAL, None)
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        norm = module_of(traced, node)
        if not isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)) or norm.running_mean is None:
            continue
        source = node.args[0]
        before = module_of(traced, source)
        if not isinstance(before, (_ConvNd, torch.nn.Linear)) or len(source.users) != 1:
            continue
        if calls.count(str(source.target)) == 1:
            _fold(traced, node, source, before, norm)
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _fold(traced: GraphModule, node: Node, source: Node, before: Any, norm: Any) -> None:
    activation = Activation.of(_argument(node, 2, "activation") or getattr(norm, "activation", IDENTITY))
    residual = _argument(node, 1, "residual")
    bare = copy.copy(norm)
    bare.activation = IDENTITY
    linear = isinstance(before, torch.nn.Linear)
    folded = fuse_linear_bn_eval(before, bare) if linear else fuse_conv_bn_eval(before, bare)
    parent, _, child = str(source.target).rpartition(".")
    setattr(traced.get_submodule(parent), child, folded)
    graph = traced.graph
    with graph.inserting_before(node):
        result = graph.call_function(_two_axes, (source,)) if linear else source
        if residual is not None:
            result = graph.call_function(torch.add, (result, residual))
        if not activation.is_identity:
            call, options = _activations.function(activation)
            result = graph.call_function(call, (result,), options)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _argument(node: Node, position: int, name: str) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    if isinstance(value, Node) and value.target is Activation:
        return Activation(*value.args)  # type: ignore[arg-type]
    return value


def _two_axes(y: Tensor) -> Tensor:
    """What a folded linear layer gives; with more axes the normalisation was not over its outputs."""
    if y.dim() != 2:
        raise ValueError(f"a linear layer was folded with the normalisation of 2D inputs, got {y.dim()}D")
    return y


def _fuse_eval(layer: Any, bn: Any, transposed: bool, groups: int) -> Any:
    if layer.training or bn.training:
        raise AssertionError("Fusion only for eval!")
    fused = copy.deepcopy(layer)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, transposed, groups
    )
    activation = getattr(bn, "activation", IDENTITY)
    return fused if activation.is_identity else torch.nn.Sequential(fused, _Activation(activation))


class _Activation(torch.nn.Module):
    """An activation of ours as a layer."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return _activations.activate(input, self.activation)

    def extra_repr(self) -> str:
        return repr(self.activation)
