"""Run scripts in a process where Triton interprets its kernels."""

import importlib.util
import os
import subprocess
import sys

import pytest

from support.paths import ROOT, TESTS


def interpreted(script, *arguments):
    """Run a script with Triton's interpreter in another process and return its output."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    command = [sys.executable, *script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
