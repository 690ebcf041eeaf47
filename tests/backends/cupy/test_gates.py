"""The machine code of the CUDA kernels: no spills, no stack, registers for two blocks per SM, full vectors.

This file compiles a covering set; ``project/test_gates.py`` checks the record of all variants.
"""

from __future__ import annotations

import re
from itertools import product

import pytest
from emulator.compile import ARCHITECTURES
from emulator.nvrtc import nvrtc
from support.cuda_variants import FAMILY, SMALL, definitions
from support.gates import ITEMSIZE, Group, Resources

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.plan import DEVICES, STATIC_SHARED, THREADS, NoPlanError, Work, plan

FULL = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}
LAYOUTS = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])


def _covering():
    """Yield groups with each architecture, each dtype and narrow vectors; mostly kernels that need many registers."""
    for dtype, columns in product(("float16", "float32"), (False, True)):
        yield Group(80, "relu", dtype, FULL[dtype], columns, cuda_sources.WHOLE)
        yield Group(90, "gelu", dtype, FULL[dtype], columns, cuda_sources.WHOLE)
    for arch, dtype in product(ARCHITECTURES, FULL):
        if ITEMSIZE[dtype] == 2 or arch in (75, 90, 120):
            yield Group(
                arch, "gelu_tanh" if dtype == "bfloat16" else "gelu", dtype, FULL[dtype], True, cuda_sources.WHOLE
            )
    for arch, dtype in ((75, "float64"), (86, "float16"), (90, "float16"), (100, "float32"), (120, "float16")):
        yield Group(arch, "gelu_tanh", dtype, FULL[dtype], False, cuda_sources.WHOLE)
    for dtype, vector, columns in (("float16", 1, True), ("float16", 4, True), ("float32", 1, False)):
        yield Group(80, "gelu", dtype, vector, columns, cuda_sources.WHOLE)
    yield Group(86, "leaky_relu", "float16", 8, True, cuda_sources.WHOLE)


def _marked(groups):
    for index, group in enumerate(dict.fromkeys(groups)):
        marks = pytest.mark.exhaustive if index % 12 else pytest.mark.slow
        yield pytest.param(group, id=str(group), marks=marks)


def _masked():
    """Yield groups of masks and ghost batches: full vectors of each architecture, dtype and layout; narrow ones."""
    for arch, dtype, columns, batch in product(ARCHITECTURES, FULL, (False, True), ("MASKED_GROUPS", "GROUPS")):
        usual = (arch, dtype, columns, batch) == (90, "float16", True, "MASKED_GROUPS")
        slow = batch == "MASKED_GROUPS" and (arch, dtype) in ((75, "float64"), (120, "float16"))
        marks = [] if usual else [pytest.mark.slow if slow else pytest.mark.exhaustive]
        group = Group(arch, "gelu" if arch != 80 else "relu", dtype, FULL[dtype], columns, batch)
        yield pytest.param(group, id=str(group), marks=marks)
    for arch, dtype, vector, columns in product((75, 90, 120), ("float16", "float32"), (1, 2, 4), (False, True)):
        group = Group(arch, "gelu", dtype, vector, columns, "MASKED_GROUPS")
        yield pytest.param(group, id=str(group), marks=pytest.mark.exhaustive)


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize("group", [*_marked(_covering()), *_masked()])
def test_gates(group):
    """Each kernel is within its limits; kernels for masks and ghost batches have the same limits as the others."""
    FAMILY.check(group)


@pytest.mark.compile
@pytest.mark.parametrize(("dtype", "columns"), [("float16", True), ("float32", False)])
@pytest.mark.slow
def test_the_oldest_gpus_have_kernels(dtype, columns, compile_cuda):
    """Kernels compile for sm_70, which the record leaves out and CUDA 13 no longer supports."""
    if nvrtc().version >= (13, 0):
        pytest.skip("NVRTC 13 compiles for sm_75 and later")
    group = Group(70, "relu", dtype, FULL[dtype], columns, cuda_sources.WHOLE)
    names = FAMILY.variants(group)
    for compiled in compile_cuda(cuda_sources.source("relu"), 70, cuda_sources.OPTIONS, expressions=names).values():
        compiled.require(registers=128, shared_bytes=STATIC_SHARED)
        assert compiled.stack_bytes == 0


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("activation", "shared"), [("identity", 0), (None, 8 * THREADS)])
def test_the_small_kernels(arch, activation, shared, compile_cuda):
    source, names = cuda_sources.source(activation), SMALL[activation]
    for compiled in compile_cuda(source, arch, cuda_sources.OPTIONS, expressions=names).values():
        compiled.require(registers=128, shared_bytes=shared)
        assert compiled.stack_bytes == 0


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [
        "bn_stats_kernel<Layout<F16, 8, true>>",
        "bn_forward_cluster_kernel<Layout<F32, 4, false>, 8, true, true>",
        "bn_backward_kernel<Layout<BF16, 8, true>, Cooperative, FROM_X>",
    ],
)
def test_a_stamp_covers_all_definitions_of_a_kernel(name, compile_cuda):
    """The definitions that a kernel can reach compile to the same code as the whole source."""
    whole, part = cuda_sources.source("relu"), definitions(90, "relu").reachable(re.findall(r"\w+", name))
    assert len(part) < len(definitions(90, "relu").parts)
    made = [
        compile_cuda(source, 90, cuda_sources.OPTIONS, expressions=[name], resources=False)[name].ptx
        for source in (whole, "\n".join(part))
    ]
    # Leave out unused constants before the kernel, and the source's hash and the process number in mangled names, which
    # follow the length of the name.
    process = r"\d+_INTERNAL_\w*?kernel_cu_[0-9a-f]{8}_\d+"
    instructions = [re.sub(process, "", ptx[ptx.index(".entry") :]) for ptx in made]
    assert instructions[0] == instructions[1]


@pytest.mark.compile
def test_widths_are_those_that_the_emulator_finds(compile_cuda):
    name = "bn_backward_kernel<Layout<F16, 8, true>, Cooperative, FROM_X>"
    compiled = compile_cuda(cuda_sources.source("relu"), 80, cuda_sources.OPTIONS, expressions=[name])[name]
    found = Resources.of(compiled)
    assert list(found.loads) == sorted(compiled.global_widths("ld"))
    assert list(found.stores) == sorted(compiled.global_widths("st"))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@LAYOUTS
def test_co_resident_blocks_have_the_shared_memory_that_the_plan_counts_on(device, columns):
    """Static and dynamic shared memory and the driver's 1 KiB (none on sm_75) of two blocks fit an SM."""
    static = STATIC_SHARED if columns else 256
    reserved = 1024 if device.arch >= 80 else 0
    sizes = [size + odd for size in (1 << k for k in range(12, 25)) for odd in (0, size // 3, 2 * size // 3)]
    for backward, size, vector in product((False, True), sizes, (8, 4, 2, 1)):
        shape = (size, 248 + vector, 1) if columns else (1, 2, 8 * size + vector)
        tensors = 2 if backward else 1
        work = Work(*shape, 2, backward=backward, reads=tensors, staged=tensors)
        try:
            found = plan(work, device, "cooperative")
        except NoPlanError:
            continue
        assert 2 * (found.shared_bytes + static + reserved) <= device.shared_per_sm
        assert found.shared_bytes + static <= device.shared_per_block
