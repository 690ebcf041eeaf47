"""``gpu_bn.explain``: its report on a call, and the arguments that it refuses."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_bn
from gpu_bn import explanation, plan

SHAPE = (32, 64, 56, 56)


def test_the_text_says_what_was_chosen_and_why():
    text = str(gpu_bn.explain(SHAPE, "f16", activation="relu", device="a100"))
    shared = str(gpu_bn.explain((32, 256, 56, 56), "f16", activation="relu", device="a100"))
    assert text.startswith(
        "batch norm + relu of 32x64x56x56 float16 nchw, training, on A100 (sm_80, 108 SMs, 1555 GB/s"
    )
    forward, _ = text.partition("\nforward\n")[2].split("\nbackward\n")
    for said in (
        r"tier +split\n",
        r"why +two passes serve every size\n",
        r"launches +2\n",
        r"grid +320 blocks of 256 threads\n",
        r"strips +64 of one channel, each on 5 blocks\n",
        r"vectors +8 elements, 16 bytes\n",
        r"shared memory +none for tensors\n",
        r"bytes +25.69 MB moved; the floor is 25.69 MB\n",
        r"time \(model\) +25.37 us; the floor is 21.27 us: 84% of the floor's speed\n",
        r"parts of it +launches 5 us, memory 18.77 us, merge 1.6 us\n",
        r"not cta +a strip needs 200704 bytes of shared memory, a block has 159216\n",
        r"not cluster +clusters need sm_90\n",
        r"not cooperative +the second read of the split tier hits the L2 cache\n",
    ):
        assert re.search(said, forward), said
    for said in (
        r"tier +cooperative\n",
        r"strips +256 of one channel, each on 3 blocks, 72 at a time\n",
        r"parts of it +launches 2.5 us, memory 75.1 us, exchange 24 us\n",
        r"shared memory +\d+ bytes per block\n",
        r"not split +this would take 2 launches and 1.\d\d times as long \(model\)\n",
    ):
        assert re.search(said, shared), said
    assert text.endswith(
        "Times are a model, not measured: launches, bytes over the bandwidth of a copy, idle SMs, exchange of sums."
    )


def test_the_parts_are_those_of_the_plan():
    found = gpu_bn.explain(SHAPE, "float32", "nhwc", "t4")
    for direction in (found.forward, found.backward):
        assert direction.plan == plan.plan(direction.work, plan.DEVICES["t4"])
        assert set(direction.others) == set(plan.TIERS) - {direction.tier}
        assert direction.efficiency == direction.plan.floor_seconds / direction.plan.seconds
    assert found.forward.efficiency < 1
    assert f"{found.forward.efficiency:.0%} of the floor's speed" in str(found)


@pytest.mark.parametrize(
    ("activation", "residual", "shape", "forward", "backward"),
    [
        (None, False, SHAPE, (1, 1, False), (2, 1, False)),
        ("relu", False, SHAPE, (1, 1, False), (2, 1, False)),
        (None, True, SHAPE, (2, 1, False), (2, 2, False)),
        ("relu", True, SHAPE, (2, 1, True), (2, 2, True)),
        ("silu", True, SHAPE, (2, 1, False), (3, 2, False)),
        ("relu", True, (32, 64, 7, 7), (2, 1, False), (3, 2, False)),
    ],
)
def test_tensors_that_are_read_and_written(activation, residual, shape, forward, backward):
    found = gpu_bn.explain(shape, "f16", activation=activation, residual=residual)
    for direction, expected in ((found.forward, forward), (found.backward, backward)):
        work = direction.work
        assert (work.reads, work.writes, work.sign_bits) == expected


def test_evaluation_is_one_pass():
    found = gpu_bn.explain(SHAPE, training=False)
    for direction in (found.forward, found.backward):
        assert (direction.tier, direction.plan.launches) == ("one pass", 1)
        assert direction.moved_bytes == direction.floor_bytes
        assert direction.plan.seconds == pytest.approx(direction.plan.floor_seconds + direction.plan.times.idle)
    assert "the statistics are given" in str(found)
    assert "not cta" not in str(found)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_array_brings_its_dtype_and_memory_order(dtype):
    x = np.zeros((4, 6, 5, 7), dtype)
    last = np.zeros((4, 5, 7, 6), dtype).transpose(0, 3, 1, 2)
    assert str(gpu_bn.explain(x)) == str(gpu_bn.explain(x.shape, dtype))
    assert str(gpu_bn.explain(last)) == str(gpu_bn.explain(x.shape, dtype, "nhwc"))
    assert str(gpu_bn.explain(last, "f32", "nchw")) == str(gpu_bn.explain(x.shape, "f32", "nhwc"))


def test_a_tensor_brings_its_memory_order():
    torch = pytest.importorskip("torch")
    x = torch.zeros(4, 6, 5, 7, dtype=torch.bfloat16)
    assert str(gpu_bn.explain(x)) == str(gpu_bn.explain((4, 6, 5, 7), "bf16"))
    last = x.to(memory_format=torch.channels_last)
    assert str(gpu_bn.explain(last)) == str(gpu_bn.explain((4, 6, 5, 7), "bf16", "nhwc"))
    assert str(gpu_bn.explain(torch.zeros(4, 6, 1, 1))) == str(gpu_bn.explain((4, 6, 1, 1)))


def test_an_array_without_strides_has_the_layout_that_is_given():
    torch = pytest.importorskip("torch")
    x = SimpleNamespace(shape=(4, 6, 5, 7), dtype=np.dtype(np.float16))
    assert str(gpu_bn.explain(x, layout="nhwc")) == str(gpu_bn.explain((4, 6, 5, 7), "f16", "nhwc"))
    assert str(gpu_bn.explain((4, 6), torch.bfloat16, "nc")) == str(gpu_bn.explain((4, 6), "bfloat16"))


@pytest.mark.parametrize("dtype", ["f16", "float16", np.float16, np.dtype("float16")])
def test_dtypes_by_any_name(dtype):
    assert gpu_bn.explain((8, 8), dtype).forward.work.itemsize == 2


def test_a_device_of_ones_own():
    device = replace(plan.DEVICES["h100"], name="half an H100", sms=66)
    found = gpu_bn.explain(SHAPE, device=device)
    assert found.device is device
    assert "on half an H100 (sm_90, 66 SMs" in str(found)
    assert gpu_bn.explain(SHAPE, device="H100").device is plan.DEVICES["h100"]


@pytest.mark.parametrize("device", plan.DEVICES.values(), ids=lambda device: device.name)
def test_a_device_has_the_name_that_is_printed(device):
    assert gpu_bn.explain(SHAPE, device=device.name).device is device
    assert gpu_bn.explain((np.int64(8), 8), device=device.name.lower()).device is device


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (1e-3, "1 ms"), (18.77e-6, "18.77 us"), (9.12e-7, "912 ns"), (0.0, "0 ns")]
)
def test_times_have_a_unit_that_fits(seconds, text):
    assert explanation._time(seconds) == text


def test_narrow_vectors_are_explained():
    assert "4 elements, 8 bytes (a row is no multiple of 16 bytes)" in str(gpu_bn.explain((5, 3, 14, 14), "f16"))
    assert "8 elements, 16 bytes (rows may begin and end within a vector)" in str(gpu_bn.explain((32, 64, 7, 7), "f16"))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((7,), TypeError, "expected an array, or a shape such as"),
        (("32x64",), TypeError, "expected an array, or a shape such as"),
        (((2.5, 8),), TypeError, r"expected an array, or a shape such as .*, got \(2.5, 8\)"),
        (((8,),), ValueError, "2 to 5 axes, got 1"),
        (((8, 0),), ValueError, r"no empty axis, got \(8, 0\)"),
        (((8, 8), "int8"), TypeError, "one of float16, bfloat16, float32, float64, got 'int8'"),
        (((8, 8), np.int32), TypeError, "one of float16"),
        (((8, 8), "f16", "hwc"), ValueError, "unknown layout 'hwc', expected one of nchw, nhwc, nc"),
        (((8, 8, 8), "f16", "nc"), ValueError, "layout 'nc' needs a shape of 2 axes, got 3"),
        (((8, 8), "f16", "nc", "h900"), ValueError, "unknown device 'h900'.* one of t4, a100, 4090, h100, b200"),
        (((8, 8), "f16", "nc", 9), ValueError, "unknown device 9"),
    ],
)
def test_what_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        gpu_bn.explain(*arguments)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'maxout'"):
        gpu_bn.explain((8, 8), activation="maxout")


def test_a_shape_needs_no_framework():
    code = (
        "import sys, gpu_bn; str(gpu_bn.explain((8, 8), 'bf16')); "
        "found = {'torch', 'cupy', 'triton', 'ml_dtypes'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
