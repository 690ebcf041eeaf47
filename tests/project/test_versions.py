"""The record of other versions of torch and Triton, and the script that makes it."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import versions

RECORD = json.loads(versions.DATA.read_text())["rows"]


@pytest.mark.parametrize("found", RECORD, ids=lambda found: f"{found['torch']} {found['triton']}")
def test_every_version_has_passed(found):
    fewest = {"kernels": 100, "emulator": 11, "budget": 5, "layers": 100}
    assert found.keys() >= {"kernels", "emulator", "layers"}
    assert all(found[what]["ok"] and found[what]["passed"] >= fewest[what] for what in versions.PARTS if what in found)


def test_a_compiler_that_ends_the_process_is_noticed(monkeypatch, capsys):
    step = SimpleNamespace(kernel=SimpleNamespace(__name__="kernel"))
    monkeypatch.setattr(versions, "covering", lambda: [(arch, step, None) for arch in (75, 80, 90)])
    monkeypatch.setattr(
        versions,
        "attempt",
        lambda arch, *_: os.kill(os.getpid(), signal.SIGKILL) if arch == 80 else "bad" * (arch == 90),
    )
    assert versions.compile_all() == 1
    printed = capsys.readouterr().out
    assert "kernel for sm_80: the compiler's process ended with" in printed
    assert "1 passed, 2 failed" in printed
