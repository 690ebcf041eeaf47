"""What all tests share: the backends under test, the emulator's fixtures, and settings put back after each test."""

import gc
import os
import signal
import sys
from collections import Counter

# Before NumPy and torch are loaded: their threads spin at barriers, and those of processes that share cores wait for
# each other's turns, thousands of times in one depthwise convolution. Processes that tests start have these too.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

# A shell's background jobs ignore Ctrl-C, and so would tests of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The collector would go through thousands of tests that are there to stay, again and again.
gc.disable()

import hypothesis
import pytest
from emulator.fixtures import caught_faults, compile_cuda, compile_triton, device, pytest_terminal_summary
from support.cupy_on_emulator import make_gpu

import gpu_bn

__all__ = ["caught_faults", "compile_cuda", "compile_triton", "device", "make_gpu", "pytest_terminal_summary"]

BACKENDS = ["numpy", "cpu"]

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


def pytest_collectstart() -> None:
    """Choose the profile again before each file: torch's own test code, which some import, chooses another."""
    hypothesis.settings.load_profile("suite")


TIMEOUT = 300
"""Seconds that a test may take."""


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(config, items):
    """Mark as slow what ``one_in`` leaves to the long run.

    Give each test a timeout, if the plugin is there: an option of its own in pyproject.toml would need it.
    """
    places = Counter()
    for item in items:
        if (mark := item.get_closest_marker("one_in")) and not {"slow", "exhaustive"} & set(item.keywords):
            test = item.nodeid.partition("[")[0]
            if places[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            places[test] += 1
        if config.pluginmanager.hasplugin("timeout") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT))


def pytest_collection_finish():
    """Let the garbage collector look at what tests make, and no more at the tests.

    A kernel for the emulator is tens of thousands of objects: with the usual threshold, looking through them again and
    again takes ten times as long as to make them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _collected():
    """Collect what a module leaves, and look no more at what is kept of it, such as kernels for the emulator."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let it end everything with the process: some libraries complain of what is left."""
    gc.unfreeze()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Return the name of each backend in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _keep_num_threads():
    threads = gpu_bn.get_num_threads()
    yield
    gpu_bn.set_num_threads(threads)


@pytest.fixture
def forget_compilations():
    """Forget what torch has compiled in a test: its limit of recompilations is of a process."""
    yield
    import torch

    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Seed torch, or else what a test draws depends on the tests that its process has run before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
