"""The budget of the CUDA kernels' machine code: instructions, double precision, loads in flight, blocks per SM."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import cuda_budget as budget
import pytest
from emulator.compile import ARCHITECTURES
from support.machine_code import tool

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.gpu_model import FAST_DOUBLES

pytestmark = pytest.mark.skipif(tool("nvdisasm") is None, reason="no disassembler: the triton wheel is not installed")
REMEDY = "python tests/cuda_budget.py"
EVERY = list(product(ARCHITECTURES, budget.LAYOUTS, budget.DTYPES))
MARKS = dict.fromkeys(
    [(80, "ragged", "float16"), (90, "columns", "float16"), (89, "rows", "float32")], pytest.mark.slow
)


def current_rows():
    return [row for row in budget.recorded() if not budget.stale(row)]


def test_every_kernel_of_the_set_is_within_its_budget():
    over = [f"{row}: {why}" for row in current_rows() for why in row.over()]
    assert not over, "\n".join(over)


def test_the_record_is_of_these_kernels():
    expected = {(*which, name) for which in EVERY for name in budget.names(*which)}
    assert {(row.arch, row.layout, row.dtype, row.name) for row in budget.recorded()} == expected
    if stale := Counter(row.arch for row in budget.recorded() if budget.stale(row)):
        pytest.skip(f"machine code of kernels that have changed is not recorded, by architecture {stale}: {REMEDY}")


def test_the_page_is_of_the_record_and_the_planner():
    assert budget.PAGE.read_text() == budget.page()


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize(
    "which", [pytest.param(one, marks=MARKS.get(one, pytest.mark.exhaustive)) for one in EVERY], ids=str
)
def test_compiled_again_a_kernel_has_its_budget_and_its_record(which):
    found = budget.rows(*which)
    over = [f"{row}: {why}" for row in found for why in row.over()]
    assert not over, "\n".join(over)
    known = {row.name: row for row in budget.recorded() if (row.arch, row.layout, row.dtype) == which}
    for row in found:
        if row.made_of == known[row.name].made_of:
            assert row == known[row.name]


# ------------------------------------------------------------------------------------------------ planted slow kernels
STATS, INPUT = "bn_stats_kernel<Layout<F16, 8, true>>", "bn_backward_input_kernel<Layout<F16, 8, false>, FROM_X>"
PLANTED = {
    "scalar loads": (
        STATS,
        "V get(u32, i64 offset) const { return tensor[offset]; }\n};\n\ntemplate <class V> struct StreamedOnce",
        "V get(u32, i64 offset) const { V v; for (int j = 0; j < 8; ++j) v.at[j] = "
        "((const volatile u16*)(tensor + offset))[j]; return v; }\n};\n\ntemplate <class V> struct StreamedOnce",
        "KiB in flight",
    ),
    "one load in flight": (STATS, "each<L::MASKED && L::COLUMNS ? 2 : 4, false>", "each<1, false>", "KiB in flight"),
    "double precision by all threads, in loops": (
        STATS,
        "  if (t >= width) return 0;\n  Total sum;\n#pragma unroll 4",
        "  Total sum;\n  for (u32 again = 0; again < N; ++again)\n#pragma unroll 1",
        "double_rolled",
    ),
    "double precision for each vector": (
        INPUT,
        "return (fma(centred, slope[k], g) + offset[k]) * scale;",
        "return A(((double)centred * slope[k] + g + offset[k]) * scale);",
        "instructions",
    ),
}


def test_kernels_and_planner_agree_on_which_gpus_are_fast_at_double_precision():
    (line,) = re.findall("constexpr bool FAST_DOUBLES = (.*);", cuda_sources.source("relu"))
    assert [int(arch) // 10 for arch in re.findall("__CUDA_ARCH__ == (\\d+)", line)] == list(FAST_DOUBLES)


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
def test_double_precision_where_it_is_slow_is_noticed():
    source, pairs = cuda_sources.source("relu"), "FAST_DOUBLES || L::GROUPED"
    assert source.count(pairs) == 1
    (slow,) = budget.rows(89, "columns", "float16", source.replace(pairs, "true"), [STATS])
    assert any("double" in why for why in slow.over()), (slow.figures, list(slow.over()))


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.one_in(2)
def test_a_planted_slow_kernel_is_noticed(name):
    kernel, before, after, says = PLANTED[name]
    source, layout = cuda_sources.source("relu"), "columns" if "true" in kernel else "rows"
    assert source.count(before) == 1
    (right,) = budget.rows(90, layout, "float16", source, [kernel])
    assert not list(right.over())
    (slow,) = budget.rows(90, layout, "float16", source.replace(before, after), [kernel])
    assert any(says in why for why in slow.over()), (slow.figures, list(slow.over()))
