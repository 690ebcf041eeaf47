"""The activations as torch has them: functions, layers, and calls in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_bn.activations import Activation, elu, leaky_relu

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "leaky_relu": (F.leaky_relu, {}),
    "elu": (F.elu, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {"approximate": "none"}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "hardswish": (F.hardswish, {}),
    "sigmoid": (torch.sigmoid, {}),
    "tanh": (torch.tanh, {}),
}
"""The rows of :data:`gpu_bn.activations.ROWS` but the identity, as torch has them."""


def function(activation: Activation) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Return torch's function for an activation, and its options."""
    call, options = FUNCTIONS[activation.name]
    name = activation.row.parameter
    return call, {**options, name: activation.parameter} if name else {**options}


def activate(z: Tensor, activation: Activation) -> Tensor:
    """Apply an activation."""
    if activation.is_identity:
        return z
    call, options = function(activation)
    return call(z, **options)


_TORCH = "torch.nn.modules.activation"
NAMES: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), "tanh"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "torch.nn.modules.linear.Identity": "identity",
    **{f"{_TORCH}.{name}": name.lower() for name in ("ReLU", "ReLU6", "SiLU", "Hardswish", "Sigmoid", "Tanh")},
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.ReLU6Activation": "relu6",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "monai.networks.blocks.activation.MemoryEfficientSwish": "silu",
}
"""What has no parameter: functions, methods of tensors by name, and layers of any library by qualified name."""


def _gelu(approximate: str = "none") -> Activation:
    return Activation("gelu_tanh" if approximate == "tanh" else "gelu")


PARAMETRIC: dict[Any, tuple[str, Callable[..., Activation]]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, f"{_TORCH}.LeakyReLU"), ("negative_slope", leaky_relu)),
    **dict.fromkeys((F.elu, F.elu_, f"{_TORCH}.ELU"), ("alpha", elu)),
    **dict.fromkeys((F.gelu, f"{_TORCH}.GELU"), ("approximate", _gelu)),
}
"""Functions and layers with a parameter: its name, and the activation for a value."""


def activation_of_call(target: Any, rest: Sequence[Any], options: dict[str, Any]) -> Activation | None:
    """Return the activation that a function or method is, if it is one of ours and otherwise given constants."""
    name, make = PARAMETRIC.get(target, ("inplace", None))
    given = dict(zip((name, "inplace"), rest, strict=False)) | options
    given.pop("inplace", None)
    if len(rest) > (2 if make else 1) or not given.keys() <= {name}:
        return None
    if make is None:
        return Activation(NAMES[target]) if target in NAMES else None
    return make(*given.values()) if all(isinstance(value, (int, float, str)) for value in given.values()) else None


def activation_of(module: Any) -> Activation | None:
    """Return the activation that a module is, if it is one of ours; a subclass may compute something else."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name in PARAMETRIC:
        parameter, make = PARAMETRIC[name]
        return make(getattr(module, parameter))
    if name == "transformers.activations.GELUActivation":  # with use_gelu_python it calls another function
        return Activation("gelu") if module.act is F.gelu else None
    return Activation(NAMES[name]) if name in NAMES else None
