"""Settings, hooks and fixtures of all tests."""

import gc
import os
import signal
import sys
from collections import Counter

# Set before NumPy and torch are loaded. Their threads spin at barriers, and if test processes share cores, threads wait
# for each other thousands of times in one depthwise convolution. Processes that tests start inherit the settings.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

# In a background job of a shell, SIGINT is ignored; tests of Ctrl-C need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# During collection the garbage collector would look through thousands of tests again and again.
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
    """Load the profile again before each file: torch's test code, which some files import, loads another one."""
    hypothesis.settings.load_profile("suite")


TIMEOUT = 300
"""The seconds after which a test fails."""


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(config, items):
    """Mark as slow the combinations that ``one_in`` excludes from a normal run, and give each test a timeout.

    An option in pyproject.toml would make pytest fail where the plugin pytest-timeout is not installed.
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
    """Turn garbage collection on for the objects that tests make, but not for the tests themselves.

    A kernel for the emulator has tens of thousands of objects. With the usual threshold, the collector would look
    through them so often that it takes ten times as long as making them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _collect_garbage():
    """Collect garbage after each module, and exclude the remaining objects, such as kernels, from later collections."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Include all objects in collections again: some libraries complain at exit otherwise."""
    gc.unfreeze()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Return the name of a backend; a test runs once for each."""
    return request.param


@pytest.fixture(autouse=True)
def _keep_num_threads():
    threads = gpu_bn.get_num_threads()
    yield
    gpu_bn.set_num_threads(threads)


@pytest.fixture
def forget_compilations():
    """Forget what torch has compiled in a test: torch limits the number of recompilations of a process."""
    yield
    import torch

    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path):
    """Make torch's default process group, of this process alone.

    It ends after the test's models: a DistributedDataParallel with the last reference to a group ends the group's
    threads while it holds Python's lock, for which they may wait.
    """
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Seed torch, so that random numbers do not depend on the tests that the process has run before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
