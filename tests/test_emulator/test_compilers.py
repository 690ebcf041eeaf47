"""Run compiled constructs that kernels use, for every architecture, and compare the results with NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator import Device
from emulator.compile import NOT_REPORTED, Compiled, triton_arguments, triton_version
from emulator.fixtures import load_triton
from emulator.nvrtc import cuda_headers
from support.paths import TESTS
from support.reference_backend import DTYPES, KERNELS, forward

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")
special = pytest.importorskip("scipy.special", reason="needs the package scipy")

ARCHITECTURES = (75, 80, 90, 100, 120)
SOURCE = (KERNELS / "constructs.cu").read_text()
RNG = np.random.default_rng(0)
STATE = RNG.bit_generator.state
SEEDS = (None, 0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    RNG.bit_generator.state = STATE


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request):
    compile_cuda = request.getfixturevalue("compile_cuda")
    return {name: c.kernel for name, c in compile_cuda(SOURCE, request.param, resources=False).items()}


MATHS = {
    "expf": np.exp, "expm1f": np.expm1, "erff": special.erf, "tanhf": np.tanh, "rsqrtf": lambda x: 1 / np.sqrt(x),
    "log1pf": np.log1p, "exp": np.exp, "expm1": np.expm1, "erf": special.erf, "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@pytest.mark.parametrize("name", MATHS)
def test_maths(name, kernels, device):
    dtype = np.float32 if name.endswith("f") and name != "erf" else np.float64
    x = np.concatenate([RNG.normal(0, 3, 500), RNG.normal(0, 1e-6, 100), [0, -0.0, 50, -50, np.inf]]).astype(dtype)
    if name in ("rsqrtf", "rsqrt", "log1pf"):
        x = np.abs(x)
    y = device.empty(x.shape, dtype)
    device.launch(kernels[f"math_{name}"], 3, 256, [y, x, np.int32(x.size)])
    with np.errstate(all="ignore"):
        want = MATHS[name](x.astype(np.float64))
    np.testing.assert_allclose(y, want.astype(dtype), rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


def test_block_wide_votes(kernels, device):
    x = np.ones((4, 96), np.float32)
    x[1, 70], x[2] = -1, -2
    out = device.empty(12, np.int32)
    device.launch(kernels["votes"], 4, 96, [out, x])
    np.testing.assert_array_equal(out.reshape(4, 3), [[0, 0, 0], [1, 1, 0], [1, 96, 1], [0, 0, 0]])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", ["ticket", "barrier", "cluster"])
def test_sums_over_blocks(way, seed, kernels):
    if f"sum_by_{way}" not in kernels:
        pytest.skip("clusters need sm_90")
    device, blocks = Device(seed=seed, resident_threads=512), 12
    x = RNG.standard_normal((blocks, 128), np.float32)
    counter, partials = np.zeros(1, np.uint32), device.empty(blocks, np.float64)
    if way == "cluster":
        out, want = device.empty(blocks, np.float64), x.reshape(3, -1).astype(float).sum(1).repeat(4)
        device.launch(kernels["sum_by_cluster"], blocks, 128, [out, x])
        want = want + np.tile([3, 0, 1, 2], 3)
    else:
        out = device.empty(blocks if way == "barrier" else 1, np.float64)
        want = np.full(out.shape, x.astype(float).sum())
        args = [out, partials, counter, x]
        device.launch(kernels[f"sum_by_{way}"], blocks, 128, args, cooperative=way == "barrier")
    np.testing.assert_allclose(out, want, rtol=1e-12)
    assert counter[0] == (blocks if way == "barrier" else 0)


def test_local_arrays_and_switches(kernels, device):
    x, at = RNG.standard_normal((64, 8), np.float32), np.array([3, 1, 4, 0, 5, 2, 6, 7], np.int32)
    y, kept = device.empty(64, np.float32), x.copy()
    device.launch(kernels["local_arrays"], 1, 64, [y, x, at])
    for i in at:
        kept[:, i] += kept[:, (i + 1) & 7]
    functions = [np.negative, np.square, lambda v: max(v, np.float32(0)), lambda v: 1 / v,
                 lambda v: np.sqrt(np.abs(v)), lambda v: min(v, np.float32(6)), np.floor, lambda v: v]  # fmt: skip
    np.testing.assert_array_equal(y, [functions[t & 7](kept[t, at[t & 7]]) for t in range(64)])


def test_integer_arithmetic(kernels, device):
    x = RNG.integers(0, 2**64, 256, np.uint64) >> RNG.integers(0, 64, 256).astype(np.uint64)
    y = device.empty(128, np.uint64)
    device.launch(kernels["integers"], 1, 128, [y, x])
    signed = lambda v: v - 2**64 if v >> 63 else v  # noqa: E731

    def want(a: int, b: int) -> int:
        low, high = a % 2**32, b % 2**32
        quotient = abs(signed(a)) // abs(signed(b)) * (1 if (signed(a) < 0) == (signed(b) < 0) else -1)
        data = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        permuted = int.from_bytes(bytes(data[i] for i in (5, 7, 1, 3)), "little")
        funnel = ((high << 32 | low) << (low & 31) >> 32) % 2**32
        return (a * b >> 64) ^ a // b ^ a % b ^ quotient % 2**64 ^ int(f"{a:064b}"[::-1], 2) ^ b.bit_count() ^ (
            64 - a.bit_length()) ^ permuted ^ funnel ^ (((high & -high).bit_length()) % 2**32)  # fmt: skip

    np.testing.assert_array_equal(y, [want(int(a), int(b) | 1) for a, b in x.reshape(-1, 2)])


@pytest.mark.parametrize("n", [1024, 1001, 500])
def test_copies_in_groups(n, kernels, device):
    if "copies_in_groups" not in kernels:
        pytest.skip("cp.async needs sm_80")
    x, out = RNG.standard_normal(n, np.float32), device.empty(1, np.float64)
    device.launch(kernels["copies_in_groups"], 1, 64, [out, x, np.int32(n)], 4 * 1024)
    np.testing.assert_allclose(out, x.astype(float).sum(), rtol=1e-12)


HALVES = """
#include <cuda_{type}.h>
extern "C" __global__ void halves({pair}* y, const {pair}* x) {{
  const {pair} a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
  {pair} r = __hfma2(a, b, __hmax2(a, b));
  const float2 f = __{pair2}22float2(r);
  r = __hadd2(r, __floats2{pair2}2_rn(f.x * 2.f, fmaxf(f.y, 0.f)));
  if (__hgt(a.x, b.x)) r = __hmul2(r, r);
  y[threadIdx.x] = __hsub2(__hmin2(r, h2exp(a)), __hneg2(b));
}}"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_pairs_of_halves(type_, arch, compile_cuda, device):
    if type_ == "bf16" and arch < 80:
        pytest.skip("arithmetic of bfloat16 needs sm_80")
    if cuda_headers() is None:
        pytest.skip("CUDA's headers are not installed")
    pair, short = {"f16": ("__half2", "half"), "bf16": ("__nv_bfloat162", "bfloat16")}[type_]
    source = HALVES.format(type={"f16": "fp16"}.get(type_, type_), pair=pair, pair2=short)
    dtype = DTYPES[type_]
    x = RNG.normal(0, 1, (32, 2, 2)).astype(dtype)
    y = device.empty((32, 2), dtype)
    device.launch(compile_cuda(source, arch, resources=False)["halves"].kernel, 1, 32, [y, x])
    a, b = x[:, 0], x[:, 1]
    up = lambda v: v.astype(np.float64)  # noqa: E731
    r = (up(a) * up(b) + np.maximum(up(a), up(b))).astype(dtype)
    r = r + np.stack([2 * up(r[:, 0]), np.maximum(up(r[:, 1]), 0)], 1).astype(dtype)
    r = np.where((a[:, 0] > b[:, 0])[:, None], r * r, r)
    want = np.minimum(up(r), np.exp(up(a))) + up(b)
    np.testing.assert_allclose(up(y), want, rtol=0, atol=4 * float(ml_dtypes.finfo(dtype).eps) * np.abs(want).max())


# -------------------------------------------------------------------- Triton


@pytest.fixture(params=ARCHITECTURES)
def run_triton(request, device):
    """Return a function that compiles a kernel of constructs_triton.py and launches it."""
    compile_triton = request.getfixturevalue("compile_triton")

    def run(name, types, programs, args, constants, **options):
        function = load_triton(KERNELS / "constructs_triton.py", name)
        signature = dict(zip(function.arg_names, types, strict=False))
        options |= {"aligned": [n for n, t in signature.items() if t[0] == "*"], "resources": False}
        compiled = compile_triton(function, request.param, signature, constants, **options)
        blocks, extra = programs * options.get("num_ctas", 1), compiled.dynamic_shared_bytes
        device.launch(compiled.kernel, blocks, compiled.threads, triton_arguments(compiled, args), extra)
        return compiled

    run.arch = request.param
    return run


def test_triton_maths(run_triton, device):
    x, y = RNG.normal(0, 2, 700).astype(np.float32), device.empty(700, np.float32)
    run_triton("maths", ["*fp32", "*fp32", "i32"], 3, [y, x, 700], {"BLOCK": 256})
    wide = x.astype(float)
    want = np.exp(wide) + special.erf(wide) + special.expit(wide) + 1 / np.sqrt(wide * wide + 1)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ctas", [1, 2])
def test_triton_reductions_of_tuples(ctas, run_triton, device):
    if ctas > 1 and run_triton.arch not in (90, 100):
        pytest.skip("Triton makes clusters for sm_90 and sm_100")
    if ctas > 1 and tuple(map(int, triton_version().split(".")[:2])) < (3, 9):
        pytest.skip(f"Triton {triton_version()} does not compile this exchange between blocks")
    x, out = RNG.normal(5, 2, 900).astype(np.float32), device.empty(2, np.float32)
    run_triton("welford", ["*fp32", "*fp32", "i32"], 1, [out, x, 900], {"BLOCK": 1024}, num_ctas=ctas)
    np.testing.assert_allclose(out, [x.mean(dtype=float), x.var(dtype=float)], rtol=1e-5)


def test_triton_scans(run_triton, device):
    x, y = RNG.normal(0, 1, 300).astype(np.float32), device.empty(300, np.float32)
    run_triton("scan", ["*fp32", "*fp32", "i32"], 1, [y, x, 300], {"BLOCK": 512})
    np.testing.assert_allclose(y, np.cumsum(x, dtype=float), rtol=1e-4, atol=1e-5)


def test_triton_tickets(run_triton, device):
    x, out, partials = (
        RNG.normal(0, 1, 1000).astype(np.float32),
        device.empty(1, np.float32),
        device.empty(8, np.float32),
    )
    args = [out, partials, np.zeros(1, np.int32), x, 1000]
    run_triton("ticket", ["*fp32", "*fp32", "*i32", "*fp32", "i32"], 8, args, {"BLOCK": 128, "PROGRAMS": 8})
    np.testing.assert_allclose(out, x.sum(dtype=float), rtol=1e-5, atol=1e-4)


def test_triton_loops_with_asynchronous_copies(run_triton, device):
    x, out = RNG.normal(0, 1, (9, 1024)).astype(np.float16), device.empty(1, np.float32)
    compiled = run_triton("staged", ["*fp32", "*fp16", "i32"], 1, [out, x, 9], {"BLOCK": 1024}, num_stages=4)
    assert run_triton.arch < 80 or "cp.async" in compiled.ptx
    np.testing.assert_allclose(out, x.sum(dtype=float), rtol=1e-4, atol=1e-3)


# -------------------------------------------------------------------- other versions of the compilers

FILES = sorted((TESTS / "emulator" / "ptx").glob("*.ptx"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("seed", SEEDS)
def test_ptx_of_another_compiler_version(path, seed):
    """The PTX that emulator/ptx/make.py has stored of the reference kernels runs correctly."""
    ptx, device = path.read_text(), Device(seed=seed)
    threads, dynamic = map(int, re.findall(r"threads (\d+), dynamic shared bytes (\d+)", ptx)[0])
    name = re.search(r"\.entry (\w+)", ptx)[1]
    compiled = Compiled(name, 90, ptx, *[NOT_REPORTED] * 4, threads, dynamic)
    ctas, dtype = compiled.kernel.cluster, DTYPES[path.stem.split("_")[1]]
    x = RNG.standard_normal((3, 4, 136)).astype(dtype)
    weight, bias, y = RNG.random(4, np.float32), RNG.random(4, np.float32), device.empty(x.shape, dtype)
    mean, var = forward(
        device, compiled, x, y, weight, bias, shared_bytes=4 * 3 * 136,
        launch=lambda kernel, grid, *rest: device.launch(kernel, ctas * grid[0], *rest),
    )  # fmt: skip
    wide = x.astype(float)
    np.testing.assert_allclose(mean, wide.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(var, wide.var((0, 2)), rtol=1e-12)
    want = (wide - mean[:, None]) / np.sqrt(var + 1e-5)[:, None] * weight[:, None] + bias[:, None]
    tolerance = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[str(x.dtype)]
    np.testing.assert_allclose(y.astype(float), want, rtol=0, atol=tolerance)


def test_there_is_ptx_of_every_version():
    assert {path.stem.split("_")[0] for path in FILES} == {"nvrtc13.0", "triton3.7.1", "triton3.8.0"}
