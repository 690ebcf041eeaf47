"""The proof of the Triton kernels can fail: kernels with one bug each, and the check that notices it."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from emulator import Device, EmulatorError

from gpu_bn.plan import DEVICES
from gpu_bn.testing import check

pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.paths import ROOT
from support.triton_backends import EmulatedBackend
from support.triton_bugs import BUGS, Bug

from gpu_bn.backends.triton import arguments, backend, programs, steps

pytestmark = pytest.mark.compile

KERNELS = ROOT / "kernels" / "triton"
FIRST = {bug.noticed: bug.name for bug in reversed(BUGS)}.values()
"""The bugs of a normal run: the first for each text by which bugs are noticed."""


def plant(bug: Bug, folder: Path, monkeypatch) -> None:
    """Let the backend use a copy of the kernels with the bug."""
    package = folder / "mutant_kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in package.glob("*.py"):
        text = file.read_text()
        if file.name == bug.file:
            for right, wrong in ((bug.right, bug.wrong), *bug.more):
                assert right in text, f"{bug.name}: the text to replace is gone"
                text = text.replace(right, wrong)
        file.write_text(text.replace("gpu_bn.kernels.triton", "mutant_kernels"))
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("forward", "backward"):
        monkeypatch.setattr(steps, f"{module}_kernels", importlib.import_module(f"mutant_kernels.{module}"))
    functions = importlib.import_module("mutant_kernels.activations").functions
    for module in (arguments, backend, steps):
        monkeypatch.setattr(module, "functions", functions)


def check_bug(bug: Bug, compile_triton) -> None:
    planned = replace(DEVICES["a100"], arch=bug.arch, sms=bug.sms)
    check(bug.case, EmulatedBackend(Device(), compile_triton, 80, planned, tier=bug.tier))


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, marks=[] if bug.name in FIRST else pytest.mark.slow) for bug in BUGS],
    ids=lambda bug: bug.name.replace(" ", "-"),
)
def test_the_proof_notices(bug, tmp_path, monkeypatch, compile_triton, caught_faults):
    plant(bug, tmp_path, monkeypatch)
    monkeypatch.setattr(programs, "CHAIN", bug.chain)
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        check_bug(bug, compile_triton)
    message = str(caught.value)
    assert bug.noticed in message
    caught_faults[f"triton: {bug.name}"] = (
        message if isinstance(caught.value, EmulatorError) else f"conformance: {message}"
    )


@pytest.mark.parametrize(
    ("case", "tier", "arch", "sms"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] if index % 3 else [])
        for index, one in enumerate(sorted({(bug.case, bug.tier, bug.arch, bug.sms) for bug in BUGS}, key=str))
    ],
    ids=str,
)
def test_without_a_bug_the_same_cases_pass(case, tier, arch, sms, compile_triton):
    planned = replace(DEVICES["a100"], arch=arch, sms=sms)
    assert check(case, EmulatedBackend(Device(), compile_triton, 80, planned, tier=tier))
