"""Fold normalisations into the convolutions and linear layers before them, for inference."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvTransposeNd

from gpu_bn import folding
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn.fx import activations
from gpu_bn.nn.fx.forward import INTERNAL, is_watched
from gpu_bn.nn.fx.graph import is_layer, is_ours, undo
from gpu_bn.nn.fx.inspection import NORM_ATTRIBUTES
from gpu_bn.nn.fx.pairs import observed_pairs, traced_pairs
from gpu_bn.nn.fx.trace import in_mode
from gpu_bn.nn.known_layers import frozen_eps, known_norm
from gpu_bn.nn.operators.autograd import PLAIN
from gpu_bn.nn.report import Report

Model = TypeVar("Model", bound=nn.Module)

FOLDED = (nn.Linear, *(nn.Conv1d, nn.Conv2d, nn.Conv3d), *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
"""The layers that a normalisation is folded into."""


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
    """Fold a normalisation into a convolution, as ``torch.nn.utils.fuse_conv_bn_weights`` does, in float64.

    Args:
        conv_w: (out, in / groups, ...), the weight of a convolution; (in, out / groups, ...) if it is transposed.
        conv_b: (out,), or ``None``.
        bn_rm: (out,), the running mean.
        bn_rv: (out,), the running variance.
        bn_eps: added to the variance.
        bn_w: (out,), or ``None`` for 1.
        bn_b: (out,), or ``None`` for 0.
        transpose: whether the convolution is transposed.
        groups: the number of groups of a transposed convolution.

    Returns:
        ``(weight, bias)``: with ``conv_w``'s shape and dtype, and (out,) in ``conv_w``'s dtype.

    Raises:
        ValueError: the numbers of channels and of outputs differ, or ``conv_w`` has fewer than two axes.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> mean, var = torch.ones(1), torch.ones(1)
        >>> weight, bias = nn.fuse_conv_bn_weights(torch.ones(1, 1, 1, 1), None, mean, var, 0.0, None, None)
        >>> weight.item(), bias.item()
        (1.0, -1.0)

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
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
    """Fold a normalisation into a linear layer, as ``torch.nn.utils.fuse_linear_bn_weights`` does, in float64.

    The other arguments are those of :func:`fuse_conv_bn_weights`.

    Args:
        linear_w: (out, in), the weight of a linear layer.
        linear_b: (out,), or ``None``.
        bn_rm: (out,), the running mean; or (1,): then all vectors of the normalisation hold one number for all outputs.

    Returns:
        ``(weight, bias)``: with ``linear_w``'s shape and dtype, and (out,) in ``linear_w``'s dtype.

    Raises:
        ValueError: the number of channels differs from the number of outputs of ``linear_w``.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> weight, bias = nn.fuse_linear_bn_weights(torch.eye(2), None, torch.ones(2), torch.ones(2), 0.0, None, None)
        >>> bias.tolist()
        [-1.0, -1.0]

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
    if len(bn_rm) == 1:
        vectors = (None if vector is None else vector.expand(len(linear_w)) for vector in (bn_rm, bn_rv, bn_w, bn_b))
        bn_rm, bn_rv, bn_w, bn_b = vectors  # type: ignore[assignment]
    return fuse_conv_bn_weights(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)


def fuse_conv_bn_eval(conv: Any, bn: Any, transpose: bool = False) -> Any:
    """Return a convolution that includes the normalisation behind it, as ``torch.nn.utils.fuse_conv_bn_eval`` does.

    Transposed convolutions and their groups are recognised.

    Args:
        conv: a convolution in evaluation mode; it is not changed.
        bn: a normalisation in evaluation mode, with running statistics over the convolution's outputs.
        transpose: whether a convolution of another type is transposed.

    Returns:
        A copy of the convolution with the folded weight and bias; a ``Sequential`` of the copy and the activation if
        ``bn`` has one.

    Raises:
        AssertionError: one of the two is in training mode.
        ValueError: ``bn`` has no running statistics, or its number of channels differs from the number of outputs.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> conv, bn, x = torch.nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval(), torch.randn(2, 3, 5, 5)
        >>> torch.testing.assert_close(nn.fuse_conv_bn_eval(conv, bn)(x), bn(conv(x)))

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
    if conv.training or bn.training:
        raise AssertionError("Fusion only for eval!")
    fused = copy.deepcopy(conv)
    fused.weight, fused.bias = _folded_parameters(conv, bn, transpose)
    activation = getattr(bn, "activation", IDENTITY)
    if activation.is_identity:
        return fused
    folded = Folded()
    folded.activation = activation
    return nn.Sequential(fused, folded)


def fuse_linear_bn_eval(linear: Any, bn: Any) -> Any:
    """Return a linear layer that includes the normalisation behind it, as ``torch.nn.utils.fuse_linear_bn_eval`` does.

    Args:
        linear: a linear layer in evaluation mode; it is not changed.
        bn: a normalisation in evaluation mode, with running statistics over the outputs, or of a single channel.

    Returns:
        A copy of the linear layer with the folded weight and bias; a ``Sequential`` of the copy and the activation if
        ``bn`` has one.

    Raises:
        AssertionError: one of the two is in training mode.
        ValueError: ``bn`` has no running statistics, or its number of channels differs from the number of outputs.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> linear, bn, x = torch.nn.Linear(3, 4).eval(), nn.BatchNorm1d(4).eval(), torch.randn(2, 3)
        >>> torch.testing.assert_close(nn.fuse_linear_bn_eval(linear, bn)(x), bn(linear(x)))

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
    return fuse_conv_bn_eval(linear, bn)


def fold(model: Model, *inputs: Any, report: Report | None = None, **options: Any) -> Model:
    """Copy a model for inference, and fold its normalisations into the convolutions and linear layers before them.

    The copy has the model's class and attributes, and modules of the same names. In place of a folded normalisation it
    has an identity, or a module that computes the rest: the sum with a residual, and the activation. A layer is not
    folded if it is a subclass of a known layer, if it has hooks or parametrisations, if other code calls it or reads
    its tensors, or if the outputs of the layer before it are not the channels of the normalisation.

    Args:
        model: a model with torch layers, ours or others that :func:`convert` knows; it is not changed.
        inputs: a batch. The copy is called with it once, to record which layer follows which, whatever the model's
            control flow; it should take the same branches as later inputs. Without a batch, ``torch.fx`` traces the
            model, or otherwise each module in it that can be traced. Linear layers are then taken to have 2D outputs,
            as in ``torch.nn.utils.fuse_linear_bn_eval``; other outputs raise a ``ValueError``.
        report: collects what was folded, and the reason for each layer that was not.
        options: keyword arguments for the call with the batch.

    Returns:
        The copy, in evaluation mode.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x, report = torch.randn(2, 3, 8, 8), nn.Report()
        >>> folded = nn.fold(model, x, report=report)
        >>> torch.testing.assert_close(folded(x), model.eval()(x))
        >>> report.folded
        {'1': '0'}

    Source: Ioffe & Szegedy 2015, Alg. 2.
    """
    report = Report() if report is None else report
    copied = _copy(model).eval()
    undo(copied)
    names = {module: name for name, module in copied.named_modules()}
    with in_mode(model.modules(), False):  # functions that the copy shares may call the model's own layers
        pairs, reasons = observed_pairs(copied, inputs, options) if inputs or options else traced_pairs(copied)
    for layer, norm in pairs:
        if reason := _obstacle(layer, norm):
            reasons[norm] = reason
            continue
        layer.weight, layer.bias = _folded_parameters(layer, norm)
        _remove_normalisation(layer, norm)
        report.folded[names[norm]] = names[layer]
    for module, name in names.items():
        if is_layer(module):
            report.left[name] = reasons.get(module, "its input is not the output of one convolution or linear layer")
    return copied


def _copy(model: Model) -> Model:
    """Copy a model deeply. Tensors in it that have a gradient history, which torch cannot copy, are detached."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in tensors if not value.is_leaf})


def _obstacle(layer: Any, norm: Any) -> str:
    """Return the reason why a normalisation cannot be folded into the layer before it; "" if it can."""
    known = known_norm(norm)
    if known is None:
        return f"{type(norm).__name__} is not known, or has hooks, parametrisations or an activation that is not ours"
    if type(layer) not in FOLDED or is_watched(layer):
        return f"{type(layer).__name__} before it is no layer of torch, or has hooks or parametrisations"
    if norm.running_mean is None or norm.training:
        return "it uses each batch's statistics"
    tensors = (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not PLAIN.issuperset(type(tensor) for tensor in tensors if tensor is not None):
        return "its tensors, or those of the layer before it, are quantised, distributed or of another subclass"
    ranks = getattr(known[0], "ranks", (4,))
    outputs = layer.out_features if type(layer) is nn.Linear else layer.out_channels
    if len(norm.running_mean) != outputs or (ranks and layer.weight.dim() not in ranks):
        return "its channels are not the outputs of the layer before it"
    return ""


def _remove_normalisation(layer: Any, norm: Any) -> None:
    """Turn a folded normalisation into a :class:`Folded` or an identity that keeps its numbers, but not its tensors."""
    _, activation = known_norm(norm) or (None, IDENTITY)
    ours = is_ours(norm) and "_converted_from" not in vars(norm)
    numbers = {name: value for name, value in vars(norm).items() if name in NORM_ATTRIBUTES}
    for name in [name for name in vars(norm) if name not in INTERNAL]:
        del vars(norm)[name]
    vars(norm).update({name: False if isinstance(value, bool) else value for name, value in numbers.items()})
    for tensors in (norm._parameters, norm._buffers):
        tensors.update(dict.fromkeys(tensors))
    norm._modules.clear()
    if ours or not activation.is_identity or isinstance(layer, nn.Linear):
        norm.__class__ = Folded
        norm.activation, norm.two_axes = activation, isinstance(layer, nn.Linear)
    else:
        norm.__class__ = nn.Identity


class Folded(nn.Module):
    """The module in place of a folded normalisation: it adds the residual and applies the activation."""

    activation: Activation = IDENTITY
    two_axes: bool = False
    """Whether the input must be 2D, because the normalisation was folded into a linear layer."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add the residual and apply the activation, with the arguments of :meth:`gpu_bn.nn.BatchNorm.forward`."""
        if mask is not None:
            raise ValueError("a folded normalisation has no mask")
        text = "a linear layer was folded with the normalisation of 2D inputs"
        if self.two_axes and isinstance(input, Proxy):  # torch.fx traces: the graph checks when it runs
            torch._assert(input.dim() == 2, text)
        elif self.two_axes and input.dim() != 2:
            raise ValueError(f"{text}, got {input.dim()}D: call nn.fold with a batch of such inputs")
        z = input if residual is None else input + residual
        return activations.activate(z, self.activation if activation is None else Activation.of(activation))

    def extra_repr(self) -> str:
        return repr(self.activation)


def _folded_parameters(layer: Any, bn: Any, transposed: bool = False) -> tuple[Parameter, Parameter]:
    """Return the weight and bias of a layer that includes the normalisation behind it."""
    eps: Any = bn.eps if hasattr(bn, "eps") else frozen_eps(bn)
    tensors = (layer.weight, layer.bias, bn.running_mean, bn.running_var, eps, bn.weight, bn.bias)
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_weights(*tensors)
    transposed = transposed or isinstance(layer, _ConvTransposeNd)
    return fuse_conv_bn_weights(*tensors, transposed, layer.groups if transposed else 1)
