"""Convert the BatchNorm layers of a model to ours, and back.

A layer stays the same object: only its class changes. Its parameters, buffers, hooks, flags and name are kept, and all
references to it stay valid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import modules
from gpu_bn.nn.activated import join_classes, store_guarded
from gpu_bn.nn.fused import Fused
from gpu_bn.nn.fx.forward import restore_forwards
from gpu_bn.nn.fx.graph import fuse_activations, is_ours, undo
from gpu_bn.nn.fx.trace import in_mode
from gpu_bn.nn.known_layers import CLASSES, class_of, conversion_of, frozen_eps, is_our_class
from gpu_bn.nn.report import Report

Model = TypeVar("Model", bound=torch.nn.Module)

ADDED = ("activation", "frozen", "virtual_batch_size", "renorm", "_converted_from", "_added")
"""The attributes that our layers may have in addition to those of torch layers."""


def convert(model: Model, *, fuse: bool = False, report: Report | None = None) -> Model:
    """Convert the BatchNorm layers of a model to layers of this package, in place.

    It converts ``torch.nn.BatchNorm1d/2d/3d``, their lazy forms, ``SyncBatchNorm`` (which then also works on CPUs),
    timm's ``BatchNormAct2d`` and ``FrozenBatchNormAct2d`` with their activations, and frozen normalisations of any
    library. Parameters, buffers, hooks, flags and the state_dict stay.

    Args:
        model: a model, or a layer.
        fuse: whether to merge the activation that follows a layer, and a sum between the two, into the layer's call.
            The modules that call these are traced one by one by ``torch.fx``. A module that cannot be traced, or whose
            graph would lose something, stays as it is.
        report: collects what was converted and merged, and the reason for each layer that was not.

    Returns:
        ``model``.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> report = nn.Report()
        >>> model = nn.convert(model, fuse=True, report=report)
        >>> report.converted, report.merged
        (['1'], {'1': 'relu'})
    """
    report = Report() if report is None else report
    names = {module: name for name, module in model.named_modules()}
    restore_forwards(model)
    for module, name in names.items():
        if (conversion := conversion_of(module)) is not None:
            _convert_layer(module, *conversion)
            report.converted.append(name)
        elif not is_our_class(type(module)) and isinstance(module, _BatchNorm):
            report.left[name] = f"{type(module).__name__} or its activation is not known, or it has hooks"
    if fuse:
        fuse_activations(model, report)
    _register_with_opacus({*CLASSES.values(), *map(type, filter(is_ours, model.modules()))})
    return model


def _register_with_opacus(classes: Iterable[type[torch.nn.Module]]) -> None:
    """Let opacus, if it is loaded, treat our layers as the torch layers of the same name: it looks up exact types."""
    validators = sys.modules.get("opacus.validators.module_validator")
    if validators is not None:
        for registered in (validators.ModuleValidator.VALIDATORS, validators.ModuleValidator.FIXERS):
            for cls in classes:
                theirs = getattr(torch.nn, cls.__name__, None)
                if theirs in registered:
                    registered.setdefault(cls, registered[theirs])


def revert(model: Model) -> Model:
    """Undo :func:`convert`, in place: each of our layers gets back its class, or torch's class of the same name.

    Modules compute their activations and sums themselves again. In ``torch.fx`` graph modules, calls of our layers with
    a residual or an activation become calls of torch functions.

    Args:
        model: a model, or a layer.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer has an activation, a ``virtual_batch_size`` or ``renorm``, or is frozen, and torch's layer
            would lose that. The model is then unchanged.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> model = nn.revert(nn.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4))))
        >>> type(model[0]) is torch.nn.BatchNorm1d
        True
    """
    originals = [
        (module, _original_class(name, module))
        for name, module in model.named_modules()
        if isinstance(module, (Fused, modules.FrozenBatchNorm2d))
    ]
    undo(model)
    for layer, cls in originals:
        for attribute in (*ADDED, *layer.__dict__.get("_added", ())):
            layer.__dict__.pop(attribute, None)
        if cls is not None:
            if cls is not torch.nn.SyncBatchNorm:
                layer.__dict__.pop("process_group", None)
            set_class(layer, cls)
    return model


def freeze(model: Model, *, parameters: bool = True) -> Model:
    """Make our layers use their running statistics in training too, without updating them.

    Args:
        model: a model, or a layer; torch layers in it stay as they are.
        parameters: whether weight and bias are frozen as well.

    Returns:
        ``model``.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.freeze(nn.BatchNorm1d(4))
        >>> y = layer(torch.randn(8, 4))
        >>> layer.num_batches_tracked.item(), layer.weight.requires_grad
        (0, False)
    """
    return _set_frozen(model, True, parameters)


def unfreeze(model: Model, *, parameters: bool = True) -> Model:
    """Undo :func:`freeze`.

    Args:
        model: a model, or a layer.
        parameters: whether weight and bias are learned again as well.

    Returns:
        ``model``.

    Examples:
        >>> from gpu_bn import nn
        >>> nn.unfreeze(nn.freeze(nn.BatchNorm1d(4))).weight.requires_grad
        True
    """
    return _set_frozen(model, False, parameters)


def insert_identity_(model: Model, names: list[str] | tuple[str, ...], *inputs: Any, **options: Any) -> Model:
    """Put a batch normalisation behind modules of a trained model, without changing its outputs.

    Each named module becomes ``Sequential(module, BatchNorm)``. The normalisation is initialised as the identity on the
    module's output for these inputs.

    Args:
        model: changed in place.
        names: the names of modules, as ``named_modules`` gives them.
        inputs: a batch; the model is called with it once.
        options: options of the layers, such as ``eps`` and ``momentum``.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no module of a name, or the module was not called, or its output was not a tensor of
            rank 2 to 5.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.randn(8, 3)
        >>> before = model(x)
        >>> torch.testing.assert_close(nn.insert_identity_(model, ["0"], x)(x), before, rtol=1e-4, atol=1e-5)

    Source: Ioffe & Szegedy 2015, section 3.
    """
    known = dict(model.named_modules())
    if unknown := [name for name in names if name not in known or not name]:
        raise ValueError(f"the model has no modules named {', '.join(unknown)}")
    ranks = {rank: cls for cls in (modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d) for rank in cls.ranks}
    layers: dict[str, torch.nn.Module] = {}

    def make_layer(name: str, output: Any) -> None:
        """Make the layer behind a module within its call, because later operations may overwrite the output."""
        if isinstance(output, torch.Tensor) and output.dim() in ranks:
            defaults = {"device": output.device, "dtype": None if output.dtype.itemsize < 4 else output.dtype}
            layers[name] = ranks[output.dim()](output.shape[1], **(defaults | options)).init_identity_(output)

    hooks = [
        known[name].register_forward_hook(lambda _module, _inputs, output, name=name: make_layer(name, output))
        for name in names
    ]
    try:
        with torch.no_grad(), in_mode(model.modules(), False):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"{', '.join(missing)} should give a tensor of rank 2 to 5 for these inputs")
    places = [name.rpartition(".") for name in layers]
    parents = [model.get_submodule(parent) for parent, _, _ in places]  # before replacements change the paths
    for (name, layer), parent, (_, _, child) in zip(layers.items(), parents, places, strict=True):
        setattr(parent, child, torch.nn.Sequential(known[name], layer.train(known[name].training)))
    return model


def _set_frozen(model: Model, frozen: bool, parameters: bool) -> Model:
    for module in model.modules():
        if isinstance(module, Fused):
            module.frozen = frozen
            for parameter in module.parameters(recurse=False) if parameters else ():
                parameter.requires_grad = not frozen  # requires_grad_() refuses a lazy layer's parameters
    return model


def _original_class(name: str, module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """Return the class that ``revert`` gives to one of our layers; ``None`` if torch has no such class."""
    came_from: type[torch.nn.Module] | None = module.__dict__.get("_converted_from")
    if getattr(module, "frozen", False):
        raise ValueError(f"layer {name!r} is frozen, which torch's layers cannot be: call unfreeze first")
    for option in ("virtual_batch_size", "renorm"):
        if getattr(module, option, None) is not None:
            raise ValueError(f"layer {name!r} has {option}, which torch's layer would lose")
    has_module = came_from is not None and module._modules.get("act") is not None  # which applies the activation
    if module.activation != IDENTITY and not has_module:
        raise ValueError(f"layer {name!r} has the activation {module.activation!r}, which torch's layer would lose")
    if came_from is None:
        return getattr(torch.nn, class_of(module).__name__, None)
    if issubclass(came_from, _LazyNormBase) and not isinstance(module, _LazyNormBase):
        return came_from.cls_to_become  # the layer has had its first input
    return came_from


def _convert_layer(module: torch.nn.Module, cls: type[torch.nn.Module], activation: Activation) -> None:
    """Change a module's class to ``cls``, and record its original class for :func:`revert`."""
    eps = frozen_eps(module) if cls is modules.FrozenBatchNorm2d else None
    module.__dict__["_converted_from"] = class_of(module)
    if eps is not None and "eps" not in module.__dict__:
        module.__dict__.update(eps=eps, _added=("eps",))
    set_class(module, join_classes(cls, class_of(module)))
    if not activation.is_identity:
        setattr(module, "activation", activation)  # noqa: B010 - torch.nn.Module declares no such attribute


def set_class(module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    """Change a module's class, and keep its parametrisations."""
    if parametrize.is_parametrized(module):  # its class is generated, with a property for each parametrised tensor
        body = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), body)
    module.__class__ = cls
    store_guarded(module)
