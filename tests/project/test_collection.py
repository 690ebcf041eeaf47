"""Test that all processes of pytest-xdist collect the same names, and that torch has one thread in each."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT


@pytest.mark.exhaustive
def test_names_do_not_depend_on_the_order_of_sets():
    """Strings hash differently in each process, so the name of a test must not contain a set of strings.

    Otherwise names differ between processes, and pytest-xdist refuses to run anything.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "tests"]
    names = set()
    for seed in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        names.add(tuple(line for line in done.stdout.splitlines() if "::" in line))
    assert len(names) == 1
    assert len(names.pop()) > 1000


def test_torch_has_one_thread():
    assert pytest.importorskip("torch").get_num_threads() == 1
