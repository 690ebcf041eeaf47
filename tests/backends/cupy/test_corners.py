"""Corner cases of the CUDA kernels and their launches: many blocks, mixed dtypes, several devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import Checks, Device
from support import fake_cupy, far_from_zero, rng, same_bits

import gpu_bn
from gpu_bn.activations import ROWS
from gpu_bn.testing import Case, build, check

pytestmark = pytest.mark.compile


# ----------------------------------------------------------------------------------- many blocks that share a strip
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_each_block_of_a_cluster_is_read(blocks, make_gpu):
    gpu = make_gpu(90, "cluster")
    check(Case((4, 8 // blocks, 512)), gpu.backend)
    assert len(gpu.launched) == 2
    assert all(f"Li{blocks}E" in name for name in gpu.launched)


def test_a_cluster_whose_strips_are_of_several_channels(make_gpu):
    check(Case((64, 8), activation="relu"), make_gpu(90, "cluster").backend)


@pytest.mark.parametrize(
    ("tier", "case"),
    [
        ("split", Case((2100, 64), "float16", activation="relu")),
        (None, Case((700, 64), "float16", mask="random")),
    ],
    ids=str,
)
def test_more_blocks_than_are_merged_in_one_round(tier, case, make_gpu):
    """Strips have 64 channels, so that each of them is merged by 4 of the 256 threads."""
    check(case, make_gpu(80, tier).backend)


def test_more_blocks_than_threads_count_what_a_mask_selects(make_gpu, monkeypatch):
    monkeypatch.setitem(fake_cupy.PROPERTIES, 90, fake_cupy.PROPERTIES[90] | {"multiProcessorCount": 132})
    gpu = make_gpu(90, None, Device(checks=Checks(races=False, initialised=False)))
    check(Case((3, 1, 90113), "float16", mask="random"), gpu.backend)


# ---------------------------------------------------------------------------------------------- numbers of any dtype
def with_vectors_of_all_dtypes(case):
    problem = build(case)
    dtypes = {"running_mean": "f2", "running_var": "f8", "weight": "f2", "bias": "f8"}
    return replace(problem, **{name: getattr(problem, name).astype(dtype) for name, dtype in dtypes.items()})


@pytest.mark.parametrize(
    ("tier", "options"),
    [("split", {}), ("cta", {}), (None, {"mode": "eval"}), (None, {"virtual_batch_size": 2})],
    ids=str,
)
@pytest.mark.one_in(2)
def test_each_vector_may_have_a_dtype_of_its_own(tier, options, make_gpu):
    check(with_vectors_of_all_dtypes(Case((4, 6, 5), activation="relu", **options)), make_gpu(80, tier).backend)


def test_running_statistics_alone_may_be_of_16_bits(make_gpu):
    check(Case((4, 6, 5), affine="none", param_dtype="float16", mode="eval"), make_gpu(80).backend)


@pytest.mark.parametrize(("tier", "mode"), [("split", "train"), ("cta", "train"), (None, "eval")])
def test_an_activation_has_its_parameter_in_float64(tier, mode, make_gpu):
    check(Case((4, 6, 5), "float64", activation="leaky_relu", mode=mode), make_gpu(80, tier).backend)


def test_ghost_batches_are_added_up_in_float64(make_gpu):
    """Running statistics, momentum included, and gradients of the parameters are summed over groups in float64."""
    check(Case((4, 6, 5), "float64", virtual_batch_size=2), make_gpu(80).backend)


@pytest.mark.parametrize("value", [np.float64(0.25), np.float32(0.25), np.float16(0.25), np.int64(1)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=str)
def test_momentum_may_be_a_number_on_the_device(options, value, make_gpu):
    gpu = make_gpu(80, "split")
    problem = build(Case((4, 6, 5)))
    results = []
    for momentum in (float(value), gpu.asarray(np.array(value))):
        running = [gpu.asarray(array.copy()) for array in (problem.running_mean, problem.running_var)]
        gpu_bn.batch_norm(
            gpu.asarray(problem.x), *running, training=True, momentum=momentum, backend=gpu.backend, **options
        )
        results.append(np.array(running))
    assert same_bits(*results)
    assert (results[0][0] != problem.running_mean).all()


# ------------------------------------------------------------------------------------------------------- statistics
def test_the_running_variance_of_one_position_is_zero(make_gpu):
    """Bessel's correction, which would be 1 / 0, is left out."""
    check(Case((6, 5, 4), mask="one"), make_gpu(80).backend)


@pytest.mark.parametrize("scale", [1, 1e20])
def test_a_shift_far_from_the_mean_is_improved_until_it_is_near(scale, make_gpu):
    """All elements are 10,001, but those that the first shift is computed from are 0."""
    problem = build(Case((4, 1, 4096), mode="train_no_stats"))
    x = np.full((1 << 12, 4), 10_001, np.float32)
    x[np.arange(8) * len(x) // 8] = 0
    check(replace(problem, x=x.reshape(4, 1, 4096) * np.float32(scale)), make_gpu(80, "cta").backend)


@pytest.mark.parametrize("tier", ["cta", "cluster", "split"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.one_in(2)
def test_a_first_element_far_from_the_others_costs_no_digits(layout, tier, make_gpu):
    """Blocks report their means as differences from an element of the channel."""
    problem = build(Case((4, 6, 5, 14), "float64", layout))
    problem.x[0, :, 0, 0] = [30, -30, 50, -50, 77.7, 100 / 3]
    check(problem, make_gpu(90, tier).backend)


def test_a_channel_of_one_large_number_is_not_scaled(make_gpu):
    """All squares of deviations are 0, which does not mean that they underflowed."""
    problem = build(Case((3, 4, 41, 8), mode="train_no_stats"))
    check(replace(problem, x=np.full_like(problem.x, 1e20)), make_gpu(80, "cta").backend)


def test_the_first_shift_is_a_mean_and_no_sum(make_gpu):
    """The sum of the samples overflows float32; their mean does not."""
    gpu = make_gpu(80, "cta")
    x = rng().normal(1e38, 1e37, (3, 4, 41, 8)).astype(np.float32)
    y = gpu_bn.batch_norm(gpu.asarray(x), training=True, backend=gpu.backend)
    np.testing.assert_allclose(y, gpu_bn.batch_norm(x, training=True), atol=1e-5)


@pytest.mark.parametrize("arch", [75, 80])
def test_small_numbers_that_follow_a_large_one_are_not_lost(arch, make_gpu, monkeypatch):
    """Each thread sums 64 vectors, the first of ones. A single float32 sum would lose all the others.

    In the first two channels the sums of x and dy would lose them, in the last two the sums of squares. Long sums are
    pairs of floats on sm_75, and in double precision on sm_80.
    """
    few_sms = {"multiProcessorCount": 2, "memoryClockRate": 1000}  # few blocks reach the bandwidth of its memory
    monkeypatch.setitem(fake_cupy.PROPERTIES, arch, fake_cupy.PROPERTIES[arch] | few_sms)
    problem = build(Case((1, 4, 1 << 16), mode="train_no_stats"))
    numbers = np.full((4, 64, 1024), 2.0**-24 / 10, np.float32)
    numbers[2:] = 1943 * 2.0**-23
    numbers[:, 0] = 1
    numbers[:, ::8, :4] = 0  # the samples of the first shift
    numbers = numbers.reshape(problem.x.shape)
    gpu = make_gpu(arch, "split", Device(checks=Checks(races=False)))
    check(replace(problem, x=numbers, dy=numbers), gpu.backend)


@pytest.mark.parametrize("arch", [75, 80])
def test_a_sum_beyond_the_range_of_floats_is_infinite_and_not_nan(arch, make_gpu):
    gpu = make_gpu(arch, "split")
    x, dy = (rng().normal(size=(3, 4, 41, 8)).astype(np.float32) for _ in range(2))
    dy[:, 1] = 1e37
    _, saved = gpu_bn.batch_norm_forward(gpu.asarray(x), bias=gpu.asarray(np.zeros(4, np.float32)), training=True,
                                         backend=gpu.backend)  # fmt: skip
    dbias = gpu_bn.batch_norm_backward(gpu.asarray(dy), saved, backend=gpu.backend).dbias
    assert dbias[1] == np.inf
    np.testing.assert_allclose(dbias[[0, 2, 3]], dy.astype(float).sum((0, 2, 3))[[0, 2, 3]], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ activations
@pytest.mark.parametrize("activation", ROWS)
@pytest.mark.one_in(4)
def test_activations_far_from_zero(activation, make_gpu):
    """Small values far from zero keep their digits, and nothing overflows on the way to them."""
    check(far_from_zero(activation), make_gpu(80).backend)


# ------------------------------------------------------------------------------------------------ frozen statistics
def test_frozen_gradients_of_adjacent_channels(make_gpu):
    """dx has the same bits whether or not gradients of the parameters are computed, which takes another kernel."""
    gpu = make_gpu(80)
    problem = build(Case((60, 24), "float16", mode="eval"))
    check(problem, gpu.backend)
    vectors = [gpu.asarray(getattr(problem, name)) for name in ("running_mean", "running_var", "weight", "bias")]
    _, saved = gpu_bn.batch_norm_forward(gpu.asarray(problem.x), *vectors, backend=gpu.backend)
    dy = gpu.asarray(problem.dy)
    everything = gpu_bn.batch_norm_backward(dy, saved, backend=gpu.backend)
    alone = gpu_bn.batch_norm_backward(dy, saved, need={"dx"}, backend=gpu.backend)
    assert same_bits(np.array(alone.dx), np.array(everything.dx))


# --------------------------------------------------------------------------------------------------------- launches
@pytest.mark.parametrize("vectors", [11, 12])
def test_shared_memory_is_asked_for_with_what_a_block_has_of_its_own(vectors, make_gpu):
    """Static and dynamic memory may take 48 KiB together; the launch requests as much for the dynamic part alone."""
    gpu = make_gpu(80, "cta", Device(checks=Checks(races=False)))
    x = rng().normal(1, 2, (1, 1, 4 * 256 * vectors)).astype(np.float32)
    y = gpu_bn.batch_norm(gpu.asarray(x), training=True, backend=gpu.backend)
    np.testing.assert_allclose(y, gpu_bn.batch_norm(x, training=True), atol=1e-5)
    assert {kernel.requested for kernel in gpu.kernels.values()} == {fake_cupy.DEFAULT_SHARED}


@pytest.mark.parametrize("tier", ["cta", "cooperative", "split"])
def test_each_device_has_its_own_kernels_and_counters(tier, make_gpu):
    """Emulated launches refuse kernels and memory of another device."""
    gpu = make_gpu(80, tier)
    problem = build(Case((8, 1, 32, 64), activation="relu"))
    for device in (0, 1):
        with gpu.entering(device):
            x, dy = gpu.asarray(problem.x), gpu.asarray(problem.dy)
        _, saved = gpu_bn.batch_norm_forward(x, training=True, activation="relu", backend=gpu.backend)
        dx = gpu_bn.batch_norm_backward(dy, saved, backend=gpu.backend).dx
        assert dx.device.id == device
    assert {key[0]: counters.device.id for key, (_, counters) in gpu.backend._counters.items()} == (
        {} if tier == "cta" else {0: 0, 1: 1}
    )


@pytest.mark.parametrize(
    "options", [{"mask": True}, {"mask": True, "renorm": (1.2, 0.3)}, {"renorm": (2.0, 1.0), "training": True}], ids=str
)
def test_all_is_done_where_the_input_is(options, make_gpu):
    """The kernels of CuPy, too, run on the device of the input rather than on the current one."""
    gpu = make_gpu(80)
    problem = build(Case((4, 6, 5), activation="relu"))
    keep = rng().random((4, 1, 5)) > 0.3
    vectors = [getattr(problem, name).copy() for name in ("running_mean", "running_var", "weight", "bias")]
    with gpu.entering(1):
        x, dy, mask, *theirs = map(gpu.asarray, (problem.x, problem.dy, keep, *vectors))
    call = {"training": True, **options, "activation": "relu"}
    if "mask" in options:
        call["mask"] = keep
    y, saved = gpu_bn.batch_norm_forward(problem.x, *vectors, **call)
    want = [y, *gpu_bn.batch_norm_backward(problem.dy, saved)[:3], *vectors]
    if "mask" in options:
        call["mask"] = mask
    y, saved = gpu_bn.batch_norm_forward(x, *theirs, **call, backend=gpu.backend)
    got = [y, *gpu_bn.batch_norm_backward(dy, saved, backend=gpu.backend)[:3], *theirs]
    assert [array.device.id for array in got] == [1] * len(got)
    for mine, its in zip(got, want, strict=True):
        np.testing.assert_allclose(mine.get(), its, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3), (0, 3)], ids=str)
def test_a_layer_counts_where_it_is(shape, make_gpu):
    gpu = make_gpu(80)
    with gpu.entering(1):
        norm = gpu_bn.BatchNorm(3, momentum=None, device="cuda")
        x = gpu.asarray(rng().normal(1, 2, shape).astype(np.float32))
    for _ in range(2):
        norm.backward(norm(x))
    assert norm.num_batches_tracked.device.id == norm.grad["weight"].device.id == 1
    assert norm.num_batches_tracked.get() == 2
    if x.size:
        np.testing.assert_allclose(norm.running_mean.get(), x.get().mean(0), rtol=1e-5)


def test_a_momentum_of_another_device_is_refused(make_gpu):
    gpu = make_gpu(80)
    x = gpu.asarray(np.ones((4, 3), np.float32))
    running = [gpu.asarray(np.ones(3, np.float32)) for _ in range(2)]
    with gpu.entering(1):
        momentum = gpu.asarray(np.array(0.5))
    with pytest.raises(ValueError, match="on one GPU, got input on GPU 0, momentum on GPU 1"):
        gpu_bn.batch_norm(x, *running, training=True, momentum=momentum, backend=gpu.backend)
    assert not gpu.launched
