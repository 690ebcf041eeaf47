"""Test that the record of compiled kernels is of the present sources, and that all resources are within the gates."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import record_gates
from emulator.compile import ARCHITECTURES
from support import gates, registers
from support.cuda_variants import FAMILY as CUDA
from support.gates import REMEDY, Definitions, Family, Group, Limits, Record, Resources

try:
    from support.triton_variants import FAMILY as TRITON
except ImportError as error:
    TRITON, ABSENT = None, f"no Triton kernels here: {error}"

FAMILIES = {"cuda": CUDA, "triton": TRITON}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    found = FAMILIES[request.param]
    if found is None:
        pytest.skip(ABSENT)
    return found


@pytest.fixture(scope="module")
def current(family):
    """Return the recorded cells of the covering set that were compiled from the present sources."""
    return Record.read(family).current(family, family.covering())


def test_what_is_recorded_is_within_the_gates(family, current):
    assert not Record.read(family).outside
    for group, cell in current.items():
        limits = [family.limits(group, name) for name in family.variants(group)]
        assert cell.kernels == len(limits), group
        assert cell.spilled <= sum(limit.spilled for limit in limits), group
        assert cell.stack <= max(limit.spilled for limit in limits), group
        assert cell.registers <= max(limit.registers for limit in limits), group
        assert cell.shared <= max(limit.shared for limit in limits), group
        assert cell.load == cell.store == group.width, group


def test_the_covering_set_is_recorded(family, current):
    covering = family.covering()
    missing = Counter(group.arch for group in covering if group not in current)
    if missing:
        groups = ", ".join(f"{count} of sm_{arch}" for arch, count in missing.items())
        pytest.skip(f"groups of {family.name} kernels not compiled since their sources changed: {groups}; {REMEDY}")
    assert {group.arch for group in covering} == set(ARCHITECTURES)


def test_kernels_with_many_registers_have_a_reason_and_no_others(family):
    assert set(registers.crowded(family)) == set(registers.REASONS[family.name])


@pytest.mark.parametrize("pair", [("arch", "kind"), ("activation", "kind"), ("arch", "dtype"), ("activation", "dtype")])
def test_the_covering_set_has_every_pair(family, pair):
    def pairs(groups):
        return {tuple(getattr(group, name) for name in (*pair, "vector", "columns")) for group in groups}

    assert pairs(family.covering()) == pairs(family.every_group())


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize("group", CUDA.sample(1), ids=str)
def test_drawn_cuda_kernels(group):
    CUDA.check(group)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize("group", TRITON.sample(1) if TRITON else [], ids=str)
def test_drawn_triton_kernels(group):
    TRITON.check(group)


@cache
def changed():
    """Return the CUDA groups that have changed since they were recorded, with the registers that each had to spare."""
    return CUDA.changed()


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.slow if d == "float16" else pytest.mark.exhaustive) for d in gates.ITEMSIZE],
)
def test_cuda_kernels_that_have_changed_are_within_the_gates(dtype):
    """Of each kind and layout, the group that had the fewest registers to spare is compiled."""
    tightest = {}
    for group in changed():
        if group.dtype == dtype:
            tightest.setdefault((group.kind, group.columns), group)
    require_within_the_gates(CUDA, tightest.values())


DRAWN = 1
"""The number of tight groups that a long run compiles for each architecture. Each change of sources draws others."""


@pytest.mark.compile
@pytest.mark.usefixtures("compile_cuda")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "most",
    [
        pytest.param(DRAWN, marks=pytest.mark.slow, id="drawn"),
        pytest.param(None, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)], id="all"),
    ],
)
def test_cuda_kernels_that_have_changed_and_were_tight_are_within_the_gates(arch, most):
    tight = CUDA.shuffled(group for group, spare in changed().items() if group.arch == arch and spare <= 2)
    require_within_the_gates(CUDA, tight[:most])
    if len(tight[:most]) < len(tight):
        pytest.skip(f"{most} groups drawn of {len(tight)} are within the gates; -m exhaustive compiles the others")


def require_within_the_gates(family, groups):
    outside = [
        why for group in groups for why in family.outside(group, family.build(group, family.variants(group), True))
    ]
    assert not outside, "\n".join(outside)


# ------------------------------------------------------------------------------------------- how the record is judged
GROUP = Group(80, "relu", "float16", 8, False, "WHOLE")
GOOD = Resources(40, 0, 0, 512, (4, 16), (16,))


def toy(kernels, stamp="one"):
    """Return a family of one group, whose compiler always reports the given resources."""
    return Family(
        "toy", lambda: "compiler 1", lambda arch: [GROUP] if arch == 80 else [], lambda _: 0,
        lambda _: list(kernels), lambda _, names, _cached: {name: kernels[name] for name in names},
        lambda *_: Limits(128, 1024), lambda *_: stamp, lambda: stamp,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"spilled": 4}, {"stack": 8}, {"registers": 129}, {"shared": 1025}, {"loads": (4, 8)}, {"loads": (16, 32)},
        {"stores": (8,)}, {"stores": ()},
    ],
    ids=str,
)  # fmt: skip
def test_a_kernel_outside_the_gates_is_found(change, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "DATA", tmp_path)
    family = toy({"good": GOOD, "bad": GOOD._replace(**change)})
    with pytest.raises(AssertionError, match="sm_80 relu float16 x8 rows WHOLE: bad: "):
        family.check(GROUP)
    record_gates.sweep(family, tmp_path, 1)
    record_gates.write(family, tmp_path)
    record = Record.read(family)
    with pytest.raises(AssertionError):
        test_what_is_recorded_is_within_the_gates(family, record.current(family))


def test_the_record_is_of_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "DATA", tmp_path)
    family = toy({"good": GOOD, "better": GOOD._replace(registers=30)})
    record_gates.sweep(family, tmp_path, 1)
    record_gates.write(family, tmp_path)
    cell = Record.read(family).current(family)[GROUP]
    assert (cell.kernels, cell.registers, cell.shared, cell.load) == (2, 40, 512, 16)
    test_what_is_recorded_is_within_the_gates(family, {GROUP: cell})
    family.check(GROUP)
    with pytest.raises(AssertionError):  # the same kernels, compiled to more registers
        toy({"good": GOOD._replace(registers=41), "better": GOOD._replace(registers=30)}).check(GROUP)


def test_a_row_serves_as_long_as_its_kernels_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "DATA", tmp_path)
    record_gates.sweep(toy({"good": GOOD}), tmp_path, 1)
    more, changed = toy({"good": GOOD, "more": GOOD}), toy({"good": GOOD}, stamp="two")
    assert record_gates.Rows(more, tmp_path).missing(GROUP) == ["more"]
    assert record_gates.Rows(more, tmp_path).missing(GROUP._replace(activation="gelu")) == ["more"]
    assert record_gates.Rows(more, tmp_path).missing(GROUP._replace(arch=90)) == ["good", "more"]
    assert record_gates.Rows(changed, tmp_path).missing(GROUP) == ["good"]
    record_gates.write(toy({"good": GOOD}), tmp_path)
    for family in (more, changed):
        assert not Record.read(family).current(family)
        with pytest.raises(pytest.skip.Exception, match="nothing of these sources"):
            family.check(GROUP)
    record_gates.sweep(more, tmp_path, 2)
    assert set(record_gates.Rows(more, tmp_path).kernels(GROUP)) == {"good", "more"}


def test_a_definition_changes_the_stamps_of_kernels_that_can_use_it():
    def stamps(tier):
        found = Definitions([(["cta"], "struct cta {}"), (["tier"], tier), (["kernel"], "void kernel(Tier) { cta; }")])
        return found.stamp(["kernel", "cta"]), found.stamp(["kernel", "tier"])

    before, after = stamps("struct tier { one }"), stamps("struct tier { two }")
    assert before[0] == after[0]
    assert before[1] != after[1]
