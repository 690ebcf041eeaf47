"""Prepared calls of the CuPy backend: each call gets its own results, and nothing from another signature."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from emulator import Checks, Device
from support import rng, same_bits
from support.cupy_on_emulator import misaligned_copy

import gpu_bn
from gpu_bn.backends.protocol import BackendUnavailableError, Saved
from gpu_bn.plan import NoPlanError

pytestmark = pytest.mark.compile
SHAPE = (4, 4, 4, 8)
TENSORS = ("x", "residual", "dy")


def numbers(seed=0, shape=SHAPE):
    """Return the arguments of a call as NumPy arrays, by name."""
    draw = rng(seed)
    vectors = {name: draw.uniform(0.5, 2, shape[1]) for name in ("running_mean", "running_var", "weight", "bias")}
    tensors = {name: draw.normal(1, 2, shape) for name in TENSORS}
    return {name: array.astype(np.float32) for name, array in (tensors | vectors).items()}


def to_gpu(gpu, arrays):
    return {name: gpu.asarray(array) for name, array in arrays.items()}


def run_call(backend, dy, **call):
    """Return all results of a forward and a backward call, by name."""
    call = {"training": True, "activation": "relu"} | call
    y, saved = gpu_bn.batch_norm_forward(**call, backend=backend)
    grads = gpu_bn.batch_norm_backward(dy, saved, backend=backend)
    found = {"y": y, "mean": saved.mean, "rstd": saved.rstd, "saved weight": saved.weight, "saved bias": saved.bias}
    found |= grads._asdict() | {name: call[name] for name in ("running_mean", "running_var")}
    return {name: np.array(array) for name, array in found.items() if array is not None}


def channels_last(gpu, array):
    copy = gpu.asarray(np.ascontiguousarray(np.moveaxis(np.array(array), 1, -1)))
    return copy.transpose(0, 3, 1, 2)


def with_gaps(gpu, vector):
    """Return a copy with gaps between the elements: a column of a table."""
    return gpu.asarray(np.stack([np.array(vector)] * 2, axis=1))[:, 1]


def half(gpu, vector):
    return gpu.asarray(np.array(vector).astype(np.float16))


def shorter(gpu, length):
    return gpu.asarray((np.arange(8) < length).reshape(1, 1, 1, 8))


def changing(name, change):
    """Return a function that makes a changed copy of an argument of the call."""
    return lambda gpu, call: {name: change(gpu, call[name])}


VECTORS = ("running_mean", "running_var", "weight", "bias")
CHANGES = {
    **{f"{name} moved": changing(name, misaligned_copy) for name in TENSORS},
    **{f"{name} channels-last": changing(name, channels_last) for name in TENSORS},
    **{f"{name} strided": changing(name, with_gaps) for name in VECTORS},
    **{f"{name} of another dtype": changing(name, half) for name in VECTORS},
    **{f"no {name}": {name: None} for name in ("residual", "weight", "bias")},
    "another eps": {"eps": 0.5},
    "another momentum": {"momentum": 0.5},
    "momentum on the device": lambda gpu, _: {"momentum": gpu.asarray(np.array(0.25))},
    "another activation": {"activation": "relu6"},
    "a parameter": {"activation": gpu_bn.leaky_relu()},
    "another parameter": {"activation": gpu_bn.leaky_relu(0.5)},
    "no activation": {"activation": None},
    "another channel axis": {"channel_axis": 2},
    "evaluation": {"training": False},
    "a mask": lambda gpu, _: {"mask": shorter(gpu, 5)},
    "another mask": lambda gpu, _: {"mask": shorter(gpu, 3)},
    "ghost batches": {"virtual_batch_size": 2},
    "renormalisation": {"renorm": (1.1, 0.1)},
    "out": lambda gpu, _: {"out": gpu.empty(SHAPE, np.float32)},
    "out moved": lambda gpu, call: {"out": misaligned_copy(gpu, call["x"])},
}


def changed_call(gpu, arrays, change):
    call = to_gpu(gpu, arrays)
    return call | (change if isinstance(change, dict) else change(gpu, call))


def run_with_numpy(call):
    return run_call("numpy", **{name: np.array(it) if isinstance(it, np.ndarray) else it for name, it in call.items()})


def test_a_call_gets_nothing_that_another_left(make_gpu):
    """Calls with and without a change alternate; each gives the bits of a backend that has seen no other call."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False)))
    arrays = numbers()
    want = run_call(gpu.backend, **to_gpu(gpu, arrays))
    for name, change in CHANGES.items():
        right = run_with_numpy(changed_call(gpu, arrays, change))
        alone = run_call(type(gpu.backend)(), **changed_call(gpu, arrays, change))
        got = run_call(gpu.backend, **changed_call(gpu, arrays, change))
        assert same_bits(got, alone), name
        for what, array in right.items():
            np.testing.assert_allclose(got[what], array, rtol=1e-3, atol=1e-3, err_msg=f"{name}: {what}")
        assert same_bits(run_call(gpu.backend, **to_gpu(gpu, arrays)), want), f"after {name}"
    assert gpu.backend._forward.cache_info().hits >= len(CHANGES)
    assert gpu.backend._backward.cache_info().hits >= len(CHANGES)


@pytest.mark.parametrize(
    "options", [{}, {"training": False}, {"activation": "silu"}, {"virtual_batch_size": 2}], ids=str
)
def test_calls_of_one_signature_have_their_own_numbers(options, make_gpu):
    """Arrays, momentum and eps are not part of a signature."""
    gpu = make_gpu(80)
    for seed in range(3):
        call = options | {"momentum": 0.2 * seed, "eps": 10.0**-seed}
        want = run_call(type(gpu.backend)(), **to_gpu(gpu, numbers(seed)), **call)
        assert same_bits(run_call(gpu.backend, **to_gpu(gpu, numbers(seed)), **call), want)
    assert gpu.backend._forward.cache_info().misses == 1
    assert gpu.backend._backward.cache_info().misses == 1


def test_a_tier_forced_later_is_taken(make_gpu):
    gpu = make_gpu(80)
    for tier, launches in ((None, 1), ("split", 2), ("cta", 1), ("split", 2), (None, 1)):
        gpu.backend.tier = tier
        gpu.launched.clear()
        gpu_bn.batch_norm(gpu.asarray(numbers()["x"]), training=True, backend=gpu.backend)
        assert len(gpu.launched) == launches


def test_each_device_has_its_own(make_gpu):
    gpu = make_gpu(80)
    here = gpu.asarray(numbers()["x"])
    with gpu.entering(1):
        there = gpu.asarray(numbers()["x"])
    for device, x in enumerate((here, there)):
        for _ in range(2):
            gpu.launched_on.clear()
            y = gpu_bn.batch_norm(x, training=True, backend=gpu.backend)
            assert gpu.launched_on == {y.device.id} == {device}
    assert gpu.backend._forward.cache_info().misses == 2


def test_a_refused_call_is_refused_again_and_changes_nothing(make_gpu):
    gpu = make_gpu(80, "cluster")  # clusters need sm_90
    call = to_gpu(gpu, numbers())
    del call["dy"]
    before = {name: array.tobytes() for name, array in call.items()}
    for _ in range(2):
        with pytest.raises(NoPlanError, match="clusters need sm_90"):
            gpu_bn.batch_norm(**call, training=True, backend=gpu.backend)
    gpu.backend.tier = None
    gpu.edit_source = lambda source: source.replace("block_sum", "block_sun", 1)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="could not be compiled"):
            gpu_bn.batch_norm(**call, training=True, backend=gpu.backend)
    gpu.edit_source = lambda source: source
    assert {name: array.tobytes() for name, array in call.items()} == before
    assert not gpu.launched
    gpu_bn.batch_norm(**call, training=True, backend=gpu.backend)
    assert gpu.launched


def test_a_compiler_that_fails_says_why_and_what_may_help(make_gpu):
    """The error has the log of NVRTC and names remedies."""
    gpu = make_gpu(80)
    gpu.edit_source = lambda source: source.replace("block_sum", "block_sun", 1)
    with pytest.raises(BackendUnavailableError) as caught:
        gpu_bn.batch_norm(gpu.asarray(numbers()["x"]), training=True, backend=gpu.backend)
    text = str(caught.value)
    for said in ('identifier "block_sum" is undefined', "pip install -e '.[cupy]'", "update CuPy", "NVIDIA driver"):
        assert said in text


def test_a_split_call_compiles_everything_before_it_launches(make_gpu):
    gpu = make_gpu(80, "split")
    call = to_gpu(gpu, numbers())
    gpu.edit_source = lambda source: source.replace("bn_normalize_kernel", "bn_normalise_kernel")
    with pytest.raises(BackendUnavailableError, match="bn_normalize_kernel"):
        gpu_bn.batch_norm(call["x"], call["running_mean"], call["running_var"], training=True, backend=gpu.backend)
    assert not gpu.launched


def test_what_is_prepared_is_bounded_and_can_be_prepared_again(make_gpu, monkeypatch):
    gpu = make_gpu(80)
    monkeypatch.setattr(sys.modules["gpu_bn.backends.cupy.backend"], "PREPARED", 3)
    backend = type(gpu.backend)()
    shapes = [(4, channels, 8) for channels in range(1, 7)]
    for _ in range(2):
        for shape in shapes:
            x = rng().normal(0, 1, shape).astype(np.float32)
            y, saved = gpu_bn.batch_norm_forward(gpu.asarray(x), training=True, backend=backend)
            np.testing.assert_allclose(y, gpu_bn.batch_norm(x, training=True), atol=1e-5)
            gpu_bn.batch_norm_backward(y, saved, backend=backend)
    for prepared in (backend._forward, backend._backward):
        assert prepared.cache_info().currsize == 3
        assert prepared.cache_info().misses == 2 * len(shapes)


def test_no_array_is_kept(make_gpu):
    gpu = make_gpu(80)
    call = to_gpu(gpu, numbers())
    run_call(gpu.backend, **call, momentum=gpu.asarray(np.array(0.5)))
    del call
    gpu.device.memory.begin()  # the emulator frees the arguments of the last launch
    assert [ref().shape for ref in gpu.allocated if ref() is not None] == []


def test_what_is_saved_is_seen_only_when_asked_for(make_gpu):
    gpu = make_gpu(80)
    call = to_gpu(gpu, numbers())
    dy = call.pop("dy")
    _, saved = gpu_bn.batch_norm_forward(**call, training=True, backend=gpu.backend)
    want = gpu_bn.batch_norm_backward(dy, saved, backend=gpu.backend)
    for name in ("moments", "weight", "bias"):
        with pytest.raises(AttributeError):
            getattr(Saved, name).__get__(saved)  # the slot is empty until then
    assert np.array_equal(saved.weight, call["weight"])
    assert np.array_equal(saved.bias, call["bias"])
    assert saved.weight is saved.weight
    with pytest.raises(AttributeError, match="has no attribute 'weights'"):
        saved.weights  # noqa: B018
    doubled = replace(saved, weight=saved.weight * 2)
    assert doubled.rows is None
    got = gpu_bn.batch_norm_backward(dy, doubled, backend=gpu.backend)
    np.testing.assert_allclose(got.dx, 2 * np.array(want.dx), rtol=1e-5, atol=1e-6)
    assert np.array_equal(got.dbias, want.dbias)


def signature(x, groups=1):
    """Return the signature of a call for statistics without a mask."""
    return sys.modules["gpu_bn.backends.cupy.signatures"].Signature(None, x, 1, "identity", groups, None, False)


def test_more_blocks_than_a_launch_may_have_are_refused(make_gpu):
    """CuPy would truncate the number to 32 bits."""
    gpu = make_gpu(80)
    shape, itemsize = (1 << 21, 1 << 11, 2), 2
    strides = (itemsize << 12, itemsize << 1, itemsize)
    with pytest.raises(ValueError, match="launches of less than 2\\*\\*31 blocks, got 4294967296"):
        gpu.backend._stats(signature((0, shape, np.dtype(np.float16), strides, 0), groups=1 << 21))


def test_rows_longer_than_the_kernels_can_count_are_refused(make_gpu):
    """More than 2**32 vectors in a row are refused; the odd length makes vectors of one element."""
    gpu = make_gpu(80)
    shape, itemsize = (1, 1, (1 << 32) + 1), 2
    strides = (itemsize * shape[2], itemsize * shape[2], itemsize)
    x = (0, shape, np.dtype(np.float16), strides, 0)
    with pytest.raises(ValueError, match="less than 2\\*\\*32 vectors, got 4294967297 vectors of 1 elements"):
        gpu.backend._stats(signature(x))
    builder = sys.modules["gpu_bn.backends.cupy.builder"].TensorBuilder(signature(x))
    assert builder.plan_once().tiling.vector == 1
