"""Fixtures: a device, and compilers, which skip a test if their package is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import compile as compiler
from .compile import Compiled
from .machine import Device
from .nvrtc import nvrtc_library


def load_triton(path: Path, name: str = "bn_forward") -> Any:
    """Import a kernel function from a file: Triton reads a kernel's text from the file that defines it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


_CAUGHT = "caught fault"


@pytest.fixture
def device() -> Device:
    """Return a device with every check on."""
    return Device()


@pytest.fixture(scope="session")
def compile_cuda() -> Callable[..., dict[str, Compiled]]:
    if nvrtc_library() is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    return compiler.compile_cuda


@pytest.fixture(scope="session")
def compile_triton() -> Callable[..., Compiled]:
    if compiler.triton_version() is None:
        pytest.skip("Triton is not installed: pip install triton")
    return compiler.compile_triton


class CaughtFaults:
    """Record planted faults and the messages of the checks that found them, for the summary of the test run.

    They are stored in the test's report, because a test may run in another process (pytest-xdist).
    """

    def __init__(self, node: pytest.Item) -> None:
        self.node = node

    def __setitem__(self, fault: str, message: str) -> None:
        self.node.user_properties.append((_CAUGHT, f"{fault}\n{message}"))


@pytest.fixture
def caught_faults(request: pytest.FixtureRequest) -> CaughtFaults:
    return CaughtFaults(request.node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    caught = [str(value) for report in reports for name, value in report.user_properties if name == _CAUGHT]
    if not caught:
        return
    if terminalreporter.verbosity < 1:
        terminalreporter.write_line(f"planted faults: {len(caught)}, each caught by a check that is named with -v")
        return
    terminalreporter.section("planted faults, and the check that caught each")
    for line in caught:
        fault, _, message = line.partition("\n")
        check, _, rest = message.replace("\n", " ").partition(": ")
        terminalreporter.write_line(f"{fault:42} {check:20} {rest[:96]}")
