"""Ragged rows, which begin and end within vectors of 16 bytes, such as those of 7 x 7 images."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.compile import compile_cuda as compile_kernels
from support import rng, same_bits
from support.gates import access_widths

import gpu_bn
from gpu_bn.backends.cupy import sources
from gpu_bn.plan import VECTOR_BYTES, Tiling, Work, tile
from gpu_bn.testing import Case, check

pytestmark = pytest.mark.compile


def all_are_ragged(gpu):
    """Tell whether all launched kernels were kernels for ragged rows."""
    return {"L5Batch1E" in name for name in gpu.launched} == {True}


CASES = [
    ("cta", Case((4, 8, 7, 7), "float16", activation="relu", residual=True)),
    ("cta", Case((4, 8, 7, 7), "bfloat16")),
    ("cta", Case((8, 3, 27), "float32", activation="silu", residual=True)),  # rows of seven vectors and of eight
    ("cta", Case((2, 4, 9), "float32", mean=1e4, std=1.0, activation="relu", residual=True)),
    ("cooperative", Case((4, 4, 37), "float16", activation="leaky_relu", residual=True)),
    ("cooperative", Case((1, 8, 1025), "float32", activation="relu")),  # blocks that begin within a row
    ("cluster", Case((4, 4, 37), "float16", activation="relu", residual=True)),
    ("cluster", Case((2, 4, 603), "float32", residual=True)),
    ("split", Case((4, 8, 7, 7), "float16", activation="gelu", residual=True)),
    ("split", Case((8, 3, 1111), "float32", activation="relu")),
    (None, Case((4, 8, 7, 7), "float16", mode="eval", activation="relu", residual=True)),
    (None, Case((4, 8, 7, 7), "float16", mode="train_no_stats", affine="none")),
]


@pytest.mark.parametrize(
    ("tier", "case"),
    [pytest.param(*one, marks=pytest.mark.slow if index % 2 else ()) for index, one in enumerate(CASES)],
    ids=str,
)
def test_case(tier, case, make_gpu):
    gpu = make_gpu(90 if tier == "cluster" else 80, tier)
    check(case, gpu.backend)
    assert all_are_ragged(gpu)


@pytest.mark.parametrize("tier", ["cta", "split"])
def test_what_is_not_finite_stays_in_its_channel(tier, make_gpu):
    """NaN and infinities do not spread, though adjacent channels share vectors."""
    gpu = make_gpu(80, tier)
    x = rng(0).standard_normal((2, 8, 7, 7)).astype("f2")
    clean = x.copy()
    x[1, 3, 6, 6], x[0, 5] = np.nan, np.inf
    clean[:, [3, 5]] = 0
    y, of_clean = (gpu_bn.batch_norm(gpu.asarray(a), training=True, backend=gpu.backend).get() for a in (x, clean))
    others = [0, 1, 2, 4, 6, 7]
    assert np.isnan(y[:, 3]).all()
    assert same_bits(y[:, others], of_clean[:, others])


def test_in_place_rows_keep_their_own_vectors(make_gpu):
    """In place, rows are not ragged: a block would read a vector while another block writes a part of it."""
    gpu = make_gpu(80)
    x = rng(0).standard_normal((4, 8, 7, 7)).astype("f2")
    given = gpu.asarray(x)
    gpu_bn.batch_norm(given, training=True, out=given, backend=gpu.backend)
    assert gpu.launched
    assert not all_are_ragged(gpu)
    y = gpu_bn.batch_norm(gpu.asarray(x), training=True, backend=gpu.backend).get()
    np.testing.assert_allclose(given.get().astype("f8"), y.astype("f8"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_row_spans_as_many_vectors_as_the_tiling_says(itemsize):
    full = VECTOR_BYTES // itemsize
    for s in range(1, 200):
        tiling = tile(Work(3, 16, s, itemsize, ragged=True))
        starts = range(0, 3 * 16 * s, s)
        spans = max((start + s - 1) // full - start // full + 1 for start in starts)
        assert tiling.ragged == (s % 2 == 1 and 4 * s >= 3 * full * spans)
        if tiling.ragged:
            assert (tiling.vector, tiling.inner, tiling.positions) == (full, spans, 3 * spans)


@pytest.mark.parametrize(
    "work",
    [
        Work(4, 8, 49, 2),  # ragged rows are not allowed
        Work(4, 8, 49, 2, ragged=True, alignment=8),
        Work(3, 5, 49, 2, ragged=True),  # the tensor ends within a vector
        Work(4, 8, 196, 2, ragged=True),  # vectors of 8 bytes take fewer instructions
        Work(4, 8, 49, 8, ragged=True),
        Work(4, 8, 9, 2, ragged=True),  # two vectors for nine elements
        Work(32, 8, 1, 2, ragged=True),
    ],
    ids=str,
)
def test_other_rows_are_not_ragged(work):
    assert not tile(work).ragged


KERNELS = [
    ("bn_stats_kernel",), ("bn_normalize_kernel", True, False), ("bn_forward_kernel", "Cta", True, False),
    ("bn_backward_reduce_kernel", "FROM_RESIDUAL"), ("bn_backward_input_kernel", "FROM_RESIDUAL"),
    ("bn_backward_kernel", "Cta", "FROM_RESIDUAL"),
]  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.one_in(2)
def test_accesses_are_of_16_bytes(arch, compile_cuda):
    del compile_cuda  # skips the test if NVRTC is missing
    tiling = Tiling(False, 1, 1, 1, 8, 1, 1, 1, ragged=True)
    names = [sources.kernel(name, "float16", tiling, *arguments) for name, *arguments in KERNELS]
    compiled = compile_kernels(sources.source("relu"), arch, sources.OPTIONS, expressions=names)
    for name in names:
        kernel = compiled[name]
        loads, stores = access_widths(kernel.ptx)
        assert max(loads) == VECTOR_BYTES, name
        assert "stats" in name or max(stores) == VECTOR_BYTES, name
        assert kernel.spill_bytes == kernel.stack_bytes == 0, name
        assert kernel.registers <= 128, name
