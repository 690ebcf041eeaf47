"""The layers whose computation is known: torch's, ours, and those of other libraries by the name of their class.

No other library is imported. Subclasses are not known: they may compute something else. A frozen normalisation of any
library is known by what it holds and computes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils import parametrize

from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import modules
from gpu_bn.nn.activated import joined_by
from gpu_bn.nn.fx.activations import activation_of
from gpu_bn.nn.fx.forward import is_watched

_SAME = (
    *(modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d),
    *(modules.LazyBatchNorm1d, modules.LazyBatchNorm2d, modules.LazyBatchNorm3d),
)
CLASSES: dict[str, type[torch.nn.Module]] = {
    **{f"torch.nn.modules.batchnorm.{cls.__name__}": cls for cls in _SAME},
    "timm.layers.norm_act.BatchNormAct2d": modules.BatchNorm2d,
    "timm.layers.norm_act.FrozenBatchNormAct2d": modules.FrozenBatchNorm2d,
    "torchvision.ops.misc.FrozenBatchNorm2d": modules.FrozenBatchNorm2d,
}
"""Our class for each layer that is converted, by qualified name; :mod:`gpu_bn.nn.sync` adds the row of its layer."""


def is_own(kind: type[torch.nn.Module]) -> bool:
    """Tell whether a class is one of our layers, and not a subclass, which may compute something else."""
    return kind is modules.BatchNorm or joined_by(kind)[0] in CLASSES.values()


def counterpart(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return our class for one of torch or another library."""
    return CLASSES.get(f"{kind.__module__}.{kind.__qualname__}")


def rule(module: torch.nn.Module) -> tuple[type[torch.nn.Module], Activation] | None:
    """Return what a module becomes, and its activation; ``None`` if it stays what it is."""
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


def looks_frozen(module: torch.nn.Module) -> bool:
    """Tell whether a module holds what a frozen normalisation holds, and is not ours."""
    buffers = module._buffers
    if is_own(type(module)) or buffers.keys() != set(FROZEN) or module._parameters or module._modules:
        return False
    return all(buffer is not None and buffer.dim() == 1 for buffer in buffers.values())


def frozen_eps(module: torch.nn.Module) -> float | None:
    """Find the eps of a frozen normalisation of any library: four buffers, nothing else, and matching outputs.

    It follows from the outputs of a copy with other buffers, so that the module need not store it.
    """
    if not looks_frozen(module) or is_watched(module) or any(buffer.is_meta for buffer in module.buffers()):
        return None
    channels = len(module._buffers["weight"])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    made: Any = {"dtype": torch.float64, "device": "cpu", "generator": generator}
    weight, bias, mean, var = held = 0.1 + torch.rand(4, channels, **made)
    x = 1 + torch.rand(2, channels, 1, 2, **made)
    try:
        trial = copy.deepcopy(module).cpu().double()
        trial._buffers.update(zip(FROZEN, held, strict=True))
        y = trial(x)
        slope = (y[0, :, 0, 1] - y[0, :, 0, 0]) / (x[0, :, 0, 1] - x[0, :, 0, 0])
        eps = float(f"{((weight / slope).square() - var).median().item():.6g}")
        scale = (weight * (var + eps).rsqrt())[:, None, None]
        right = (x - mean[:, None, None]) * scale + bias[:, None, None]
        return eps if eps >= 0 and torch.allclose(y, right, FROZEN_RTOL, FROZEN_RTOL) else None
    except Exception:  # it takes no such input: it is something else
        return None


def known_norm(module: Any) -> tuple[type[torch.nn.Module], Activation] | None:
    """Return our class for a normalisation, and its activation, if it computes nothing else."""
    if not isinstance(module, torch.nn.Module) or is_watched(module) or parametrize.is_parametrized(module):
        return None
    return rule(module) if not is_own(type(module)) else (type(module), getattr(module, "activation", IDENTITY))


def class_of(module: torch.nn.Module) -> type[Any]:
    """Return a module's class, without what parametrisations make of it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
