"""Fixtures and helpers for the CuPy backend on emulated GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import fake_cupy
import pytest
from emulator import Device

from gpu_bn import dispatch


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch, compile_cuda: Any) -> Callable[..., Any]:
    """make_gpu(arch, tier=None, device=None): an emulated GPU, with ``.backend`` and every check on."""
    del compile_cuda  # skips the test if NVRTC is missing

    def make(arch: int, tier: str | None = None, device: Device | None = None) -> Any:
        gpu = fake_cupy.install(monkeypatch, Device() if device is None else device, arch)
        gpu.backend = importlib.import_module("gpu_bn.backends.cupy").CupyBackend(tier)
        return gpu

    yield make
    dispatch.load.cache_clear()
