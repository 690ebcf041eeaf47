"""The Triton backend's compiled kernels on emulated devices with every check on: traffic, determinism, arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import Checks, Device
from emulator.schedules import require_same_results

import gpu_bn
from gpu_bn.call import Call
from gpu_bn.testing import ADAPTERS, Case, check
from gpu_bn.testing.cases import build

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend

from gpu_bn.backends.triton import programs
from gpu_bn.backends.triton.launch import CLUSTERS
from gpu_bn.plan import DEVICES, VECTOR_BYTES

pytestmark = pytest.mark.compile


def require_clusters(tier):
    if tier == "cluster" and not CLUSTERS:
        pytest.skip(f"Triton {triton.__version__} does not compile clusters of blocks: there is no plan with them")


@pytest.mark.parametrize("tier", [None, "split"])
@pytest.mark.parametrize("numbers", ["random", "halves"])
def test_float64_whose_squares_overflow_is_nan(numbers, tier, compile_triton, device):
    """Within blocks, or only between them."""
    positions = torch.arange(2 * 5000).reshape(2, 1, 5000)
    x = 1e160 * torch.where(positions < 5000, 1.0, -1.0).to(torch.float64)
    if numbers == "random":
        x = 1e160 * torch.randn(2, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = gpu_bn.batch_norm(x, training=True, backend=EmulatedBackend(device, compile_triton, tier=tier))
    assert y.isnan().all()


@pytest.mark.parametrize("mapping", ["rows", "channels-last"])
@pytest.mark.one_in(2)
def test_a_mask_is_read_once_a_pass(mapping, compile_triton):
    """One byte a position for each channel, or strip of channels, beside what an unmasked call reads."""
    (n, *others), channels_last = SHAPES[mapping]
    x, dy, _, vectors = tensors((n, *others), torch.float16, channels_last)
    mask = torch.rand(n, 1, *others[1:]) < 0.7
    reports = {}
    for given in (None, mask):
        device = Device(checks=Checks(races=False))
        backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier="split")
        _, saved = gpu_bn.batch_norm_forward(
            x, *[v.clone() for v in vectors], training=True, activation="relu", mask=given, backend=backend
        )
        gpu_bn.batch_norm_backward(dy, saved, backend=backend)
        reports[given is None] = device.reports
    plain, masked = reports[True], reports[False]
    plan = next(iter(backend._prepared.values())).plan
    sampled = sampled_bytes(plan, x.element_size()) // x.element_size()
    assert [report.kernel.name for report in masked] == [report.kernel.name for report in plain]
    for index, (a, b) in enumerate(zip(plain, masked, strict=True)):
        assert b.buffer("x", "load").bytes == x.nbytes + (sampled_bytes(plan, x.element_size()) if index == 0 else 0)
        for name, kind in (("dy", "load"), ("y", "store"), ("dx", "store")):
            assert a.buffer(name, kind).bytes == b.buffer(name, kind).bytes, (name, kind)
        read = b.buffer("valid", "load")
        if plan.tiling.columns:  # the lanes of a position share its byte: counted once a lane, and in few sectors
            assert read.units <= b.buffer("x", "load").units / 4
        else:
            assert read.bytes == mask.numel() * plan.tiling.strips + (sampled if index == 0 else 0)


def test_ghost_batches_take_as_many_launches_as_one(compile_triton, device):
    x, dy, _, vectors = tensors((12, 3, 5))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, virtual_batch_size=2, backend=backend)
    forward = len(backend.steps)
    gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    assert (forward, len(backend.steps) - forward) == (2, 3)


def tensors(shape, dtype=torch.float32, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if channels_last:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    vectors = [torch.rand(shape[1], generator=generator) + 0.5 for _ in range(4)]
    return x, dy, residual, vectors


# ------------------------------------------------------------------------------------------------------ traffic
SHAPES = {
    "rows": ((18, 3, 32, 32), False),
    "channels-last": ((64, 64, 4, 4), True),
}


def sampled_bytes(plan, itemsize):
    """What the first launch reads to choose its shifts."""
    samples = programs.SAMPLES[plan.tiling.columns]
    width = (plan.tiling.c if plan.tiling.columns else plan.tiling.vector) * itemsize
    taken = 0
    for block in range(plan.blocks):
        share = min(plan.share, plan.tiling.positions - block * plan.share)
        step = max(share // samples, 1)
        taken += min(-(-share // step), samples)
    return taken * width * (1 if plan.tiling.columns else plan.tiling.strips)


@pytest.mark.parametrize("mapping", SHAPES)
@pytest.mark.parametrize("fused", [False, True], ids=["relu", "add-relu"])
@pytest.mark.parametrize("tier", ["split", "cta"])
@pytest.mark.one_in(3)
def test_bytes_are_those_of_the_plan(tier, fused, mapping, compile_triton):
    (n, *others), channels_last = SHAPES[mapping]
    shape = (n if tier == "split" else n // 4, *others)
    x, dy, residual, vectors = tensors(shape, torch.float16, channels_last)
    device = Device(checks=Checks(races=False))
    small = replace(DEVICES["a100"], sms=4)
    backend = EmulatedBackend(device, compile_triton, 80, small, tier=tier)
    _, saved = gpu_bn.batch_norm_forward(
        x, *vectors, training=True, activation="relu", residual=residual if fused else None, backend=backend
    )
    gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    plans = [found.plan for found in backend._prepared.values()]
    assert [plan.tier for plan in plans] == [tier, tier]
    assert [plan.launches for plan in plans] == [2 if tier == "split" else 1] * 2
    reads = [size for plan in plans for size in plan.read_bytes]
    written = [size for plan in plans for size in plan.written_bytes]
    if tier == "split":
        reads[0] += sampled_bytes(plans[0], x.element_size())
        assert plans[0].blocks > 1
        # The plan books the residual's gradient in the first launch, as the CUDA kernels do; here the second writes it.
        written[2:] = [0, written[2] + written[3]]
    tensors_named = ("x", "y", "dx", "dy", "dz", "residual", "mask")
    for kind, wanted in (("load", reads), ("store", written)):
        got = [sum(report.buffer(name, kind).bytes for name in tensors_named) for report in device.reports]
        assert got == wanted, kind
    assert (saved.mask is None) != fused
    assert saved.mask is None or saved.mask.numel() == x.numel() * x.element_size() // VECTOR_BYTES
    for report in device.reports:
        for name in ("x", "dy", "dx", "y"):
            for kind in ("load", "store"):
                traffic = report.buffer(name, kind)
                extra = 0.4 if report.kernel.name == "bn_stats_kernel" else 0  # samples lie apart
                assert traffic.units <= traffic.bytes / 32 * (1 + extra), "whole sectors"


def test_a_strip_that_channels_do_not_fill_is_summed_once(compile_triton, device):
    """bfloat16's squares may leave float32's range: those of no elements at all do not."""
    x, _, _, vectors = tensors((64, 40, 4, 4), torch.bfloat16, channels_last=True)
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier="split")
    gpu_bn.batch_norm(x, *vectors, training=True, backend=backend)
    plan = next(iter(backend._prepared.values())).plan
    assert plan.tiling.c % plan.tiling.channels_per_strip
    read = backend.report("bn_stats_kernel").buffer("x", "load").bytes
    assert read == x.nbytes + sampled_bytes(plan, x.element_size())


def test_the_second_launch_starts_with_what_the_first_left_in_the_cache(compile_triton):
    x, _, _, vectors = tensors((16, 4, 32, 32), torch.float16)
    read = {}
    for l2_bytes in (4 * x.nbytes, x.nbytes // 2, 1024):
        device = Device(checks=Checks(races=False, initialised=False), l2_bytes=l2_bytes, resident_threads=512)
        backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier="split")
        gpu_bn.batch_norm(x, *vectors, training=True, backend=backend)
        read[l2_bytes] = backend.report("bn_normalize_kernel").dram_read_bytes / x.nbytes
    assert read[4 * x.nbytes] < 0.01
    assert 0.4 < read[x.nbytes // 2] < 0.8
    assert read[1024] > 0.99


# -------------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize(
    ("tier", "arch"),
    [("split", 80), *(pytest.param(*of, marks=pytest.mark.slow) for of in (("cta", 80), ("cluster", 90)))],
)
def test_the_result_does_not_depend_on_the_schedule(tier, arch, compile_triton):
    require_clusters(tier)
    x, dy, residual, vectors = tensors((9, 3, 32, 32))

    def results(device):
        given = [vector.clone() for vector in vectors]
        planned = replace(DEVICES["h100" if arch == 90 else "a100"], sms=4)
        backend = EmulatedBackend(device, compile_triton, arch, planned, tier=tier)
        y, saved = gpu_bn.batch_norm_forward(
            x, *given, training=True, activation="relu", residual=residual, backend=backend
        )
        grads = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
        return tuple(t.numpy() for t in (y, saved.mean, saved.rstd, *given[:2], *grads))

    require_same_results(results, seeds=range(2))


APART = {
    "rows": ("rows", torch.float16, {}),
    "channels-last": ("channels-last", torch.float16, {}),
    "a mask": ("rows", torch.float32, {"mask": True}),
    "ghost batches": ("channels-last", torch.float16, {"mask": True, "virtual_batch_size": 16}),
    "float64": ("rows", torch.float64, {}),
    "one output": ("channels-last", torch.bfloat16, {"need": {"dx"}}),
}


@pytest.mark.parametrize("kind", APART)
def test_a_launch_that_merges_gives_what_programs_that_do_give(kind, compile_triton):
    """Where double precision is slow, one program of a strip merges what blocks have found, and not all of the next.

    Sums in float64 may be of another order, and a mean off by a rounding of its channel's standard deviation; after it
    everything is rounded alike. The results of float64 are themselves such sums.
    """
    mapping, dtype, options = APART[kind]
    shape, channels_last = SHAPES[mapping]
    x, dy, residual, vectors = tensors(shape, dtype, channels_last)
    options, need = dict(options), options.get("need")
    options.pop("need", None)
    if options.get("mask"):
        options["mask"] = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(1)) < 0.7
    results = []
    for arch in (80, 89):
        planned = replace(DEVICES["a100"], sms=4, arch=arch)
        backend = EmulatedBackend(Device(), compile_triton, 80, planned, tier="split")
        given = [v.clone() for v in vectors]
        y, saved = gpu_bn.batch_norm_forward(
            x, *given, training=True, activation="relu", residual=residual, backend=backend, **options
        )
        grads = gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)
        results.append([t for t in (saved.mean, saved.moments.var, y, *given, *grads) if t is not None])
        merges = [step.kernel.__name__ for step in backend.steps if "merge" in step.kernel.__name__]
        if "virtual_batch_size" not in options:
            assert merges == (["bn_merge_moments_kernel", "bn_merge_sums_kernel"] if arch == 89 else [])
    deviation = results[0][1].min().sqrt().item()
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        rounding, size = 4 * torch.finfo(a.dtype).eps, b.abs().max().item() if dtype == torch.float64 else 0
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * (size if number else deviation))


@pytest.mark.parametrize("mapping", SHAPES)
@pytest.mark.parametrize("tier", ["split", pytest.param("cta", marks=pytest.mark.slow)])
@pytest.mark.one_in(2)
def test_offsets_of_64_bits_give_the_same_bits(tier, mapping, compile_triton):
    shape, channels_last = SHAPES[mapping]
    x, dy, residual, vectors = tensors(shape, torch.float16, channels_last)
    results = []
    for wide in (False, True):
        backend = EmulatedBackend(
            Device(checks=Checks(races=False)),
            compile_triton,
            80,
            replace(DEVICES["a100"], sms=4),
            tier=tier,
            wide=wide,
        )
        assert wide or not any(step.wide for step in backend.steps)
        y, saved = gpu_bn.batch_norm_forward(
            x, *[v.clone() for v in vectors], training=True, activation="relu", residual=residual, backend=backend
        )
        grads = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
        results.append((y, saved.mean, *grads))
        assert all(step.wide == wide for step in backend.steps)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------ the backend
@pytest.fixture
def backend(compile_triton, device):
    return EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))


def test_launches(backend):
    """One launch forward and one backward; evaluation one; frozen statistics two if parameters have gradients."""
    x, dy, _, vectors = tensors((4, 3, 5))
    for options, need, launches in (
        ({"training": True}, None, (1, 1)),
        ({"training": False}, {"dx"}, (1, 1)),
        ({"training": False}, None, (1, 2)),
        ({"training": True}, {"dweight"}, (1, 1)),
    ):
        backend.steps.clear()
        _, saved = gpu_bn.batch_norm_forward(x, *vectors, backend=backend, **options)
        forward = len(backend.steps)
        gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)
        assert (forward, len(backend.steps) - forward) == launches, options


def test_alike_calls_share_their_steps(backend):
    x, dy, _, vectors = tensors((4, 3, 5))
    for _ in range(2):
        _, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, backend=backend)
        gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    first, second = backend.steps[:2], backend.steps[2:]
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "need", [{"dx"}, {"dbias"}, {"dresidual"}, {"dx", "dresidual"}, {"dweight", "dresidual"}], ids=sorted
)
@pytest.mark.parametrize("tier", ["split", pytest.param("cta", marks=pytest.mark.slow)])
def test_gradients_that_are_asked_for_are_as_with_all(tier, need, compile_triton, device):
    x, dy, residual, vectors = tensors((9, 3, 32, 32))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    _, saved = gpu_bn.batch_norm_forward(
        x, *vectors, training=True, activation="relu", residual=residual, backend=backend
    )
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=backend)._asdict()
    some = gpu_bn.batch_norm_backward(dy, saved, need=need, backend=backend)._asdict()
    assert {name for name, gradient in some.items() if gradient is not None} == need
    for name in need:
        torch.testing.assert_close(some[name], everything[name], rtol=1e-6, atol=1e-6)


def test_frozen_gradients_without_those_of_the_parameters(compile_triton, device):
    x, dy, residual, vectors = tensors((4, 3, 5, 8))
    backend = EmulatedBackend(device, compile_triton, 80)
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, activation="silu", residual=residual, backend=backend)
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    some = gpu_bn.batch_norm_backward(dy, saved, need={"dx", "dresidual"}, backend=backend)
    assert torch.equal(some.dx, everything.dx)
    assert torch.equal(some.dresidual, everything.dresidual)


def test_momentum_may_be_a_number_on_the_device(backend):
    x, _, _, vectors = tensors((4, 3, 5))
    spec = gpu_bn.spec.BatchNormSpec(1, True, 0.3, 1e-5, gpu_bn.activations.Activation.of(None))
    results = []
    for momentum in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        running = [vector.clone() for vector in vectors[:2]]
        backend.forward(Call(x, None, None, None, *running), replace(spec, momentum=momentum))
        results.append(running)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], vectors[0])


def test_running_statistics_of_any_stride_are_updated_in_place(backend):
    x, _, _, vectors = tensors((4, 3, 5))
    apart = torch.zeros(2, 3, 2)
    apart[0, :, 0], apart[1, :, 0] = vectors[0], vectors[1]
    gpu_bn.batch_norm(x, *vectors, training=True, backend=backend)
    gpu_bn.batch_norm(x, apart[0, :, 0], apart[1, :, 0], *vectors[2:], training=True, backend=backend)
    assert torch.equal(apart[0, :, 0], vectors[0])
    assert torch.equal(apart[1, :, 0], vectors[1])
    assert (apart[..., 1] == 0).all()


@pytest.mark.parametrize("tier", ["split", "cta"])
def test_the_output_may_be_the_input(tier, compile_triton, device):
    x, _, residual, vectors = tensors((9, 3, 32, 32))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    options = {"training": True, "activation": "relu", "residual": residual, "backend": backend}
    want = gpu_bn.batch_norm(x, *[v.clone() for v in vectors], **options)
    got = gpu_bn.batch_norm(x, *[v.clone() for v in vectors], out=x, **options)
    assert got is x
    assert torch.equal(got, want)


def test_overlapping_outputs_are_refused(backend):
    whole, _, _, vectors = tensors((8, 3, 5))
    x = whole[:4]
    with pytest.raises(ValueError, match="out may not be the input or overlap it"):
        gpu_bn.batch_norm_forward(x, *vectors, training=True, out=x, backend=backend)
    with pytest.raises(ValueError, match="should be the input itself or share no memory"):
        gpu_bn.batch_norm(x, *vectors, training=True, out=whole[1:5], backend=backend)
    apart = whole[..., :4]
    gpu_bn.batch_norm(apart[..., ::2], *vectors, training=True, out=apart[..., 1::2], backend=backend)
    assert backend.steps


class Phases:
    """A backend's phases without the methods that fuse them."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        if name in ("forward", "backward"):
            raise AttributeError(name)
        return getattr(self._backend, name)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 7, 111), activation="relu", residual=True),
        Case((4, 8, 5, 6), "float16", "channels_last", activation="silu", residual=True),
        Case((4, 6, 5), activation="gelu", mode="eval"),
        Case((4, 6, 5), dy_layout="sliced"),
    ],
    ids=str,
)
@pytest.mark.one_in(2)
def test_the_phases_one_by_one(case, compile_triton, device):
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))
    assert check(case, Phases(backend))
    assert len(backend.steps) >= 3


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 2, 5000), activation="relu"),
        pytest.param(Case((3000, 24), "float16", activation="relu", residual=True), marks=pytest.mark.slow),
        pytest.param(Case((5, 2, 5000), mask="random", activation="relu"), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, pytest.param(89, marks=pytest.mark.slow)])
def test_long_shares_are_summed_in_chains(case, arch, compile_triton, device, monkeypatch):
    """With short chains, for only tensors of 100 million numbers have shares of more than one long one."""
    monkeypatch.setattr(programs, "CHAIN", 2)
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=1, arch=arch), tier="split")
    check(case, backend)
    for step in backend.steps:
        names = [parameter.name for parameter in step.kernel.params]
        constants = dict(zip(names[-len(step.tail) :], step.tail, strict=True))
        assert constants.get("CHAIN", 2) == 2
    assert any(step.kernel.__name__ == "bn_backward_reduce_kernel" for step in backend.steps)


@pytest.mark.parametrize("activation", ["relu6", pytest.param("leaky_relu", marks=pytest.mark.slow)])
def test_gradients_where_they_jump(activation, compile_triton, device):
    case = Case((4, 6, 5), activation=activation, affine="kinks")
    check(case, EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4)))


@pytest.mark.parametrize("arch", [80, 89])
def test_nan_stays_in_its_channel(arch, compile_triton):
    problem = build(Case((40, 24), activation="relu", residual=True))
    results = []
    for poison in (None, np.nan, np.inf):
        x = problem.x.copy()
        if poison is not None:
            x[3, 5] = poison
        planned = replace(DEVICES["a100"], sms=4, arch=arch)
        backend = EmulatedBackend(Device(), compile_triton, 80, planned, tier="split")
        tensor, dy = (ADAPTERS["triton"].to_backend(array) for array in (x, problem.dy))
        y, saved = gpu_bn.batch_norm_forward(tensor, None, None, training=True, activation="relu", backend=backend)
        dx = gpu_bn.batch_norm_backward(dy, saved, backend=backend).dx
        results.append((y, dx, saved.mean, saved.moments.var))
    others = [channel for channel in range(24) if channel != 5]
    for poisoned in results[1:]:
        for clean, got in zip(results[0], poisoned, strict=True):
            assert torch.equal(clean[..., others], got[..., others])
            assert not got[..., 5].isfinite().all()
