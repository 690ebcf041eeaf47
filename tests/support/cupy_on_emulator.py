"""Provide fixtures and helpers for the CuPy backend on emulated GPUs."""

from __future__ import annotations

import importlib
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
