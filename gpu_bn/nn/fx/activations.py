"""Map between activations and torch: its functions, its layers, and the calls in a graph."""

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
"""The torch function of each activation in :data:`gpu_bn.activations.ROWS` except the identity, and its options."""


def torch_function(activation: Activation) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Return the torch function that computes an activation, and its keyword arguments."""
    call, options = FUNCTIONS[activation.name]
    name = activation.row.parameter
    return call, {**options, name: activation.parameter} if name else {**options}


def activate(z: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to a tensor, by torch's own functions."""
    if activation.is_identity:
        return z
    call, options = torch_function(activation)
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
"""The activations without a parameter: functions, names of tensor methods, and qualified names of layers."""


def _gelu(approximate: str = "none") -> Activation:
    return Activation("gelu_tanh" if approximate == "tanh" else "gelu")


PARAMETRIC: dict[Any, tuple[str, Callable[..., Activation]]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, f"{_TORCH}.LeakyReLU"), ("negative_slope", leaky_relu)),
    **dict.fromkeys((F.elu, F.elu_, f"{_TORCH}.ELU"), ("alpha", elu)),
    **dict.fromkeys((F.gelu, f"{_TORCH}.GELU"), ("approximate", _gelu)),
}
"""Functions and layers with a parameter: the parameter's name, and a function from its value to the activation."""


def activation_of_call(target: Any, rest: Sequence[Any], options: dict[str, Any]) -> Activation | None:
    """Return the activation that a call computes, or ``None``; the arguments after the input must be constants."""
    name, make = PARAMETRIC.get(target, ("inplace", None))
    arguments = dict(zip((name, "inplace"), rest, strict=False)) | options
    arguments.pop("inplace", None)
    if len(rest) > (2 if make else 1) or not arguments.keys() <= {name}:
        return None
    if make is None:
        return Activation(NAMES[target]) if target in NAMES else None
    constant = all(isinstance(value, (int, float, str)) for value in arguments.values())
    return make(*arguments.values()) if constant else None


def activation_of(module: Any) -> Activation | None:
    """Return the activation that a module computes; ``None`` for other classes and for subclasses of known ones."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name in PARAMETRIC:
        parameter, make = PARAMETRIC[name]
        return make(getattr(module, parameter))
    if name == "transformers.activations.GELUActivation":  # with use_gelu_python it calls another function
        return Activation("gelu") if module.act is F.gelu else None
    return Activation(NAMES[name]) if name in NAMES else None
