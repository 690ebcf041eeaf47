"""The bytes that the CUDA kernels move, compared with the plan: exact for tensors, bounded for the rest."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
from emulator import Checks, Device

from gpu_bn import batch_norm, batch_norm_backward, batch_norm_forward, explain

pytestmark = pytest.mark.compile
ROWS, COLUMNS = (4, 4, 1024), (1024, 32)
"""Tensors of 64 KiB: channels of 1,024 vectors in float32, and a strip of 1,024 positions in float16."""
L2 = 32 << 10
"""The bytes of the L2 cache of the emulated GPU: half a tensor."""
CALLS = [
    (80, "cta", ROWS, "float32"), (80, "cta", COLUMNS, "float16"),
    (90, "cluster", ROWS, "float32"), (90, "cluster", COLUMNS, "float16"),
    (80, "cooperative", ROWS, "float32"), (90, "cooperative", COLUMNS, "float16"),
    (80, "split", ROWS, "float32"), (80, "split", COLUMNS, "float16"),
]  # fmt: skip
ARGUMENTS = {
    "stats": ("x",),
    "normalize": ("x", "y", "residual", "mask"),
    "forward": ("x", "y", "residual", "mask"),
    "backward": ("x", "dy", "residual", "mask", "dx", "dresidual"),
}
"""The first arguments of a kernel, by the word after ``bn_`` in its name."""
SAMPLES = 8
"""The number of vectors that each lane of a block reads before the sweep to choose the shift."""


class Call:
    """The traffic of a forward or backward call: bytes of each tensor, of all else, and of device memory."""

    def __init__(self, gpu, plans, run):
        device = gpu.device
        device.l2.flush()
        before, launched = len(device.reports), len(gpu.launched)
        plans.clear()
        self.result = run()
        self.reports = device.reports[before:]
        (self.plan,) = plans
        self.loads, self.stores, self.other = Counter(), Counter(), 0
        for report, name in zip(self.reports, gpu.launched[launched:], strict=True):
            kind = next(kind for kind in ARGUMENTS if f"bn_{kind}" in name)
            for position, tensor in enumerate(ARGUMENTS[kind]):
                for count, way in ((self.loads, "load"), (self.stores, "store")):
                    traffic = report.buffer(f"arg{position}", way)
                    count[tensor] += traffic.bytes
                    whole = tensor == "mask" or (tensor == "x" and way == "load")  # samples are single vectors
                    assert whole or traffic.units * 32 == traffic.bytes, f"{tensor}: sectors in part"
            self.other += report.total("global", "load").bytes + report.total("global", "store").bytes
        self.other -= self.loads.total() + self.stores.total()
        self.dram_reads = sum(report.dram_read_bytes for report in self.reports)
        self.dram_writes = sum(report.dram_write_bytes for report in self.reports) + device.l2.flush()

    @property
    def dram(self) -> int:
        return self.dram_reads + self.dram_writes

    @property
    def samples(self) -> int:
        """The bytes of x that all blocks read before the sweep."""
        tiling = self.plan.tiling
        first = 16 if tiling.columns else 16 // tiling.vector
        return (SAMPLES * 16 + first) * tiling.strips * self.plan.blocks * tiling.lanes

    @property
    def small(self) -> int:
        """A bound on the bytes requested besides the tensors: each block reads its channels' entries of 12 vectors, and
        two doubles for each thread, or three for each block of the strip."""
        tiling, blocks = self.plan.tiling, self.plan.blocks
        width = tiling.channels_per_strip
        sums = max(256 * 16, 24 * width * blocks)
        return len(self.reports) * tiling.strips * blocks * (12 * 8 * width + sums)

    @property
    def small_dram(self) -> int:
        """A bound on the bytes of device memory besides the tensors: 12 vectors, partial sums, written and read, and
        samples that are evicted from the cache, all in full sectors."""
        channels = self.plan.tiling.strips * self.plan.tiling.channels_per_strip
        vectors = 12 * (8 * channels + 64)
        return vectors + 2 * (8 * self.plan.partials + 64) + 2 * self.samples


@pytest.fixture
def measured(make_gpu, monkeypatch):
    """Return a function that runs a forward and a backward call with ReLU and returns both as ``Call``."""

    def measure(arch, tier, shape, dtype, residual=False, resident_threads=16384):
        checks = Checks(races=False, initialised=False)
        gpu = make_gpu(arch, tier, Device(checks=checks, l2_bytes=L2, resident_threads=resident_threads))
        builder, plans = sys.modules["gpu_bn.backends.cupy.builder"], []
        choose = builder.plan
        monkeypatch.setattr(builder, "plan", lambda *work: plans.append(choose(*work)) or plans[-1])
        rng = np.random.default_rng(0)
        x, dy, added = (gpu.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(3))
        vectors = [gpu.asarray(rng.uniform(1, 2, shape[1]).astype(np.float32)) for _ in range(4)]
        forward = Call(
            gpu, plans,
            lambda: batch_norm_forward(
                x, *vectors, True, activation="relu", residual=added if residual else None, backend=gpu.backend
            ),
        )  # fmt: skip
        y, saved = forward.result
        backward = Call(gpu, plans, lambda: batch_norm_backward(dy, saved, backend=gpu.backend))
        for output in (y, backward.result.dx, *([backward.result.dresidual] if residual else [])):
            assert np.isfinite(np.array(output, np.float32)).all()  # unwritten memory is NaN
        return forward, backward

    return measure


def require_tensor_bytes(call, loads, stores, samples):
    """Require the exact bytes of each tensor, in sum those of the plan, and little other traffic."""
    assert +call.loads == Counter(loads) + Counter({"x": samples})
    assert +call.stores == Counter(stores)
    again = 0 if call.plan.tier == "split" else loads.get("mask", 0) // 2  # the plan counts device memory
    assert sum(loads.values()) - again == sum(call.plan.read_bytes)
    assert sum(stores.values()) == sum(call.plan.written_bytes)
    assert call.other <= call.small + polls(call)


def polls(call) -> int:
    """Return the bytes that blocks load while they wait for other blocks."""
    return 4 * sum(
        count
        for report in call.reports
        for _, text, count, traffic in report.lines()
        if "ld.acquire" in text and traffic
    )


@pytest.mark.parametrize(
    ("arch", "tier", "shape", "dtype", "residual"),
    [
        pytest.param(*call, residual, marks=[] if residual == index % 2 else pytest.mark.exhaustive)
        for index, call in enumerate(CALLS)
        for residual in (False, True)
    ],
)
@pytest.mark.one_in(3)
def test_each_tensor_is_read_and_written_as_planned(arch, tier, shape, dtype, residual, measured):
    forward, backward = measured(arch, tier, shape, dtype, residual)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    mask = size // 16 if residual else 0
    again = 2 if tier == "split" else 1
    assert (forward.plan.tier, backward.plan.tier) == (tier, tier)
    assert (len(forward.reports), len(backward.reports)) == (again, again)
    require_tensor_bytes(
        forward,
        {"x": again * size} | ({"residual": size} if residual else {}),
        {"y": size} | ({"mask": mask} if residual else {}),
        forward.samples,
    )
    require_tensor_bytes(
        backward,
        {"x": again * size, "dy": again * size} | ({"mask": 2 * mask} if residual else {}),
        {"dx": size} | ({"dresidual": size} if residual else {}),
        0,
    )
    if tier != "split":
        tensors = (3, 4) if residual else (2, 3)
        for call, count in zip((forward, backward), tensors, strict=True):
            assert call.plan.dram_bytes == count * size + mask
            masked = mask if call is backward else 0  # read twice, in the worst case from memory
            assert 0 <= call.dram - call.plan.dram_bytes <= call.small_dram + masked


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_the_second_pass_starts_with_what_the_first_left(residual, measured):
    """The second pass finds about as many bytes in the cache as the plan expects; one block runs at a time."""
    for call in measured(80, "split", ROWS, "float32", residual, resident_threads=256):
        asked = sum(call.plan.read_bytes) + sum(call.plan.written_bytes)
        assert asked - call.plan.dram_bytes == L2 // 2
        assert abs(call.dram - call.plan.dram_bytes) <= L2 // 8


@pytest.mark.parametrize(("shape", "dtype", "layout"), [(ROWS, "float32", "nchw"), (COLUMNS, "float16", "nc")], ids=str)
def test_evaluation_moves_what_is_explained(shape, dtype, layout, make_gpu):
    """A mask is written only where a backward call may read it."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False, initialised=False), l2_bytes=L2))
    rng = np.random.default_rng(0)
    x, dy, added = (gpu.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(3))
    vectors = [gpu.asarray(rng.uniform(1, 2, shape[1]).astype(np.float32)) for _ in range(4)]
    options = {"activation": "relu", "residual": added, "backend": gpu.backend}

    def moved(call):
        before = len(gpu.device.reports)
        result = call()
        (report,) = gpu.device.reports[before:]
        kind = next(kind for kind in ARGUMENTS if f"bn_{kind}" in gpu.launched[-1])
        buffers = [report.buffer(f"arg{at}", way) for at in range(len(ARGUMENTS[kind])) for way in ("load", "store")]
        return result, sum(buffer.bytes for buffer in buffers)

    expected = explain(shape, dtype, layout, "a100", activation="relu", residual=True, training=False)
    y, bytes_of_inference = moved(lambda: batch_norm(x, *vectors, **options))
    assert bytes_of_inference == expected.forward.moved_bytes
    (same, saved), bytes_of_forward = moved(lambda: batch_norm_forward(x, *vectors, **options))
    assert bytes_of_forward == bytes_of_inference + saved.mask.nbytes
    assert same.tobytes() == y.tobytes()
    assert moved(lambda: batch_norm_backward(dy, saved, backend=gpu.backend))[1] == expected.backward.moved_bytes
