"""Extra memory beyond the outputs has a bound: tracemalloc measures NumPy, the resident set size measures torch."""

import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support import rng, running_pair

import gpu_bn
from gpu_bn.testing.cases import arrange

SHAPES = [(16, 64, 56, 56), (64, 256, 14, 14), (128, 512, 7, 7), (4000, 1000), (2, 8, 512, 512), (16, 128, 1500)]


def extra(call, outputs, x):
    """Return the peak memory of a call beyond its outputs, divided by the bytes of x.

    It is the least of three measurements, because other threads of the process may allocate memory, too.
    """
    call()  # fills caches and starts threads
    return (min(peak(call) for _ in range(3)) - outputs * x.nbytes) / x.nbytes


def peak(call):
    tracemalloc.start()
    try:
        result = call()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result is not None
    return most


def data(shape, dtype=np.float32, layout="contiguous"):
    x = rng().standard_normal(shape, np.float32).astype(dtype)
    return arrange(x, layout, 1)


def every_other(activations):
    """Parametrise by shape, activation and mode: half of all combinations, which hold each pair of values."""
    names = "shape", "activation", "training"
    some = [
        (shape, activation, training)
        for (i, shape), (j, activation), training in product(enumerate(SHAPES), enumerate(activations), (True, False))
        if (i + j + training) % 2
    ]
    return pytest.mark.parametrize(names, some, ids=str)


@every_other(["identity", "relu", "silu"])
@pytest.mark.one_in(4)
def test_forward(shape, activation, training):
    x, running = data(shape), running_pair(shape[1])
    share = extra(lambda: gpu_bn.batch_norm(x, *running, training=training, activation=activation), 1, x)
    assert share <= 0.05


@every_other(["identity", "relu", "silu"])
@pytest.mark.one_in(4)
def test_backward(shape, activation, training):
    x, dy = data(shape), data(shape)
    weight, bias = np.ones((2, shape[1]), np.float32)
    _, saved = gpu_bn.batch_norm_forward(x, *running_pair(shape[1]), weight, bias, training, activation=activation)
    assert extra(lambda: gpu_bn.batch_norm_backward(dy, saved), 1, x) <= 0.05


@pytest.mark.parametrize("layout", ["contiguous", "negative_stride", "sliced_channels", "misaligned"])
@pytest.mark.parametrize("shape", [(8, 3, 512, 512), (16, 128, 1500), (16000, 200)], ids=str)
@pytest.mark.one_in(5)
def test_layouts_whatever_the_channels(shape, layout):
    x, added = data(shape, layout=layout), data(shape)
    y, saved = gpu_bn.batch_norm_forward(x, training=True, residual=added, activation="relu")
    assert extra(lambda: gpu_bn.batch_norm(x, training=True, residual=added, activation="relu"), 1, x) <= 0.05
    assert extra(lambda: gpu_bn.batch_norm_backward(y, saved), 2, x) <= 0.05


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels"])
@pytest.mark.parametrize("shape", [(8, 3, 512, 512), (32, 64, 56, 56)], ids=str)
@pytest.mark.one_in(3)
def test_a_mask_costs_a_byte_for_each_position(shape, layout):
    x = data(shape, layout=layout)
    mask = rng(1).random((shape[0], 1, *shape[2:])) < 0.5
    y, saved = gpu_bn.batch_norm_forward(x, training=True, mask=mask, activation="relu")
    allowed = 0.05 + mask.size / x.nbytes
    assert extra(lambda: gpu_bn.batch_norm(x, training=True, mask=mask, activation="relu"), 1, x) <= allowed
    assert extra(lambda: gpu_bn.batch_norm_backward(y, saved), 1, x) <= allowed


@pytest.mark.parametrize(
    ("layout", "dtype", "residual"),
    [
        ("contiguous", "float16", False), ("contiguous", "float32", True), ("channels_last", "float16", True),
        ("channels_last", "float32", False), ("negative_stride", "float16", True),
        ("sliced_channels", "float16", False), ("sliced_channels", "float32", True),
    ],
)  # fmt: skip
@pytest.mark.one_in(3)
def test_layouts_and_half_precision(layout, dtype, residual):
    x = data((32, 64, 56, 56), dtype, layout)
    added = x if residual else None
    y, saved = gpu_bn.batch_norm_forward(x, training=True, residual=added, activation="relu")
    assert extra(lambda: gpu_bn.batch_norm(x, training=True, residual=added, activation="relu"), 1, x) <= 0.05
    assert extra(lambda: gpu_bn.batch_norm_backward(y, saved), 2 if residual else 1, x) <= 0.05


@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (4000, 1000)], ids=str)
def test_statistics_far_from_zero(shape):
    x = data(shape) + np.float32(100)
    assert extra(lambda: gpu_bn.batch_norm(x, training=True), 1, x) <= 0.05


@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (4000, 1000)], ids=str)
def test_out_needs_no_output(shape):
    x = data(shape)
    out = np.empty_like(x)
    assert extra(lambda: gpu_bn.batch_norm(x, training=True, out=out), 0, x) <= 0.05


@pytest.mark.parametrize("need", ["dweight", "dbias"])
def test_parameter_gradients_alone_need_no_full_size_array(need):
    x = data((16, 64, 56, 56))
    ones = np.ones(64, np.float32)
    _, saved = gpu_bn.batch_norm_forward(x, None, None, ones, ones, True, activation="relu")
    assert extra(lambda: gpu_bn.batch_norm_backward(x, saved, need=need), 0, x) <= 0.05


# ----------------------------------------------------------------- few positions a channel, ghost batches, wide masks
EXTREMES = [
    ((2, 1 << 18), {}),
    ((64, 1 << 16), {}),
    ((64, 1 << 15), {"dtype": "float64"}),
    ((16, 1 << 16), {}),
    ((16, 1 << 12, 15), {}),
    ((4096, 1024), {"virtual_batch_size": 2}),
    ((8, 1, 1 << 19), {"mask": "all but some"}),
    ((8, 16, 1 << 15), {"mask": "all but some"}),
]
BYTES = {"numpy": (64, 24, 16, 0), "cpu": (64, 64, 32, 1), "torch": (64, 64, 32, 1)}
"""Bytes for each channel, forward and backward; for each channel of a ghost batch; whether sums of rows take memory."""


@pytest.mark.parametrize(("shape", "options"), EXTREMES, ids=str)
@pytest.mark.parametrize("library", list(BYTES))
@pytest.mark.one_in(5)
def test_bytes_a_channel_and_a_position(shape, options, library):
    dtype = np.dtype(options.get("dtype", "float32"))
    options = {name: one for name, one in options.items() if name != "dtype"}
    x = rng().standard_normal(shape, dtype)
    positions, channels, groups = 0, shape[1], shape[0] // options.get("virtual_batch_size", shape[0])
    if "mask" in options:
        options = {"mask": rng(1).random((shape[0], 1, *shape[2:])) < 0.9}
        positions = options["mask"].size
    arguments = [x, *running_pair(channels), *np.ones((2, channels), np.float32)]
    engine, measure = {"backend": library}, peak
    if library == "torch":
        torch = pytest.importorskip("torch")
        arguments = [torch.from_numpy(array) for array in arguments]
        options = {name: torch.from_numpy(one) if name == "mask" else one for name, one in options.items()}
        engine, measure = {}, resident
    options = {**options, "activation": "relu", **engine}
    saved = gpu_bn.batch_norm_forward(*arguments, True, **options)[1]
    gpu_bn.batch_norm_backward(arguments[0], saved, **engine)
    forward = measure(lambda: gpu_bn.batch_norm_forward(*arguments, True, **options)) - x.nbytes
    backward = measure(lambda: gpu_bn.batch_norm_backward(arguments[0], saved, **engine)) - x.nbytes
    first, second, each, rows = BYTES[library]
    adjacent = int(np.prod(shape[2:]))
    common = max(0.05 * x.nbytes, 1 << 20) + each * channels * groups
    if rows and adjacent < 16:
        least, most = (104, 560) if dtype == np.float64 else (72, 300)
        common += min(most, max(least, 40 + shape[0] * x.itemsize / 4)) * channels * adjacent
    assert forward <= common + first * channels + positions
    assert backward <= common + second * channels + positions


def resident(call):
    """Return by how many bytes the process grows in a call: tracemalloc does not see the memory of torch."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("the most memory a process has had is read from Linux's /proc")

    def kilobytes(name):
        return int(status.read_text().partition(f"{name}:")[2].split()[0])

    clear.write_text("5")
    before = kilobytes("VmRSS")
    result = call()
    most = kilobytes("VmHWM")
    assert result is not None
    return (most - before) << 10
