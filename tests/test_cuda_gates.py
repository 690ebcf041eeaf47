"""What the compiler makes of the CUDA kernels: no spills, no stack, registers for two blocks an SM, full vectors."""

from __future__ import annotations

from itertools import product

import pytest
from emulator.compile import ARCHITECTURES

from gpu_bn.backends import _cuda
from gpu_bn.plan import DEVICES, VECTOR_BYTES, NoPlanError, Tiling, Work, plan

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
REGISTERS = {"float32": 128, "float16": 128, "bfloat16": 128, "float64": 255}
"""A file of 65,536 for two blocks of 256 threads; float64 has one block and the most that a thread may have."""
STATIC_SHARED = 7_696
"""Of the largest kernels; less than plan.py leaves for it."""


def on_chip_tiers(arch: int) -> list[tuple[str, str]]:
    """The middle of a kernel's name, and the argument that says how its blocks meet."""
    clusters = [("_cluster", str(blocks)) for blocks in (2, 4, 8)] if arch >= 90 else []
    return [("", "Cta"), ("", "Cooperative"), *clusters]


def variants(arch: int, activation: str, dtype: str, vector: int, columns: bool, batch: str = _cuda.WHOLE) -> list[str]:
    """The name expressions of all kernels that a call with such tensors can come to."""
    tiling = Tiling(columns, 1, 1, 1, vector, 1, 1, 1)
    full = vector * ITEMSIZE[dtype] == VECTOR_BYTES
    masked = full and _cuda.switched(activation)
    # Residual and mask. The phases of SyncBatchNorm write no mask, so that their kernels come without it as well.
    fused = [(False, False), (True, masked)]
    phases = sorted({*fused, (True, False)})
    if activation == "identity":
        sources = split_sources = ["DY"]
    else:
        sources = ["FROM_X", "FROM_MASK" if masked else "FROM_RESIDUAL"]
        split_sources = sorted({*sources, "FROM_RESIDUAL"})
    crowded = columns and vector == 8  # three tensors on chip: see plan.py
    resident = [source for source in sources if not (crowded and source == "FROM_RESIDUAL")]
    tiers = on_chip_tiers(arch) if batch == _cuda.WHOLE else []
    calls = [
        ("bn_stats_kernel",),
        *(("bn_normalize_kernel", *flags) for flags in phases),
        *((f"bn_forward{kind}_kernel", tier, *flags) for (kind, tier), flags in product(tiers, fused)),
        *((f"bn_backward_{part}_kernel", source) for part, source in product(("reduce", "input"), split_sources)),
        *((f"bn_backward{kind}_kernel", tier, source) for (kind, tier), source in product(tiers, resident)),
    ]
    return [_cuda.kernel(name, dtype, tiling, *arguments, batch=batch) for name, *arguments in calls]


def require_gates(compile_cuda, arch, activation, dtype, vector, columns, tiers=None, batch=_cuda.WHOLE):
    """Every variant; of those that keep a channel on chip, the ones with the given tiers or cluster sizes."""
    names = variants(arch, activation, dtype, vector, columns, batch)
    if tiers is not None:
        others = ("stats", "normalize", "reduce", "input")
        names = [name for name in names if any(word in name for word in (*others, *(f", {tier}, " for tier in tiers)))]
    kernels = compile_cuda(_cuda.source(activation), arch, _cuda.OPTIONS, expressions=names)
    width = vector * ITEMSIZE[dtype]
    wrong = []
    for name in names:
        compiled = kernels[name]
        widest = VECTOR_BYTES if width == VECTOR_BYTES else None
        try:
            compiled.require(
                registers=REGISTERS[dtype], shared_bytes=STATIC_SHARED,
                load_bytes=widest, store_bytes=None if "stats" in name else widest,
            )  # fmt: skip
            assert compiled.stack_bytes == 0, f"{compiled.stack_bytes} bytes of stack"
            assert compiled.global_widths("ld")[width], f"no load of a vector of {width} bytes"
        except AssertionError as error:
            wrong.append(f"{name} for sm_{arch}: {error}")
    assert not wrong, "\n".join(wrong)


LAYOUTS = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
FULL = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}


@pytest.mark.compile
@LAYOUTS
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("arch", "activation", "tier"), [(80, "relu", "Cooperative"), (90, "relu", "8"), (90, "gelu", "Cta")]
)
def test_gates(arch, activation, tier, dtype, columns, compile_cuda):
    require_gates(compile_cuda, arch, activation, dtype, FULL[dtype], columns, [tier])


def _covering():
    """Each architecture with the kernels that need most registers, each dtype, and vectors that are not full."""
    for arch, dtype in product(ARCHITECTURES, FULL):
        half = ITEMSIZE[dtype] == 2
        if half or arch in (75, 90, 120):
            tier = "Cta" if half == (arch < 90) else "Cooperative" if arch < 90 else "8"
            yield arch, "gelu_tanh" if dtype == "bfloat16" else "gelu", dtype, FULL[dtype], True, [tier]
    for arch, dtype in ((75, "float64"), (86, "float16"), (90, "float16"), (100, "float32")):
        yield arch, "gelu_tanh", dtype, FULL[dtype], False, ["Cta", "8"]
    for dtype, vector, columns in (("float16", 1, True), ("float16", 4, True), ("float32", 1, False)):
        yield 80, "gelu", dtype, vector, columns, ["Cooperative"]
    yield 90, "relu", "float16", 8, True, ["Cta", "Cooperative", "2", "4", "8"]


SETS = [
    pytest.param(*one, marks=pytest.mark.slow if index % 2 else pytest.mark.exhaustive)
    for index, one in enumerate(_covering())
]


@pytest.mark.compile
@pytest.mark.parametrize(("arch", "activation", "dtype", "vector", "columns", "tiers"), SETS)
def test_gates_of_all_architectures(arch, activation, dtype, vector, columns, tiers, compile_cuda):
    require_gates(compile_cuda, arch, activation, dtype, vector, columns, tiers)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@LAYOUTS
def test_co_resident_blocks_have_the_shared_memory_that_the_plan_counts_on(device, columns):
    """Static, dynamic and the driver's 1 KiB (none on sm_75), for the largest share that the plan gives a block."""
    static = STATIC_SHARED if columns else 256
    reserved = 1024 if device.arch >= 80 else 0
    for backward, size in product((False, True), (1 << k for k in range(12, 25))):
        shape = (size, 64, 1) if columns else (1, 2, 8 * size)
        tensors = 2 if backward else 1
        work = Work(*shape, 2, backward=backward, reads=tensors, staged=tensors)
        try:
            found = plan(work, device, "cooperative")
        except NoPlanError:
            continue
        assert 2 * (found.shared_bytes + static + reserved) <= device.shared_per_sm
        assert found.shared_bytes + static <= device.shared_per_block
