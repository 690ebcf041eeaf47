"""Test how the threads of a block run: divergence, exchange between lanes, barriers and memory spaces."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Device, parse
from emulator.snippet import snippet
from support.snippets import SEEDS, STORE_R1, run


@pytest.mark.parametrize("type_", ["f64", "b64"])
def test_a_double_keeps_its_value_under_either_type(type_):
    """A double may be declared as f64, or as b64, which Triton does."""
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
    """Thread t runs t iterations of a loop, and then takes one of two branches."""
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
    """Half of the warp executes more instructions before it comes to the same shuffle."""
    got = run("""
        mov.u32 %r2, %tid.x; and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 1; mov.u32 %r4, %r2;
        @%p1 bra meet;
        add.u32 %r4, %r4, 100;
    meet: shfl.sync.bfly.b32 %r1, %r4, 1, 31, -1;
    """, seed=seed)  # fmt: skip
    t = np.arange(64)
    np.testing.assert_array_equal(got, (t ^ 1) + np.where(t % 2, 100, 0))


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
