"""A call on a GPU that raises has changed nothing: memory that runs out at every late call into C, on the emulator."""

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
"""Calls into C at the end of a call, in which its last memory is taken and its outputs are written."""
WRITING = 3
"""The last of them write the statistics, which takes no memory."""


def require_all_or_nothing(own, options, **how):
    """``own`` moves an array to where the backend has its arrays."""
    options = {name: own(value) if name == "mask" else value for name, value in options.items()}

    def attempt(number):
        """Where memory runs out: whether it was noticed, how many places there were, and what is there after it."""
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
    """Where the phases are launched one after another, and there is no counter."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False)))
    x, start = gpu.asarray(data()), (np.zeros(3, np.float32), np.ones(3, np.float32))

    def attempt(number):
        """A new mean and variance, whether Ctrl-C was noticed, and how many lines there were."""
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
