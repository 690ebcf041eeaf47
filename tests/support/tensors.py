"""Create tensors for the tests of ``gpu_bn.nn``."""

import torch

from support import rng


def tensor(*shape, dtype=torch.float64, seed=0, grad=True):
    return torch.from_numpy(rng(seed).standard_normal(shape)).to(dtype).requires_grad_(grad)


def data(*shape, seed=0, dtype=torch.float32):
    """Return a random tensor from torch's generator, without a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape=(3, 2, 4), dtype=torch.float64, grad=True):
    """Return random tensors x, weight, bias and residual."""
    channels = shape[1]
    sizes = (shape, (channels,), (channels,), shape)
    return tuple(tensor(*size, dtype=dtype, seed=seed, grad=grad) for seed, size in enumerate(sizes))


def running(channels=2, dtype=torch.float64):
    return torch.linspace(-1, 1, channels, dtype=dtype), torch.linspace(0.5, 3, channels, dtype=dtype)
