"""Test the output and the exit codes of the command ``gpu-bn``."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_bn
from gpu_bn import plan
from gpu_bn.bench import cases
from gpu_bn.cli.commands import DEMO_NEEDS, main, parser


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gpu-bn {gpu_bn.__version__}\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], "COMMAND"),
        (["info"], "backend"),
        (["check"], "--backend"),
        (["explain"], "--shape"),
        (["bench"], "--verify-model"),
        (["demo"], "--seeds"),
    ],
)
def test_help(command, says, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["train"],
        ["demo", "--seeds", "0"],
        ["demo", "--steps", "two"],
        ["check", "--backend", "jax"],
        ["bench", "--device", "tpu"],
        ["bench", "--seconds", "few"],
        ["bench", "--tiers", "some"],
        ["explain"],
        ["explain", "--shape", "4,x"],
        ["explain", "--shape", "4,0"],
        ["explain", "--shape", "4,8", "--dtype", "int8"],
        ["explain", "--shape", "4,8", "--device", "abacus"],
    ],
)
def test_a_line_that_is_not_understood_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    assert "usage: gpu-bn" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "demo"])
def test_a_backend_that_cannot_be_had_is_refused_with_its_reason(command, capsys, monkeypatch):
    def refuse(name):
        raise gpu_bn.BackendUnavailableError(f"{name} is not for this machine")

    monkeypatch.setattr(gpu_bn.registry, "load", refuse)
    assert main([command, "--backend", "cupy"]) == 1
    assert capsys.readouterr().err == f"gpu-bn {command}: cupy is not for this machine\n"


@pytest.mark.parametrize("module", DEMO_NEEDS)
def test_demo_without_its_extra_says_how_to_get_it(module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "pip install -e '.[demo]'" in said.err
    assert DEMO_NEEDS[module] in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--out", "no/such/folder/x.png"], "no folder no/such/folder"), (["--steps", "30"], "multiple of 20, got 30")],
)
def test_demo_refuses_what_it_cannot_do_before_it_starts(arguments, says, capsys):
    assert main(["demo", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-c", "import gpu_bn.cli, sys; sys.exit(gpu_bn.cli.main(['info']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


EXPLAIN = ["explain", "--shape", "32,64,56,56", "--dtype", "f16"]


def test_explain_says_what_the_function_says(capsys):
    assert main([*EXPLAIN, "--layout", "nhwc", "--device", "a100", "--residual", "--activation", "relu"]) == 0
    expected = gpu_bn.explain((32, 64, 56, 56), "float16", "nhwc", "a100", activation="relu", residual=True)
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_on_all_devices_is_a_table(capsys):
    assert main([*EXPLAIN, "--device", "all"]) == 0
    out = capsys.readouterr().out
    for device in plan.DEVICES.values():
        lines = [line for line in out.splitlines() if line.startswith(f"  {device.name} ")]
        assert [line.removeprefix(f"  {device.name}").split()[0] for line in lines] == ["forward", "backward"]
    assert "Times are a model, not measured" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "8"], "2 to 5 axes, got 1"),
        (["--shape", "1x8"], "Expected more than 1 value per channel when training, got input size (1, 8)"),
        (["--shape", "4,8,2", "--layout", "nc"], "layout 'nc' needs a shape of 2 axes, got 3"),
        (["--shape", "4,8", "--activation", "maxout"], "unknown activation 'maxout', expected one of identity"),
    ],
)
def test_explain_refuses_what_makes_no_sense(arguments, says, capsys):
    assert main(["explain", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["bench", "--shapes", "1x8"], "Expected more than 1 value per channel when training, got input size (1, 8)"),
        (["bench", "--threads", "100000"], "this process has"),
    ],
)
def test_other_commands_refuse_what_makes_no_sense(line, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ syntax and outputs
@pytest.mark.parametrize("shape", ["32,64,56,56", "32x64x56x56", "32X64x56x56", "32, 64, 56, 56", "32 x 64 x 56 x 56"])
@pytest.mark.parametrize("dtype", ["f16", "float16", "Float16"])
def test_one_syntax_for_shapes_and_dtypes(shape, dtype, capsys):
    assert main(["explain", "--shape", shape, "--dtype", dtype, "--device", "H100", "--layout", "NHWC"]) == 0
    assert "batch norm of 32x64x56x56 float16 nhwc" in capsys.readouterr().out
    options = parser().parse_args(["bench", "--shapes", f"few,{shape},tiny", "--dtype", dtype, "--device", "GPU"])
    assert cases.shapes_of(options.shapes) == cases.shapes_of(["few", "32x64x56x56", "tiny"])
    assert (options.dtype, options.device) == (["f16"], "cuda")


@pytest.mark.parametrize(
    "line",
    [
        ["demo", "--rate", "-1"],
        ["demo", "--rate", "nan"],
        ["bench", "--seconds", "-1"],
        ["bench", "--seconds", "inf"],
        ["bench", "--threads", "0"],
        ["check", "--processes", "0"],
    ],
)
def test_values_out_of_range_are_refused(line, capsys):
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    assert "expected a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "place", "says"),
    [
        ("bench", "--out", "file", "is not a folder, expected one for the report"),
        ("bench", "--out", "file/inside", "is not a folder, expected one for the report"),
        ("bench", "--page", "", "is a folder, expected the name of a file for the page"),
        ("demo", "--out", "", "is a folder, expected the name of a file for the figure"),
        ("demo", "--out", "picture", "names no picture format, expected one of "),
        ("demo", "--out", "picture.xyz", "names no picture format, expected one of "),
        ("check", "--json", "", "is a folder, expected the name of a file for the results"),
        ("info", "--json", "", "is a folder, expected the name of a file for the facts"),
    ],
)
def test_outputs_are_checked_before_the_work(command, option, place, says, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert main([command, option, str(tmp_path / place)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_device_is_no_place_for_results(command, capsys):
    assert main([command, "--out", "/dev/null"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def run_with(redirection, *arguments):
    """Run the command in a shell."""
    line = f'"{sys.executable}" -m gpu_bn {" ".join(arguments)} {redirection}'
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_line_and_what_was_measured_is_kept(tmp_path):
    done = run_with("> /dev/full", "info")
    assert (done.returncode, done.stderr) == (1, "gpu-bn info: No space left on device\n")
    done = run_with("> /dev/full", "--version")
    assert (done.returncode, done.stderr) == (1, "gpu-bn: No space left on device\n")
    tiny = ["--device", "cpu", "--seconds", "0", "--shapes", "4x8", "--ops", "eval", "--peers", "none"]
    done = run_with("> /dev/full", "bench", *tiny, "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "gpu-bn bench: No space left on device"
    assert json.loads((tmp_path / "report.json").read_text())["measured"]


def test_a_closed_standard_output_is_refused():
    done = run_with(">&-", "info")
    assert (done.returncode, done.stderr) == (1, "gpu-bn info: standard output is closed\n")


@pytest.mark.parametrize("command", ["info", "demo"])
def test_a_bad_number_in_the_environment_is_a_line(command, monkeypatch, capsys):
    monkeypatch.setenv("GPU_BN_NUM_THREADS", "abc")
    monkeypatch.setattr("gpu_bn.backends.cpu.threads._threads", 0)
    assert main([command]) == 1
    said = capsys.readouterr()
    number = "the environment variable GPU_BN_NUM_THREADS should be a whole number, got 'abc'"
    assert (said.out, said.err) == ("", f"gpu-bn {command}: {number}\n")


@pytest.mark.parametrize("command", ["info", "check", "explain", "bench", "demo"])
def test_an_interrupt_ends_with_130(command, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gpu_bn.cli.commands.run_{command}", interrupted)
    assert main([command, *(["--shape", "4x8"] if command == "explain" else [])]) == 130
    assert capsys.readouterr().err == f"gpu-bn {command}: interrupted\n"


def test_an_interrupt_while_the_command_is_imported_ends_with_130():
    code = """
import builtins, sys
imported = builtins.__import__
def interrupted(name, *rest):
    if name == "numpy":
        raise KeyboardInterrupt
    return imported(name, *rest)
builtins.__import__ = interrupted
from gpu_bn.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "gpu-bn: interrupted\n")


def test_explain_refuses_what_a_call_would_refuse(capsys):
    assert main(["explain", "--shape", "1x8"]) == 2
    assert "Expected more than 1 value per channel when training" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        gpu_bn.batch_norm(np.ones((1, 8)), training=True)
    assert gpu_bn.explain((1, 8), training=False)


def test_warm_up_compiles_once(capsys, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("gpu_bn.cli.warm_up.SHAPES", ((4, 3, 2, 8),))
    line = ["warm-up", "--activation", "relu"]
    assert main(line) == 0
    assert "kernels compiled in" in capsys.readouterr().out
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("0 kernels compiled in")


def test_warm_up_names_what_it_does_not_know(capsys):
    pytest.importorskip("numba")
    assert main(["warm-up", "--activation", "relux"]) == 2
    assert "unknown activation 'relux'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["warm-up", "--dtype", "f8"])


def test_warm_up_without_numba_says_what_installs_it():
    code = "import sys; sys.modules['numba'] = None; from gpu_bn.cli import main; sys.exit(main(['warm-up']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu-bn warm-up: backend 'cpu' cannot be used")
    assert "pip install -e '.[cpu]'" in done.stderr
