"""Call the reference kernels as functions and as a backend on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator import Device
from emulator.compile import Compiled, triton_arguments
from emulator.fixtures import load_triton

from gpu_bn.backends.layout import Layout
from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.backends.protocol import Moments, Saved
from support.paths import TESTS

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")

Array = np.ndarray
KERNELS = TESTS / "emulator" / "kernels"
CUDA_SOURCE = (KERNELS / "bn_forward_reference.cu").read_text()
TRITON_SOURCE = (KERNELS / "bn_forward_reference_triton.py").read_text()
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TYPES = {dtype: type_ for type_, dtype in DTYPES.items()}
TRITON_TYPES = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
STAGING_BYTES = 48 * 1024
"""The bytes of shared memory that a block may have without a request for more."""


def compile_reference_triton(
    compile_triton: Callable[..., Compiled], type_: str, arch: int, aligned: tuple[str, ...] = ("x", "y"),
    block: int = 512, function: Any = None, **options: Any,
) -> Compiled:  # fmt: skip
    scalars = {"n": "i32", "c": "i32", "s": "i32", "eps": "fp64"}
    vectors = {"weight": "*fp32", "bias": "*fp32", "save_mean": "*fp64", "save_var": "*fp64"}
    signature = {"x": TRITON_TYPES[type_], "y": TRITON_TYPES[type_], **vectors, **scalars}
    function = function or load_triton(KERNELS / "bn_forward_reference_triton.py")
    return compile_triton(function, arch, signature, {"BLOCK": block}, aligned=aligned, **options)


def forward(
    device: Device, compiled: Compiled, x: Array, y: Array | None, weight: Array | None, bias: Array | None,
    eps: float = 1e-5, *, threads: int = 256, shared_bytes: int = 0, launch: Callable[..., Any] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Launch a kernel on an array of shape [n, c, s]. Return the mean and the variance of each channel."""
    n, c, s = x.shape
    mean, var = device.empty(c, np.float64), device.empty(c, np.float64)
    args = [x, y, weight, bias, mean, var, np.int32(n), np.int32(c), np.int32(s), np.float64(eps)]
    if compiled.threads:
        args = triton_arguments(compiled, args)
        threads, shared_bytes = compiled.threads, compiled.dynamic_shared_bytes
    (launch or device.launch)(compiled.kernel, (c,), (threads,), args, shared_bytes)
    for array in (mean, var) if y is None else (mean, var, y):
        device.require_written(array)
    return mean, var


class ReferenceBackend(NumpyBackend):
    """A backend that computes the training forward by a kernel, and everything else by the NumPy backend.

    The kernels take contiguous tensors of shape [n, c, s] without activation and residual. Other strides are copied,
    other options are refused. The backward phases use the statistics of the kernel.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def launch(self, x: Array, y: Array | None, weight: Array | None, bias: Array | None, eps: float) -> tuple:
        """Return the mean and variance of each channel of a contiguous array [n, c, s]. Write the output to ``y``."""
        raise NotImplementedError

    def stats(self, x: Array, axis: int) -> Moments:
        layout = Layout.from_array(x, axis)
        mean, var = self.launch(_ordered(layout, x), None, None, None, 0.0)
        return Moments(layout.count, mean, var)

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        if not (saved.spec.batch_stats and saved.spec.activation.is_identity and residual is None):
            raise NotImplementedError("the reference kernels do training, without activation and residual")
        layout = Layout.from_array(saved.x, saved.spec.axis)
        x = _ordered(layout, saved.x)
        y = self.device.empty(x.shape, x.dtype)
        weight, bias = (None if v is None else v.astype(np.float32) for v in (saved.weight, saved.bias))
        moments = self.launch(x, y, weight, bias, saved.spec.eps)
        for got, want in zip(moments, (saved.moments.mean, saved.moments.var), strict=True):
            assert got.tobytes() == want.tobytes(), "two launches of one kernel gave different statistics"
        view = out.transpose(layout.order)
        view[...] = y.reshape(view.shape)


class CudaBackend(ReferenceBackend):
    """The backend of the CUDA kernels, with the widest loads that the rows allow.

    Statistics alone are computed without staging, so that every case runs both kinds of kernel.
    """

    def __init__(self, device: Device, kernels: dict[str, Compiled]) -> None:
        super().__init__(device)
        self.kernels = kernels

    def choose(self, n: int, s: int, dtype: np.dtype, stage: bool) -> tuple[str, int]:
        """Return the name of a kernel, and the bytes of shared memory in which it stages a channel; 0 for none."""
        names = (f"bn_forward_{TYPES[dtype]}_v{width}" for width in (8, 4, 2, 1) if s % width == 0)
        name = next(name for name in names if name in self.kernels)
        size = n * s * dtype.itemsize
        if stage and f"{name}_staged" in self.kernels and size <= STAGING_BYTES:
            return f"{name}_staged", size
        return name, 0

    def launch(self, x: Array, y: Array | None, weight: Array | None, bias: Array | None, eps: float) -> tuple:
        n, _, s = x.shape
        name, shared_bytes = self.choose(n, s, x.dtype, stage=y is not None)
        threads = min(256, -(-n * s // 32) * 32)
        kernel = self.kernels[name]
        return forward(self.device, kernel, x, y, weight, bias, eps, threads=threads, shared_bytes=shared_bytes)


class TritonBackend(ReferenceBackend):
    """The backend of the Triton kernel, specialised as by Triton's launcher if 16 divides the length of rows.

    A channel that one warp can hold gets one warp.
    """

    def __init__(self, device: Device, build: Callable[..., Compiled]) -> None:
        super().__init__(device)
        self.build = build

    def launch(self, x: Array, y: Array | None, weight: Array | None, bias: Array | None, eps: float) -> tuple:
        n, _, s = x.shape
        aligned = ("x", "y", "s") if s % 16 == 0 else ("x", "y")
        block, warps = (32, 1) if n * s <= 32 else (512, 4)
        kernel = self.build(TYPES[x.dtype], aligned=aligned, block=block, num_warps=warps)
        return forward(self.device, kernel, x, y, weight, bias, eps)


def _ordered(layout: Layout, array: Array) -> Array:
    """Return an array in the shape [n, c, s], copied unless it is contiguous and aligned for the widest loads."""
    array = array.transpose(layout.order).reshape(layout.n, layout.c, layout.s)
    usable = array.flags.c_contiguous and array.ctypes.data % 16 == 0
    return array if usable else array.copy()
