"""Test conversions, matrices in shared memory, and errors for unknown instructions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from emulator import Device, EmulatorError
from emulator.snippet import snippet

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs the package ml_dtypes")
from support.instructions import NUMPY, evaluate, floats, integers, nearest, same_bits


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_conversions_round_their_way(to, mode):
    source = "f64" if to == "f32" else "f32"
    a = np.concatenate([floats(source, 38), np.array([1e-30, -1e-30, 3e38, -3e38], NUMPY[source])])
    a = a[np.isfinite(a)]
    got = evaluate(f"cvt.{mode}.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
    bits = got.view(f"u{got.dtype.itemsize}")
    up = mode == "rp"
    for value, result, bit in zip(a.tolist(), got, bits, strict=True):
        toward_plus = up or (mode == "rz" and value < 0)
        assert float(result) >= value if toward_plus else float(result) <= value
        # The neighbour of the result in the other direction lies on the other side of the value.
        step = -1 if (float(result) > 0 or bit == 0) == toward_plus else 1
        if float(result) != value and bit != 0 and np.isfinite(result.astype(float)):
            other = float(bit.dtype.type(int(bit) + step).view(got.dtype))
            assert other < value if toward_plus else other > value


@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["f16", "f32", "f64"])
def test_integers_become_floats_rounded_once(to, source):
    a = integers(source, 43)
    a[:2] = [2**62 + 2**38 + 1, 2**60 + 2**36 + 1] if source.endswith("64") else [2**30 + 2**6 + 1, 5]
    got = evaluate(f"cvt.rn.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
    with np.errstate(over="ignore"):
        want = [nearest(Fraction(int(v)), got.dtype) if abs(int(v)) < 65520 or to != "f16" else
                np.copysign(np.inf, float(v)) for v in a]  # fmt: skip
    same_bits(got, np.array(want).astype(got.dtype))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s16", "s32", "u32", "s64", "u64"])
def test_floats_become_integers_clamped(to, source):
    a = np.array([1.5, -1.5, 2.5, -0.5, 3e9, -3e9, 1e30, -1e30, np.inf, -np.inf, np.nan], NUMPY[source])
    info = np.iinfo(NUMPY[to])
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        # NaN becomes 0 if f32 is converted to at most 32 bits. Otherwise only the highest bit of the result is set.
        nan = 0 if source == "f32" and not to.endswith("64") else (info.min or (info.max >> 1) + 1)
        rounded = [function(float(v)) for v in a]
        want = [nan if v != v else int(max(min(v, info.max), info.min)) if abs(v) < 1e18 else
                (info.max if v > 0 else info.min) for v in rounded]  # fmt: skip
        got = evaluate(f"cvt.{mode}.{to}.{source} {{d}}, {{0}};", [(source, a)], to)
        np.testing.assert_array_equal(got, np.array(want, NUMPY[to]))
    tiny = np.array([1e-40], np.float32)
    assert evaluate("cvt.rpi.s32.f32 {d}, {0};", [("f32", tiny)], "s32")[0] == 1
    assert evaluate("cvt.rpi.ftz.s32.f32 {d}, {0};", [("f32", tiny)], "s32")[0] == 0


def test_an_unknown_opcode_quotes_its_line():
    kernel = snippet("    wgmma.fence.sync.aligned;")
    with pytest.raises(EmulatorError, match=r"PTX line 13: wgmma\.fence\.sync\.aligned;") as caught:
        Device().launch(kernel, 1, 32, [])
    assert caught.value.check == "unknown instruction"


@pytest.mark.parametrize(
    "line",
    [
        "add.rz.f64 %d1, %d2, %d3;",
        "div.rz.f32 %f1, %f2, %f3;",
        "add.cc.u32 %r1, %r2, %r3;",
        "addc.u32 %r1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "min.xorsign.abs.f32 %f1, %f2, %f3;",
        "setp.lt.f16x2 %p1|%p2, %r1, %r2;",
        "set.lt.u32.f16x2 %r1, %r2, %r3;",
        "mul24.lo.u32 %r1, %r2, %r3;",
        "cvt.rna.tf32.f32 %r1, %f1;",
        "cvt.rn.satfinite.f16x2.f32 %r1, %f1, %f2;",
        "cvt.rz.f16x2.f32 %r1, %f1, %f2;",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "mov.f32 %f1, 1.5;",
        "cp.async.bulk.commit_group;",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
        "redux.sync.min.NaN.f32 %f1, %f2, -1;",
        "match.any.sync.b32 %r1, %r2, -1;",
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3];",
        "red.global.add.v2.f32 [%rd1], {%f1, %f2};",
        "fence.proxy.async;",
        "bar.arrive 1, 64;",
        "call foo;",
    ],
)
def test_an_unknown_variant_is_refused(line):
    with pytest.raises(EmulatorError, match="unknown instruction"):
        Device().launch(snippet(line), 1, 32, [])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed):
    """Lane 8 m + r gives the address of row r of matrix m. Here row i of all 32 goes to place i ^ 5."""
    body = f"""
    mov.u32 %r1, %tid.x;
    xor.b32 %r2, %r1, 5; shl.b32 %r2, %r2, 4; mov.u32 %r3, memory; add.u32 %r2, %r2, %r3;
    shl.b32 %r4, %r1, 1; add.u32 %r5, %r4, 1; shl.b32 %r5, %r5, 16; or.b32 %r10, %r4, %r5;
    add.u32 %r11, %r10, 0x400040; add.u32 %r12, %r11, 0x400040; add.u32 %r13, %r12, 0x400040;
    stmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
    bar.warp.sync 0xffffffff;
    shl.b32 %r6, %r1, 4; add.u32 %r6, %r6, %r3;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r6];
    ld.param.u64 %rd1, [out]; cvt.u64.u32 %rd2, %r1; shl.b64 %rd2, %rd2, 4; add.u64 %rd1, %rd1, %rd2;
    st.global.v4.b32 [%rd1], {{%r20, %r21, %r22, %r23}};"""
    device = Device()
    out = device.empty((32, 8), np.uint16)
    module = ".shared .align 16 .b8 memory[512];"
    device.launch(snippet(body, "u64 out", module=module), 1, 32, [out])
    matrices = np.arange(256).reshape(4, 8, 8)
    rows = (matrices.transpose(0, 2, 1) if transposed else matrices).reshape(32, 8)
    np.testing.assert_array_equal(out, rows[np.arange(32) ^ 5])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    body = f"""
    mov.u32 %r1, %tid.x; cvt.u64.u32 %rd2, %r1; shl.b64 %rd2, %rd2, 4; mov.u32 %r3, memory; shl.b32 %r6, %r1, 4;
    add.u32 %r2, %r3, %r6; ld.param.u64 %rd1, [x]; add.u64 %rd1, %rd1, %rd2;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd1]; st.shared.v4.b32 [%r2], {{%r20, %r21, %r22, %r23}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
    ld.param.u64 %rd3, [out]; add.u64 %rd3, %rd3, %rd2;
    st.global.v4.b32 [%rd3], {{%r10, %r11, %r12, %r13}};"""
    device = Device()
    out = device.empty((32, 4, 2), np.uint16)
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    device.launch(snippet(body, "u64 out, u64 x", module=".shared .align 16 .b8 memory[512];"), 1, 32, [out, x])
    wanted = (x.transpose(0, 2, 1) if transposed else x).reshape(4, 32, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(out, wanted)
