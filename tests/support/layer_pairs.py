"""List the layers of gpu_bn and torch that the tests compare."""

import pytest

from support import rng

torch = pytest.importorskip("torch")
from gpu_bn import nn

PAIRS = {
    "1d": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3, 5)),
    "1d of rows": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    "2d": (nn.BatchNorm2d, torch.nn.BatchNorm2d, (6, 3, 4, 5)),
    "3d": (nn.BatchNorm3d, torch.nn.BatchNorm3d, (6, 3, 2, 3, 4)),
}


LAZY = {
    "1d": (nn.LazyBatchNorm1d, torch.nn.LazyBatchNorm1d, nn.BatchNorm1d),
    "2d": (nn.LazyBatchNorm2d, torch.nn.LazyBatchNorm2d, nn.BatchNorm2d),
    "3d": (nn.LazyBatchNorm3d, torch.nn.LazyBatchNorm3d, nn.BatchNorm3d),
}


def data(shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(rng(seed).standard_normal(shape)).to(dtype)
