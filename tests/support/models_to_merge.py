"""Provide helpers for the tests of merging."""

import pytest

from support import rng

torch = pytest.importorskip("torch")
from gpu_bn.nn.modules import Fused


def image(seed=0, size=32):
    return torch.from_numpy(rng(seed).standard_normal((4, 3, size, size))).float()


def norms(model):
    return [module for module in model.modules() if isinstance(module, Fused)]
