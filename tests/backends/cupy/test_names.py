"""All kernels that random calls of the CuPy backend ask for, on several GPUs, are among the kernels with gates."""

from __future__ import annotations

import importlib
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from emulator import Device
from support import fake_cupy
from support.cuda_variants import FAMILY, SMALL

import gpu_bn
from gpu_bn import algorithm, registry
from gpu_bn.activations import ROWS
from gpu_bn.plan import DEVICES, TIERS, NoPlanError
from gpu_bn.testing.cases import DTYPES, numpy_dtype

PLANNED = {
    "one SM": replace(DEVICES["b200"], sms=1),
    **DEVICES,
    "5090": replace(DEVICES["4090"], name="RTX 5090", arch=120, sms=170),
}
SHAPES = (
    (3, 2), (33, 600), (4096, 64), (256, 8192), (4, 4096, 1), (5, 49, 7), (64, 784, 32), (256, 196, 32), (2, 12, 99),
    (16, 1 << 16, 2), (1, 1 << 12, 4), (24, 1000, 128), (2048, 49, 16), (40, 4, 9), (6, 10, 2), (96, 3136, 12),
)  # fmt: skip
"""Channels, positions, and the batch if there are three axes; they give vectors of every size."""
CALLS = 1500
"""The number of random calls on each GPU; they are the same in each run."""


def install_gpu(monkeypatch, device):
    """Return a stand-in for CuPy whose kernels do nothing; ``asked`` collects the activation and name of each."""
    monkeypatch.setitem(fake_cupy.PROPERTIES, device.arch, {
        "name": device.name.encode(), "major": device.arch // 10, "minor": device.arch % 10,
        "multiProcessorCount": device.sms, "l2CacheSize": device.l2_bytes,
        "sharedMemPerMultiprocessor": device.shared_per_sm, "sharedMemPerBlockOptin": device.shared_per_block,
    })  # fmt: skip
    gpu = fake_cupy.install(monkeypatch, Device(), device.arch)
    backend = importlib.import_module("gpu_bn.backends.cupy.backend")
    backend.cupy.empty = memory
    backend.cupy.cuda.driver.launchCooperativeKernel = lambda *_: None
    gpu.asked = set()

    def asked(activation, name, *_):
        gpu.asked.add((activation, name))
        return Nothing()

    for module in ("builder", "sync"):
        monkeypatch.setattr(importlib.import_module(f"gpu_bn.backends.cupy.{module}"), "get_kernel", asked)
    gpu.backend = backend.CupyBackend
    return gpu


class Nothing:
    """A kernel that does nothing."""

    kernel = SimpleNamespace(ptr=0)

    def __call__(self, grid, block, args, shared_mem=0):
        pass


def memory(shape, dtype):
    """Return zeros, or uninitialised memory if it is large."""
    make = np.zeros if np.prod(shape) < 1 << 16 else np.empty
    return make(shape, dtype).view(fake_cupy.ndarray)


def tensor(rng, shape, dtype, columns):
    """Return a tensor with the channels on axis 1, in memory on axis 1 or last, at a random alignment."""
    size = int(np.prod(shape))
    flat = memory(size * dtype.itemsize + 32, np.uint8)
    start = -flat.ctypes.data % 16 + rng.choice((0, 0, 0, 1, 2, 4)) * dtype.itemsize
    flat = flat[start : start + size * dtype.itemsize].view(dtype)
    if columns and len(shape) == 3:
        return flat.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1)
    return flat.reshape(shape)


def call(rng, gpu, monkeypatch):
    """Make a random forward and backward call, unless a forced tier cannot serve it."""
    channels, positions, *batch = rng.choice(SHAPES)
    shape = (*batch, channels, positions) if batch else (positions, channels)
    dtype, columns = numpy_dtype(rng.choice(DTYPES)), rng.random() < 0.5
    x, dy, residual = (tensor(rng, shape, dtype, columns) for _ in range(3))
    vectors = [memory(channels, np.float32) for _ in range(4)]
    options = {"training": rng.random() < 0.8, "activation": rng.choice([*ROWS, "relu", "relu", "gelu"])}
    options["residual"] = residual if rng.random() < 0.5 else None
    kind = rng.random()
    if kind < 0.15:
        options["mask"] = memory((shape[0], *[1] * (len(shape) - 1)), np.uint8)
    if 0.1 < kind < 0.25 and shape[0] % 2 == 0 and x.size > 2 * channels:
        options["virtual_batch_size"] = shape[0] // 2
    backend = gpu.backend(rng.choice((None, None, None, *TIERS)))
    needs = [None, {"dx"}, {"dweight"}, *([{"dresidual"}] if options["residual"] is not None else [])]
    with monkeypatch.context() as patch, np.errstate(all="ignore"):  # the data are arbitrary
        if rng.random() < 0.1:  # the single phases, as in SyncBatchNorm
            patch.setattr(algorithm, "_fused_backend", lambda *_: None)
        try:
            _, saved = gpu_bn.batch_norm_forward(x, *vectors, backend=backend, **options)
            gpu_bn.batch_norm_backward(dy, saved, need=rng.choice(needs), backend=backend)
        except NoPlanError:
            assert backend.tier is not None


def launch_sync_kernels(backend):
    """Launch the kernels that SyncBatchNorm needs besides the phases."""
    packets = [memory((3, 20), np.float64)]
    moments = backend.merge_packets(packets, 4, 5, 15, -1.0)
    backend.sum_packets(packets, 8, 5, 15, -1.0)
    backend.update_shared(None, None, None, 0.1, None, *moments)


@pytest.mark.slow
def test_every_kernel_that_is_asked_for_has_gates(monkeypatch):
    rng, missed = random.Random(0), None
    for device in PLANNED.values():
        gpu = install_gpu(monkeypatch, device)
        for _ in range(CALLS):
            call(rng, gpu, monkeypatch)
        launch_sync_kernels(gpu.backend())
        variants = {(activation, name) for activation, names in SMALL.items() for name in names}
        for group in FAMILY.groups(gpu.arch):
            variants |= {(group.activation, name) for name in FAMILY.variants(group)}
        assert not gpu.asked - variants, device.name
        missed = (kinds(variants) if missed is None else missed) - kinds(gpu.asked)
    registry.load.cache_clear()
    assert not missed, "kinds of kernels that no call has asked for"


def kinds(asked):
    """Return the names of kernels without dtype, vector size and layout."""
    return {re.sub(r"<Layout<.*?(MASKED_GROUPS|GROUPS)?>", r"<\1", name) for _, name in asked}
