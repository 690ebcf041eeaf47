"""Test the command ``gpu-bn check``: its cases, its output and its exit code."""

import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest

import gpu_bn
from gpu_bn import testing
from gpu_bn.cli import check as conformance_check
from gpu_bn.cli import info
from gpu_bn.cli.commands import main

FEW = [testing.Case((4, 3)), testing.Case((4, 3), mode="eval"), testing.Case((2, 3, 5), "float64")]


def test_check_prints_a_table_and_passes(capsys, monkeypatch):
    monkeypatch.setattr(testing, "cases", lambda: FEW[:2])
    monkeypatch.setattr(testing, "extended_cases", lambda: FEW[2:])
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "numpy: 3 of 3 cases have passed" in out
    for dtype, mode in (("float32", "train"), ("float32", "eval"), ("float64", "train")):
        assert any(line.split()[:4] == [dtype, mode, "1", "-"] for line in out.splitlines()), (dtype, mode)
    assert "cupy: not run, " in out


@pytest.mark.parametrize("error", [AssertionError("y[0]: too far"), ZeroDivisionError("y[0]: too far")])
def test_check_exits_with_1_if_a_case_fails(error, capsys, monkeypatch):
    def fail_in_eval(case, _):
        if case.mode == "eval":
            raise error
        return {"y": 0.25, "dx": 0.5}

    monkeypatch.setattr(testing, "cases", lambda: FEW[:2])
    monkeypatch.setattr(testing, "extended_cases", lambda: FEW[2:])
    monkeypatch.setattr(testing, "check", fail_in_eval)
    assert main(["check", "--backend", "numpy"]) == 1
    out = capsys.readouterr().out
    assert "numpy: 2 of 3 cases have passed" in out
    assert f"FAILED {FEW[1]}\n  {type(error).__name__}: y[0]: too far" in out
    assert any(line.split() == ["float32", "train", "1", "-", "0.5", "dx"] for line in out.splitlines())


def test_worst_names_the_quantity():
    outcomes = [conformance_check.Outcome(FEW[0], errors, "") for errors in ({"y": 0.1}, {"y": 0.2, "dx": 0.3})]
    assert conformance_check.worst(outcomes) == ("0.3", "dx")
    assert conformance_check.worst([]) == ("-", "-")


def broken_gpu(monkeypatch, calls):
    """Let all calls fail after an access out of bounds in the second case, as on a GPU."""

    def synchronize():
        if len(calls) > 1:
            raise RuntimeError("an illegal memory access was encountered")

    runtime = SimpleNamespace(deviceSynchronize=synchronize)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))

    def check(case, _):
        calls.append(case)
        if len(calls) > 1:
            raise RuntimeError("an illegal memory access was encountered")
        return {"y": 0.5}

    monkeypatch.setattr(testing, "check", check)


def test_a_gpu_that_does_not_answer_ends_the_check(monkeypatch, capsys):
    calls = []
    broken_gpu(monkeypatch, calls)
    monkeypatch.setattr(conformance_check, "THREADS", ())
    monkeypatch.setattr(conformance_check, "unavailable", lambda _: "")
    monkeypatch.setattr(testing, "cases", lambda: FEW * 3)
    monkeypatch.setattr(testing, "extended_cases", list)
    monkeypatch.setattr(conformance_check.registry, "NAMES", ("cupy", "triton"))
    assert not conformance_check.conformance(None)
    out = capsys.readouterr().out
    assert len(calls) == 2
    left = 3 * len(FEW) - 2
    assert f"The GPU stopped answering in one of the last cases; {left} cases and later backends were not run." in out
    assert "cupy: 1 of 2 cases have passed" in out
    assert "triton: " not in out


def test_cases_run_side_by_side_and_are_reported_in_order(monkeypatch):
    together = threading.Barrier(4, timeout=60)

    def check(case, _):
        together.wait()
        return {"y": float(case.shape[0])}

    monkeypatch.setattr(testing, "check", check)
    cases = [testing.Case((size, 2)) for size in range(2, 10)]
    ticks = []
    outcomes = conformance_check.run_all(cases, "cupy", ticks.append, workers=4)
    assert [outcome.case for outcome in outcomes] == cases
    assert [outcome.errors["y"] for outcome in outcomes] == [case.shape[0] for case in cases]
    assert sum(ticks) == len(cases)


def test_cases_of_a_backend_that_compiles_in_processes_give_the_same(monkeypatch):
    ticks = []
    in_turn = conformance_check.run_all(FEW, "numpy", ticks.append)
    monkeypatch.setattr(conformance_check, "PROCESSES", ("numpy",))
    together = conformance_check.run_all(FEW, "numpy", ticks.append, workers=2)
    assert together == in_turn
    assert sum(ticks) == 2 * len(FEW)
    assert all(outcome.errors and not outcome.failure for outcome in together)


class Crash(testing.Case):
    """A case that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_case_that_ends_its_process_has_failed_and_the_others_run(capsys, monkeypatch, tmp_path):
    cases = [*FEW, Crash((5, 3)), testing.Case((7, 3)), Crash((6, 3)), *FEW]
    monkeypatch.setattr(conformance_check, "PROCESSES", ("numpy",))
    monkeypatch.setattr(conformance_check, "cores", lambda: 2)
    monkeypatch.setattr(testing, "cases", lambda: cases)
    monkeypatch.setattr(testing, "extended_cases", list)
    path = tmp_path / "check.json"
    assert main(["check", "--backend", "numpy", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "numpy: 7 of 9 cases have passed" in out
    _, _, table = out.partition("To paste into an issue:\n")
    assert any(line.split()[:5] == ["numpy", "9", "7", "2", "0"] for line in table.splitlines())
    ended = [{"case": str(case), "failure": conformance_check.ENDED} for case in cases if isinstance(case, Crash)]
    assert json.loads(path.read_text())["backends"]["numpy"]["failures"] == ended


def test_a_quick_check_covers_every_option_with_every_dtype():
    everything = [*testing.cases(), *testing.extended_cases()]
    quick = conformance_check.covering(everything)
    assert len(quick) < len(everything) / 4
    for name in ("layout", "dy_layout", "channel_axis", "activation", "residual", "affine", "mode", "mask", "renorm"):
        assert {(c.dtype, getattr(c, name)) for c in quick} == {(c.dtype, getattr(c, name)) for c in everything}, name


def test_check_ends_with_one_table_and_writes_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(testing, "cases", lambda: FEW)
    monkeypatch.setattr(testing, "extended_cases", list)
    path = tmp_path / "check.json"
    assert main(["check", "--quick", "--backend", "numpy", "--json", str(path)]) == 0
    _, _, table = capsys.readouterr().out.partition("To paste into an issue:\n")
    assert f"gpu-bn {gpu_bn.__version__} check --quick" in table
    assert any(line.split()[:5] == ["numpy", "3", "3", "0", "0"] for line in table.splitlines())
    assert "Python 3." in table
    found = json.loads(path.read_text())
    assert found["backends"]["numpy"]["cases"] == 3
    assert found["backends"]["numpy"]["failures"] == []


@pytest.mark.parametrize(("backend", "answers"), [("numpy", True), ("torch", True), ("triton", True), ("cupy", False)])
def test_a_backend_on_the_cpu_always_answers(backend, answers, monkeypatch):
    broken_gpu(monkeypatch, ["one", "two"])
    if backend == "triton":
        pytest.importorskip("torch")
    assert conformance_check.answers(backend) is answers


def test_a_backend_whose_library_cannot_be_loaded_is_unavailable(monkeypatch):
    def load(_):
        raise OSError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(info, "find_spec", lambda _: True)
    monkeypatch.setattr(info.registry, "load", load)
    assert info.unavailable("cupy") == "OSError: libnvrtc.so.12: cannot open shared object file"
