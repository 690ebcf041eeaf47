"""The CuPy backend: launches, memory, options, errors, on emulated GPUs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import rng
from support.cupy_on_emulator import misaligned_copy

import gpu_bn
from gpu_bn.backends.protocol import BackendUnavailableError

pytestmark = pytest.mark.compile
SHAPE = (4, 6, 5, 8)


def arrays(gpu, dtype=np.float32, shape=SHAPE):
    x = gpu.asarray(rng().normal(1, 2, shape).astype(dtype))
    weight, bias = (gpu.asarray(rng(k).normal(1, 0.3, shape[1]).astype(np.float32)) for k in (1, 2))
    running_mean, running_var = (gpu.asarray(np.full(shape[1], value, np.float32)) for value in (0, 1))
    return x, running_mean, running_var, weight, bias


def test_a_layer_as_the_numpy_layer(make_gpu):
    gpu = make_gpu(80)
    x, dy = (rng(k).normal(0, 1, SHAPE).astype(np.float32) for k in (0, 1))
    layers = [gpu_bn.BatchNorm(6, momentum=None, device=device, activation="silu") for device in ("cpu", "cuda")]
    for _ in range(3):
        outputs = [layer(array) for layer, array in zip(layers, (x, gpu.asarray(x)), strict=True)]
        gradients = [layer.backward(array) for layer, array in zip(layers, (dy, gpu.asarray(dy)), strict=True)]
    for ours, theirs in (outputs, gradients, *zip(*(layer.state_dict().values() for layer in layers), strict=True)):
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=1e-5, atol=1e-6)
    assert type(layers[1].running_mean) is type(gpu.asarray(x))
    layers[0].load_state_dict(layers[1].state_dict())
    layers[1].load_state_dict(layers[0].state_dict())
    assert int(layers[1].num_batches_tracked) == 3


def test_momentum_may_be_on_the_device(make_gpu):
    gpu = make_gpu(80)
    results = []
    for momentum in (0.25, gpu.asarray(np.array(0.25))):
        x, running_mean, running_var, weight, bias = arrays(gpu)
        gpu_bn.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, backend=gpu.backend)
        results.append(np.array([running_mean, running_var]))
    assert results[0].tobytes() == results[1].tobytes()
    assert np.abs(results[0][0]).min() > 0


def test_parameters_saved_for_backward_are_copies(make_gpu):
    gpu = make_gpu(80)
    x, _, _, weight, bias = arrays(gpu)
    _, saved = gpu_bn.batch_norm_forward(x, None, None, weight, bias, True, activation="relu", backend=gpu.backend)
    want = gpu_bn.batch_norm_backward(x, saved, backend=gpu.backend)
    weight[...], bias[...] = 0, 100
    for got, expected in zip(gpu_bn.batch_norm_backward(x, saved, backend=gpu.backend)[:3], want[:3], strict=True):
        assert got.tobytes() == expected.tobytes()


def test_a_mask_takes_the_place_of_the_residual(make_gpu):
    gpu = make_gpu(80)
    x, *_ = arrays(gpu)
    for activation, has_mask in (("relu", True), ("leaky_relu", True), ("silu", False), (None, False)):
        _, saved = gpu_bn.batch_norm_forward(x, training=True, residual=x, activation=activation, backend=gpu.backend)
        assert (saved.mask is not None) == has_mask
        assert (saved.residual is None) == (activation != "silu")
    assert saved.has_residual


def test_a_mask_serves_a_gradient_of_any_alignment(make_gpu):
    gpu = make_gpu(80)
    x, *_ = arrays(gpu)
    _, saved = gpu_bn.batch_norm_forward(x, training=True, residual=x, activation="relu", backend=gpu.backend)
    dy = rng(5).normal(0, 1, SHAPE).astype(np.float32)
    want = gpu_bn.batch_norm_backward(gpu.asarray(dy), saved, backend=gpu.backend)
    got = gpu_bn.batch_norm_backward(misaligned_copy(gpu, dy), saved, backend=gpu.backend)
    assert got.dx.tobytes() == want.dx.tobytes()
    assert got.dresidual.tobytes() == want.dresidual.tobytes()


@pytest.mark.parametrize("need", [{"dx"}, {"dweight"}, {"dbias"}, {"dx", "dbias"}, {"dresidual"}], ids=sorted)
@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_needed(need, training, make_gpu):
    gpu = make_gpu(80)
    x, running_mean, running_var, weight, bias = arrays(gpu)
    call = {"training": training, "residual": x, "activation": "relu", "backend": gpu.backend}
    _, saved = gpu_bn.batch_norm_forward(x, running_mean, running_var, weight, bias, **call)
    everything = gpu_bn.batch_norm_backward(x, saved, backend=gpu.backend)
    gpu.launched.clear()
    some = gpu_bn.batch_norm_backward(x, saved, backend=gpu.backend, need=need)
    assert len(gpu.launched) == 1
    for name, gradient in some._asdict().items():
        assert (gradient is not None) == (name in need)
        if gradient is not None:
            np.testing.assert_allclose(gradient, getattr(everything, name), rtol=1e-6, atol=1e-7)


def test_out(make_gpu):
    gpu = make_gpu(80)
    x, *_ = arrays(gpu)
    want = gpu_bn.batch_norm(x, training=True, backend=gpu.backend)
    strided = gpu.empty((4, 6, 5, 16), np.float32)[..., ::2]
    assert gpu_bn.batch_norm(x, training=True, backend=gpu.backend, out=strided) is strided
    assert np.array_equal(strided, want)
    with pytest.raises(ValueError, match="out may not be the input or overlap it"):
        gpu_bn.batch_norm_forward(x, training=True, backend=gpu.backend, out=x)
    assert gpu_bn.batch_norm(x, training=True, backend=gpu.backend, out=x) is x
    assert np.array_equal(x, want)


def test_blocks_that_do_not_fit_together_are_not_launched_together(make_gpu):
    """A cooperative grid with more blocks than the GPU can hold at a time would wait for ever."""
    gpu = make_gpu(80, "cooperative")
    x, *_ = arrays(gpu)
    want = gpu_bn.batch_norm(x, training=True, backend=gpu.backend)
    gpu.resident_blocks = 0
    sys.modules["gpu_bn.backends.cupy.device"].resident_blocks.cache_clear()
    gpu.launched.clear()
    y = gpu_bn.batch_norm(x, training=True, backend=type(gpu.backend)("cooperative"))
    assert len(gpu.launched) == 2
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tier", ["cta", "cooperative"])
def test_a_smaller_tensor_takes_no_shared_memory_from_a_larger_one(tier, make_gpu):
    """Both launch one kernel, whose limit on shared memory must not drop with the smaller tensor."""
    gpu = make_gpu(80, tier)
    sizes = (24 << 10, 16 << 10) if tier == "cta" else (48 << 10, 20 << 10)
    large, small = (gpu.asarray(rng().normal(0, 1, (1, 2, size)).astype(np.float32)) for size in sizes)
    first = gpu_bn.batch_norm(large, training=True, backend=gpu.backend)
    gpu_bn.batch_norm(small, training=True, backend=gpu.backend)
    assert len(set(gpu.launched)) == 1
    assert gpu_bn.batch_norm(large, training=True, backend=gpu.backend).tobytes() == first.tobytes()


def test_counters_are_left_as_they_were_found(make_gpu):
    gpu = make_gpu(80, "split")
    x, *_ = arrays(gpu, shape=(16, 2, 64, 64))
    first = gpu_bn.batch_norm(x, training=True, backend=gpu.backend)
    ((_, counters),) = gpu.backend._counters.values()
    assert not counters.any()
    assert gpu_bn.batch_norm(x, training=True, backend=gpu.backend).tobytes() == first.tobytes()


def test_a_graph_gets_counters_of_its_own(make_gpu):
    gpu = make_gpu(80)
    cupy = sys.modules["cupy"]
    usual = gpu.backend.counters(8)
    assert gpu.backend.counters(8) is usual
    cupy.cuda.get_current_stream().is_capturing = lambda: True
    assert gpu.backend.counters(8) is not usual


def test_threads_whose_default_streams_have_one_name_share_no_counters(make_gpu):
    gpu = make_gpu(80)
    sys.modules["cupy"].cuda.get_current_stream().ptr = 2  # cudaStreamPerThread
    usual = gpu.backend.counters(8)
    assert gpu.backend.counters(8) is usual
    with ThreadPoolExecutor(1) as other:
        assert other.submit(gpu.backend.counters, 8).result() is not usual


def test_an_unknown_dtype_is_refused(make_gpu):
    gpu = make_gpu(80)
    with pytest.raises(TypeError, match="input should be one of float16, bfloat16, float32, float64, got int32"):
        gpu_bn.batch_norm(gpu.asarray(np.ones((4, 3), np.int32)), training=True)


def test_a_failed_compile_shows_the_log(make_gpu):
    gpu = make_gpu(80)
    gpu.edit_source = lambda source: source.replace("block_sum", "block_sun", 1)
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)could not be compiled.*block_sum.*pip install -e '.\[cupy\]'"
    ):
        gpu_bn.batch_norm(arrays(gpu)[0], training=True)


def test_an_old_gpu_is_refused(make_gpu):
    gpu = make_gpu(80)
    properties = sys.modules["cupy"].cuda.runtime.getDeviceProperties(0)
    properties["major"], properties["minor"] = 6, 1
    with pytest.raises(BackendUnavailableError, match=r"is sm_61, the kernels need sm_70 or newer .*NumPy arrays$"):
        gpu_bn.batch_norm(arrays(gpu)[0], training=True)


def test_a_gpu_that_cuda_13_has_left_behind_is_told_of_cuda_12(make_gpu):
    gpu = make_gpu(80)
    properties = sys.modules["cupy"].cuda.runtime.getDeviceProperties(0)
    properties["major"], properties["minor"] = 7, 0
    gpu.nvrtc = 13, 0
    says = "is sm_70, the kernels need sm_75 or newer with CUDA 13; use NumPy arrays, or cupy-cuda12x in place of this"
    with pytest.raises(BackendUnavailableError, match=says):
        gpu_bn.batch_norm(arrays(gpu)[0], training=True)
    gpu.nvrtc = 12, 9
    assert sys.modules["gpu_bn.backends.cupy.device"].properties(0).arch == 70


def test_no_gpu_no_driver_no_cupy(make_gpu, monkeypatch):
    make_gpu(80)
    runtime = sys.modules["cupy"].cuda.runtime
    runtime.getDeviceCount = lambda: 0
    with pytest.raises(BackendUnavailableError, match="'cupy' cannot be used: CuPy finds no GPU"):
        gpu_bn.BatchNorm(3, device="cuda")

    def no_driver():
        raise RuntimeError("cudaErrorInsufficientDriver")

    runtime.getDeviceCount = no_driver
    with pytest.raises(
        BackendUnavailableError, match=r"no usable CUDA driver .*InsufficientDriver.*update the NVIDIA driver"
    ):
        gpu_bn.BatchNorm(3, device="cuda")
    for module in [name for name in sys.modules if name.startswith("gpu_bn.backends.cupy.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install -e '.\[cupy\]'"):
        gpu_bn.BatchNorm(3, device="cuda")


def test_importing_gpu_bn_does_not_import_cupy():
    code = "import sys, gpu_bn; gpu_bn.BatchNorm(3); sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("tier", [None, "split", "cooperative"])
def test_a_call_runs_where_its_input_is(tier, make_gpu):
    gpu = make_gpu(80, tier)
    here = arrays(gpu)
    with gpu.entering(1):
        there = arrays(gpu)
    gpu.entered.clear()
    results = []
    for device, (x, *vectors) in enumerate((here, there)):
        gpu.launched_on.clear()
        y, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, activation="silu", backend=gpu.backend)
        grads = gpu_bn.batch_norm_backward(x, saved, backend=gpu.backend)
        assert gpu.launched_on == {device}
        results.append((y, saved.mean, grads.dx, grads.dweight, *vectors))
        assert {array.device.id for array in results[-1]} == {device}
        assert gpu.entered == [1, 1] * device  # no device is entered for a call on the current one
        assert gpu.current == 0
    assert all(one.tobytes() == other.tobytes() for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["weight", "running_mean", "residual", "out", "mask"])
def test_arrays_on_several_gpus_are_refused(name, make_gpu):
    gpu = make_gpu(80)
    x, running_mean, running_var, weight, bias = arrays(gpu)
    call = {"x": x, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    call |= {"residual": gpu.asarray(np.asarray(x)), "out": gpu.asarray(np.asarray(x))}
    call |= {"mask": gpu.asarray(np.ones((x.shape[0], 1, *x.shape[2:]), bool))}
    gpu_bn.batch_norm(**call, training=True, backend=gpu.backend)
    with gpu.entering(1):
        call[name] = gpu.asarray(np.asarray(call[name]))
    before = {key: array.tobytes() for key, array in call.items()}
    gpu.launched.clear()
    with pytest.raises(ValueError, match=f"expected all arrays on one GPU, got input on GPU 0, {name} on GPU 1"):
        gpu_bn.batch_norm(**call, training=True, backend=gpu.backend)
    assert {key: array.tobytes() for key, array in call.items()} == before
    assert not gpu.launched


def test_vectors_of_any_strides(make_gpu):
    """Parameters and running statistics may be columns of a table, or have negative strides."""
    gpu = make_gpu(80)
    x, *_ = arrays(gpu)
    columns = rng(3).uniform(1, 2, (4, 6, 3)).astype(np.float32)
    want = [np.ascontiguousarray(table[:, 1]) for table in columns]
    tables = [gpu.asarray(table) for table in columns]
    for training in (True, False):
        for views in ([table[:, 1] for table in tables], [np.flip(table[::-1, 1]) for table in tables]):
            running = want[:2] if training else [vector.copy() for vector in want[:2]]
            y, saved = gpu_bn.batch_norm_forward(np.asarray(x), *running, *want[2:], training)
            got, ours = gpu_bn.batch_norm_forward(x, *views, training, backend=gpu.backend)
            np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
            grads = gpu_bn.batch_norm_backward(x, ours, backend=gpu.backend)
            for mine, its in zip(grads[:3], gpu_bn.batch_norm_backward(np.asarray(x), saved), strict=False):
                np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-4)
    for table, vector, before in zip(tables, want, columns, strict=True):
        np.testing.assert_allclose(table[:, 1], vector, rtol=1e-5)
        assert np.array_equal(np.asarray(table)[:, ::2], before[:, ::2])


def test_cuda_13_has_the_memory_clock_among_the_attributes(make_gpu):
    gpu = make_gpu(80)
    properties = sys.modules["gpu_bn.backends.cupy.device"].properties
    known = properties(0).bandwidth
    del gpu.properties["memoryClockRate"]
    properties.cache_clear()
    assert properties(0).bandwidth == known == 2e9 * 1024 / 8
