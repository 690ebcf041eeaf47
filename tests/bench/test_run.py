"""Test that ``gpu-bn bench`` refuses wrong results, and what it prints and writes. No time is asserted."""

import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO

import pytest
from support.bench_stand_ins import NUMPY

import gpu_bn
from gpu_bn import bench, registry, testing
from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.bench import cases, implementations, machine, measurement, run, timing
from gpu_bn.cli import main

TINY = ["bench", "--seconds", "0", "--device", "cpu"]


def exit_code(line):
    try:
        return main(line)
    except SystemExit as end:  # argparse raises it
        return end.code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shapes", "vgg"], "unknown shape 'vgg', expected such as 32x64x56x56, or one of few, resnet50-32"),
        (["--shapes", "4x0"], "unknown shape '4x0'"),
        (["--dtype", "int8"], "unknown dtype 'int8', expected one of f16, bf16, f32, f64"),
        (["--layout", "chwn"], "unknown layout 'chwn', expected one of nchw, nhwc"),
        (["--ops", "sideways"], "unknown operation 'sideways', expected one of forward, forward+relu"),
        (["--peers", "jax"], "unknown peer 'jax', expected some of torch CPU, textbook NumPy"),
        (["--only", "no such case"], "no case is left"),
        (["--page", "no/such/folder/x.md"], "there is no folder no/such/folder for the page"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_timed(arguments, says, capsys, tmp_path):
    assert exit_code([*TINY, "--out", str(tmp_path / "report"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_what_needs_a_gpu_is_left_out_without_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY])
    line = [*TINY, "--shapes", "4x8", "--ops", "eval", "--tiers", "all", "--verify-model"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "--tiers: needs a GPU: the CPU was asked for\n--verify-model: needs a GPU: the CPU was asked for\n" in out


def test_a_gpu_that_is_asked_for_and_not_there(capsys, monkeypatch):
    monkeypatch.setattr(timing, "find_gpu", lambda: (None, "torch sees no CUDA device"))
    assert main(["bench", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "gpu-bn bench: --device cuda needs a GPU: torch sees no CUDA device\n"


# ------------------------------------------------------------------------------------------------- correctness
class Wrong(NumpyBackend):
    """A backend that adds 0.01 to the last element of every output, which no network would notice."""

    def normalize(self, saved, residual, out):
        super().normalize(saved, residual, out)
        out.flat[-1] += 0.01


def wrong_implementation(name="gpu_bn wrong", **options):
    return replace(NUMPY, name=name, build=implementations.backend_calls(lambda *_: Wrong()), **options)


def test_a_wrong_backend_is_not_timed_and_ends_the_command_with_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, wrong_implementation()])
    line = [*TINY, "--shapes", "4x6x5x7", "--ops", "forward,backward", "--out", str(tmp_path)]
    assert main(line) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED 4x6x5x7 f32 nchw forward by gpu_bn wrong: wrong: y[3, 5, 4, 6]: expected" in out
    measured = json.loads((tmp_path / "report.json").read_text())["measured"]
    refused = {(row["by"], row["operation"]): bool(row["refused"]) for row in measured}
    assert refused[("gpu_bn wrong", "forward")]
    assert not refused[("gpu_bn wrong", "backward")]  # what forward saves is right
    for row in measured:
        assert bool(row["seconds"]) is not bool(row["refused"])


def test_a_wrong_peer_is_not_timed_but_is_no_failure_of_ours(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        implementations, "IMPLEMENTATIONS", [NUMPY, replace(NUMPY, name="peer", ours=False, build=build_doubled)]
    )
    assert main([*TINY, "--shapes", "4x6x5x7", "--ops", "forward", "--out", str(tmp_path)]) == 0
    assert "by peer: wrong: y is off by 1 of its root mean square" in capsys.readouterr().out


def build_doubled(operation, problem):
    call = NUMPY.build(operation, problem)
    return lambda: (2 * call()[0],)


def test_what_raises_is_reported_and_the_others_are_timed(capsys, monkeypatch, tmp_path):
    def build(*_, **__):
        raise RuntimeError("out of memory\nsomewhere")

    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, replace(NUMPY, name="gpu_bn poor", build=build)])
    assert main([*TINY, "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED 4x8 f32 eval by gpu_bn poor: RuntimeError: out of memory\n" in out
    assert re.search(r"  4x8 f32\n(    eval     gpu_bn cpu .*\n)?    eval     gpu_bn numpy", out)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "f64"])
def test_every_operation_of_every_cpu_implementation_is_right(dtype, layout):
    pytest.importorskip("torch")
    if dtype == "bf16":
        pytest.importorskip("ml_dtypes")
    timed = [s for s in implementations.IMPLEMENTATIONS if s.device == "cpu" and s.default]
    timed += [s for s in implementations.IMPLEMENTATIONS if s.name in ("torch cuDNN", "torch native")]
    found = cases.select(["4x6x5x7"], [dtype], [layout], cases.OPERATIONS)
    tensors = measurement.Tensors(found[0])
    for case in found:
        for result in measurement.measure(case, tensors, timed, timing.CpuTimer(0, 0), 0):
            assert result.refused == result.not_served == ""
            assert result.error <= 1
            assert set(result.timings) == {"wall"}


def test_a_large_tensor_is_right_on_some_of_its_channels():
    case = cases.Case((64, 8, 64, 64))
    checked = measurement.Tensors(case)
    assert checked.channels.tolist() == [0, 7]
    small = measurement.Tensors(cases.Case((4, 6, 5, 7)))
    assert small.channels.tolist() == list(range(6))


# ------------------------------------------------------------------------------------------------------ report
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run the command. Return the folder that it has written and the text that it has printed."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("bench") / "report"
    with redirect_stdout(StringIO()) as printed:
        assert main([*TINY, "--shapes", "tiny", "--dtype", "f32", "--out", str(path)]) == 0
    return path, printed.getvalue()


COMPILED = ["gpu_bn cpu"] if find_spec("numba") else []
"""The backend that needs Numba."""


def test_the_tables(folder):
    _, text = folder
    assert re.search(r"torch CPU \((us|ms)\) +ratio +textbook NumPy \(\1\) +ratio\n", text)
    measured, _, modelled = text.partition("Model: times on GPUs that are not here")
    assert "\n  4x8 f32\n    forward " in measured
    assert "A model" not in measured
    assert "A model, nothing here was measured" in modelled
    assert "gpu_bn numpy" not in modelled
    for device in ("T4", "A100", "RTX 4090", "H100", "B200"):
        assert device in modelled.splitlines()[1]
    assert "Model: bytes by tier on H100" in modelled


def test_the_json(folder):
    path, _ = folder
    report = json.loads((path / "report.json").read_text())
    assert report["schema"] == 1
    assert report["command"].startswith("gpu-bn bench --seconds 0")
    assert {"commit", "packages", "processor", "copy_bandwidth", "gpu", "python"} <= set(report["machine"])
    assert report["machine"]["gpu"] is None
    ours = [row for row in report["measured"] if row["ours"]]
    peers_here = {"torch CPU", "textbook NumPy"}
    assert {row["by"] for row in report["measured"]} == {"gpu_bn numpy", *COMPILED, *peers_here}
    assert len(ours) == 4 * len(run.FEW_OPERATIONS) * (1 + len(COMPILED))
    assert set(ours[0]["ratios"]["wall"]) == peers_here
    assert ours[0]["floor_bytes"] == 2 * 4 * 8 * 4
    assert all("seconds" in row and "device" not in row for row in report["measured"])
    assert {row["device"] for row in report["model"]} == {"T4", "A100", "RTX 4090", "H100", "B200"}


def test_nothing_written_names_this_machine_or_a_path(folder):
    import platform

    path, _ = folder
    text = (path / "report.json").read_text().replace(str(path), "")
    assert str(bench.__path__[0]) not in text
    assert "/home" not in text
    assert "site-packages" not in text
    assert platform.node() not in text.split('"')


def test_the_pictures(folder):
    path, _ = folder
    for name in ("roofline.png", "peers.png"):
        assert (path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_no_pictures(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY])
    assert main([*TINY, "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path)]) == 0
    assert "No pictures: matplotlib is not installed; pip install -e '.[bench]'" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_numpy_alone_is_enough(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(machine, "installed", lambda _: None)
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    assert main(["bench", "--seconds", "0", "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch CPU: not installed: torch" in out
    assert re.search(r"  4x8 f32\n(    eval     gpu_bn cpu .*\n)?    eval     gpu_bn numpy", out)
    assert "No GPU was timed: torch is not installed, cupy is not installed." in out
    for arguments, says in ((["--dtype", "bf16"], "bf16 needs ml_dtypes"), (["--train"], "--train needs torch")):
        assert main(["bench", "--seconds", "0", "--shapes", "4x8", *arguments, "--out", str(tmp_path)]) == 1
        assert f"{says}: pip install -e '.[bench]'" in capsys.readouterr().err


def test_a_implementation_of_one_module_or_another():
    either = replace(NUMPY, modules=("no_such_module.at_all or json", "sys"))
    assert either.missing == ""
    assert replace(either, modules=("no_such_module or nor_this",)).missing == "no_such_module or nor_this"
    assert (
        "apex.contrib.groupbn.bnp or bnp"
        in next(s for s in implementations.IMPLEMENTATIONS if s.name == "apex").modules
    )


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_reports_what_was_measured(capsys, monkeypatch, tmp_path):
    interrupted = replace(
        NUMPY, name="peer", ours=False, refuses=lambda case: "" if case.shape == (4, 8) else interrupt()
    )
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, interrupted])
    page = tmp_path / "page.md"
    line = [*TINY, "--shapes", "4x8,6x8", "--ops", "eval", "--out", str(tmp_path), "--page", str(page)]
    assert main(line) == 130
    out = capsys.readouterr().out
    assert "FAILED interrupted: the report is of what was measured until then" in out
    assert "  4x8 f32\n" in out
    assert "  6x8 f32\n" not in out
    measured = json.loads((tmp_path / "report.json").read_text())["measured"]
    assert {row["case"] for row in measured} == {"4x8 f32 eval"}
    assert page.exists()


def test_pictures_that_fail_take_no_report_away(capsys, monkeypatch, tmp_path):
    figures = pytest.importorskip("gpu_bn.bench.figures")
    monkeypatch.setattr(figures, "draw", lambda *_: interrupt.no_such_attribute)
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY])
    page = tmp_path / "page.md"
    line = [*TINY, "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path), "--page", str(page)]
    assert main(line) == 0
    assert "No pictures: AttributeError" in capsys.readouterr().out
    assert page.exists()


def test_a_peer_that_is_not_installed_is_named(capsys, monkeypatch, tmp_path):
    absent = replace(NUMPY, name="another", ours=False, modules=("no_such_module.at_all",))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, absent])
    assert main([*TINY, "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path)]) == 0
    assert "another: not installed: no_such_module.at_all" in capsys.readouterr().out


def test_peers_can_be_left_out(tmp_path, capsys):
    assert main([*TINY, "--shapes", "4x8", "--ops", "eval", "--peers", "none", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["by"] for row in report["measured"]} == {"gpu_bn numpy", *COMPILED}
    assert "peers.png" not in capsys.readouterr().out


def test_names_of_implementations_are_unique_and_their_adapters_exist():
    names = [implementation.name for implementation in implementations.IMPLEMENTATIONS]
    assert len(set(names)) == len(names)
    assert {implementation.adapter for implementation in implementations.IMPLEMENTATIONS} <= set(testing.ADAPTERS)
    assert {s.adapter for s in implementations.IMPLEMENTATIONS if s.ours} <= set(registry.NAMES)


def test_a_copy_that_moves_is_flagged(monkeypatch, tmp_path):
    bandwidths = iter([4e9, 2e9])
    monkeypatch.setattr(run, "cpu_copy_bandwidth", lambda _: next(bandwidths))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY])
    line = ["bench", "--device", "cpu", "--seconds", "0.001", "--shapes", "4x8", "--ops", "eval"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert any(text.startswith("UNSTEADY: a copy had 4.00 GB/s before and 2.00 GB/s") for text in found["warnings"])
    assert {row["threads"] for row in found["measured"]} == {1, gpu_bn.get_num_threads()}
