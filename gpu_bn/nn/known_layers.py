"""The layers that this package recognises: torch's, ours, and those of other libraries, by the name of their class.

No other library is imported. Subclasses are not recognised: they may compute something else. A frozen normalisation of
any library is recognised by its buffers and its outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils import parametrize

from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import modules
from gpu_bn.nn.activated import component_classes
from gpu_bn.nn.fx.activations import activation_of
from gpu_bn.nn.fx.forward import is_watched

_NAMED_ALIKE = (
    *(modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d),
    *(modules.LazyBatchNorm1d, modules.LazyBatchNorm2d, modules.LazyBatchNorm3d),
)
CLASSES: dict[str, type[torch.nn.Module]] = {
    **{f"torch.nn.modules.batchnorm.{cls.__name__}": cls for cls in _NAMED_ALIKE},
    "timm.layers.norm_act.BatchNormAct2d": modules.BatchNorm2d,
    "timm.layers.norm_act.FrozenBatchNormAct2d": modules.FrozenBatchNorm2d,
    "torchvision.ops.misc.FrozenBatchNorm2d": modules.FrozenBatchNorm2d,
}
"""Our class for each class that is converted, by qualified name; :mod:`gpu_bn.nn.sync` adds ``SyncBatchNorm``."""


def is_our_class(cls: type[torch.nn.Module]) -> bool:
    """Tell whether a class is one of our layers; false for a user's subclass, which may compute something else."""
    return cls is modules.BatchNorm or component_classes(cls)[0] in CLASSES.values()


def counterpart(cls: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return our class for a class of torch or another library; ``None`` if there is none."""
    return CLASSES.get(f"{cls.__module__}.{cls.__qualname__}")


def conversion_of(module: torch.nn.Module) -> tuple[type[torch.nn.Module], Activation] | None:
    """Return the class and the activation that ``convert`` gives to a module; ``None`` if it leaves the module."""
    cls = counterpart(class_of(module))
    if cls is None:
        return None if frozen_eps(module) is None else (modules.FrozenBatchNorm2d, IDENTITY)
    children = dict(module.named_children())
    drop, act = (children.get(name) for name in ("drop", "act"))
    if drop is not None and (type(drop) is not torch.nn.Identity or is_watched(drop)):
        return None
    if act is None:
        return cls, IDENTITY
    activation = None if is_watched(act) else activation_of(act)
    return None if activation is None else (cls, activation)


FROZEN = ("weight", "bias", "running_mean", "running_var")
"""The buffers of a frozen normalisation."""
FROZEN_RTOL = 1e-9
"""The tolerance, relative and absolute, of the outputs of a frozen normalisation in float64."""


def looks_frozen(module: torch.nn.Module) -> bool:
    """Tell whether a module that is not ours has just the four vectors of a frozen normalisation, all as buffers."""
    buffers = module._buffers
    if is_our_class(type(module)) or buffers.keys() != set(FROZEN) or module._parameters or module._modules:
        return False
    return all(buffer is not None and buffer.dim() == 1 for buffer in buffers.values())


def frozen_eps(module: torch.nn.Module) -> float | None:
    """Return the eps of a frozen normalisation of any library, or ``None`` if the module computes anything else.

    It is computed from the outputs of a copy with random buffers, which must match those of such a normalisation.
    """
    if not looks_frozen(module) or is_watched(module) or any(buffer.is_meta for buffer in module.buffers()):
        return None
    channels = len(module._buffers["weight"])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    options: Any = {"dtype": torch.float64, "device": "cpu", "generator": generator}
    weight, bias, mean, var = vectors = 0.1 + torch.rand(4, channels, **options)
    x = 1 + torch.rand(2, channels, 1, 2, **options)
    try:
        trial = copy.deepcopy(module).cpu().double()
        trial._buffers.update(zip(FROZEN, vectors, strict=True))
        y = trial(x)
        slope = (y[0, :, 0, 1] - y[0, :, 0, 0]) / (x[0, :, 0, 1] - x[0, :, 0, 0])
        eps = float(f"{((weight / slope).square() - var).median().item():.6g}")
        scale = (weight * (var + eps).rsqrt())[:, None, None]
        expected = (x - mean[:, None, None]) * scale + bias[:, None, None]
        return eps if eps >= 0 and torch.allclose(y, expected, FROZEN_RTOL, FROZEN_RTOL) else None
    except Exception:  # a module that does not accept this input is no frozen normalisation
        return None


def known_norm(module: Any) -> tuple[type[torch.nn.Module], Activation] | None:
    """Return our class for a normalisation, and its activation; ``None`` if the module may compute anything else."""
    if not isinstance(module, torch.nn.Module) or is_watched(module) or parametrize.is_parametrized(module):
        return None
    ours = is_our_class(type(module))
    return (type(module), getattr(module, "activation", IDENTITY)) if ours else conversion_of(module)


def class_of(module: torch.nn.Module) -> type[Any]:
    """Return a module's class, or the original class of a parametrised module."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
