"""The activations as torch has them: functions, layers, and calls in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_bn.activations import IDENTITY, Activation, elu, leaky_relu

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


LAYERS = {
    "torch.nn.modules.linear.Identity": IDENTITY,
    **{
        f"torch.nn.modules.activation.{name}": Activation(name.lower())
        for name in ("ReLU", "ReLU6", "SiLU", "Hardswish", "Sigmoid", "Tanh")
    },
    **{
        f"timm.layers.activations.{name}": Activation(ours)
        for name, ours in (
            ("Swish", "silu"),
            ("Sigmoid", "sigmoid"),
            ("Tanh", "tanh"),
            ("HardSwish", "hardswish"),
            ("GELU", "gelu"),
            ("GELUTanh", "gelu_tanh"),
        )
    },
    **{
        f"transformers.activations.{name}": Activation(ours)
        for name, ours in (("SiLUActivation", "silu"), ("ReLU6Activation", "relu6"), ("GELUTanh", "gelu_tanh"))
    },
    "monai.networks.blocks.activation.MemoryEfficientSwish": Activation("silu"),
}
"""Layers without parameters, by qualified name; those of other libraries too."""

TARGETS: dict[Any, Activation] = {
    target: Activation(name)
    for name, targets in {
        "relu": (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
        "relu6": (F.relu6,),
        "silu": (F.silu,),
        "hardswish": (F.hardswish,),
        "sigmoid": (F.sigmoid, torch.sigmoid, "sigmoid"),
        "tanh": (F.tanh, torch.tanh, "tanh"),
    }.items()
    for target in targets
}
"""Functions and methods of tensors, as they appear in a graph."""
PARAMETRIC: dict[Any, tuple[str, Callable[..., Activation]]] = {
    F.leaky_relu: ("negative_slope", lambda slope=0.01: leaky_relu(slope)),
    F.leaky_relu_: ("negative_slope", lambda slope=0.01: leaky_relu(slope)),
    F.elu: ("alpha", lambda alpha=1.0: elu(alpha)),
    F.elu_: ("alpha", lambda alpha=1.0: elu(alpha)),
    F.gelu: ("approximate", lambda approximate="none": Activation("gelu_tanh" if approximate == "tanh" else "gelu")),
}
"""Functions with a parameter: its name, and the activation for a value."""


def activation_of_call(target: Any, rest: Sequence[Any], options: dict[str, Any]) -> Activation | None:
    """Return the activation that a function or method is, if it is one of ours and otherwise given constants."""
    known = PARAMETRIC.get(target)
    names = ("inplace",) if known is None else (known[0], "inplace")
    given = dict(zip(names, rest, strict=False)) | options
    given.pop("inplace", None)
    if len(rest) > len(names) or not given.keys() <= {names[0]}:
        return None
    if known is None:
        return TARGETS.get(target)
    values = tuple(given.values())
    return known[1](*values) if all(isinstance(value, (int, float, str)) for value in values) else None


def activation_of(module: Any) -> Activation | None:
    """Return the activation that a module is, if it is one of ours; a subclass may compute something else."""
    kind = type(module)
    if kind is torch.nn.LeakyReLU:
        return leaky_relu(module.negative_slope)
    if kind is torch.nn.ELU:
        return elu(module.alpha)
    if kind is torch.nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "transformers.activations.GELUActivation":  # another with use_gelu_python
        return Activation("gelu") if module.act is F.gelu else None
    return LAYERS.get(name)
