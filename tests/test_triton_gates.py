"""What the compiler makes of the Triton kernels: registers, spills, shared memory and the width of accesses."""

from __future__ import annotations

from itertools import product

import pytest
from emulator.compile import ARCHITECTURES

import gpu_bn

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton_backends import RecordingBackend  # noqa: E402

from gpu_bn.plan import DEVICES  # noqa: E402

pytestmark = pytest.mark.compile

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
GEOMETRIES = {
    "split rows": ((64, 64, 56, 56), False, "split"),
    "split channels-last": ((64, 64, 56, 56), True, "split"),
    "held rows": ((32, 256, 16, 16), False, "cta"),
    "narrow rows": ((32, 256, 14, 14), False, "split"),
    "held channels-last": ((2, 256, 7, 7), True, "cta"),
    "largest held rows": ((26, 512, 28, 28), False, "cta"),
    "cluster": ((32, 256, 28, 28), False, "cluster"),
}
PLANNED = {75: "t4", 80: "a100", 86: "a100", 89: "4090", 90: "h100", 100: "b200", 120: "b200"}
"""What is planned for: the architecture's device, or one that is served alike."""
CEILINGS = {
    "bn_stats_kernel": (64, 128),
    "bn_normalize_kernel": (72, 96),
    "bn_backward_reduce_kernel": (88, 112),
    "bn_backward_input_kernel": (80, 112),
    "bn_forward_kernel": (255, 255),
    "bn_backward_kernel": (255, 255),
}
"""Registers a thread in rows and in channels-last, for half precision and ReLU. Beyond 128, an SM runs one block of 8
warps at a time; the kernels that hold a channel may."""


def recorded(geometry, dtype, activation, residual, device="h100"):
    """The steps of a call, forward and backward, and what they are compiled from. No tensor is touched."""
    shape, channels_last, tier = GEOMETRIES[geometry]
    backend = RecordingBackend(DEVICES[device], tier=tier)
    if channels_last:
        n, c, h, w = shape
        x = torch.empty(n, h, w, c, dtype=DTYPES[dtype]).permute(0, 3, 1, 2)
    else:
        x = torch.empty(shape, dtype=DTYPES[dtype])
    vectors = [torch.ones(shape[1]) for _ in range(4)]
    added = torch.empty_like(x) if residual else None
    options = {"training": True, "activation": activation, "residual": added, "backend": backend}
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, **options)
    gpu_bn.batch_norm_backward(torch.empty_like(x), saved, backend=backend)
    return backend.launches


def require(geometry, dtype, activation, residual, arch, compile_triton):
    launches = recorded(geometry, dtype, activation, residual, PLANNED[arch])
    for step, special in launches:
        options = dict(special.options)
        options["fp_fusion"] = options.pop("enable_fp_fusion")
        compiled = compile_triton(
            step.kernel, arch, special.signature, special.constants, aligned=special.aligned, **options
        )
        name = step.kernel.__name__
        usual = dtype in ("f16", "bf16") and activation == "relu"
        ceiling = CEILINGS[name]["channels-last" in geometry] if usual else 255
        size = DTYPES[dtype].itemsize
        width = min(16, 4 * size) if geometry == "narrow rows" else 16  # rows of 196 elements
        compiled.require(registers=ceiling, shared_bytes=16 << 10, load_bytes=width)
        if name not in ("bn_stats_kernel", "bn_backward_reduce_kernel"):
            compiled.require(store_bytes=width)
        for kind in ("ld", "st"):
            narrow = compiled.global_widths(kind)[size] if size < 4 else 0
            assert narrow <= (1 if name == "bn_stats_kernel" else 0), f"{name}: {narrow} accesses of one element"
    return launches


@pytest.mark.parametrize(
    ("geometry", "arch"),
    [("split rows", 75), ("split rows", 120), ("split channels-last", 80), ("narrow rows", 90), ("held rows", 80),
     ("held channels-last", 89)],
)  # fmt: skip
def test_half_precision_with_relu_and_residual(geometry, arch, compile_triton):
    require(geometry, "f16", "relu", True, arch, compile_triton)


def test_clusters(compile_triton):
    launches = require("cluster", "f16", "relu", True, 90, compile_triton)
    assert [step.num_ctas > 1 for step, _ in launches] == [True, True]


EVERYTHING = [
    pytest.param(
        geometry, dtype, activation, residual, arch,
        marks=[pytest.mark.slow if index % 87 == 0 else pytest.mark.exhaustive],
    )
    for index, (geometry, dtype, (activation, residual), arch) in enumerate(
        product(
            GEOMETRIES, DTYPES, [("identity", False), ("relu", False), ("relu", True), ("gelu", True)], ARCHITECTURES
        )
    )
]  # fmt: skip


@pytest.mark.parametrize(("geometry", "dtype", "activation", "residual", "arch"), EVERYTHING)
def test_everything(geometry, dtype, activation, residual, arch, compile_triton):
    require(geometry, dtype, activation, residual, arch, compile_triton)


@pytest.mark.parametrize("name", DEVICES)
def test_the_plans_are_ones_that_the_kernels_can_follow(name):
    for geometry in ("split rows", "held rows", "held channels-last"):
        for step, special in recorded(geometry, "f16", "relu", True, name):
            assert step.num_warps <= 8
            assert step.num_ctas == 1 or DEVICES[name].arch >= 90
            assert step.grid[1] <= 65535
            elements = special.constants["POSITIONS"] * special.constants["LANES"] * special.constants["VEC"]
            assert elements * special.constants.get("TILES", 1) <= step.num_ctas * 32768
