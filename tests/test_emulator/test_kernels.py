"""Test the reference kernels: results, traffic, determinism and resources."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from emulator import Device
from emulator.compile import ARCHITECTURES, Compiled, triton_version
from emulator.schedules import require_same_results
from support.reference_backend import CUDA_SOURCE, DTYPES, compile_reference_triton, forward

pytestmark = pytest.mark.compile
# Half an ulp of the output for the store, and a few ulps of float32 for the computation; |y| is below 8.
TOLERANCE = {"f32": 4e-6, "f16": 2.0**-9, "bf16": 2.0**-6}
EPS = 1e-5
Shape = tuple[int, int, int]


def oracle(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 2)), wide.var((0, 2))
    scale = weight / np.sqrt(var + EPS)
    return (wide - mean[:, None]) * scale[:, None] + bias[:, None], mean, var


def inputs(shape: Shape, type_: str, mean: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(shape)
    x = (rng.standard_normal(shape) + mean).astype(DTYPES[type_])
    weight, bias = rng.uniform(0.5, 1.5, shape[1]), rng.uniform(-1, 1, shape[1])
    return x, weight.astype(np.float32), bias.astype(np.float32)


def run(device: Device, compiled: Compiled, x: np.ndarray, *parameters: np.ndarray, **options) -> tuple:
    y = device.empty(x.shape, x.dtype)
    return y, *forward(device, compiled, x, y, *parameters, EPS, **options)


def require_correct(device: Device, compiled: Compiled, shape: Shape, type_: str, **options) -> None:
    x, weight, bias = inputs(shape, type_)
    y, mean, var = run(device, compiled, x, weight, bias, **options)
    want_y, want_mean, want_var = oracle(x, weight, bias)
    np.testing.assert_allclose(y.astype(np.float64), want_y, rtol=0, atol=TOLERANCE[type_])
    np.testing.assert_allclose(mean, want_mean, rtol=1e-14)
    np.testing.assert_allclose(var, want_var, rtol=1e-14)


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
    require_correct(device, compiled, shape, type_, shared_bytes=staged)


def test_a_large_mean_costs_no_accuracy(compile_cuda, device):
    compiled = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f32_v4"]
    x, weight, bias = inputs((4, 3, 1024), "f32", mean=1e4)
    _, _, var = run(device, compiled, x, weight, bias)
    np.testing.assert_allclose(var, oracle(x, weight, bias)[2], rtol=1e-13)


@pytest.mark.parametrize("variant", ["f32_v4", "f16_v8_staged"])
def test_the_result_does_not_depend_on_the_schedule(variant, compile_cuda):
    compiled = compile_cuda(CUDA_SOURCE, 80)[f"bn_forward_{variant}"]
    shape, type_ = (2, 4, 136), variant.split("_")[0]

    def results(device: Device) -> tuple[np.ndarray, ...]:
        return run(device, compiled, *inputs(shape, type_), threads=128, shared_bytes=2 * 136 * 2)

    require_same_results(results, seeds=range(3))


def test_staged_forward_reads_x_once_and_writes_y_once(compile_cuda, device):
    """The kernel moves the floor of two tensors exactly, in whole sectors."""
    shape = (2, 6, 512)
    x, weight, bias = inputs(shape, "f16")
    compiled = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f16_v8_staged"]
    run(device, compiled, x, weight, bias, shared_bytes=2 * 2 * 512)
    report = device.reports[-1]
    load, store = report.buffer("arg0", "load"), report.buffer("arg1", "store")
    assert (load.bytes, store.bytes) == (x.nbytes, x.nbytes)
    assert (load.units, store.units) == (x.nbytes // 32, x.nbytes // 32)
    assert report.footprint_bytes("load") == x.nbytes + 2 * 32  # weight and bias
    assert report.bank_conflicts == 0


def test_direct_forward_reads_dram_once_if_the_channel_stays_in_the_cache(compile_cuda):
    x, weight, bias = inputs((4, 8, 1024), "f32")
    compiled = compile_cuda(CUDA_SOURCE, 80)["bn_forward_f32_v4"]

    def dram_reads(l2_bytes: int) -> float:
        device = Device(l2_bytes=l2_bytes, resident_threads=512)
        run(device, compiled, x, weight, bias)
        assert device.reports[-1].buffer("arg0", "load").bytes == 3 * x.nbytes
        return device.reports[-1].dram_read_bytes / x.nbytes

    assert dram_reads(2 * x.nbytes) == pytest.approx(1, abs=0.01)
    assert dram_reads(x.nbytes // 16) == pytest.approx(3, abs=0.01)


# -------------------------------------------------------------------- Triton


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("type_", list(DTYPES))
@pytest.mark.parametrize(("shape", "aligned"), [((3, 5, 149), ("x", "y")), ((2, 4, 784), ("x", "y", "s"))])
def test_triton_forward(shape, aligned, type_, arch, compile_triton, device):
    require_correct(device, compile_reference_triton(compile_triton, type_, arch, aligned), shape, type_)


@pytest.mark.parametrize("seed", [None, 0])
def test_triton_forward_over_clusters(seed, compile_triton):
    """With num_ctas = 2 a reduction combines two blocks through distributed shared memory."""
    if triton_version().startswith(("3.6.", "3.7.")):
        pytest.skip("with num_ctas = 2 Triton 3.6 leaves the exchange out, and Triton 3.7 fails")
    compiled = compile_reference_triton(compile_triton, "f32", 90, num_ctas=2)
    assert compiled.kernel.cluster == 2
    device = Device(seed=seed)

    def launch(kernel, grid, block, args, shared_bytes):
        device.launch(kernel, (2 * grid[0],), block, args, shared_bytes)

    require_correct(device, compiled, (3, 4, 149), "f32", launch=launch)


# -------------------------------------------------------------------- gates


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_gate(arch, compile_cuda):
    for name, compiled in compile_cuda(CUDA_SOURCE, arch).items():
        size = DTYPES[name.split("_")[2]].itemsize
        width = size * int(name.split("_v")[1].split("_")[0])
        compiled.require(registers=64, shared_bytes=256)
        stores = compiled.global_widths("st")  # mean and variance are stored as doubles, y as vectors
        assert set(stores) == {width, 8}
        assert stores[width] >= (3 if width == 8 else 1)
        assert compiled.global_widths("ld")[width] >= (1 if "staged" in name else 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_gate(arch, compile_triton):
    compiled = compile_reference_triton(compile_triton, "f16", arch, ("x", "y", "s"), num_warps=2)
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


TEMPLATE = """#include "scale.cuh"
namespace bn {
template <class T, int FACTOR> __global__ void scale(T* y) { y[threadIdx.x] *= FACTOR * SCALE; }
}
extern "C" __global__ void nothing() {}"""


@pytest.mark.parametrize("resources", [False, True])
def test_templates_are_compiled_by_name_expression(resources, compile_cuda, device):
    expressions = ["bn::scale<float, 4>", "bn::scale<double, 2>"]
    build = functools.partial(compile_cuda, TEMPLATE, 90, expressions=expressions, resources=resources)
    kernels = build(headers={"scale.cuh": "#define SCALE 10"})
    assert kernels.keys() == {*expressions, "nothing"}
    for expression, dtype, factor in zip(expressions, (np.float32, np.float64), (40, 20), strict=True):
        y = np.arange(32, dtype=dtype)
        device.launch(kernels[expression].kernel, 1, 32, [y])
        np.testing.assert_array_equal(y, factor * np.arange(32))
    changed = build(headers={"scale.cuh": "#define SCALE 1"})  # the cached kernel is not used
    assert changed[expressions[0]].ptx != kernels[expressions[0]].ptx


def test_ptx_alone_can_be_run_but_not_judged(compile_cuda):
    full, bare = (compile_cuda(CUDA_SOURCE, 80, resources=resources) for resources in (True, False))
    assert full.keys() == bare.keys()
    for name, compiled in bare.items():
        assert compiled.kernel.code == full[name].kernel.code
        with pytest.raises(AssertionError, match="resources=False"):
            compiled.require()


def test_triton_ptx_alone_can_be_run_but_not_judged(compile_triton):
    build = functools.partial(compile_reference_triton, compile_triton, "f16", 80)
    full, bare = build(), build(resources=False)
    assert full.registers > 16
    assert full.kernel.code == bare.kernel.code
    with pytest.raises(AssertionError, match="resources=False"):
        bare.require()


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
    from emulator.nvrtc import CompileError

    with pytest.raises(CompileError, match='identifier "missing" is undefined'):
        compile_cuda("__global__ void broken() { missing(); }", 80)
