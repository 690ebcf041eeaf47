"""A call on an emulated GPU that raises changes nothing: a MemoryError at each of its last calls into C."""

import sys
from functools import partial

import numpy as np
import pytest
from emulator import Checks, Device
from support import rng
from support.injection import at_c_call, at_line, run_with_error

import gpu_bn

pytestmark = pytest.mark.compile


def data(seed=0):
    return rng(seed).standard_normal((6, 3, 8)).astype(np.float32)


CALLS = {
    "ghost batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": (2.0, 1.0)},
    "mask": {"mask": rng(2).random((6, 1, 8)) < 0.7},
}
LATE = 14
"""The number of calls into C that are tested: the last ones, which allocate memory and write the outputs."""
WRITING = 3
"""The number of calls into C at the end that write the statistics; they allocate nothing."""


def require_all_or_nothing(own, options, **how):
    """Require that a failing call changes all or nothing; ``own`` makes an array of the backend's library."""
    options = {name: own(value) if name == "mask" else value for name, value in options.items()}

    def attempt(number):
        """Return whether the call raised, how many calls into C it made, and the bytes of its arrays afterwards."""
        x, mean, var = (own(array) for array in (data(), np.zeros(3, np.float32), np.ones(3, np.float32)))
        error = MemoryError()
        call = lambda: gpu_bn.batch_norm(x, mean, var, training=True, out=x, **options, **how)  # noqa: E731
        raised, places = run_with_error(call, sys.setprofile, at_c_call(number, error), error)
        return raised, places, [np.asarray(one).tobytes() for one in (x, mean, var)]

    attempt(-1)
    raised, places, new = attempt(-1)
    old = [array.tobytes() for array in (data(), np.zeros(3, np.float32), np.ones(3, np.float32))]
    assert not raised
    assert places > LATE
    for number in range(places - LATE, places):
        raised, _, found = attempt(number)
        assert raised
        assert found in (old, new) or number >= places - WRITING, (number, places)


@pytest.mark.parametrize("name", ["mask", "renorm"])
def test_memory_that_runs_out_on_emulated_cuda(name, make_gpu):
    gpu = make_gpu(80, None, Device(checks=Checks(races=False)))
    require_all_or_nothing(gpu.asarray, CALLS[name])


@pytest.mark.parametrize("name", ["ghost batches", "mask"])
def test_memory_that_runs_out_on_emulated_triton(name, compile_triton):
    torch = pytest.importorskip("torch")
    from support.triton_backends import EmulatedBackend

    backend = EmulatedBackend(Device(checks=Checks(races=False)), compile_triton)
    require_all_or_nothing(lambda array: torch.from_numpy(array.copy()), CALLS[name], backend=backend)


def test_ctrl_c_between_the_statistics_of_an_emulated_gpu(make_gpu):
    """Mean and variance change together, also where the phases are separate launches and there is no counter."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False)))
    x, start = gpu.asarray(data()), (np.zeros(3, np.float32), np.ones(3, np.float32))

    def attempt(number):
        """Return the new mean and variance, whether the call raised, and how many lines it ran."""
        mean, var = map(gpu.asarray, start)
        call = partial(gpu_bn.batch_norm, x, mean, var, training=True, renorm=(2.0, 1.0))
        raised, lines = run_with_error(call, sys.settrace, at_line(number, KeyboardInterrupt()), KeyboardInterrupt())
        return mean.get(), var.get(), raised, lines

    attempt(-1)
    *_, lines = attempt(-1)
    for number in range(lines - 24, lines):
        mean, var, raised, _ = attempt(number)
        assert raised
        assert np.any(mean != start[0]) == np.any(var != start[1])
