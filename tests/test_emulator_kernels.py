"""The reference kernels, run and measured: results, traffic, determinism, resources, speed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import Checks, Device
from emulator.compile import ARCHITECTURES, Compiled, triton_arguments, triton_version
from emulator.schedules import require_same_results

pytestmark = pytest.mark.compile
KERNELS = Path(__file__).parent / "emulator" / "kernels"
CUDA_SOURCE = (KERNELS / "bn_forward_reference.cu").read_text()
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TRITON_TYPES = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
# Half an ulp of the output for storing it, and a few of float32 for computing it; |y| stays below 8.
TOLERANCE = {"f32": 4e-6, "f16": 2.0**-9, "bf16": 2.0**-6}
EPS = 1e-5


def oracle(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    mean, rstd = wide.mean((0, 2)), 1 / np.sqrt(wide.var((0, 2)) + EPS)
    return (wide - mean[:, None]) * (rstd * weight)[:, None] + bias[:, None], mean, rstd


@dataclass
class Forward:
    """A backend in small: it allocates, orders arguments, launches through the seam; it knows no emulator."""

    launch: Callable
    empty: Callable
    kernel: object
    threads: int
    shared_bytes: int = 0
    complete: Callable = list

    def __call__(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
        n, c, s = x.shape
        y, mean, rstd = self.empty(x.shape, x.dtype), self.empty(c, np.float32), self.empty(c, np.float32)
        args = [x, y, weight, bias, mean, rstd, np.int32(n), np.int32(c), np.int32(s), np.float32(EPS)]
        self.launch(self.kernel, (c,), (self.threads,), self.complete(args), self.shared_bytes)
        return y, mean, rstd


def inputs(
    shape: tuple[int, int, int], type_: str, mean: float = 1.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(shape)
    channels = shape[1]
    x = (rng.standard_normal(shape) + mean).astype(DTYPES[type_])
    return (
        x,
        rng.uniform(0.5, 1.5, channels).astype(np.float32),
        rng.uniform(-1, 1, channels).astype(np.float32),
    )


def require_correct(forward: Forward, device: Device, shape: tuple[int, int, int], type_: str) -> None:
    x, weight, bias = inputs(shape, type_)
    y, mean, rstd = forward(x, weight, bias)
    for array in (y, mean, rstd):
        device.require_written(array)
    want_y, want_mean, want_rstd = oracle(x, weight, bias)
    np.testing.assert_allclose(y.astype(np.float64), want_y, rtol=0, atol=TOLERANCE[type_])
    np.testing.assert_allclose(mean, want_mean, rtol=0, atol=5e-7)
    np.testing.assert_allclose(rstd, want_rstd, rtol=5e-7)


# -------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        ("f32_v1", (3, 5, 49)), ("f32_v1", (2, 3, 1)), ("f32_v4", (2, 7, 196)),
        ("f32_v4_staged", (2, 7, 196)), ("f16_v1", (3, 5, 49)), ("f16_v2", (3, 5, 50)),
        ("f16_v8", (2, 6, 392)), ("f16_v8_staged", (2, 6, 392)), ("bf16_v1", (4, 3, 33)),
        ("bf16_v8", (2, 6, 392)),
    ],
)  # fmt: skip
def test_cuda_forward(variant, shape, arch, compile_cuda, device):
    compiled = compile_cuda(CUDA_SOURCE, arch)[f"bn_forward_{variant}"]
    type_ = variant.split("_")[0]
    staged = DTYPES[type_].itemsize * shape[0] * shape[2] if "staged" in variant else 0
    require_correct(Forward(device.launch, device.empty, compiled.kernel, 256, staged), device, shape, type_)


def test_the_second_pass_keeps_a_large_mean_accurate(compile_cuda, device):
    compiled = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f32_v4"]
    x, weight, bias = inputs((4, 3, 1024), "f32", mean=1e4)
    _, _, rstd = Forward(device.launch, device.empty, compiled.kernel, 256)(x, weight, bias)
    np.testing.assert_allclose(rstd, oracle(x, weight, bias)[2], rtol=1e-6)


@pytest.mark.parametrize("variant", ["f32_v4", "f16_v8_staged"])
def test_the_result_does_not_depend_on_the_schedule(variant, compile_cuda):
    compiled = compile_cuda(CUDA_SOURCE, 80)[f"bn_forward_{variant}"]
    shape, type_ = (2, 4, 136), variant.split("_")[0]

    def run(device: Device) -> tuple[np.ndarray, ...]:
        return Forward(device.launch, device.empty, compiled.kernel, 128, 2 * 136 * 2)(*inputs(shape, type_))

    require_same_results(run, seeds=range(3))


def test_staged_forward_reads_x_once_and_writes_y_once(compile_cuda, device):
    """The floor of 2 N: exact in bytes, and every sector is whole."""
    shape = (2, 6, 512)
    x, weight, bias = inputs(shape, "f16")
    forward = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f16_v8_staged"].kernel
    Forward(device.launch, device.empty, forward, 256, 2 * 2 * 512)(x, weight, bias)
    report = device.reports[-1]
    load, store = report.buffer("arg0", "load"), report.buffer("arg1", "store")
    assert (load.bytes, store.bytes) == (x.nbytes, x.nbytes)
    assert (load.units, store.units) == (x.nbytes // 32, x.nbytes // 32)
    assert report.footprint_bytes("load") == x.nbytes + 2 * 32  # weight and bias
    assert report.bank_conflicts == 0


def test_direct_forward_reads_dram_once_if_the_channel_stays_in_the_cache(compile_cuda):
    x, weight, bias = inputs((4, 8, 1024), "f32")
    kernel = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f32_v4"].kernel

    def dram_reads(l2_bytes: int) -> float:
        device = Device(l2_bytes=l2_bytes, resident_threads=512)
        Forward(device.launch, device.empty, kernel, 256)(x, weight, bias)
        assert device.reports[-1].buffer("arg0", "load").bytes == 3 * x.nbytes
        return device.reports[-1].dram_read_bytes / x.nbytes

    assert dram_reads(2 * x.nbytes) == pytest.approx(1, abs=0.01)
    assert dram_reads(x.nbytes // 16) == pytest.approx(3, abs=0.01)


# -------------------------------------------------------------------- Triton


@pytest.fixture(scope="module")
def triton_forward(compile_triton) -> Callable[..., Compiled]:
    spec = importlib.util.spec_from_file_location("reference", KERNELS / "bn_forward_reference_triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(type_: str, arch: int, aligned: tuple[str, ...] = ("x", "y"), **options) -> Compiled:
        statistics = dict.fromkeys(("weight", "bias", "save_mean", "save_rstd"), "*fp32")
        signature = {"x": TRITON_TYPES[type_], "y": TRITON_TYPES[type_], **statistics,
                     "n": "i32", "c": "i32", "s": "i32", "eps": "fp32"}  # fmt: skip
        return compile_triton(module.bn_forward, arch, signature, {"BLOCK": 512}, aligned=aligned, **options)

    return build


def triton_backend(compiled: Compiled, launch: Callable, empty: Callable) -> Forward:
    def complete(args: list) -> list:
        return triton_arguments(compiled, args)

    return Forward(launch, empty, compiled.kernel, compiled.threads, compiled.dynamic_shared_bytes, complete)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("type_", list(DTYPES))
@pytest.mark.parametrize(("shape", "aligned"), [((3, 5, 149), ("x", "y")), ((2, 4, 784), ("x", "y", "s"))])
def test_triton_forward(shape, aligned, type_, arch, triton_forward, device):
    compiled = triton_forward(type_, arch, aligned)
    require_correct(triton_backend(compiled, device.launch, device.empty), device, shape, type_)


@pytest.mark.parametrize("seed", [None, 0])
def test_triton_forward_over_clusters(seed, triton_forward):
    """num_ctas = 2: the reduction crosses two blocks through distributed shared memory."""
    if triton_version().startswith("3.7."):
        pytest.skip("the compiler of Triton 3.7 fails on this kernel with num_ctas = 2")
    compiled = triton_forward("f32", 90, num_ctas=2)
    assert compiled.kernel.cluster == 2
    device = Device(seed=seed)

    def launch(kernel, grid, block, args, shared_bytes):
        device.launch(kernel, (2 * grid[0],), block, args, shared_bytes)

    require_correct(triton_backend(compiled, launch, device.empty), device, (3, 4, 149), "f32")


# -------------------------------------------------------------------- gates


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_gate(arch, compile_cuda):
    for name, compiled in compile_cuda(CUDA_SOURCE, arch).items():
        size = DTYPES[name.split("_")[2]].itemsize
        width = size * int(name.split("_v")[1].split("_")[0])
        compiled.require(registers=64, shared_bytes=128, store_bytes=max(width, 4))
        assert compiled.global_widths("ld")[width] >= (1 if "staged" in name else 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_gate(arch, triton_forward):
    compiled = triton_forward("f16", arch, ("x", "y", "s"), num_warps=2)
    compiled.require(registers=80, shared_bytes=1024, load_bytes=16, store_bytes=16)


def test_a_gate_says_what_is_wrong():
    ptx = ".target sm_80\n.visible .entry k(.param .u64 p) { .reg .b32 %r<2>; ld.global.u32 %r1, [0]; }"
    compiled = Compiled("k", 80, ptx, registers=70, spill_bytes=8, stack_bytes=0, shared_bytes=100)
    for ceiling, message in (
        ({}, "spills 8 bytes"),
        ({"spill_bytes": 8, "registers": 64}, "70 registers > 64"),
        ({"spill_bytes": 8, "shared_bytes": 99}, "100 bytes of shared memory > 99"),
        ({"spill_bytes": 8, "load_bytes": 16}, "widest global ld is 4 bytes, not 16"),
    ):
        with pytest.raises(AssertionError, match=message):
            compiled.require(**ceiling)


def test_a_second_compilation_comes_from_the_cache(compile_cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_BN_COMPILE_CACHE", str(tmp_path))
    source = 'extern "C" __global__ void nothing() {}'
    first = compile_cuda(source, 80)
    (entry,) = tmp_path.iterdir()
    entry.write_text(entry.read_text().replace('"registers": ', '"registers": 9'))
    assert compile_cuda(source, 80)["nothing"].registers > first["nothing"].registers
    entry.write_text("cut short")
    assert compile_cuda(source, 80)["nothing"].registers == first["nothing"].registers


def test_a_compilation_error_carries_the_log(compile_cuda):
    from emulator.compile import CompileError

    with pytest.raises(CompileError, match='identifier "missing" is undefined'):
        compile_cuda("__global__ void broken() { missing(); }", 80)


# -------------------------------------------------------------------- speed


def test_a_million_elements_a_second(compile_cuda):
    device = Device(checks=Checks(races=False))
    shape = (8, 64, 1024)
    forward = Forward(
        device.launch, device.empty, compile_cuda(CUDA_SOURCE, 80)["bn_forward_f32_v4"].kernel, 256
    )
    arrays = inputs(shape, "f32")

    def seconds() -> float:
        start = time.perf_counter()
        forward(*arrays)
        return time.perf_counter() - start

    assert arrays[0].size / min(seconds() for _ in range(3)) > 1e6
