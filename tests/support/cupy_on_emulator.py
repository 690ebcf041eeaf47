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
    """Return ``make_gpu(arch, tier=None, device=None)``, which creates an emulated GPU with a backend."""
    del compile_cuda  # this fixture skips the test if NVRTC is missing

    def make(arch: int, tier: str | None = None, device: Device | None = None) -> Any:
        gpu = fake_cupy.install(monkeypatch, Device() if device is None else device, arch)
        gpu.backend = importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier)
        return gpu

    yield make
    registry.load.cache_clear()


def misaligned_copy(gpu: Any, array: np.ndarray, offset: int | None = None) -> Any:
    """Copy an array to the GPU, to an address ``offset`` bytes (one element) after an aligned one."""
    offset = array.itemsize if offset is None else offset
    copy = gpu.empty(array.nbytes + offset, np.uint8)[offset:].view(array.dtype).reshape(array.shape)
    copy[...] = gpu.asarray(array)
    return copy


def backend_for_tensors(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the CuPy backend for torch tensors on the CPU or on a pretended GPU. It uses their memory as the GPU's."""
    import torch

    owners: dict[int, np.ndarray] = {}

    def from_dlpack(tensor: Any) -> Any:
        """Return a view of a tensor's storage, which is one allocation for the emulator."""
        index = tensor.device.index if tensor.is_cuda else 0
        tensor = tensor.as_subclass(torch.Tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owners:
            owners[storage.data_ptr()] = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        layout = np.from_dlpack(tensor)
        start = tensor.data_ptr() - storage.data_ptr() if tensor.numel() else 0  # an empty tensor has no address
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
