"""Batch normalisation, forward and backward, for arrays on the CPU and the GPU.

Importing this package imports none of its modules and no array library. The public names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_bn import nn as nn
    from gpu_bn import testing as testing
    from gpu_bn.activations import Activation, elu, leaky_relu
    from gpu_bn.backends.cpu.threads import get_num_threads, set_num_threads
    from gpu_bn.backends.protocol import Grads, Saved
    from gpu_bn.explanation import explain
    from gpu_bn.folding import fold, identity_affine, unfold
    from gpu_bn.functional import batch_norm, batch_norm_backward, batch_norm_forward
    from gpu_bn.layers import BatchNorm
    from gpu_bn.registry import BackendUnavailableError

__version__ = "0.1.0"

_MODULES = {
    "Activation": "activations",
    "BackendUnavailableError": "registry",
    "BatchNorm": "layers",
    "Grads": "backends.protocol",
    "Saved": "backends.protocol",
    "batch_norm": "functional",
    "batch_norm_backward": "functional",
    "batch_norm_forward": "functional",
    "elu": "activations",
    "explain": "explanation",
    "fold": "folding",
    "get_num_threads": "backends.cpu.threads",
    "identity_affine": "folding",
    "leaky_relu": "activations",
    "set_num_threads": "backends.cpu.threads",
    "unfold": "folding",
}

_SUBPACKAGES = ("nn", "testing")
"""The public subpackages; ``from gpu_bn import *`` leaves them out, because ``nn`` imports torch."""

__all__ = [
    "Activation",
    "BackendUnavailableError",
    "BatchNorm",
    "Grads",
    "Saved",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "elu",
    "explain",
    "fold",
    "get_num_threads",
    "identity_affine",
    "leaky_relu",
    "set_num_threads",
    "unfold",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES, "__version__"])
