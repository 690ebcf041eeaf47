"""The Triton backend's compiled kernels on emulated devices with every check on: traffic, determinism, arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulator import Checks, Device
from emulator.schedules import require_same_results

import gpu_bn

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, tensors

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
    """Squares overflow within blocks (random numbers), or only between blocks (two constant halves)."""
    positions = torch.arange(2 * 5000).reshape(2, 1, 5000)
    x = 1e160 * torch.where(positions < 5000, 1.0, -1.0).to(torch.float64)
    if numbers == "random":
        x = 1e160 * torch.randn(2, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = gpu_bn.batch_norm(x, training=True, backend=EmulatedBackend(device, compile_triton, tier=tier))
    assert y.isnan().all()


@pytest.mark.parametrize("mapping", ["rows", "channels-last"])
@pytest.mark.one_in(2)
def test_a_mask_is_read_once_a_pass(mapping, compile_triton):
    """A pass reads one byte of the mask for each position and strip, besides the bytes of an unmasked call."""
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
        if plan.tiling.columns:  # each lane counts the shared byte, in few sectors
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


# ------------------------------------------------------------------------------------------------------ traffic
SHAPES = {
    "rows": ((18, 3, 32, 32), False),
    "channels-last": ((64, 64, 4, 4), True),
}


def sampled_bytes(plan, itemsize):
    """Return the bytes of the samples from which the first launch computes its shifts."""
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
        # The plan counts dresidual in the first launch, as for the CUDA kernels; in Triton the second launch writes it.
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
                extra = 0.4 if report.kernel.name == "bn_stats_kernel" else 0  # the samples have gaps
                assert traffic.units <= traffic.bytes / 32 * (1 + extra), "whole sectors"


def test_a_strip_that_channels_do_not_fill_is_summed_once(compile_triton, device):
    """Squares of bfloat16 may overflow float32, which starts a second sum; idle lanes must not cause one."""
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


MERGED = {
    "rows": ("rows", torch.float16, {}),
    "channels-last": ("channels-last", torch.float16, {}),
    "a mask": ("rows", torch.float32, {"mask": True}),
    "ghost batches": ("channels-last", torch.float16, {"mask": True, "virtual_batch_size": 16}),
    "float64": ("rows", torch.float64, {}),
    "one output": ("channels-last", torch.bfloat16, {"need": {"dx"}}),
}


@pytest.mark.parametrize("kind", MERGED)
def test_a_separate_merging_launch_gives_the_same_results(kind, compile_triton):
    """Where double precision is slow, a separate launch merges partial results, instead of each later program.

    The float64 sums may be in another order, and a mean may differ by a rounding error relative to the standard
    deviation of its channel. All else is rounded alike, except for float64 tensors, whose results are such sums.
    """
    mapping, dtype, options = MERGED[kind]
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
