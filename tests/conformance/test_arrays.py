"""Backends for arrays against the oracle: random cases, every layout and stride, and the accuracy of long sums."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_problem
from support.views import random_views

from gpu_bn import batch_norm_backward, batch_norm_forward
from gpu_bn.activations import ROWS
from gpu_bn.testing import Case, cases, check, unavailable_cases
from gpu_bn.testing.cases import AFFINE, DTYPES, LAYOUTS, MODES, OPTIONS, SHARING, build


def test_without_ml_dtypes_only_bfloat16_is_left_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    left_out = unavailable_cases()
    assert left_out
    assert all("bfloat16" in (case.dtype, case.param_dtype) for case in left_out)
    assert all("bfloat16" not in (case.dtype, case.param_dtype) for case in cases())


@st.composite
def random_cases(draw, largest=40_000):
    rank = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    stretched = draw(st.integers(0, rank - 1))
    shape[stretched] = draw(st.sampled_from([1, 2, 31, 33, 97, 130, 513, 1031]))
    while np.prod(shape) > largest:
        shape[int(np.argmax(shape))] //= 2
    axis = draw(st.integers(-rank, rank - 1))
    mode = draw(st.sampled_from(MODES))
    if mode != "eval" and np.prod(shape) == shape[axis]:
        shape[axis - 1 if rank + axis else axis + 1] += 1
        if np.prod(shape) == shape[axis]:
            mode = "eval"
    return Case(
        tuple(shape),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dy_layout=draw(st.sampled_from((None, *LAYOUTS))),
        channel_axis=axis,
        activation=draw(st.sampled_from(list(ROWS))),
        residual=draw(st.booleans()),
        affine=draw(st.sampled_from(AFFINE)),
        mode=mode,
        param_dtype=draw(st.sampled_from((None, *DTYPES))),
        mean=draw(st.sampled_from([0.0, 1.0, -5.0, 300.0])),
        std=draw(st.sampled_from([0.0, 0.1, 1.0, 20.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        momentum=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0])),
    )


def with_few_kernels(case, backend):
    """Return the case; for compiled backends with one of three activations, since each takes seconds to compile."""
    few = {"gelu": "silu", "sigmoid": "silu", "elu": "silu", "tanh": "silu", "gelu_tanh": "silu", "silu": "silu"}
    if backend == "numpy" or case.activation == "identity":
        return case
    return replace(case, activation=few.get(case.activation, "relu"), parameter=None)


@pytest.mark.parametrize("shape", [(200, 5), (200, 20), (513, 648), (5, 80_000), (20, 20_000)])
def test_means_have_all_digits_of_float64(shape, backend):
    """The mean is as accurate as in float64, also of channels that begin with numbers far from their mean."""
    for layout in ("contiguous", "channels_last"):
        assert check(Case(shape, "float64", layout, channel_axis=0, std=0.1, mean=0.0), backend)["mean"] < 0.7


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("length", [648, 60_000])
def test_sums_of_one_sign_lose_little_in_float64(length, axis, backend):
    """Long sums of one sign stay accurate, though each addition is rounded relative to the sum so far."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(4, length)), rng.normal(1, 0.5, (4, length))
    if axis == 1:
        x, dy = np.ascontiguousarray(x.T), np.ascontiguousarray(dy.T)
    bias = np.zeros(4)
    _, saved = batch_norm_forward(x, None, None, None, bias, training=True, channel_axis=axis, backend=backend)
    dbias = batch_norm_backward(dy, saved, backend=backend)[2]
    for channel, got in enumerate(dbias):
        terms = np.take(dy, channel, axis)
        assert abs(got - math.fsum(terms)) <= 2 * 2.0**-53 * math.fsum(abs(terms))


@given(case=random_cases())
@settings(max_examples=30)
def test_random_case(case, backend):
    assert check(with_few_kernels(case, backend), backend)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
@given(case=random_cases(largest=400_000))
@settings(max_examples=25)
def test_many_random_cases(case, library):
    assert check(with_few_kernels(case, library), library)


@pytest.mark.exhaustive
@given(case=random_cases())
@settings(max_examples=200)
def test_random_cases_of_all_activations(case, backend):
    assert check(case, backend)


@pytest.mark.parametrize("shape", [(33, 2, 6, 2), (40, 9, 9, 3), (60, 50, 3)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_sums_of_float64_over_several_axes(shape, mean, backend):
    """Sums are blocked or pairwise: adding all terms one after another would lose more digits."""
    assert check(Case(shape, "float64", channel_axis=-1, mean=mean, std=0.0, momentum=0.0), backend)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
def test_every_layout_with_every_option(library, layout, options):
    if library == "torch":
        pytest.importorskip("torch")
    for dtype in ("float32", "float16"):
        case = Case((4, 6, 5, 3), dtype, layout, residual=True, activation="relu", **options)
        assert check(case, library)


def require_vectors_and_masks_in_any_strides(backend, own=lambda array: array, steps=(1, 3, -2), numpy=np.asarray):
    """Require the bits of dense arrays from strided vectors and a permuted mask, and unchanged memory between."""
    random = np.random.default_rng(0)
    x, mask = random.standard_normal((4, 6, 5, 3), np.float32), random.random((4, 5, 3)) < 0.7
    vectors = random.uniform(0.5, 2, (4, 6)).astype(np.float32)
    expected = None
    for step in steps:
        memory = own(np.full((4, 40), 7, np.float32))
        places = slice(20, None, step)
        views = [row[places][:6] for row in memory]
        for view, values in zip(views, vectors, strict=True):
            view[...] = own(values)
        valid = own(mask) if step == 1 else own(mask.transpose(2, 0, 1).copy()).swapaxes(0, 1).swapaxes(1, 2)
        y, saved = batch_norm_forward(own(x), *views, True, mask=valid, activation="relu", backend=backend)
        grads = batch_norm_backward(own(x), saved, backend=backend)
        found = [numpy(one).tobytes() for one in (y, views[0], views[1], *grads[:3])]
        expected = expected or found
        assert found == expected, step
        between = numpy(memory).copy()
        for row in between:
            row[places][:6] = 7
        assert (between == 7).all()


@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
def test_vectors_and_masks_in_any_strides(library):
    if library == "torch":
        torch = pytest.importorskip("torch")
        require_vectors_and_masks_in_any_strides(None, torch.from_numpy, (1, 3))
    else:
        require_vectors_and_masks_in_any_strides(library)


@pytest.mark.compile
def test_vectors_and_masks_in_any_strides_on_emulated_cuda(make_gpu):
    gpu = make_gpu(80)
    require_vectors_and_masks_in_any_strides(gpu.backend, gpu.asarray)


def require_layouts(backend, layouts, options):
    """Check a call with each layout and its options."""
    for layout, more in zip(layouts, options, strict=True):
        assert check(Case((4, 6, 5, 3), "float32", layout, residual=True, activation="relu", **more), backend)


HARDEST = ("permuted", "negative_stride", "sliced_channels", "overlapping")


@pytest.mark.compile
@pytest.mark.parametrize("options", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in OPTIONS)], ids=str)
def test_layouts_on_emulated_cuda(options, make_gpu):
    layouts, every = (HARDEST, OPTIONS[: len(HARDEST)]) if options is None else (LAYOUTS, [options] * len(LAYOUTS))
    require_layouts(make_gpu(80).backend, layouts, every)


@pytest.mark.compile
@pytest.mark.parametrize("options", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in OPTIONS)], ids=str)
def test_layouts_on_emulated_triton(options, compile_triton, device):
    pytest.importorskip("torch")
    from support.triton_backends import EmulatedBackend

    layouts, every = (HARDEST, OPTIONS[: len(HARDEST)]) if options is None else (LAYOUTS, [options] * len(LAYOUTS))
    require_layouts(EmulatedBackend(device, compile_triton), layouts, every)


@st.composite
def random_extended_cases(draw):
    """Draw cases of ghost batches, masks, batch renormalisation or frozen statistics, in any dtype and layout."""
    groups, samples = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    inner = draw(st.lists(st.sampled_from([1, 2, 5, 33, 130, 2100]), min_size=1, max_size=2))
    shape = [groups * samples, draw(st.sampled_from([1, 2, 3, 17])), *inner]
    while np.prod(shape) > 300_000:
        shape[int(np.argmax(shape))] //= 2
    renorm = draw(st.sampled_from([None, (1.5, 0.5), (3.0, 5.0)]))
    return Case(
        tuple(shape),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dy_layout=draw(st.sampled_from((None, *(layout for layout in LAYOUTS if layout not in SHARING)))),
        activation=draw(st.sampled_from(list(ROWS))),
        residual=draw(st.booleans()),
        affine=draw(st.sampled_from(AFFINE)),
        mode="train" if renorm else draw(st.sampled_from(MODES)),
        mean=draw(st.sampled_from([0.0, 1.0, 300.0])),
        mask=draw(st.sampled_from([None, "random", "samples", "lengths"])),
        virtual_batch_size=None if renorm or shape[0] != groups * samples else draw(st.sampled_from([None, samples])),
        renorm=renorm,
    )


@given(case=random_extended_cases())
@settings(max_examples=20)
def test_random_extended_case(case, backend):
    assert check(with_few_kernels(case, backend), backend)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["numpy", "cpu", "torch"])
@given(case=random_extended_cases())
@settings(max_examples=15)
def test_many_random_extended_cases(case, library):
    assert check(with_few_kernels(case, library), library)


@given(data=st.data())
@settings(max_examples=40)
def test_random_strides(data, backend):
    shape = (*data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)), data.draw(st.sampled_from([2, 3, 130])))
    axis = data.draw(st.integers(0, len(shape) - 2))
    dtype = data.draw(st.sampled_from(["float32", "float16", "float64"]))
    x, dy, residual = (data.draw(random_views(shape, dtype)) for _ in range(3))
    activation = data.draw(st.sampled_from([("identity", 0.0), ("relu", 0.0), ("silu", 0.0)]))
    assert check(make_problem(x, dy=dy, residual=residual, activation=activation, channel_axis=axis), backend)


def test_a_case_has_the_same_numbers_every_time():
    first, second = (build(Case((3, 4, 5), "float16", residual=True)) for _ in range(2))
    assert first.x.tobytes() == second.x.tobytes()
    assert first.residual.tobytes() == second.residual.tobytes()
