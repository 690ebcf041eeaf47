"""How the CuPy backend launches its kernels: streams, counters, cooperative launches, refused clusters and memory."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from emulator import Device
from support import rng, same_bits
from support.cupy_on_emulator import misaligned_copy

import gpu_bn
from gpu_bn.plan import DEVICES, NoPlanError, Work, plan_once
from gpu_bn.testing import Case, build, check
from gpu_bn.testing.check import run

pytestmark = pytest.mark.compile
SHARED = (8, 1, 16, 64)
"""A channel that several blocks share, in the tiers that allow it."""


def stream():
    return sys.modules["cupy"].cuda.Stream(non_blocking=True)


# ---------------------------------------------------------------------------------------------- streams and graphs
@pytest.mark.parametrize("tier", ["cta", "cluster", "cooperative", "split"])
def test_every_kernel_runs_on_the_current_stream(tier, make_gpu):
    gpu = make_gpu(90, tier)
    with stream() as current:
        run(build(Case(SHARED, activation="relu")), gpu.backend)
    assert len(gpu.launched) == (4 if tier == "split" else 2)
    assert gpu.launched_in == {current.ptr}


def test_small_kernels_run_on_the_current_stream(make_gpu):
    gpu = make_gpu(80)
    with stream() as current:
        run(build(Case((4, 6, 5), virtual_batch_size=2)), gpu.backend)
    assert any("track" in name for name in gpu.launched)
    assert any("add_groups" in name for name in gpu.launched)
    assert gpu.launched_in == {current.ptr}


def set_counters(gpu):
    """Set the counters of the current stream to 7, as if seven blocks of a running launch had counted; return them."""
    counters = gpu.backend.counters(8)
    counters[...] = 7
    return counters


def results_of(gpu):
    found = run(build(Case(SHARED, activation="relu")), gpu.backend)
    assert {"y", "running_mean", "dx", "dweight"} <= found.keys()
    return found


@pytest.mark.parametrize("tier", ["cooperative", "split"])
def test_a_call_on_one_stream_is_not_disturbed_by_one_that_runs_on_another(tier, make_gpu):
    gpu = make_gpu(80, tier)
    want = results_of(gpu)
    busy, free = stream(), stream()
    with busy:
        counters = set_counters(gpu)
    with free:
        assert same_bits(results_of(gpu), want)
    assert (counters == 7).all()


def test_a_stream_keeps_its_counters(make_gpu):
    """Each stream gets the same counters again; otherwise each call would allocate and clear new ones."""
    gpu = make_gpu(80)
    streams = stream(), stream()
    counters = []
    for current in streams * 2:
        with current:
            counters.append(gpu.backend.counters(8))
    assert counters[2] is counters[0]
    assert counters[3] is counters[1]


def test_a_stream_that_was_let_go_keeps_its_handle_from_the_next(make_gpu):
    """Its launches may still run: a new stream with the same handle would share their counters."""
    gpu = make_gpu(80)
    used, unused = stream(), stream()
    with used:
        gpu.backend.counters(8)
    kept, let_go = weakref.ref(used), weakref.ref(unused)
    del used, unused
    gpu.streams.clear()
    gc.collect()
    assert let_go() is None
    assert kept() is not None


def test_counters_of_few_streams_are_kept(make_gpu):
    gpu = make_gpu(80)
    most = sys.modules["gpu_bn.backends.cupy.backend"].STREAMS
    for _ in range(most + 5):
        with stream() as current:
            gpu.backend.counters(8)
    assert len(gpu.backend._counters) == most
    assert (0, current.ptr) in gpu.backend._counters


def test_a_stream_gets_more_counters_when_it_asks_for_more(make_gpu):
    """The counters grow, since a split launch may have any number of strips."""
    gpu = make_gpu(80)
    many = gpu.backend.counters(8).size + 1
    counters = gpu.backend.counters(many)
    assert counters.size >= many
    assert not counters.any()
    assert gpu.backend.counters(8) is counters


@pytest.mark.parametrize("tier", ["cooperative", "split"])
def test_what_is_captured_counts_from_zero_whatever_runs_on_the_stream(tier, make_gpu):
    """A captured call gets new counters, since its graph may be launched at any time on any stream."""
    gpu = make_gpu(80, tier)
    want = results_of(gpu)
    with stream() as current:
        counters = set_counters(gpu)
        current.begin_capture()
        assert same_bits(results_of(gpu), want)
        assert gpu.backend.counters(8) is not gpu.backend.counters(8)  # two graphs may run at the same time
        current.end_capture()
    assert (counters == 7).all()


# ----------------------------------------------------------------------------------- blocks that wait for each other
def test_blocks_that_wait_for_each_other_are_launched_to_run_together(make_gpu):
    """An ordinary launch may run one block at a time, so that the first would wait for ever."""
    gpu = make_gpu(80, "cooperative", Device(resident_threads=256))
    check(Case(SHARED, activation="relu"), gpu.backend)
    assert len(gpu.launched) == 2


@pytest.mark.parametrize("tier", ["cooperative", "cta"])
def test_a_thread_that_has_not_met_the_device_yet_may_call(tier, make_gpu):
    """The driver needs a context that is bound to the thread, which CuPy does only in its own launches."""
    gpu = make_gpu(80, tier)
    want = results_of(gpu)
    assert {"y", "dx"} <= want.keys()
    with ThreadPoolExecutor(1) as other:
        assert same_bits(other.submit(results_of, gpu).result(), want)
        sys.modules["gpu_bn.backends.cupy.device"].resident_blocks.cache_clear()
    with ThreadPoolExecutor(1) as other:  # a new backend prepares its calls in the thread
        gpu.backend = type(gpu.backend)(tier)
        assert same_bits(other.submit(results_of, gpu).result(), want)


# ----------------------------------------------------------------------------------------------- refused clusters
def test_a_device_without_room_for_a_cluster_is_served_without(make_gpu):
    """A part of a GPU (MIG) may refuse clusters. The call has written nothing by then and takes another tier."""
    gpu = make_gpu(90)
    want = results_of(gpu)
    assert all("cluster" in name for name in gpu.launched)
    gpu.launched.clear()
    gpu.refuses_clusters = True
    for _ in range(2):
        got = results_of(gpu)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert gpu.launched
    assert not any("cluster" in name for name in gpu.launched)
    with pytest.raises(NoPlanError, match="not cluster: the device refuses clusters"):
        gpu_bn.batch_norm(gpu.asarray(build(Case(SHARED)).x), training=True, backend=type(gpu.backend)("cluster"))


def test_another_failure_of_a_launch_is_not_taken_for_a_refusal(make_gpu):
    gpu = make_gpu(90, "cluster")
    error = sys.modules["cupy"].cuda.driver.CUDADriverError("CUDA_ERROR_ILLEGAL_ADDRESS: an earlier kernel's")

    def fails(*_, **__):
        raise error

    gpu.launch = fails
    with pytest.raises(type(error), match="ILLEGAL_ADDRESS"):
        results_of(gpu)
    assert sys.modules["gpu_bn.backends.cupy.device"].properties(0).clusters


def test_blocks_whose_shared_memory_does_not_fit_together_are_not_launched_together(make_gpu):
    gpu = make_gpu(80, "cooperative")
    case = Case((1, 4, 2048), activation="relu")
    check(case, gpu.backend)
    assert len(gpu.launched) == 2
    gpu.launched.clear()
    gpu.shared_per_sm = 8 << 10  # two blocks of 4 KiB, but no room for static memory
    sys.modules["gpu_bn.backends.cupy.device"].resident_blocks.cache_clear()
    check(case, type(gpu.backend)("cooperative"))
    assert len(gpu.launched) == 4


# ------------------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(
    "options", [{"training": True}, {"training": False}, {"training": True, "virtual_batch_size": 2}], ids=str
)
def test_vectors_may_begin_at_any_byte(options, make_gpu):
    gpu = make_gpu(80)
    problem = build(Case((4, 6, 5)))
    vectors_of_it = [getattr(problem, name) for name in ("running_mean", "running_var", "weight", "bias")]
    results = []
    for send in (gpu.asarray, partial(misaligned_copy, gpu, offset=1)):
        vectors = [send(vector) for vector in vectors_of_it]
        y, saved = gpu_bn.batch_norm_forward(gpu.asarray(problem.x), *vectors, **options, backend=gpu.backend)
        dx, dweight, dbias, _ = gpu_bn.batch_norm_backward(gpu.asarray(problem.dy), saved, backend=gpu.backend)
        results.append([np.array(array) for array in (y, dx, dweight, dbias, *vectors)])
    assert all(map(same_bits, *results))


def test_where_the_output_may_go_is_decided_without_the_device(make_gpu):
    """Overlap is decided on the host: ``cupy.shares_memory``, which the stand-in lacks, would wait for the device."""
    gpu = make_gpu(80)
    base = gpu.asarray(rng().normal(1, 2, (9, 6, 5, 4)).astype(np.float32))
    x, residual, beside = base[:4], gpu.asarray(np.array(base[:4]) / 2), base[5:]
    want = np.array(gpu_bn.batch_norm(np.array(x), residual=np.array(residual), training=True))
    for out in (beside, gpu.asarray(np.array(x).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        assert gpu_bn.batch_norm(x, residual=residual, training=True, out=out, backend=gpu.backend) is out
        np.testing.assert_allclose(out, want, atol=1e-5)
    for name, overlapping in (("input", base[1:5]), ("input", x[::-1]), ("residual", residual[:, :, ::-1])):
        with pytest.raises(ValueError, match=f"out should be the {name} itself or share no memory with it"):
            gpu_bn.batch_norm(x, residual=residual, training=True, out=overlapping, backend=gpu.backend)
    with pytest.raises(ValueError, match="out may not be the input or overlap it"):
        gpu_bn.batch_norm_forward(x, training=True, out=x[:], backend=gpu.backend)
    gpu_bn.batch_norm(x, residual=residual, training=True, out=x, backend=gpu.backend)
    np.testing.assert_allclose(x, want, atol=1e-5)


def test_ghost_batches_of_more_channels_than_a_block_has_threads(make_gpu):
    """The kernels that sum over ghost batches, with one thread for each channel, launch several blocks."""
    check(Case((4, 600), virtual_batch_size=2), make_gpu(80).backend)


@pytest.mark.parametrize("step", [(slice(None, None, -1), slice(None)), (slice(None), slice(None, None, -2))], ids=str)
def test_an_array_from_the_host_has_the_values_and_the_strides_that_it_had(step, make_gpu):
    make_gpu(80)
    array = rng().normal(0, 1, (4, 6)).astype(np.float32)[step]
    sent = sys.modules["gpu_bn.backends.cupy.backend"].from_host(array)
    assert sent.strides == array.strides
    assert same_bits(sent.get(), np.array(array))


# -------------------------------------------------------------------------------------------------------- many channels
@pytest.mark.parametrize("backward", [False, True])
def test_channels_are_counted_in_64_bits_or_refused(backward, make_gpu):
    """The geometry of a kernel and its partial sums hold 2**31 channels; larger numbers are refused."""
    make_gpu(80)
    geometry = sys.modules["gpu_bn.backends.cupy.builder"].geometry
    work = Work(1, 1 << 31, 1, 2, backward=backward, reads=1 + backward)
    plan = plan_once(work, DEVICES["h100"])
    numbers = [int(number) for number in geometry(plan)]
    assert numbers[0] == 1 << 31
    assert numbers[1] * plan.tiling.vector == 1 << 31
    assert numbers[4] * numbers[3] * plan.tiling.vector >= 1 << 31
    assert plan.partials >= 2 * plan.tiling.c  # an int here, 64 bits in the kernels
    with pytest.raises(ValueError, match=r"less than 2\*\*31 blocks, got 2147483648"):
        geometry(plan_once(replace(work, s=2), DEVICES["h100"]))
    with pytest.raises(ValueError, match=r"less than 2\*\*32 channels in all groups, got 4294967296"):
        geometry(plan_once(replace(work, n=2, groups=2), DEVICES["h100"]), 2)
