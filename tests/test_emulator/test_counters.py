"""Test the counts of a launch: bytes, sectors, bank conflicts, footprints, instructions and DRAM traffic."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Checks, Device
from emulator.counters import L2, Report
from emulator.snippet import snippet


def strided_copy(device: Device, stride: int, count: int = 64) -> Report:
    """Let thread t copy element stride * t of an array of floats. Return the report of the launch."""
    kernel = snippet(f"""
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r1, %r1, %r2, %r3;
        ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; mul.wide.u32 %rd3, %r1, {4 * stride};
        add.u64 %rd1, %rd1, %rd3; add.u64 %rd2, %rd2, %rd3;
        ld.global.f32 %f1, [%rd1]; st.global.f32 [%rd2], %f1;
    """, "u64 x, u64 y")  # fmt: skip
    x, y = np.zeros(stride * count, np.float32), device.empty(stride * count, np.float32)
    return device.launch(kernel, count // 32, 32, [x, y], names=["x", "y"])


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (4, 16), (8, 32), (64, 32)])
def test_sectors_per_warp(stride, sectors):
    report = strided_copy(Device(), stride)
    for name, kind in (("x", "load"), ("y", "store")):
        traffic = report.buffer(name, kind)
        assert (traffic.instructions, traffic.bytes) == (2, 256)
        assert (traffic.units, traffic.ideal_units) == (2 * sectors, 2 * 4)
        assert report.footprint_bytes(kind) == 2 * sectors * 32
    assert report.buffer("x", "store").bytes == report.buffer("y", "load").bytes == 0


def test_a_broadcast_and_a_misplaced_warp():
    load = """
        ld.param.u64 %rd1, [x]; mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd2, %r1, {}, %rd1; ld.global.u32 %r2, [%rd2+{}];
    """
    x = np.zeros(64, np.uint32)
    for step, offset, sectors in ((0, 0, 1), (4, 0, 4), (4, 4, 5), (4, 32, 4)):
        report = Device().launch(snippet(load.format(step, offset), "u64 x"), 1, 32, [x])
        assert report.total("global", "load").units == sectors


@pytest.mark.parametrize(
    ("size", "stride", "wavefronts"),
    [
        (4, 4, 1),
        (4, 8, 2),
        (4, 16, 4),
        (4, 128, 32),
        (4, 132, 1),
        (4, 0, 1),
        (16, 16, 4),
        (16, 32, 8),
        (8, 8, 2),
    ],
)
def test_bank_conflicts(size, stride, wavefronts):
    vector = {4: ("u32", "%r2"), 8: ("v2.u32", "{%r2, %r3}"), 16: ("v4.u32", "{%r2, %r3, %r4, %r5}")}[size]
    kernel = snippet(f"""
        mov.u32 %r1, %tid.x; mov.u32 %r6, dynamic; mad.lo.u32 %r6, %r1, {stride}, %r6;
        mov.u32 %r2, 7; mov.u32 %r3, 7; mov.u32 %r4, 7; mov.u32 %r5, 7;
        st.shared.{vector[0]} [%r6], {vector[1]}; ld.shared.{vector[0]} {vector[1]}, [%r6];
    """, module=".extern .shared .align 16 .b8 dynamic[];")  # fmt: skip
    # With stride 0 lanes overwrite each other. This is a race, but takes no more wavefronts.
    report = Device(checks=Checks(races=False)).launch(kernel, 1, 32, [], 8192)
    for kind in ("load", "store"):
        assert report.total("shared", kind).units == wavefronts
    assert report.bank_conflicts == 2 * (wavefronts - max(1, size // 4))


def test_instructions_are_counted_per_warp_and_line():
    kernel = snippet("""
        mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 40; @%p1 bra few;
        add.u32 %r2, %r1, 1;
    few: add.u32 %r3, %r1, 1;
    """)  # fmt: skip
    report = Device().launch(kernel, 2, 96, [])
    issued = {text: count for _, text, count, _ in report.lines()}
    # Of three warps, one branches as a whole, one diverges, and one does not branch.
    assert issued == {
        "mov.u32 %r1, %tid.x;": 6, "setp.lt.u32 %p1, %r1, 40;": 6, "@%p1 bra few;": 6,
        "add.u32 %r2, %r1, 1;": 4, "add.u32 %r3, %r1, 1;": 6, "ret;": 6,
    }  # fmt: skip
    assert report.warp_instructions == 34


def test_least_recently_used_replacement():
    cache = L2(4 * 32)
    cache.access(32 * np.arange(4), write=False)
    cache.access(32 * np.array([0]), write=True)
    cache.access(32 * np.array([4]), write=False)  # evicts sector 1, because sector 0 was used later
    assert cache.read_bytes == 5 * 32
    cache.access(32 * np.array([0]), write=False)
    assert (cache.read_bytes, cache.write_bytes) == (5 * 32, 0)
    cache.access(32 * np.array([1, 2, 3, 4]), write=False)  # the last one evicts sector 0, which was written
    assert (cache.read_bytes, cache.write_bytes) == (9 * 32, 32)
    assert cache.flush() == 0


def test_dram_traffic_depends_on_what_stays_in_the_cache():
    size = 4 * 4096
    large = Device(l2_bytes=4 * size)
    first, second = (strided_copy(large, 1, 4096) for _ in range(2))
    assert (first.dram_read_bytes, first.dram_write_bytes) == (size, 0)
    assert second.dram_read_bytes == size  # the second copy reads other arrays
    assert large.l2.flush() == 2 * size
    small = Device(l2_bytes=size // 8, checks=Checks(races=False))
    report = strided_copy(small, 1, 4096)
    assert report.dram_read_bytes == size
    assert report.dram_write_bytes + small.l2.flush() == size
