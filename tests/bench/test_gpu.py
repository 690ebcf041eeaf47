"""Test the GPU part of ``gpu-bn bench`` on an emulated GPU with CuPy and in Triton's interpreter."""

# ruff: noqa: ARG001 - stand-ins have the signatures of the originals
import importlib
import json
from dataclasses import fields, replace

import pytest
from emulator import Checks, Device
from support.bench_stand_ins import EMULATED, NUMPY, Clocked
from support.interpreter import interpreted

from gpu_bn import plan
from gpu_bn.bench import cases, implementations, measurement, model, timing
from gpu_bn.cli import main

CUPY = implementations.by_name("gpu_bn cupy")
LINE = ["bench", "--seconds", "0", "--dtype", "f32", "--layout", "nchw", "--shapes"]
SMALL = [*LINE, "4x4x64,2x4x64", "--ops", "forward"]


@pytest.fixture
def emulated(make_gpu, monkeypatch):
    """Give the benchmark a virtual clock, the CuPy backend on an emulated GPU, and a NumPy peer. Return the GPU."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False, initialised=False)))
    clock = Clocked()
    monkeypatch.setattr(timing, "find_gpu", lambda: (clock, ""))
    peer = replace(NUMPY, name="peer", ours=False, device="cuda")
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [replace(CUPY, modules=()), peer])
    monkeypatch.setattr(timing.GpuTimer, "row", 1)
    return gpu


@pytest.mark.compile
def test_the_report_of_a_gpu(emulated, capsys, tmp_path):
    page = tmp_path / "page.md"
    line = [*LINE, "4x4x64", "--ops", "forward,backward+add+relu,eval", "--tiers", "all", "--verify-model"]
    assert main([*line, "--out", str(tmp_path), "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "cold" in out
    assert "moved / floor" in out
    assert "Model: " not in out  # with a GPU nothing is modelled
    found = json.loads((tmp_path / "report.json").read_text())
    ours = {row["operation"]: row for row in found["measured"] if row["ours"]}
    assert {name: row["tier"] for name, row in ours.items()} == {
        "forward": "cta", "backward+add+relu": "cta", "eval": "one pass"
    }  # fmt: skip
    for row in ours.values():
        assert list(row["seconds"]) == ["cold", "hot", "wall"]
        assert row["moved_bytes"] == row["floor_bytes"]
        assert list(row["ratios"]["cold"]) == ["peer"]
    assert found["model"] == []
    assert found["machine"]["gpu"]["name"] == "emulated"
    forced = {tier for row in found["crossovers"]["tiers"] for tier in row["seconds"]}
    assert forced == {"cta", "cooperative", "split"}
    assert set(found["crossovers"]["thresholds"]) == {field.name for field in fields(plan.Thresholds)}
    assert {row["tier"] for row in found["crossovers"]["ranges"]} <= forced
    assert all(row["chosen"] == "cta" for row in found["crossovers"]["tiers"])
    assert "Thresholds for gpu_model.py, fitted to gpu_bn cupy in 2 cases on emulated" in out
    assert "driver and clocks are not known: nvidia-smi cannot be run" in out
    assert "driver and clocks are not known" in page.read_text()
    assert "DRAM bytes were not counted: ncu cannot be run" in out
    assert [v["refuted"] != "" for v in found["verification"]] == [True] * 3  # the clock is not theirs
    text = page.read_text()
    assert "## Measured on the GPU" in text
    assert "nobody has run" not in text
    assert emulated.launched


@pytest.mark.compile
def test_a_kernel_that_is_wrong_is_not_timed(emulated, capsys, tmp_path):
    emulated.edit_source = lambda source: source.replace("slope = rstd * weight", "slope = rstd * weight * 1.001")
    assert main([*LINE, "4x4x64", "--ops", "forward", "--out", str(tmp_path)]) == 1
    assert "NOT TIMED 4x4x64 f32 nchw forward by gpu_bn cupy: wrong: y[" in capsys.readouterr().out


def test_a_gpu_that_is_lost_ends_the_run_and_leaves_a_report(emulated, monkeypatch, capsys, tmp_path):
    """After an access out of bounds every call of every library fails, even one that frees memory."""

    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Clocked, "synchronize", lambda self: fail() if "call" in self.done_things else None)
    monkeypatch.setattr(Clocked, "free", fail)
    broken = replace(NUMPY, name="gpu_bn breaks", device="cuda", build=lambda *_, **__: fail())
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [broken])
    timing.find_gpu()[0].done_things.append("call")
    assert main([*SMALL, "--tiers", "all", "--verify-model", "--train", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    lost = "the GPU has not answered since 4x4x64 f32 nchw forward: RuntimeError: an illegal memory access"
    assert f"FAILED {lost}" in out
    for part in ("--tiers", "--verify-model", "--train"):
        assert f"{part}: {lost}" in out
    assert "NOT TIMED 4x4x64 f32 nchw forward by gpu_bn breaks: RuntimeError: an illegal memory access" in out
    assert "2x4x64" not in out.replace("4x4x64,2x4x64", "")  # no other case was tried
    assert len(json.loads((tmp_path / "report.json").read_text())["measured"]) == 1


@pytest.mark.compile
def test_a_part_that_fails_leaves_the_report(emulated, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gpu_bn.bench.run.crossovers", lambda *_: 1 / 0)
    monkeypatch.setattr("gpu_bn.bench.run.verify", lambda *_: {}["nothing"])
    assert main([*SMALL, "--tiers", "all", "--verify-model", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "--tiers: ZeroDivisionError: division by zero" in out
    assert "--verify-model: KeyError: 'nothing'" in out
    assert len(json.loads((tmp_path / "report.json").read_text())["measured"]) == 4


def test_a_gpu_that_cannot_copy_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(Clocked, "copy_bandwidth", lambda _: 1 / 0)
    monkeypatch.setattr(timing, "find_gpu", lambda: (Clocked(), ""))
    assert main(["bench"]) == 1
    assert (
        capsys.readouterr().err
        == "gpu-bn bench: nothing can be copied on emulated: ZeroDivisionError: division by zero\n"
    )


def test_what_needs_torch_is_left_out_where_only_cupy_sees_the_gpu(emulated, monkeypatch, capsys, tmp_path):
    """Otherwise a torch without CUDA would run on the CPU but be timed by events of the GPU."""
    monkeypatch.setattr(Clocked, "library", "cupy")
    torches = replace(NUMPY, name="torch native", device="cuda", ours=False, modules=("torch",))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [replace(NUMPY, name="gpu_bn x", device="cuda"), torches])
    pytest.importorskip("torch")
    assert main([*SMALL, "--train", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch native: torch does not see the GPU\n" in out
    assert "--train: torch does not see the GPU\n" in out
    assert "torch native" not in out.partition("Measured")[2]


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_the_models_bytes_are_those_that_the_emulator_counts(tier, operation, make_gpu):
    """The benchmark's model uses plans, whose bytes backends/cupy/test_traffic.py compares with counts."""
    case = cases.Case((4, 4, 1024), operation=cases.OPERATIONS[operation])
    checks = Checks(races=False, initialised=False)
    gpu = make_gpu(80, tier, Device(checks=checks, l2_bytes=EMULATED.l2_bytes, resident_threads=256))
    tensors = measurement.Tensors(case)
    problem = tensors.problem("cupy", case.operation)
    call = implementations.backend_calls(lambda *_: gpu.backend)(case.operation, problem)
    gpu.device.l2.flush()
    before = len(gpu.device.reports)
    tensors.check(CUPY, case.operation, call())
    reports = gpu.device.reports[before:]
    counted = sum(r.dram_read_bytes + r.dram_write_bytes for r in reports) + gpu.device.l2.flush()
    expected = model.Modelled(case, EMULATED).tiers[tier]
    assert abs(counted - expected) <= (4 << 10)  # of 128 KiB or more: vectors, partial results, cached bytes


@pytest.mark.compile
def test_a_backend_reports_the_plan_of_each_call(make_gpu):
    make_gpu(80)
    module = importlib.import_module("gpu_bn.backends.cupy.backend")
    case = cases.Case((4, 4, 64), operation=cases.OPERATIONS["backward"])
    tensors, reported = measurement.Tensors(case), []
    backend = module.CupyBackend("split", lambda *found: reported.append(found))
    call = implementations.backend_calls(lambda *_: backend)(case.operation, tensors.problem("cupy", case.operation))
    assert [(plan.tier, len(launches)) for plan, launches in reported] == [("split", 2)]  # the plan of the forward call
    call(), call()
    assert [(plan.tier, len(launches)) for plan, launches in reported] == [("split", 2)] * 2
    assert [launch.registers for launch in reported[1][1]] == [None] * 2  # PTX does not tell them


IN_THE_INTERPRETER = """
from gpu_bn.bench import cases, implementations, measurement, timing
triton = implementations.by_name("gpu_bn triton")
found = cases.select(["4x6x5x7"], ["f16"], ["nhwc"], ["forward+add+relu", "backward+add+relu", "eval"])
for case in found:
    tensors = measurement.Tensors(case)
    for implementation in (triton, triton.forced("split")):
        for r in measurement.measure(case, tensors, [implementation], timing.CpuTimer(0, 0), 0):
            print(r.case, "by", r.by, "tier", r.tier, "refused", r.refused or "-", r.error is not None and r.error <= 1)
"""


@pytest.mark.slow
def test_the_triton_backend_is_right_and_reports_its_tier_in_the_interpreter():
    lines = interpreted(["-c", IN_THE_INTERPRETER]).splitlines()
    assert len(lines) == 3 * 2
    assert all(line.endswith("refused - True") for line in lines), lines
    assert {line.partition("tier ")[2].split(" refused")[0] for line in lines if "triton split" in line} == {
        "split", "one pass"
    }  # fmt: skip
    assert any("tier cta" in line for line in lines)


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path):
    if timing.find_gpu()[0] is None:
        pytest.skip(f"no GPU: {timing.find_gpu()[1]}")
    line = ["bench", "--seconds", "0", "--shapes", "tiny,32x64x56x56", "--dtype", "f16,f32", "--tiers", "all"]
    assert main([*line, "--verify-model", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    ours = [row for row in found["measured"] if row["ours"] and not row["not_served"]]
    assert ours
    for row in ours:
        assert set(row["seconds"]) == {"cold", "hot", "wall"}
        assert row["moved_bytes"] >= row["floor_bytes"]
        assert row["registers"]
    assert found["crossovers"]["tiers"]
    assert found["machine"]["gpu"]["driver_version"]
