"""Provide fixtures and helpers for the CuPy backend on emulated GPUs."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator import Device

from gpu_bn import registry
from support import fake_cupy


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch, compile_cuda: Any) -> Callable[..., Any]:
    """Return ``make_gpu(arch, tier=None, device=None)``, which makes an emulated GPU with backend and checks."""
    del compile_cuda  # skips the test if NVRTC is missing

    def make(arch: int, tier: str | None = None, device: Device | None = None) -> Any:
        gpu = fake_cupy.install(monkeypatch, Device() if device is None else device, arch)
        gpu.backend = importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier)
        return gpu

    yield make
    registry.load.cache_clear()


def moved(gpu: Any, array: np.ndarray, by: int | None = None) -> Any:
    """Copy to the GPU, to an address one element behind the beginning of a vector."""
    by = array.itemsize if by is None else by
    copy = gpu.empty(array.nbytes + by, np.uint8)[by:].view(array.dtype).reshape(array.shape)
    copy[...] = gpu.asarray(array)
    return copy


def for_tensors(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the backend for CPU tensors and those that say that they are on a GPU; their memory is the GPU's."""
    import torch

    owners: dict[int, np.ndarray] = {}

    def from_dlpack(tensor: Any) -> Any:
        """Return a view of the tensor's storage, which the emulator knows as one allocation."""
        index = tensor.device.index if tensor.is_cuda else 0
        tensor = tensor.as_subclass(torch.Tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owners:
            owners[storage.data_ptr()] = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        layout = np.from_dlpack(tensor)
        start = tensor.data_ptr() - storage.data_ptr() if tensor.numel() else 0  # nothing has no address
        view = np.ndarray(layout.shape, layout.dtype, owners[storage.data_ptr()], start, layout.strides)
        with gpu.entering(index):
            return gpu._register(view)

    def current_stream(device: Any) -> Any:
        return types.SimpleNamespace(cuda_stream=1234 + (device.index or 0))

    monkeypatch.setattr(sys.modules["cupy"], "from_dlpack", from_dlpack, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.delitem(sys.modules, "gpu_bn.backends.cupy.tensors", raising=False)
    engine = importlib.import_module("gpu_bn.backends.cupy.tensors").CupyForTorch(gpu.backend)
    engine.gpu = gpu
    return engine
