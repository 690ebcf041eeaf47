"""Test how blocks run together: atomics, asynchronous copies, clusters, cooperative grids and launches."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.schedules import require_same_results
from emulator.snippet import snippet
from support.snippets import SEEDS, STORE_R1, run


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_lose_nothing(seed):
    device = Device(seed=seed)
    cells = np.array([0, 0, 2**32 - 1, 0, 100], np.uint32)
    tickets = device.empty(128, np.uint32)
    body = """
        ld.param.u64 %rd1, [cells]; mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r4, %r3, 64, %r2;
        atom.global.add.u32 %r1, [%rd1], 1; red.global.max.u32 [%rd1+4], %r4;
        red.global.min.u32 [%rd1+8], %r4; red.global.or.b32 [%rd1+12], %r4;
        atom.global.cas.b32 %r5, [%rd1+16], 100, %r4;
    """
    device.launch(snippet(body + STORE_R1, "u64 out, u64 cells"), 2, 64, [tickets, cells])
    np.testing.assert_array_equal(np.sort(tickets), np.arange(128))
    np.testing.assert_array_equal(cells[:4], [128, 127, 0, 127])
    assert cells[4] < 128


def test_floating_point_atomics_depend_on_the_schedule():
    """Schedules add floats in different orders, and comparing the results of schedules reports it."""
    kernel = snippet("""
        ld.param.u64 %rd1, [x]; mov.u32 %r2, %tid.x; mad.wide.u32 %rd1, %r2, 4, %rd1;
        ld.global.f32 %f1, [%rd1];
        ld.param.u64 %rd2, [total]; red.global.add.f32 [%rd2], %f1;
    """, "u64 total, u64 x")  # fmt: skip
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32) * 10.0 ** np.arange(256) ** 0.1

    def total(device: Device) -> list[np.ndarray]:
        out = np.zeros(1, np.float32)
        device.launch(kernel, 1, 256, [out, x.astype(np.float32)])
        return [out]

    with pytest.raises(EmulatorError) as caught:
        require_same_results(total)
    assert caught.value.check == "schedule dependent"


COPIES = """
    mov.u32 %r2, %tid.x; ld.param.u64 %rd1, [x]; mad.wide.u32 %rd1, %r2, 16, %rd1;
    mov.u32 %r3, dynamic; mad.lo.u32 %r3, %r2, 32, %r3; add.u32 %r4, %r3, 16;
    cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r4], [%rd1], 8, 4; cp.async.commit_group;
    cp.async.wait_group {first}; ld.shared.u32 %r1, [%r3+4];
    cp.async.wait_group 0; ld.shared.v2.u32 {{%r5, %r6}}, [%r4]; add.u32 %r1, %r1, %r5; add.u32 %r1, %r1, %r6;
"""


def test_asynchronous_copies_arrive_at_their_wait_and_fill_with_zeros():
    kernel = snippet(COPIES.format(first=1) + STORE_R1, "u64 out, u64 x",
                     module=".extern .shared .align 16 .b8 dynamic[];")  # fmt: skip
    device = Device()
    x, out = np.arange(256, dtype=np.uint32), device.empty(64, np.uint32)
    device.launch(kernel, 1, 64, [out, x], 64 * 32)
    np.testing.assert_array_equal(out, x[1::4] + x[0::4])


def test_a_partial_asynchronous_copy_reads_only_its_bytes():
    """Lane 0 copies the last 12 bytes of x, which is too short for 16."""
    kernel = snippet("""
        ld.param.u64 %rd1, [x]; mov.u32 %r3, cell; mov.u32 %r4, 12;
        cp.async.cg.shared.global [%r3], [%rd1+16], 16, %r4; cp.async.wait_all;
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; add.u32 %r1, %r7, %r8;
    """ + STORE_R1, "u64 out, u64 x", module=".shared .align 16 .b8 cell[16];")  # fmt: skip
    device = Device()
    out = device.empty(1, np.uint32)
    device.launch(kernel, 1, 1, [out, np.arange(7, dtype=np.uint32)])
    assert out[0] == 6


CLUSTER = """
    mov.u32 %r2, %tid.x; mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, slot;
    setp.eq.u32 %p1, %r2, 0; mov.u32 %r5, %ctaid.x; @%p1 st.shared.u32 [%r4], %r5;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    add.u32 %r6, %r3, 1; and.b32 %r6, %r6, 3;
    mapa.shared::cluster.u32 %r7, %r4, %r6; ld.shared::cluster.u32 %r1, [%r7];
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_read_each_others_shared_memory(seed):
    device = Device(seed=seed)
    out = device.empty(8 * 32, np.uint32)
    device.launch(snippet(CLUSTER + STORE_R1, "u64 out", module=".shared .u32 slot;"), 8, 32, [out], cluster=4)
    np.testing.assert_array_equal(out.reshape(8, 32)[:, 0], [1, 2, 3, 0, 5, 6, 7, 4])


GRID_BARRIER = """
    ld.param.u64 %rd1, [slots]; ld.param.u64 %rd2, [counter]; ld.param.u32 %r9, [blocks];
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; setp.ne.u32 %p1, %r3, 0;
    mad.wide.u32 %rd3, %r2, 4, %rd1; mul.lo.u32 %r4, %r2, 3;
    @%p1 bra wait;
    st.global.u32 [%rd3], %r4;
    {release}
    atom.global.add.u32 %r5, [%rd2], 1;
spin: {poll}
    setp.lt.u32 %p2, %r6, %r9; @%p2 bra spin;
wait: bar.sync 0;
    add.u32 %r7, %r2, 1; rem.u32 %r7, %r7, %r9; mad.wide.u32 %rd4, %r7, 4, %rd1; ld.global.u32 %r1, [%rd4];
"""


CORRECT = {"release": "membar.gl;", "poll": "ld.acquire.gpu.u32 %r6, [%rd2];"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cooperative_grid_meets_at_a_spin_barrier(seed):
    device = Device(seed=seed)
    kernel = snippet(GRID_BARRIER.format(**CORRECT) + STORE_R1, "u64 out, u64 slots, u64 counter, u32 blocks")
    out, slots, counter = (
        device.empty(12 * 32, np.uint32),
        device.empty(12, np.uint32),
        np.zeros(1, np.uint32),
    )
    device.launch(kernel, 12, 32, [out, slots, counter, 12], cooperative=True)
    np.testing.assert_array_equal(out.reshape(12, 32)[:, 5], 3 * (np.arange(1, 13) % 12))
    assert counter[0] == 12


def test_last_block_done_across_batches_of_blocks():
    """The last block to take a ticket adds the values of all blocks, even of those that ended long before."""
    body = """
        ld.param.u64 %rd1, [slots]; ld.param.u64 %rd2, [counter];
        mov.u32 %r2, %ctaid.x; mov.u32 %r9, %nctaid.x;
        mad.wide.u32 %rd3, %r2, 4, %rd1; add.u32 %r4, %r2, 1; st.global.u32 [%rd3], %r4;
        atom.acq_rel.gpu.global.add.u32 %r5, [%rd2], 1;
        sub.u32 %r6, %r9, 1; setp.ne.u32 %p1, %r5, %r6; @%p1 ret;
        mov.u32 %r7, 0; mov.u32 %r1, 0;
    sum: mad.wide.u32 %rd4, %r7, 4, %rd1; ld.global.u32 %r8, [%rd4]; add.u32 %r1, %r1, %r8;
        add.u32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, %r9; @%p2 bra sum;
        ld.param.u64 %rd5, [out]; st.global.u32 [%rd5], %r1;
    """
    for seed in SEEDS:
        device = Device(seed=seed, resident_threads=64)
        out, slots, counter = device.empty(1, np.uint32), device.empty(20, np.uint32), np.zeros(1, np.uint32)
        device.launch(snippet(body, "u64 out, u64 slots, u64 counter"), 20, 1, [out, slots, counter])
        assert out[0] == 210


def test_launches_share_memory_and_views_alias():
    """Two launches work in place on one scratch array, through views that overlap."""
    kernel = snippet("""
        ld.param.u64 %rd1, [y]; ld.param.u64 %rd2, [x]; mov.u32 %r2, %tid.x; mul.wide.u32 %rd3, %r2, 4;
        add.u64 %rd1, %rd1, %rd3; add.u64 %rd2, %rd2, %rd3; ld.global.f32 %f1, [%rd2]; ld.param.f32 %f2, [a];
        mul.f32 %f1, %f1, %f2; st.global.f32 [%rd1], %f1;
    """, "u64 y, u64 x, f32 a")  # fmt: skip
    device = Device()
    scratch = np.arange(48, dtype=np.float32)
    device.launch(kernel, 1, 32, [scratch[16:], scratch[16:], 2.0])
    device.launch(kernel, 1, 16, [scratch[:16], scratch[32:], np.float32(0.5)])
    base = np.arange(48, dtype=np.float32)
    np.testing.assert_array_equal(scratch, np.concatenate([base[32:], 2 * base[16:]]))
    assert len(device.reports) == 2


@pytest.mark.parametrize(
    ("args", "grid", "block", "message"),
    [
        ([], 1, 32, "1 parameters, 0 arguments"),
        ([np.zeros(1, np.uint32)], 1, 2048, "limit is 1024"),
        ([np.zeros(1, np.uint32)], 0, 32, "empty grid"),
        ([np.uint32(1)], 1, 32, "expects a .u64"),
    ],
)
def test_impossible_launches_are_refused(args, grid, block, message):
    with pytest.raises(EmulatorError, match=message) as caught:
        Device().launch(snippet("", "u64 out"), grid, block, args)
    assert caught.value.check == "launch"


def test_a_cooperative_grid_must_fit():
    with pytest.raises(EmulatorError, match="room for 4"):
        Device(cooperative_blocks=4).launch(snippet(""), 5, 32, [], cooperative=True)


def test_a_view_with_a_negative_stride_points_at_its_first_element():
    body = (
        "ld.param.u64 %rd1, [x]; ld.global.u32 %r1, [%rd1]; ld.global.u32 %r2, [%rd1+-4]; mad.lo.u32 %r1, %r2, 10, %r1;"
    )
    device = Device()
    out = device.empty(1, np.uint32)
    device.launch(snippet(body + STORE_R1, "u64 out, u64 x"), 1, 1, [out, np.arange(8, dtype=np.uint32)[::-1]])
    assert out[0] == 67


def test_labels_belong_to_their_block():
    """A label may be defined again in another pair of braces, as in inline assembly in an unrolled loop."""
    once = "{ .reg .pred %q; setp.gt.u32 %q, %r1, 90; @%q bra DONE; add.u32 %r1, %r1, 10; DONE: }"
    assert (run(f"mov.u32 %r1, 75; {once} {once} {once}") == 95).all()
    with pytest.raises(EmulatorError, match="label again is defined twice"):
        run("again: add.u32 %r1, %r1, 1; again:")


def test_atomics_and_stores_accept_cache_policies():
    device = Device()
    out, total = device.empty(64, np.uint32), np.zeros(1, np.float32)
    device.launch(snippet("""
        createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0; ld.param.u64 %rd1, [total]; mov.f32 %f1, 0f3F800000;
        red.relaxed.gpu.global.add.L2::cache_hint.f32 [%rd1], %f1, %rd9; mov.u32 %r1, %tid.x;
        ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r1, 4, %rd2;
        st.global.cs.L1::no_allocate.L2::cache_hint.u32 [%rd2], %r1, %rd9; discard.global.L2 [%rd1], 128;
    """, "u64 out, u64 total"), 1, 64, [out, total])  # fmt: skip
    assert total[0] == 64
    np.testing.assert_array_equal(out, np.arange(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_of_some_warps(seed):
    """Warps 1 and 2 of each block wait for each other, in odd blocks for warp 3 too. Warp 0 does not wait."""
    got = run("""
        mov.u32 %r2, %tid.x; mov.u32 %r3, buffer; mad.lo.u32 %r4, %r2, 4, %r3; st.shared.u32 [%r4], %r2;
        mov.u32 %r1, 0; setp.lt.u32 %p1, %r2, 32; @%p1 bra end;
        mov.u32 %r5, %ctaid.x; and.b32 %r5, %r5, 1; mad.lo.u32 %r6, %r5, 32, 64;
        add.u32 %r7, %r6, 32; setp.ge.u32 %p2, %r2, %r7; @%p2 bra end;
        barrier.sync 3, %r6; setp.lt.u32 %p3, %r2, 64; barrier.red.popc.u32 %r8, 4, %r6, %p3;
        sub.u32 %r9, %r7, %r2; add.u32 %r9, %r9, 31; mad.lo.u32 %r4, %r9, 4, %r3; ld.shared.u32 %r1, [%r4];
        mad.lo.u32 %r1, %r8, 1000, %r1;
    end:
    """, block=128, grid=2, seed=seed, module=".shared .align 4 .b8 buffer[512];").reshape(2, 128)  # fmt: skip
    t = np.arange(128)
    np.testing.assert_array_equal(got[0], np.where((t >= 32) & (t < 96), 32000 + 127 - t, 0))
    np.testing.assert_array_equal(got[1], np.where(t >= 32, 32000 + 159 - t, 0))


def test_a_barrier_counts_whole_warps():
    assert (run("mov.u32 %r1, 1; bar.sync 1, 64;", block=48) == 1).all()
