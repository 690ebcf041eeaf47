"""``gpu-bn bench``: what it times, that it times nothing wrong, and what it prints and writes. No time is asserted."""

import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO

import numpy as np
import pytest
from support.bench_stand_ins import NUMPY, timed

import gpu_bn
from gpu_bn import bench, registry, testing
from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.bench import cases, correctness, gpus, implementations, machine, measurement, report, run, timing
from gpu_bn.cli import main
from gpu_bn.explanation import DTYPES

TINY = ["bench", "--seconds", "0", "--device", "cpu"]


# -------------------------------------------------------------------------------------------------------- what
@pytest.mark.parametrize(
    ("network", "layers", "channels"),
    [("resnet50-32", 53, 26_560), ("resnet50-256", 53, 26_560), ("mobilenetv2", 52, 17_056)],
)
def test_a_network_has_all_its_layers(network, layers, channels):
    rows = cases.NETWORKS[network]
    assert sum(count for count, _ in rows) == layers
    assert sum(count * shape[1] for count, shape in rows) == channels  # half of the parameters that BN layers have
    assert len({shape for _, shape in rows}) == len(rows)


def test_there_is_every_kind_of_shape():
    assert {"resnet50-32", "resnet50-256", "mobilenetv2", "unet2d", "unet3d", "mlp", "tiny", "few"} == set(
        cases.NETWORKS
    )
    assert {len(shape) for _, shape in cases.NETWORKS["unet3d"]} == {5}
    assert {len(shape) for _, shape in cases.NETWORKS["mlp"]} == {2}
    assert {shape[0] for _, shape in cases.NETWORKS["resnet50-256"]} == {256}


def test_the_help_names_networks_dtypes_and_operations(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(cases.NETWORKS) in text
    assert ",".join(DTYPES) in text
    assert {name.split("+")[0] for name in cases.OPERATIONS} == {"forward", "backward", "eval"}
    assert {"eval+relu", "eval+add+relu"} < set(cases.OPERATIONS)
    assert "forward,backward,eval,each" in text


def test_every_operation_names_its_outputs():
    assert len(cases.OPERATIONS) == 9
    assert cases.OPERATIONS["eval"].outputs == cases.OPERATIONS["forward+relu"].outputs == ("y",)
    assert cases.OPERATIONS["backward+add+relu"].outputs == ("dx", "dweight", "dbias", "dresidual")


def test_cases_are_all_combinations_those_of_a_tensor_together():
    found = cases.select(["few", "4x8"], ["f16", "f32"], ["nchw", "nhwc"], ["forward", "eval"])
    assert len(found) == (4 * 2 + 2) * 2 * 2  # layouts are of more than two axes
    assert str(found[0]) == "32x64x56x56 f16 nchw forward"
    assert str(found[-1]) == "4x8 f32 eval"
    tensors = [case.tensor for case in found]
    assert [t for t, before in zip(tensors, ["", *tensors], strict=False) if t != before] == list(
        dict.fromkeys(tensors)
    )
    only = cases.select(["few"], ["f32"], ["nchw"], ["forward", "backward"], only="14 f32 nchw b")
    assert list(map(str, only)) == ["32x256x14x14 f32 nchw backward"]


def exit_code(line):
    try:
        return main(line)
    except SystemExit as end:  # of argparse
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
    monkeypatch.setattr(gpus, "find", lambda: (None, "torch sees no CUDA device"))
    assert main(["bench", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "gpu-bn bench: --device cuda needs a GPU: torch sees no CUDA device\n"


# ------------------------------------------------------------------------------------------------------- proof
class Wrong(NumpyBackend):
    """Forgets the last element of every output; what no network would notice."""

    def normalize(self, saved, residual, out):
        super().normalize(saved, residual, out)
        out.flat[-1] += 0.01


def wrong_implementation(name="gpu_bn wrong", **options):
    return replace(NUMPY, name=name, build=implementations.ours(lambda _: Wrong()), **options)


def test_a_wrong_backend_is_not_timed_and_ends_the_command_with_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, wrong_implementation()])
    line = [*TINY, "--shapes", "4x6x5x7", "--ops", "forward,backward", "--out", str(tmp_path)]
    assert main(line) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED 4x6x5x7 f32 nchw forward by gpu_bn wrong: wrong: y[3, 5, 4, 6]: expected" in out
    measured = json.loads((tmp_path / "report.json").read_text())["measured"]
    refused = {(row["by"], row["operation"]): bool(row["refused"]) for row in measured}
    assert refused[("gpu_bn wrong", "forward")]
    assert not refused[("gpu_bn wrong", "backward")]  # of a forward call that was right in all that backward needs
    for row in measured:
        assert bool(row["seconds"]) is not bool(row["refused"])


def test_a_wrong_peer_is_not_timed_but_is_no_failure_of_ours(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        implementations, "IMPLEMENTATIONS", [NUMPY, replace(NUMPY, name="peer", ours=False, build=twice_as_much)]
    )
    assert main([*TINY, "--shapes", "4x6x5x7", "--ops", "forward", "--out", str(tmp_path)]) == 0
    assert "by peer: wrong: y is off by 1 of its root mean square" in capsys.readouterr().out


def twice_as_much(operation, problem, tier):
    call = NUMPY.build(operation, problem, tier)
    return lambda: (2 * call()[0],)


def test_what_raises_is_reported_and_the_others_are_timed(capsys, monkeypatch, tmp_path):
    def build(*_):
        raise RuntimeError("out of memory\nsomewhere")

    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY, replace(NUMPY, name="gpu_bn poor", build=build)])
    assert main([*TINY, "--shapes", "4x8", "--ops", "eval", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED 4x8 f32 eval by gpu_bn poor: RuntimeError: out of memory\n" in out
    assert re.search(r"  4x8 f32\n(    eval     gpu_bn cpu .*\n)?    eval     gpu_bn numpy", out)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "f64"])
def test_every_operation_of_every_cpu_subject_is_proved(dtype, layout):
    pytest.importorskip("torch")
    if dtype == "bf16":
        pytest.importorskip("ml_dtypes")
    entries = [measurement.Entry(s) for s in implementations.IMPLEMENTATIONS if s.device == "cpu" and s.default]
    entries += [
        measurement.Entry(s) for s in implementations.IMPLEMENTATIONS if s.name in ("torch cuDNN", "torch native")
    ]
    found = cases.select(["4x6x5x7"], [dtype], [layout], cases.OPERATIONS)
    tensors = measurement.Tensors(found[0])
    for case in found:
        for result in measurement.measure(case, tensors, entries, timing.CpuTimer(0, 0), 0):
            assert result.refused == result.not_served == ""
            assert result.error <= 1
            assert set(result.timings) == {"wall"}


def test_a_large_tensor_is_proved_on_some_of_its_channels():
    case = cases.Case((64, 8, 64, 64))
    checked = correctness.Reference(implementations.data(case))
    assert checked.channels.tolist() == [0, 7]
    small = correctness.Reference(implementations.data(cases.Case((4, 6, 5, 7))))
    assert small.channels.tolist() == list(range(6))


def test_data_lie_in_memory_as_the_case_says():
    first, last = (implementations.data(cases.Case((4, 6, 5, 7), layout=layout)).x for layout in ("nchw", "nhwc"))
    assert first.flags.c_contiguous
    assert last.transpose(0, 2, 3, 1).flags.c_contiguous
    assert len(np.unique(first)) == first.size


# ------------------------------------------------------------------------------------------------------ report
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of the command leaves; with what it has printed."""
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


def test_a_subject_of_one_module_or_another():
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


def refused(by, shape, why, ours=False, **options):
    return measurement.Result(cases.Case(shape), by, ours, refused=why, **options)


def test_what_a_peer_refuses_for_one_reason_is_one_line():
    from gpu_bn.bench.report import refusals

    results = [refused("peer", (size, 8), "out of luck") for size in (2, 3, 4)]
    results += [refused("ours", (size, 8), "wrong: y", ours=True) for size in (2, 3)]
    results += [measurement.Result(cases.Case((size, 8)), "ours", True, not_served="too odd") for size in (5, 6)]
    results += [measurement.Result(cases.Case((7, 8)), "ours", True, launches_unknown="AttributeError: n_regs")]
    results += [measurement.Result(cases.Case((8, 8)), "peer", False, not_served="by design")]
    assert refusals(results).splitlines() == [
        "NOT TIMED 2x8 f32 nchw forward by ours: wrong: y",
        "NOT TIMED 3x8 f32 nchw forward by ours: wrong: y",
        "NOT TIMED 2x8 f32 nchw forward and 2 more by peer: out of luck",
        "NOT TIMED 5x8 f32 nchw forward and 1 more by ours: too odd",
        "LAUNCHES UNKNOWN of 7x8 f32 nchw forward by ours: AttributeError: n_regs",
    ]


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


def test_names_of_subjects_are_unique_and_their_adapters_exist():
    names = [implementation.name for implementation in implementations.IMPLEMENTATIONS]
    assert len(set(names)) == len(names)
    assert {implementation.adapter for implementation in implementations.IMPLEMENTATIONS} <= set(testing.ADAPTERS)
    assert {s.adapter for s in implementations.IMPLEMENTATIONS if s.ours} <= set(registry.NAMES)


def test_layers_are_summed_as_often_as_the_network_has_them():
    results = [
        measurement.Result(cases.Case(shape), "x", True, timings={"wall": timing.Timing(1e-3, 0, 0, 1)})
        for shape in cases.shapes_of(["resnet50-32", "tiny"])
    ]
    lines = str(report.layers_table(results)[0]).splitlines()
    assert [line.split() for line in lines[3:-1]] == [["resnet50-32", "53", "f32", "nchw", "forward", "x", "53", "ms"]]
    assert report.layers_table(results[1:]) == []  # one is missing


def test_json_has_no_numbers_that_are_none(tmp_path):
    found = report.Report("gpu-bn bench", {}, [timed("x", 1.0)])
    found.results[0].error = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        found.write(tmp_path / "report.json")


# ------------------------------------------------------------------------------------------------ what to trust
def of(by, seconds, threads, ours=False):
    case = cases.Case((4, 8), layout="nc")
    found = {"wall": timing.Timing(seconds, seconds, seconds, 5)}
    ratios = {"wall": {"peer": 0.001}} if ours else {}
    return measurement.Result(case, by, ours, 0.1, timings=found, ratios=ratios, threads=threads, floor_bytes=64)


BUSY = [
    of("gpu_bn numpy", 12e-6, 1, True),
    of("peer", 20e-6, 1),
    of("gpu_bn numpy", 12e-6, 2, True),
    of("peer", 21e-3, 2),
]


def test_a_peer_that_threads_slow_down_is_flagged():
    (warning,) = report.slower_with_threads(BUSY)
    assert warning.startswith("UNSTEADY: peer takes up to 1050 times as long with more threads as with one (4x8 f32")
    assert report.slower_with_threads([*BUSY[:3], of("peer", 25e-6, 2)]) == []
    (table,) = report.measured_table(BUSY, 1e9)
    alone, together = (line.split() for line in str(table).splitlines() if " forward " in line)
    assert alone[1:4] == ["gpu_bn", "numpy", "1"]
    assert alone[-2:] == ["0.0200", "<0.01"]
    assert together[-2:] == ["21.0!", "<0.01"]
    assert "peer (ms)" in str(table)


def test_a_copy_that_moves_is_flagged(monkeypatch, tmp_path):
    bandwidths = iter([4e9, 2e9])
    monkeypatch.setattr(run, "cpu_copy_bandwidth", lambda _: next(bandwidths))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [NUMPY])
    line = ["bench", "--device", "cpu", "--seconds", "0.001", "--shapes", "4x8", "--ops", "eval"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert any(text.startswith("UNSTEADY: a copy had 4.00 GB/s before and 2.00 GB/s") for text in found["warnings"])
    assert {row["threads"] for row in found["measured"]} == {1, gpu_bn.get_num_threads()}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0123456, "0.0123"), (1, "1.00"), (12.34, "12.3"), (999.7, "1000"), (21000.4, "21000"), (0, "0")],
)
def test_three_digits(number, text):
    assert report.three_digits(number) == text
