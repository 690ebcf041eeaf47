"""The budget of the Triton kernels' machine code: instructions, double precision, loads under way, blocks an SM.

:mod:`triton_budget` has the budget, the kernels, and the record that a page is made of. Speed has a gate that needs no
GPU: what is dearer than this is slower, whatever the memory does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton_budget
from support.machine_code import tool

pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl
from triton_budget import BUDGETS, architectures, budget, launches, measured

from gpu_bn.backends.triton.launch import CLUSTERS

COMPILES = [
    pytest.mark.compile,
    pytest.mark.skipif(tool("nvdisasm") is None, reason="no disassembler"),
]
SLOW_DOUBLES = {("rows", "bn_stats_kernel, before a merge"), ("columns", "bn_merge_moments_kernel")}
"""What every run compiles for sm_89."""
ROWS = {90: [], 75: [pytest.mark.slow], 120: [pytest.mark.slow]}
MARKS = {"rows": ROWS, "cluster rows": ROWS, "rows, float32": {90: [pytest.mark.slow]}}


def compiled(call, kernel, arch):
    """One architecture for kernels in rows in every run, and more in the long run; all others in the exhaustive one."""
    marks = MARKS.get(call, {}).get(arch, [pytest.mark.exhaustive])
    if arch == 89 and (call, kernel) in SLOW_DOUBLES:
        marks = []
    return pytest.param(call, kernel, arch, marks=[*COMPILES, *marks])


EVERY = [compiled(*which, arch) for which in BUDGETS for arch in architectures(*which)]


@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize(("call", "kernel", "arch"), EVERY)
def test_budget(call, kernel, arch):
    if "cluster" in call and not CLUSTERS:
        pytest.skip("plans have clusters from Triton 3.9 on")
    found = measured(arch, *launches(call, arch)[kernel])
    assert not budget(call, kernel).over(found)
    record = triton_budget.RECORD.read_text().splitlines()[0]
    if record != triton_budget.header():
        pytest.skip(f"within the budget; not compared with the record, which says: {record}")
    assert found == triton_budget.recorded_rows()[call, kernel, arch]


def test_the_record_is_within_the_budget_on_every_architecture():
    rows = triton_budget.recorded_rows()
    assert set(rows) == {(*which, arch) for which in BUDGETS for arch in architectures(*which)}
    for (*which, arch), found in rows.items():
        assert not BUDGETS[tuple(which)].over(found), (which, arch)


def test_the_budget_has_little_to_spare():
    """A twentieth of instructions, or what rounding makes of it; nothing of what there has to be."""
    rows = triton_budget.recorded_rows()
    for which, limits in BUDGETS.items():
        found = [rows[(*which, arch)] for arch in architectures(*which)]
        assert limits.instructions <= 1.06 * max(one.instructions for one in found) + 1
        assert limits.double <= 1.06 * max(one.double for one in found) + 1
        assert limits.in_flight == min(one.in_flight for one in found)
        assert limits.blocks == min(one.blocks for one in found)


def test_the_page_is_of_the_record():
    assert triton_budget.PAGE.read_text() == triton_budget.page()


REDUCE = "bn_backward_reduce_kernel"
SLOW = {
    "narrow loads": ("rows", REDUCE, {"aligned": ()}, {}, "instructions 0"),
    "double precision for each element": ("rows", REDUCE, {}, {"COMPUTE": tl.float64}, "instructions"),
    "one load under way": ("rows", REDUCE, {}, {"POSITIONS": 64}, "in_flight"),
    "too many results merged at once": ("columns", "bn_backward_input_kernel", {}, {"CHUNK": 64}, "double"),
}


@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize("name", [pytest.param(name, marks=COMPILES) for name in SLOW])
@pytest.mark.one_in(2)
def test_a_planted_slow_kernel_is_noticed(name):
    call, kernel, changed, constants, says = SLOW[name]
    step, special = launches(call, 90)[kernel]
    slow = replace(special, constants=special.constants | constants, **changed)
    assert any(says in why for why in budget(call, kernel).over(measured(90, step, slow)))
