"""Test that the examples of README and docs/ print what the page says, and that CI runs the test command."""

import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from support.paths import ROOT

import gpu_bn

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(language):
    """Return the code blocks of all pages, also in lists. Blocks with a title show files and are left out."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for text in PAGES.values() for _, code in fence.findall(text)]


ELSEWHERE = ("import cupy", "init_process_group", "compile_cuda")
CPU = [code for code in blocks("python") if not any(word in code for word in ELSEWHERE)]


@pytest.mark.parametrize("code", CPU, ids=lambda code: code.splitlines()[3][:30])
def test_example(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_first_example_prints_what_readme_shows(tmp_path):
    code, shown = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == shown


def test_there_are_examples():
    assert len(CPU) >= 7


@pytest.mark.compile
def test_the_example_for_cupy(make_gpu, capsys):
    """The example runs as written on an emulated GPU."""
    (code,) = (code for code in blocks("python") if "import cupy" in code)
    gpu = make_gpu(80)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert ["forward" in name for name in gpu.launched[:2]] == [True, False]
    assert len(gpu.launched) == 3
    x = np.array([[1.0, 4.0, 2.0], [3.0, 8.0, 2.5], [5.0, 0.0, 1.5], [7.0, 4.0, 4.0]], np.float32)
    norm = gpu_bn.BatchNorm(3, activation="relu")
    norm.backward(norm(x))
    norm.weight -= 0.1 * norm.grad["weight"]
    norm.bias -= 0.1 * norm.grad["bias"]
    np.testing.assert_allclose(names["norm"](names["x"]), norm.eval()(x), rtol=1e-6)
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.compile
def test_the_example_for_the_emulator(compile_cuda, device):
    (code,) = (code for code in blocks("python") if "compile_cuda" in code)
    names = {}
    exec(compile(code, "emulator.md", "exec"), names)
    names["test_scale"](compile_cuda, device)


def test_the_example_of_training_learns(tmp_path):
    code = next(code for code in blocks("python") if "zero_grad" in code)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert float(done.stdout) < 1e-3


ENDED = """
from support.processes import gloo_threads
assert not gloo_threads()  # a thread that still works when the interpreter ends can abort the process
"""


@pytest.mark.slow  # torchrun and two processes, each of which imports torch
def test_the_example_of_several_processes(tmp_path):
    """The example runs as written by the command below it."""
    (code,) = (code for code in blocks("python") if "init_process_group" in code)
    (command,) = (block.split() for block in blocks("sh") if "torchrun" in block)
    (tmp_path / command[-1]).write_text(code + ENDED)
    assert command[0] == "torchrun"  # this command runs the module that is called below
    run = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment["PET_LOCAL_ADDR"] = "localhost"  # the machine's own name, torchrun's choice, may not resolve
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    digits = "".join(done.stdout.split())  # both processes may write at the same time, as in "11\n\n"
    first, second = digits[: len(digits) // 2], digits[len(digits) // 2 :]
    assert first == second
    assert float(first) != 0


def test_ci_runs_the_test_command():
    command = next(block.strip() for block in blocks("sh") if "[test]" in block)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
