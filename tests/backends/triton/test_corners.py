"""Corner cases of the Triton backend: arguments of other kinds, large offsets, shifts far from the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import Checks, Device
from support import far_from_zero

import gpu_bn
from gpu_bn.activations import IDENTITY
from gpu_bn.call import Call
from gpu_bn.gpu_model import streaming_seconds
from gpu_bn.plan import DEVICES, THREADS, THRESHOLDS, VECTOR_BYTES, Work, plan_once
from gpu_bn.spec import BatchNormSpec
from gpu_bn.testing import Case, check
from gpu_bn.testing.cases import build

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend

from gpu_bn.backends.protocol import Sums
from gpu_bn.backends.triton.programs import Geometry, one_pass_plan, training_plan

pytestmark = pytest.mark.compile
SHAPE = (4, 3, 5, 8)
SMALL = replace(DEVICES["a100"], sms=4)


@pytest.fixture
def make_backend(compile_triton, device):
    return lambda **options: EmulatedBackend(device, compile_triton, 80, SMALL, **options)


def tensors():
    """Return x, dy and a residual."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def moved(tensor):
    """Return a copy at an address that is not aligned to a vector."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return copy.copy_(tensor)


# ------------------------------------------------------------------------ launches serve arguments of one kind only
def test_calls_share_launches_only_with_arguments_of_the_same_types(make_backend):
    """Emulated launches refuse arguments of other types than those that the kernel was compiled for."""
    backend = make_backend()
    x, dy, _ = tensors()
    half, single = torch.float16, torch.float32
    for dtypes in ([single] * 4, [half] * 4, [half, half, single, single], [single, single, half, single]):
        for momentum in (0.1, torch.tensor(0.1, dtype=torch.float64)) if dtypes[0] is dtypes[2] else (0.1,):
            mean, var, weight, bias = (torch.ones(SHAPE[1], dtype=dtype) for dtype in dtypes)
            _, saved = gpu_bn.batch_norm_forward(
                x, mean, var, weight, bias, training=True, momentum=momentum, backend=backend
            )
            grads = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
            assert [grads.dweight.dtype, grads.dbias.dtype] == dtypes[2:]


def test_calls_on_two_devices_share_no_launch():
    backend = RecordingBackend(SMALL)
    spec = gpu_bn.spec.BatchNormSpec(1, True, 0.1, 1e-5, gpu_bn.activations.Activation.of(None))
    for device in ("cpu", "meta", "cpu"):
        x = torch.empty(SHAPE, device=device)
        _, saved = backend.forward(Call(x), spec)
        backend.backward(torch.empty_like(x), saved, frozenset({"dx"}))
    steps = [step for step, _ in backend.launches]
    assert steps[:2] == steps[4:]
    assert len(set(steps)) == 4


def test_the_phases_share_launches_only_with_calls_alike():
    """Another number of groups, another activation, or a count on the device needs another launch."""
    backend = RecordingBackend(SMALL)
    x, dy, out = tensors()

    def steps_of(call):
        before = len(backend.launches)
        call()
        return {step for step, _ in backend.launches[before:]}

    assert not steps_of(lambda: backend.stats(x, 1)) & steps_of(lambda: backend.stats(x, 1, None, 2))
    saved = []
    for name in ("silu", "gelu"):
        spec = gpu_bn.spec.BatchNormSpec(1, True, 0.1, 1e-5, gpu_bn.activations.Activation.of(name))
        saved.append(backend.forward(Call(x), spec)[1])
    silu, gelu = saved
    assert not steps_of(lambda: backend.normalize(silu, None, out)) & steps_of(
        lambda: backend.normalize(gelu, None, out)
    )
    counted = replace(silu, moments=replace(silu.moments, count=torch.tensor([160.0]).double()))
    sums = Sums(*torch.zeros((2, SHAPE[1]), dtype=torch.float64))
    first = steps_of(lambda: backend.backward_input(dy, silu, sums, out))
    assert not first & steps_of(lambda: backend.backward_input(dy, counted, sums, out))


def test_a_mask_is_written_where_it_is_kept_whatever_was_called_before():
    backend = RecordingBackend(SMALL)
    x, _, residual = tensors()
    spec = gpu_bn.spec.BatchNormSpec(1, False, 0.1, 1e-5, gpu_bn.activations.Activation.of("relu"))
    running = torch.zeros(SHAPE[1]), torch.ones(SHAPE[1])
    for keep in (False, True, False):
        _, saved = backend.forward(Call(x, None, None, residual, *running), spec, keep)
        assert (saved.mask is not None) == keep


# -------------------------------------------------------------------------- tensors at unaligned addresses
def unmoved(tensor):
    return tensor


@pytest.mark.parametrize("name", ["x", "residual", "out"])
def test_forward_with_a_tensor_moved(name, make_backend):
    x, _, residual = tensors()
    backend = make_backend()
    want = gpu_bn.batch_norm(x, training=True, residual=residual)
    for move in (unmoved, moved):
        call = {"x": x, "residual": residual, "out": torch.empty_like(x)}
        call[name] = move(call[name])
        got = gpu_bn.batch_norm(**call, training=True, backend=backend)
        torch.testing.assert_close(got, want)
    assert len(set(backend.steps)) == 2


@pytest.mark.parametrize(("name", "activation"), [("x", "silu"), ("residual", "silu"), ("dy", "relu"), ("x", "relu")])
def test_backward_with_a_tensor_moved(activation, name, make_backend):
    """A misaligned tensor gives the same gradients; for ReLU, the residual is saved as sign bits."""
    x, dy, residual = tensors()
    backend = make_backend()
    found = []
    for move in (unmoved, moved):
        call = {"x": x, "residual": residual, "dy": dy}
        call[name] = move(call[name])
        moved_dy = call.pop("dy")
        _, saved = gpu_bn.batch_norm_forward(**call, training=True, activation=activation, backend=backend)
        grads = gpu_bn.batch_norm_backward(moved_dy, saved, backend=backend)
        found.append((grads.dx, grads.dresidual))
    for tensor, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(tensor, want)


@pytest.mark.parametrize(("valid_moved", "out_moved"), [(False, False), (True, False), (False, True)])
def test_no_alignment_is_promised_of_what_has_none(valid_moved, out_moved):
    """Alignment is declared only for aligned tensors: callers of the phases may pass any mask and output."""
    backend = RecordingBackend(SMALL)
    x, dy, out = tensors()
    valid = torch.ones((SHAPE[0], 1, *SHAPE[2:]), dtype=torch.bool)
    valid, out = moved(valid) if valid_moved else valid, moved(out) if out_moved else out
    spec = gpu_bn.spec.BatchNormSpec(1, True, 0.1, 1e-5, gpu_bn.activations.Activation.of(None))
    _, saved = backend.forward(Call(x, valid=valid), spec)
    backend.backward(dy, saved, frozenset({"dx"}))
    backend.stats(x, 1, valid)
    before = len(backend.launches)
    backend.normalize(saved, None, out)
    steps = [step for step, _ in backend.launches]
    assert any(step.aligned for step in steps[:before]) != valid_moved
    assert bool(steps[before].aligned) == (not valid_moved and not out_moved)


# ------------------------------------------------------------------------------------------ momentum on the device
def test_the_second_launch_takes_its_momentum_from_the_device(make_backend):
    backend = make_backend(tier="split")
    x, *_ = tensors()
    results = []
    for momentum in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        mean, var = torch.zeros(SHAPE[1]), torch.ones(SHAPE[1])
        gpu_bn.batch_norm(x, mean, var, training=True, momentum=momentum, backend=backend)
        results.append(torch.stack([mean, var]))
    assert torch.equal(*results)
    assert (results[0][0] != 0).all()
    assert len(backend.steps) == 4


def test_gradients_go_to_tensors_where_no_vector_begins(make_backend):
    """Gradients go to unaligned tensors, where kernels that access full vectors would fail."""
    backend, (x, dy, _) = make_backend(), tensors()
    _, saved = gpu_bn.batch_norm_forward(x, training=True, activation="silu", backend=backend)
    found = []
    for out in (torch.empty(SHAPE), moved(torch.empty(SHAPE))):
        sums = backend.backward_reduce(dy, saved, out)
        found.append(out.clone())
        backend.backward_input(dy, saved, sums, out)
        found.append(out)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


# -------------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(32, 64, 112 * 112), (32 * 56 * 56, 64, 1), (8192, 256, 1)])
def test_the_time_of_two_launches_is_that_of_the_programs_that_are_launched(shape, backward):
    """The time is that of the one-pass launches, whose blocks differ from those of the CUDA kernels."""
    work, device = Work(*shape, 2, backward, reads=1 + backward), DEVICES["h100"]
    found, once = training_plan(work, device, "split"), one_pass_plan(work, device)
    assert (found.tiling, found.blocks, found.share, found.launches) == (once.tiling, once.blocks, once.share, 2)
    resident = THRESHOLDS.column_blocks if once.tiling.columns else THRESHOLDS.row_blocks
    under_way = THRESHOLDS.loads * THREADS * VECTOR_BYTES
    reads = found.read_bytes[0]
    passes = [
        streaming_seconds(moved, once.grid, resident, under_way, device, THRESHOLDS)
        for moved in (reads, found.dram_bytes - reads)
    ]
    assert [sum(parts) for parts in zip(*passes, strict=True)] == [found.times.memory, found.times.idle]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89])
def test_more_blocks_than_a_program_merges_at_a_time(arch, compile_triton, device):
    """A narrow strip of channels has twice as many blocks as a program of the last launch merges at a time."""
    plans = []
    many_sms = replace(DEVICES["a100"], arch=arch, sms=1024)
    backend = EmulatedBackend(
        device, compile_triton, arch, many_sms, tier="split", on_plan=lambda plan, _: plans.append(plan)
    )
    check(build(Case((66_000, 16), "float16", activation="relu")), backend)
    assert {plan.blocks for plan in plans} == {128}


# ------------------------------------------------------------------------------------------------------ large offsets
@pytest.mark.parametrize("size", [12, 16_384, 16_400])
def test_positions_are_divided_by_the_row_without_a_division(size):
    """The largest positions are tested, for which the multiplier is least accurate."""
    _, row, _, magic, power, *_ = Geometry.from_plan(plan_once(Work(70_000, 2, size, 4), DEVICES["h100"])).tail
    assert row == size // 4
    for end in (2**31 - 1, 2**31 - row, 2**30 + row - 1):
        for position in (end // row * row - 1, end // row * row):
            assert position * magic >> power == position // row


@pytest.mark.parametrize(("n", "wide"), [(1, False), (2, True)])
def test_offsets_are_of_64_bits_from_the_first_that_32_do_not_hold(n, wide):
    assert Geometry.from_plan(plan_once(Work(n, 1 << 10, 1 << 20, 2), DEVICES["h100"])).wide == wide


@pytest.mark.parametrize(
    ("work", "groups"),
    [(Work(1, 1, 2**31 - 1, 4), 1), (Work(2, 768, 1, 2), 2**20)],
    ids=["the end of the last share", "partial results of many groups"],
)
def test_numbers_beside_offsets_are_of_64_bits_where_32_do_not_hold_them(work, groups):
    """Other numbers take 64 bits where 32 are too few, although all offsets fit in 32 bits."""
    assert Geometry.from_plan(plan_once(work, DEVICES["h100"]), groups).wide


@pytest.mark.parametrize(
    ("work", "groups", "what"),
    [
        (Work(1, 2**31, 1, 2), 1, "channels, got 2147483648"),
        (Work(2, 2**31 - 1, 1, 2), 1, "channels, got 2147483647"),
        (Work(4, 2**11, 5, 2), 2**20, "programs, got 2147483648"),
    ],
)
def test_more_channels_than_kernels_can_count_are_refused(work, groups, what):
    with pytest.raises(ValueError, match=rf"expected less than 2\*\*31 - \d+ {what}"):
        Geometry.from_plan(plan_once(work, DEVICES["h100"]), groups)
    fewer = replace(work, c=work.c // 2)
    assert Geometry.from_plan(plan_once(fewer, DEVICES["h100"]), groups).wide


def test_a_call_with_too_many_channels_is_refused_before_anything_is_launched():
    """The tensors are never accessed, so that they take no memory."""
    backend, channels = RecordingBackend(DEVICES["h100"]), 1 << 31
    x, vector = torch.empty((1, channels), dtype=torch.float16), torch.zeros(1).expand(channels)
    spec = BatchNormSpec(1, False, 0.1, 1e-5, IDENTITY)
    with pytest.raises(ValueError, match="channels, got 2147483648"):
        backend.forward(Call(x, running_mean=vector, running_var=vector, out=x), spec)
    assert backend.launches == []


# -------------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize("activation", ["elu", "gelu", "gelu_tanh", "tanh"])
@pytest.mark.one_in(3)
def test_activations_far_from_zero(activation, make_backend):
    check(far_from_zero(activation), make_backend())


# --------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1), ("float32", 1e20), ("float16", 1)])
@pytest.mark.parametrize("arch", [80, 89])
@pytest.mark.one_in(3)
def test_a_shift_far_from_the_mean_is_improved_until_it_is_near(dtype, scale, arch, compile_triton):
    """All elements are about 10,000, but those that the first shift is computed from are 0."""
    problem = build(Case((4, 1, 65536), dtype, mode="train_no_stats"))
    x = np.full((1 << 16, 4) if dtype == "float32" else (1 << 15, 8), 10_001, dtype)
    x[:: len(x) // 128] = 0
    problem = replace(problem, x=x.reshape(problem.x.shape) * np.asarray(scale, dtype))
    device, planned = Device(checks=Checks(races=False)), replace(DEVICES["a100"], sms=1, arch=arch)
    check(problem, EmulatedBackend(device, compile_triton, 80, planned, tier="split"))
