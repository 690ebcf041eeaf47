"""Test that each planted fault is reported by the right check, and that the kernels without it are clean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.compile import Compiled
from emulator.snippet import snippet
from support.emulator_faults import SEEDS, first_report, run_grid_barrier
from support.reference_backend import KERNELS, TRITON_SOURCE, compile_reference_triton, forward, load_triton

SHAPE = (3, 4, 104)  # n, c, s: 78 vectors of 4 floats, not a multiple of the threads


def require_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    worst = float(np.abs(got.astype(np.float64) - want).max())
    if not worst <= tolerance:
        raise EmulatorError("wrong result", f"off by {worst:.3g}, tolerance {tolerance:.3g}")


def run_bn(device: Device, compiled: Compiled) -> None:
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    weight, bias = (np.linspace(low, high, SHAPE[1], dtype=np.float32) for low, high in ((1, 2), (-1, 1)))
    wide = x.astype(np.float64)
    rstd = 1 / np.sqrt(wide.var((0, 2), keepdims=True) + 1e-5)
    want = (wide - wide.mean((0, 2), keepdims=True)) * rstd * weight[:, None] + bias[:, None]
    y = device.empty(SHAPE, np.float32)
    forward(device, compiled, x, y, weight, bias, threads=64)
    require_close(y, want, 1e-5)


def run_sums(device: Device, compiled: Compiled) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1024), np.float32)
    out = device.empty(3, np.float32)
    device.launch(compiled.kernel, 3 * compiled.kernel.cluster, 32, [out, x])
    device.require_written(out, "out")
    require_close(out, x.astype(np.float64).sum(1), 1e-4)


@dataclass(frozen=True)
class Planted:
    fault: str
    check: str  # the check that must report it
    source: str
    kernel: str
    run: Callable[[Device, Compiled], None]
    old: str
    new: str
    nth: int = 0

    def text(self) -> str:
        source = (KERNELS / self.source).read_text()
        parts = source.split(self.old)
        assert len(parts) > self.nth + 1, f"{self.source} no longer holds {self.old!r}"
        return self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])


def bn(fault: str, check: str, old: str, new: str, nth: int = 0) -> Planted:
    return Planted(fault, check, "bn_forward_reference.cu", "bn_forward_f32_v4", run_bn, old, new, nth)


def sums(fault: str, check: str, kernel: str, old: str, new: str = "") -> Planted:
    return Planted(fault, check, "row_sums.cu", kernel, run_sums, old, new)


LOOP = "v < vectors; v += blockDim.x"


PLANTED = [
    bn("missing barrier before reading", "data race",
       "  __syncthreads();\n  const int lane", "  const int lane"),
    bn("missing barrier before reuse", "data race", "  __syncthreads();  // partials", "  // partials"),
    bn("out of bounds by one vector, load", "out of bounds", LOOP, "v <= vectors; v += blockDim.x"),
    bn("out of bounds by one vector, store", "out of bounds", "y[place(v)] = out", "y[place(v) + 1] = out"),
    bn("lost tail", "unwritten output", LOOP, "v < vectors / 64 * 64; v += blockDim.x", 2),
    bn("truncated reduction in a warp", "wrong result", "offset = 16; offset;", "offset = 8; offset;"),
    bn("truncated reduction over warps", "wrong result", "lane < blockDim.x >> 5", "lane < blockDim.x >> 6"),
    bn("too long reduction over warps", "uninitialised read",
       "lane < blockDim.x >> 5", "lane <= blockDim.x >> 5"),
    bn("shuffle under a condition", "absent lane", "  for (int offset = 16;",
       "  if ((threadIdx.x & 31) < 16) for (int offset = 16;"),
    bn("barrier under a condition", "deadlock", "  __syncthreads();  // partials",
       "  if (threadIdx.x < 32) __syncthreads(); else asm volatile(\"bar.sync 1;\");  // partials"),
    bn("threads leave before a barrier", "divergent barrier", "  double squares = 0.",
       "  if (threadIdx.x >= 32) return;\n  double squares = 0."),
    bn("lanes store different values to one place", "conflicting stores",
       "if (threadIdx.x == 0) {\n    save_mean[channel] = mean;",
       "if (threadIdx.x < 2) {\n    save_mean[channel] = mean + threadIdx.x;"),
    bn("all blocks store to one place", "data race", "save_mean[channel] = mean", "save_mean[0] = mean"),
    sums("missing wait for a copy", "copy in flight", "row_sums_async",
         'asm volatile("cp.async.wait_group 1;" ::: "memory");'),
    sums("wait that is one short", "copy in flight", "row_sums_async",
         "cp.async.wait_group 1", "cp.async.wait_group 2"),
    sums("missing cluster barrier before reading", "block not started", "row_sums_cluster",
         "cluster_barrier();  // SYNC before reading"),
    sums("relaxed cluster barrier", "data race", "row_sums_cluster", "arrive.release", "arrive.relaxed"),
    sums("missing cluster barrier before leaving", "exited block", "row_sums_cluster",
         "cluster_barrier();  // SYNC before leaving"),
]  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault)
def test_a_planted_fault_is_reported(planted, compile_cuda, caught_faults):
    compiled = compile_cuda(planted.text(), 90)[planted.kernel]
    error = first_report(lambda device: planted.run(device, compiled))
    caught_faults[planted.fault] = str(error)
    assert error.check == planted.check, str(error)


@pytest.mark.compile
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kernels_without_faults_are_clean(seed, compile_cuda):
    for source, name, run in {(p.source, p.kernel, p.run) for p in PLANTED}:
        run(Device(seed=seed), compile_cuda((KERNELS / source).read_text(), 90)[name])


@pytest.mark.compile
@pytest.mark.parametrize(
    ("fault", "check", "old", "new"),
    [
        (None, None, "", ""),
        ("dropped mask of a store", "out of bounds", "element_ty), mask=i < total)", "element_ty))"),
        ("dropped mask of a load", "out of bounds", "place, mask=i < total, other=0.0)", "place)"),
        ("mask that loses the tail", "unwritten output",
         "element_ty), mask=i < total)", "element_ty), mask=i < total - 1)"),
        ("padding counted as data", "wrong result",
         "tl.where(i < total, loaded - mean, 0.0)", "loaded - mean"),
    ],
)  # fmt: skip
def test_a_fault_planted_in_triton_is_reported(fault, check, old, new, compile_triton, tmp_path, caught_faults):
    assert old in TRITON_SOURCE
    changed = tmp_path / "changed_kernel.py"
    changed.write_text(TRITON_SOURCE.replace(old, new) if old else TRITON_SOURCE)
    aligned = ("x", "y", "weight", "bias", "save_mean", "save_var")
    compiled = compile_reference_triton(compile_triton, "f32", 80, aligned, block=256, function=load_triton(changed))
    if fault is None:
        for seed in SEEDS:
            run_bn(Device(seed=seed), compiled)
        return
    error = first_report(lambda device: run_bn(device, compiled))
    caught_faults[f"Triton: {fault}"] = str(error)
    assert error.check == check, str(error)


COPY = """
    mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y];
    mad.wide.u32 %rd1, %r1, 16, %rd1; mad.wide.u32 %rd2, %r1, 16, %rd2;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1]; st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};
"""


def copy(x: np.ndarray, y: np.ndarray, block: int = 32) -> None:
    Device().launch(snippet(COPY, "u64 x, u64 y"), 1, block, [x, y], names=["x", "y"])


def test_an_error_names_buffer_offset_block_thread_and_line():
    with pytest.raises(EmulatorError) as caught:
        copy(np.zeros(128, np.float32), np.zeros(124, np.float32))
    assert str(caught.value) == (
        "out of bounds: 1 lanes access 16 bytes of y (496 bytes), the first at byte 496, block 0, thread 31, "
        "PTX line 16: st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};"
    )


def test_a_view_ends_where_it_ends_and_not_where_its_memory_does():
    memory = np.zeros(256, np.float32)
    copy(memory[:128], memory[128:])
    with pytest.raises(EmulatorError, match=r"of x \(496 bytes\)"):
        copy(memory[:124], np.zeros(128, np.float32))


def test_misaligned_vectors():
    with pytest.raises(EmulatorError, match="misaligned: 16-byte global access"):
        copy(np.zeros(132, np.float32)[1:129], np.zeros(128, np.float32))


def test_a_null_pointer():
    with pytest.raises(EmulatorError) as caught:
        Device().launch(snippet(COPY, "u64 x, u64 y"), 1, 32, [None, np.zeros(128, np.float32)])
    assert caught.value.check == "out of bounds"


def test_reading_memory_that_nobody_wrote():
    device = Device()
    x = device.empty(128, np.float32)
    assert np.isnan(x).all()
    x_kernel = snippet(COPY, "u64 x, u64 y")
    with pytest.raises(EmulatorError, match="uninitialised read: 32 lanes read x, the first at byte 0"):
        device.launch(x_kernel, 1, 32, [x, np.zeros(128, np.float32)], names=["x", "y"])
    device.launch(x_kernel, 1, 31, [np.zeros(128, np.float32), x])
    with pytest.raises(EmulatorError, match="4 of 128 elements of x were never written"):
        device.require_written(x, "x")
    device.launch(x_kernel, 1, 32, [np.zeros(128, np.float32), x])
    device.require_written(x, "x")


RELEASE, ACQUIRE = "fence.acq_rel.gpu;", "ld.acquire.gpu.global.u32 %r6, [%rd2];"


@pytest.mark.parametrize(
    ("release", "poll", "check"),
    [
        (RELEASE, ACQUIRE, None),
        (RELEASE, "ld.relaxed.gpu.global.u32 %r6, [%rd2]; fence.acq_rel.gpu;", None),
        ("", ACQUIRE, "data race"),
        (RELEASE, "ld.relaxed.gpu.global.u32 %r6, [%rd2];", "data race"),
        (RELEASE, "ld.global.u32 %r6, [%rd2];", "data race"),
    ],
)
def test_a_grid_barrier_needs_its_fences(release, poll, check):
    if check is None:
        for seed in SEEDS:
            run_grid_barrier(Device(seed=seed), release, poll)
    else:
        assert first_report(lambda device: run_grid_barrier(device, release, poll)).check == check


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_are_not_resident_together_deadlock(seed):
    with pytest.raises(EmulatorError, match="threads spin") as caught:
        run_grid_barrier(Device(seed=seed, resident_threads=96), RELEASE, ACQUIRE, cooperative=False)
    assert caught.value.check == "deadlock"


def test_an_endless_loop_is_cut_short():
    with pytest.raises(EmulatorError, match="endless loop: still running after 5000 steps"):
        Device(max_steps=5000).launch(snippet("again: bra.uni again;"), 1, 32, [])


def test_a_trap_is_reported():
    with pytest.raises(EmulatorError, match=r"trap: .*block 1, thread 0"):
        Device().launch(snippet("mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 trap;"), 2, 32, [])


def test_a_shuffle_must_not_name_lanes_that_left():
    body = "mov.u32 %r1, %tid.x; setp.gt.u32 %p1, %r1, 15; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, {}, 31, -1;"
    Device().launch(snippet(body.format(8)), 1, 32, [])
    with pytest.raises(EmulatorError, match="absent lane: the shuffle reads lane 16"):
        Device().launch(snippet(body.format(16)), 1, 32, [])


def test_reading_a_neighbour_needs_a_warp_barrier():
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r2, cell; mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1; {}
        xor.b32 %r4, %r1, 1; mad.lo.u32 %r3, %r4, 4, %r2; ld.shared.u32 %r5, [%r3];
    """
    module = ".shared .align 4 .b8 cell[128];"
    Device().launch(snippet(body.format("bar.warp.sync -1;"), module=module), 1, 32, [])
    with pytest.raises(EmulatorError, match="data race"):
        Device().launch(snippet(body.format(""), module=module), 1, 32, [])
