"""The README's examples run as written, and CI runs its test command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[3][:30])
def test_example(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_there_are_examples():
    assert len(blocks("python")) >= 3


def test_the_example_of_training_learns(tmp_path):
    code = next(code for code in blocks("python") if "zero_grad" in code)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 1e-3


def test_ci_runs_the_test_command():
    command = next(block.strip() for block in blocks("sh") if "[test]" in block)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
