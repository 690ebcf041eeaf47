"""Ragged rows, which begin and end within vectors of 16 bytes, such as those of 7 x 7 images."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.gates import access_widths

import gpu_bn
from gpu_bn.call import Call
from gpu_bn.testing import Case, check

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend
from support.triton_variants import compiler_options, record_launches

from gpu_bn.backends.triton.launch import CLUSTERS
from gpu_bn.backends.triton.programs import Geometry
from gpu_bn.plan import DEVICES, VECTOR_BYTES, Work, plan_once

SMALL = replace(DEVICES["a100"], sms=4)


def ragged(steps):
    """Tell for each launch whether it reads ragged rows; launches that merge read no tensor and are left out."""
    names = [[parameter.name for parameter in step.kernel.params][-len(step.tail) :] for step in steps]
    tails = [dict(zip(there, step.tail, strict=True)) for there, step in zip(names, steps, strict=True)]
    return [tail["length"] is not None for tail in tails if "length" in tail]


def backend_of(compile_triton, device, tier=None, arch=80, **options):
    planned = SMALL if arch == 80 else replace(DEVICES["h100"], sms=4)
    return EmulatedBackend(device, compile_triton, arch, planned, tier=tier, **options)


CASES = [
    ("cta", Case((4, 8, 7, 7), "float16", activation="relu", residual=True), {}),
    ("split", Case((8, 3, 1111), "float32", activation="relu"), {}),  # blocks that begin within a row
    ("cta", Case((4, 8, 7, 7), "bfloat16"), {}),
    ("split", Case((4, 8, 7, 7), "float16", activation="gelu", residual=True), {}),
    ("cta", Case((8, 3, 27), "float32", activation="silu", residual=True), {}),  # rows of seven vectors and of eight
    ("split", Case((4, 8, 9, 9), "bfloat16", mean=1e4, std=1e3, activation="relu"), {}),
    ("cta", Case((2, 4, 9), "float32", mean=1e4, std=1.0, activation="relu", residual=True), {}),
    (None, Case((4, 8, 7, 7), "float16", mode="eval", activation="relu", residual=True), {}),
    ("cluster", Case((4, 4, 603), "float16", activation="relu", residual=True), {}),
    ("cta", Case((4, 8, 7, 7), "float16", activation="leaky_relu"), {"wide": True}),
    ("split", Case((1, 8, 1025), "float32", activation="gelu", residual=True), {"wide": True}),
    ("split", Case((1, 32, 1, 35), "float32", residual=True), {}),
    ("split", Case((16, 8, 7, 7), "float32", mean=1e18, std=1e18), {}),  # squares overflow float32
    (None, Case((4, 8, 7, 7), "float16", mode="train_no_stats", affine="none"), {}),
]


@pytest.mark.compile
@pytest.mark.parametrize(
    ("tier", "case", "options"),
    [pytest.param(*one, marks=pytest.mark.slow if index % 3 else ()) for index, one in enumerate(CASES)],
    ids=str,
)
def test_case(tier, case, options, compile_triton, device):
    if tier == "cluster" and not CLUSTERS:
        pytest.skip(f"Triton {triton.__version__} does not compile clusters of blocks: there is no plan with them")
    backend = backend_of(compile_triton, device, tier, 90 if tier == "cluster" else 80, **options)
    check(case, backend)
    assert all(ragged(backend.steps))


def halves(shape=(4, 8, 7, 7), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
def test_what_is_not_finite_stays_in_its_channel(tier, compile_triton, device):
    """NaN and infinities do not spread, though adjacent channels share vectors."""
    backend = backend_of(compile_triton, device, tier)
    x, dy = halves(), halves(seed=1)
    clean_x, clean_dy = x.clone(), dy.clone()
    x[1, 3, 6, 6], x[0, 5], dy[3, 2, 0, 0], dy[2, 0] = torch.nan, torch.inf, torch.inf, torch.nan
    clean_x[:, [3, 5]] = 0
    clean_dy[:, [0, 2]] = 0
    results = []
    for given, gradient in ((x, dy), (clean_x, clean_dy)):
        y, saved = gpu_bn.batch_norm_forward(given, training=True, activation="gelu", backend=backend)
        dx = gpu_bn.batch_norm_backward(gradient, saved, backend=backend).dx
        results.append((y, dx))
    assert all(ragged(backend.steps))
    (y, dx), (clean_y, clean_dx) = results
    assert y[:, 3].isnan().all()
    assert torch.equal(y[:, [0, 1, 2, 4, 6, 7]], clean_y[:, [0, 1, 2, 4, 6, 7]])
    assert torch.equal(dx[:, [1, 4, 6, 7]], clean_dx[:, [1, 4, 6, 7]])
    assert dx[:, [0, 2, 3, 5]].isnan().flatten(2).any(2).any(0).all()


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
@pytest.mark.one_in(2)
def test_each_element_is_written_once_and_whole_vectors_at_once(tier, compile_triton, device):
    x, residual = halves(), halves(seed=1)
    backend = backend_of(compile_triton, device, tier)
    y = gpu_bn.batch_norm(x, training=True, residual=residual, backend=backend)
    (steps,) = backend._prepared.values()
    vectors = sum(
        (start + 48) // 8 - start // 8 + 1 for start in range(0, x.numel(), 49)
    )  # a vector with the ends of two rows is read for both
    report = device.reports[-1]
    assert report.buffer("residual", "load").bytes == VECTOR_BYTES * vectors
    assert report.buffer("y", "store").bytes == y.nbytes
    assert steps.plan.tiling.positions == 4 * 7


@pytest.mark.compile
def test_in_place_rows_keep_their_own_vectors(compile_triton, device):
    """In place, rows are not ragged: a program would read a vector while another one writes a part of it."""
    backend, x = backend_of(compile_triton, device), halves()
    want = gpu_bn.batch_norm(x, training=True, backend=backend)
    assert all(ragged(backend.steps))
    backend.steps.clear()
    gpu_bn.batch_norm(x, training=True, out=x, backend=backend)
    assert not any(ragged(backend.steps))
    torch.testing.assert_close(x, want, rtol=2e-3, atol=2e-3)


def test_phases_that_write_given_tensors_are_not_ragged():
    backend, x = RecordingBackend(SMALL), halves()
    spec = gpu_bn.spec.BatchNormSpec(1, True, 0.1, 1e-5, gpu_bn.activations.Activation.of(None))
    _, saved = backend.forward(Call(x, residual=halves()), spec)
    for call, expected in (
        (lambda: backend.stats(x, 1), [True]),
        (lambda: backend.normalize(saved, None, x), [False]),
        (lambda: backend.backward_reduce(x, saved, None), [True]),
        (lambda: backend.backward_reduce(x, saved, x), [False]),
        (lambda: backend.backward_input(x, saved, None, x), [False]),
        (lambda: backend.backward(x, saved, frozenset({"dx", "dresidual"})), [True]),
    ):
        backend.launches.clear()
        call()
        assert ragged([step for step, _ in backend.launches]) == expected


@pytest.mark.parametrize(
    "options",
    [{"mask": torch.ones(4, 1, 7, 7, dtype=torch.bool)}, {"virtual_batch_size": 2}, {"moved": True}],
    ids=["mask", "ghost batches", "moved by an element"],
)
def test_other_calls_are_not_ragged(options):
    backend, x = RecordingBackend(SMALL), halves()
    if options.pop("moved", False):
        x = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    _, saved = gpu_bn.batch_norm_forward(x, training=True, backend=backend, **options)
    gpu_bn.batch_norm_backward(torch.empty_like(x), saved, backend=backend)
    launched = ragged([step for step, _ in backend.launches])
    assert launched
    assert not any(launched)


@pytest.mark.compile
@pytest.mark.one_in(2)
def test_a_tensor_moved_by_an_element_gives_the_same(compile_triton, device):
    backend, x = backend_of(compile_triton, device), halves()
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    results = [gpu_bn.batch_norm(given, training=True, activation="relu", backend=backend) for given in (x, moved)]
    assert ragged(backend.steps) == [True, False]
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("size", "itemsize"), [(49, 2), (27, 4), (16_385, 2)])
def test_positions_are_divided_by_the_vectors_that_a_row_spans(size, itemsize):
    work = Work(70_000, 8, size, itemsize, ragged=True)
    tiling = plan_once(work, DEVICES["h100"]).tiling
    channels, row, jump, magic, power, length, _ = Geometry.from_plan(plan_once(work, DEVICES["h100"])).tail
    assert (channels, row, jump, length) == (8, tiling.inner, 8 * size, size)
    for end in (2**31 - 1, 2**31 - row, 2**30 + row - 1):
        for position in (end // row * row - 1, end // row * row):
            assert position * magic >> power == position // row


@pytest.mark.compile
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 80, 100, 120))])
def test_accesses_are_of_16_bytes(arch, compile_triton):
    """Kernels for ragged rows, here of 7 x 7 images, access 16 bytes at a time."""
    for tier, dtype in (("cta", torch.float16), ("split", torch.float16), ("split", torch.float32)):
        x = torch.empty(256, 512, 49, dtype=dtype)
        for step, special in record_launches(x, arch, sms=132, tier=tier, activation="relu", residual=True):
            compiled = compile_triton(step.kernel, arch, **compiler_options(special))
            assert compiled.spill_bytes == compiled.stack_bytes == 0, step.kernel.__name__
            assert compiled.registers <= 128, step.kernel.__name__
            if "merge" in step.kernel.__name__:  # merges read no tensor
                continue
            loads, stores = access_widths(compiled.ptx)
            assert ragged([step]) == [True]
            assert max(loads) == VECTOR_BYTES, step.kernel.__name__
            assert "ld.global.v4.b32" in compiled.ptx or "ld.global.L1::evict_first" in compiled.ptx
            if step.kernel.__name__ not in ("bn_stats_kernel", "bn_backward_reduce_kernel"):
                assert max(stores) == VECTOR_BYTES, step.kernel.__name__
                assert "st.global.v4.b32" in compiled.ptx
