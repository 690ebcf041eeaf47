"""The reference kernels through the conformance suite: every training case, on emulated devices with every check on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from emulator import Device
from emulator.compile import Compiled
from support.reference_backend import (
    CUDA_SOURCE,
    DTYPES,
    CudaBackend,
    ReferenceBackend,
    TritonBackend,
    compile_reference_triton,
)

import gpu_bn
from gpu_bn.backends.layout import Layout
from gpu_bn.testing import Case, cases, check
from gpu_bn.testing.cases import AFFINE, LAYOUTS, build

pytestmark = pytest.mark.compile
TARGETS = (("cuda", 80), ("cuda", 90), ("triton", 80), ("triton", 90))


def trained_cases() -> list[Case]:
    """Every case of the suite that trains on a dtype the kernels know, less its activation and its residual.

    Left out are evaluation and float64. Cases that differ in activation and residual only are one.
    """
    known = [str(dtype) for dtype in DTYPES.values()]
    trains = [case for case in cases() if case.mode != "eval" and case.dtype in known]
    return list(dict.fromkeys(replace(case, activation="identity", parameter=None, residual=False) for case in trains))


def name(target: tuple[str, int]) -> str:
    return f"{target[0]}-sm_{target[1]}"


@pytest.fixture(scope="module", params=TARGETS, ids=name)
def make_backend(request) -> Callable[[Device], ReferenceBackend]:
    language, arch = request.param
    if language == "cuda":
        kernels = request.getfixturevalue("compile_cuda")(CUDA_SOURCE, arch)
        return lambda device: CudaBackend(device, kernels)
    compile_triton = request.getfixturevalue("compile_triton")

    @functools.cache
    def compiled(type_: str, **options) -> Compiled:
        return compile_reference_triton(compile_triton, type_, arch, **options)

    return lambda device: TritonBackend(device, compiled)


def targeted_cases() -> list:
    """Each case on one of the targets, a sixth of them on another in the long run, on all in the exhaustive one."""
    exhaustive = pytest.mark.exhaustive
    marked = [
        (target, case, (None, exhaustive if index % 6 else pytest.mark.slow, exhaustive, exhaustive)[(index + at) % 4])
        for at, target in enumerate(TARGETS)
        for index, case in enumerate(trained_cases())
    ]
    return [
        pytest.param(target, case, id=f"{name(target)}-{case}", marks=[mark] if mark else [])
        for target, case, mark in marked
    ]


@pytest.mark.parametrize(("make_backend", "case"), targeted_cases(), indirect=["make_backend"])
def test_case(case, make_backend, device):
    shares = check(case, make_backend(device))
    assert {"y", "mean", "rstd", "dx"} <= shares.keys()
    assert len(device.reports) == 2, "one launch for the statistics, one for the output"


def test_the_cases_cover_what_a_kernel_may_get_wrong():
    selected = trained_cases()
    assert len(selected) >= 180
    dtypes = Counter(case.dtype for case in selected)
    assert dtypes["float32"] >= 100
    assert dtypes["float16"] >= 50
    assert dtypes["bfloat16"] >= 20
    assert {case.layout for case in selected} == set(LAYOUTS)
    assert {case.affine for case in selected} == set(AFFINE)
    assert {case.mode for case in selected} == {"train", "train_no_stats"}
    assert {case.param_dtype for case in selected} >= {None, "float16", "bfloat16", "float64"}
    assert {case.channel_axis for case in selected} >= {-3, -2, -1, 0, 1, 2, 3}
    assert {case.mean for case in selected} >= {1e4, 1e18, 1e-20}
    assert {case.std for case in selected} >= {0.0, 1.0, 1e18, 1e-20}
    assert {len(case.shape) for case in selected} == {2, 3, 4, 5}
    assert min(case.shape[1] for case in selected) == 1
    assert max(case.shape[1] for case in selected) == 9000


def test_every_cuda_kernel_takes_part(compile_cuda, device):
    backend = CudaBackend(device, compile_cuda(CUDA_SOURCE, 80))
    used = set()
    for case in trained_cases():
        x = build(case).x
        layout = Layout.of(x, case.channel_axis % x.ndim)
        used |= {backend.choose(layout.n, layout.s, x.dtype, stage)[0] for stage in (False, True)}
    assert used == set(backend.kernels)


@pytest.mark.parametrize(
    "options",
    [{"training": False}, {"activation": "relu"}, {"residual": np.ones((4, 3, 5), np.float32)}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernels_cannot_do_is_refused(options, make_backend, device):
    x, mean, var = np.ones((4, 3, 5), np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)
    arguments = {"training": True, "backend": make_backend(device)} | options
    with pytest.raises(NotImplementedError, match="without activation and residual"):
        gpu_bn.batch_norm(x, mean, var, **arguments)
