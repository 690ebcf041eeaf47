"""Test that wrong orders of accesses are reported: scopes, tickets, warps, atomics, clusters and launches."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Device, EmulatorError, parse
from emulator.snippet import snippet
from support.emulator_faults import SEEDS, first_report, run_grid_barrier

TICKET = """
    ld.param.u64 %rd1, [slots]; ld.param.u64 %rd2, [counter]; ld.param.u64 %rd5, [out];
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; mov.u32 %r9, %nctaid.x; mov.u32 %r10, %ntid.x;
    mad.lo.u32 %r4, %r2, %r10, %r3; mad.wide.u32 %rd3, %r4, 4, %rd1; st.global.u32 [%rd3], %r4;
    {before}
    setp.ne.u32 %p1, %r3, 0; @%p1 bra meet;
    {fence} atom.global.add.u32 %r5, [%rd2], 1; {fence}
    sub.u32 %r6, %r9, 1; setp.eq.u32 %p2, %r5, %r6; @!%p2 bra meet;
    mov.u32 %r6, 0; st.global.u32 [%rd2], %r6;
meet: {after}
    shfl.sync.idx.b32 %r5, %r5, 0, 31, -1; add.u32 %r5, %r5, 1; setp.ne.u32 %p3, %r5, %r9; @%p3 ret;
    mad.wide.u32 %rd4, %r3, 4, %rd1; ld.global.u32 %r1, [%rd4];
    mad.wide.u32 %rd5, %r3, 4, %rd5; st.global.u32 [%rd5], %r1;
"""


def run_last_block(device: Device, before: str, fence: str, after: str) -> None:
    """Launch a kernel whose last block to take a ticket reads what block 0 stored, and resets the counter."""
    kernel = snippet(TICKET.format(before=before, fence=fence, after=after), "u64 slots, u64 counter, u64 out")
    slots, counter, out = device.empty(5 * 32, np.uint32), np.zeros(1, np.uint32), device.empty(32, np.uint32)
    device.launch(kernel, 5, 32, [slots, counter, out])
    np.testing.assert_array_equal(out, np.arange(32))
    assert counter[0] == 0


@pytest.mark.parametrize(
    ("before", "fence", "after", "clean"),
    [
        ("bar.sync 0;", "membar.gl;", "bar.sync 0;", True),
        ("bar.warp.sync -1;", "fence.acq_rel.gpu;", "bar.warp.sync -1;", True),
        ("", "membar.gl;", "bar.sync 0;", False),
        ("bar.sync 0;", "membar.gl;", "", False),
        ("bar.sync 0;", "membar.cta;", "bar.sync 0;", False),
        ("bar.sync 0;", "", "bar.sync 0;", False),
    ],
)
def test_a_ticket_needs_barriers_and_fences_of_its_scope(before, fence, after, clean):
    if clean:
        for seed in SEEDS:
            run_last_block(Device(seed=seed, resident_threads=64), before, fence, after)
    else:
        assert first_report(lambda device: run_last_block(device, before, fence, after)).check == "data race"


@pytest.mark.parametrize("scope", ["cta", "gpu"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_flag_within_a_block_may_have_the_scope_of_the_block(scope, seed):
    """Thread 0 passes a value to thread 32 of the same block by a flag."""
    body = f"""
        mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [x]; setp.eq.u32 %p1, %r1, 32; @%p1 bra poll;
        setp.ne.u32 %p2, %r1, 0; @%p2 ret;
        mov.u32 %r3, 1; st.global.u32 [%rd1], %r3; st.release.{scope}.global.u32 [%rd1+4], %r3; ret;
    poll: ld.acquire.{scope}.global.u32 %r4, [%rd1+4]; setp.eq.u32 %p2, %r4, 0; @%p2 bra poll;
        ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd1+4], %r5;
    """
    Device(seed=seed).launch(snippet(body, "u64 x"), 1, 33, [np.zeros(2, np.uint32)])


def test_a_flag_between_blocks_needs_the_scope_of_the_device():
    def run(device: Device, scope: str) -> None:
        release, poll = f"fence.acq_rel.{scope};", f"ld.acquire.{scope}.global.u32 %r6, [%rd2];"
        run_grid_barrier(device, release, poll)

    run(Device(), "gpu")
    assert first_report(lambda device: run(device, "cta")).check == "data race"


def test_a_plain_store_races_with_an_atomic_whatever_it_stores():
    body = """
        ld.param.u64 %rd1, [x]; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, {value};
        @%p1 st.global.u32 [%rd1], %r2; @!%p1 red.global.add.u32 [%rd1], 1;
    """
    for value in (0, 7):
        with pytest.raises(EmulatorError, match="data race"):
            Device().launch(snippet(body.format(value=value), "u64 x"), 2, 1, [np.zeros(1, np.uint32)])


@pytest.mark.parametrize(("load", "again", "clean"), [("ld.global", 0, True), ("ld.global.nc", 64, True),
                                                      ("ld.global.nc", 0, False)])  # fmt: skip
def test_the_read_only_cache_does_not_see_what_the_launch_has_written(load, again, clean):
    """Each thread reads and writes an element, and then reads the same element or another one."""
    body = f"""
        mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [x]; mad.wide.u32 %rd2, %r1, 4, %rd1;
        ld.global.nc.u32 %r2, [%rd2]; add.u32 %r2, %r2, 1; st.global.u32 [%rd2], %r2; bar.sync 0;
        {load}.u32 %r3, [%rd2+{4 * again}];
    """

    def run(device: Device) -> None:
        device.launch(snippet(body, "u64 x"), 1, 64, [np.zeros(128, np.uint32)], names=["x"])

    if clean:
        run(Device())
    else:
        error = first_report(run)
        assert error.check == "stale read"
        assert "x is read through the read-only cache, but block 0, thread 0 of this launch" in str(error)


def test_a_block_of_a_cluster_must_be_known_to_have_started():
    body = """
        mov.u32 %r1, cell; mapa.shared::cluster.u32 %r2, %r1, 1; mov.u32 %r3, %cluster_ctarank; {}
        setp.eq.u32 %p1, %r3, 0; @%p1 st.shared::cluster.u32 [%r2], %r3;
        barrier.cluster.arrive; barrier.cluster.wait;
    """
    module = ".shared .u32 cell;"
    started = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    Device().launch(snippet(body.format(started), module=module), 2, 1, [], cluster=2)
    with pytest.raises(EmulatorError, match="block not started"):
        Device().launch(snippet(body.format(""), module=module), 2, 1, [], cluster=2)


@pytest.mark.parametrize(
    ("directive", "cluster", "message"),
    [
        (".reqnctapercluster 2, 2, 1", None, "clusters along y or z are not modelled"),
        (".reqnctapercluster 4, 1, 1", 2, "clusters of 2, compiled for 4"),
        (".reqnctapercluster 4", None, "not whole clusters"),
        ("", 32, "the limit is 16"),
    ],
)
def test_impossible_clusters_are_refused(directive, cluster, message):
    with pytest.raises(EmulatorError, match=message) as caught:
        Device().launch(parse(f".target sm_90\n.visible .entry k() {directive} {{ ret; }}"), 6, 32, [], cluster=cluster)
    assert caught.value.check == "launch"


@pytest.mark.parametrize(("target", "limit"), [("sm_75", 64), ("sm_80", 163), ("sm_90a", 227), ("sm_120", 99)])
def test_shared_memory_is_limited_by_the_architecture(target, limit):
    kernel = snippet("", target=target)
    Device().launch(kernel, 1, 32, [], 1024 * limit)
    with pytest.raises(EmulatorError, match=f"limit {1024 * limit}"):
        Device().launch(kernel, 1, 32, [], 1024 * limit + 1)


@pytest.mark.parametrize(
    ("type_", "value"), [("f32", np.int32(1)), ("u32", np.float32(1)), ("u32", np.int64(1)), ("f64", np.zeros(1))]
)
def test_an_argument_must_be_of_its_parameters_kind(type_, value):
    with pytest.raises(EmulatorError, match=f"expects a .{type_}"):
        Device().launch(snippet("", f"{type_} a"), 1, 1, [value])
