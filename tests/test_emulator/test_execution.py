"""How threads run: divergence, barriers, exchange between lanes, memory spaces, clusters, grids, launches."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Device, EmulatorError, parse
from emulator.schedules import require_same_results
from emulator.snippet import snippet

STORE_R1 = """
    mov.u32 %r60, %ctaid.x; mov.u32 %r61, %ntid.x; mov.u32 %r62, %tid.x; mad.lo.u32 %r60, %r60, %r61, %r62;
    ld.param.u64 %rd60, [out]; mul.wide.u32 %rd61, %r60, 4; add.u64 %rd60, %rd60, %rd61;
    st.global.u32 [%rd60], %r1;
"""
SEEDS = (None, 0, 1, 2)


def run(body: str, block: int = 64, grid: int = 1, seed: int | None = None, module: str = "") -> np.ndarray:
    """Run a body that leaves its result in %r1; one result per thread."""
    device = Device(seed=seed)
    out = device.empty(grid * block, np.uint32)
    device.launch(snippet(body + STORE_R1, "u64 out", module=module), grid, block, [out])
    device.require_written(out)
    return out


@pytest.mark.parametrize("type_", ["f64", "b64"])
def test_a_double_keeps_its_value_under_either_type(type_):
    """Triton declares its floating-point parameters as plain bits."""
    out = np.zeros(1)
    body = "ld.param.f64 %d1, [a]; ld.param.u64 %rd1, [out]; st.global.f64 [%rd1], %d1;"
    for value in (np.float64(1e-50), 1e-50):
        Device().launch(snippet(body, f"u64 out, {type_} a"), 1, 1, [out, value])
        assert out[0] == 1e-50
        out[0] = 0


def test_special_registers():
    device = Device()
    kernel = snippet("mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.x; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %laneid;"
                     "mad.lo.u32 %r1, %r2, 100, %r3; mad.lo.u32 %r1, %r4, 10000, %r1;"
                     "mov.u32 %r6, %ntid.x; mad.lo.u32 %r7, %r2, %r6, %r3; mul.wide.u32 %rd1, %r7, 4;"
                     "ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r4, 96, %rd2; add.u64 %rd1, %rd1, %rd2;"
                     "st.global.u32 [%rd1], %r1;", "u64 out")  # fmt: skip
    out = device.empty((2, 3, 8), np.uint32)
    device.launch(kernel, (1, 1, 2), (8, 3, 1), [out])
    z, y, x = np.indices(out.shape)
    np.testing.assert_array_equal(out, 10000 * z + 100 * y + x)


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_diverge_and_meet_again(seed):
    """Each thread loops as often as its number says, then takes one of two sides."""
    got = run("""
        mov.u32 %r2, %tid.x; mov.u32 %r1, 0; mov.u32 %r3, 0;
    loop: setp.ge.u32 %p1, %r3, %r2; @%p1 bra done;
        add.u32 %r1, %r1, %r3; add.u32 %r3, %r3, 1; bra.uni loop;
    done: and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0; @%p2 bra even;
        add.u32 %r1, %r1, 1000; bra.uni join;
    even: add.u32 %r1, %r1, 2000;
    join: add.u32 %r1, %r1, 1;
    """, seed=seed)  # fmt: skip
    t = np.arange(64)
    np.testing.assert_array_equal(got, t * (t - 1) // 2 + np.where(t % 2, 1000, 2000) + 1)


def test_predicated_instructions_and_indexed_branches():
    got = run("""
        mov.u32 %r2, %tid.x; and.b32 %r3, %r2, 3; mov.u32 %r1, 7;
        setp.eq.u32 %p1, %r3, 3; @!%p1 add.u32 %r1, %r1, 1;
    targets: .branchtargets a, b, c, c;
        brx.idx %r3, targets;
    a:  add.u32 %r1, %r1, 10; bra.uni end;
    b:  add.u32 %r1, %r1, 20; bra.uni end;
    c:  add.u32 %r1, %r1, 30;
    end:
    """)  # fmt: skip
    np.testing.assert_array_equal(got, np.tile([18, 28, 38, 37], 16))


def test_nested_scopes_redeclare_registers():
    got = run("""
        mov.u32 %r1, 5;
        { .reg .b32 %t; mov.u32 %t, 6; add.u32 %r1, %r1, %t; }
        { .reg .b16 %t; mov.u16 %t, 1; cvt.u32.u16 %r2, %t; add.u32 %r1, %r1, %r2; }
    """)  # fmt: skip
    assert (got == 12).all()


# -------------------------------------------------------------------- lanes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mode", "operands", "source"),
    [
        ("bfly", "5, 31", lambda lane: lane ^ 5),
        ("down", "3, 31", lambda lane: np.where(lane + 3 < 32, lane + 3, lane)),
        ("up", "3, 0", lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("idx", "9, 31", lambda lane: np.full_like(lane, 9)),
        ("idx", "2, 0x181f", lambda lane: lane // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, operands, source, seed):
    got = run(f"mov.u32 %r2, %tid.x; shfl.sync.{mode}.b32 %r1|%p1, %r2, {operands}, -1;", seed=seed)
    t = np.arange(64)
    np.testing.assert_array_equal(got, t // 32 * 32 + source(t % 32))


def test_votes_and_warp_reductions():
    setup = "mov.u32 %r2, %tid.x; and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 1;"
    assert (run(setup + "vote.sync.ballot.b32 %r1, %p1, -1;") == 0xAAAAAAAA).all()
    assert (run(setup + "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;") == 1).all()
    assert (run(setup + "vote.sync.all.pred %p2, !%p1, -1; selp.u32 %r1, 1, 0, %p2;") == 0).all()
    assert (run(setup + "@%p1 bra odd; activemask.b32 %r1; bra end; odd: mov.u32 %r1, 0; end:")[0]) == 0x55555555
    t = np.arange(64)
    np.testing.assert_array_equal(run(setup + "redux.sync.add.u32 %r1, %r2, -1;"), np.where(t < 32, 496, 1520))
    np.testing.assert_array_equal(run(setup + "redux.sync.max.s32 %r1, %r2, -1;"), np.where(t < 32, 31, 63))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shuffle_waits_for_lanes_that_come_later(seed):
    """Half of the warp takes a longer way to the same shuffle."""
    got = run("""
        mov.u32 %r2, %tid.x; and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 1; mov.u32 %r4, %r2;
        @%p1 bra meet;
        add.u32 %r4, %r4, 100;
    meet: shfl.sync.bfly.b32 %r1, %r4, 1, 31, -1;
    """, seed=seed)  # fmt: skip
    t = np.arange(64)
    np.testing.assert_array_equal(got, (t ^ 1) + np.where(t % 2, 100, 0))


# -------------------------------------------------------------------- barriers and spaces

REVERSE = """
    mov.u32 %r2, %tid.x; mov.u32 %r3, buffer; mad.lo.u32 %r4, %r2, 4, %r3; st.shared.u32 [%r4], %r2;
    {barrier}
    sub.u32 %r5, 63, %r2; mad.lo.u32 %r4, %r5, 4, %r3; ld.shared.u32 %r1, [%r4];
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync 1, 64;", "barrier.cta.sync.aligned 0;"])
def test_shared_memory_after_a_barrier(barrier, seed):
    device = Device(seed=seed)
    kernel = snippet(REVERSE.format(barrier=barrier) + STORE_R1, "u64 out", module=".shared .align 16 .b8 buffer[256];")
    out = device.empty(192, np.uint32)
    device.launch(kernel, 3, 64, [out])
    np.testing.assert_array_equal(out, np.tile(np.arange(64)[::-1], 3))


def test_barrier_with_reduction():
    setup = "mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, 10;"
    assert (run(setup + "bar.red.popc.u32 %r1, 0, %p1;") == 10).all()
    assert (run(setup + "bar.red.and.pred %p2, 0, %p1; selp.u32 %r1, 1, 0, %p2;") == 0).all()
    assert (run(setup + "bar.red.or.pred %p2, 0, %p1; selp.u32 %r1, 1, 0, %p2;") == 1).all()


def test_dynamic_shared_memory_generic_and_local_addresses():
    kernel = snippet("""
        .local .align 8 .b8 depot[16];
        mov.u32 %r2, %tid.x; mov.u64 %rd1, dynamic; cvta.shared.u64 %rd1, %rd1;
        mad.wide.u32 %rd1, %r2, 8, %rd1; st.v2.u32 [%rd1], {%r2, 5};
        mov.u64 %rd2, depot; cvta.local.u64 %rd2, %rd2; ld.v2.u32 {%r3, %r4}, [%rd1];
        st.u32 [%rd2+8], %r3; st.local.u32 [depot+12], %r4;
        ld.local.u32 %r5, [depot+8]; ld.u32 %r6, [%rd2+12]; mad.lo.u32 %r1, %r5, 10, %r6;
    """ + STORE_R1, "u64 out", module=".extern .shared .align 16 .b8 dynamic[];")  # fmt: skip
    device = Device()
    out = device.empty(64, np.uint32)
    device.launch(kernel, 1, 64, [out], 64 * 8)
    np.testing.assert_array_equal(out, 10 * np.arange(64) + 5)


def test_constants_structs_and_every_access_width():
    module = ".const .align 4 .u32 table[4] = {3, 1, 4, 1};"
    kernel = parse(f"""
.version 8.0
.target sm_90
{module}
.visible .entry widths(.param .u64 out, .param .align 8 .b8 pair[16], .param .u64 x)
{{
    .reg .b16 %h<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [pair+8]; ld.param.u64 %rd4, [x]; cvt.u32.u64 %r1, %rd2;
    ld.const.u32 %r2, [table+8]; ld.global.s8 %r3, [%rd4+1]; ld.global.u8 %h1, [%rd4+1]; cvt.u32.u16 %r4, %h1;
    ld.global.nc.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd4+16];
    st.global.v4.b32 [%rd1], {{%r1, %r2, %r3, %r4}}; st.global.v2.b32 [%rd1+16], {{%r8, %r5}};
    ret;
}}""")
    device = Device()
    out, x = device.empty(6, np.uint32), np.arange(32, dtype=np.uint8)
    x[1] = 250
    pair = np.array((1, 77), dtype=[("a", "i8"), ("b", "i8")])[()]
    device.launch(kernel, 1, 1, [out, pair, x])
    words = x.view(np.uint32)
    np.testing.assert_array_equal(out, [77, 4, 2**32 - 6, 250, words[7], words[4]])


# -------------------------------------------------------------------- atomics and asynchronous copies


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
    """The order of float additions is the schedule's, and the comparison of schedules sees it."""
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


# -------------------------------------------------------------------- clusters, cooperative grids, launches

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
    """The last block to take a ticket sums what all the others stored, also those that ran long before."""
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
    """Two launches on one scratch array, in place, through views that overlap."""
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
    """As inline assembly in a loop that was unrolled."""
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
    """Warp 1 and 2 of every block meet, in odd blocks with warp 3 too; lane 0 of the block takes no part."""
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
