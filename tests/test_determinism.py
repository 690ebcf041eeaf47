"""Equal inputs give equal bits: from run to run, and for any number of threads."""

import numpy as np
import pytest
from support import same_bits

import gpu_bn
from gpu_bn.backends import _sweep
from gpu_bn.testing import Case, build, cases, run

LARGE = [
    Case((20, 64, 60, 60), activation="relu", residual=True),
    Case((20, 64, 60, 60), layout="channels_last"),
    Case((5000, 1000), activation="relu"),
    Case((20, 500, 21, 21), mean=50.0),
]
SMALL = [case for case in cases() if 4_000 < np.prod(case.shape) < 50_000]


@pytest.mark.parametrize("case", SMALL[::3], ids=str)
def test_runs_are_equal(case, backend):
    assert same_bits(run(build(case), backend), run(build(case), backend))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_threads_do_not_change_a_bit_however_small_the_tensor(case, monkeypatch):
    monkeypatch.setattr(_sweep, "THREADED", 1)
    results = []
    for threads in (1, 2, 5):
        gpu_bn.set_num_threads(threads)
        results.append(run(build(case)))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_threads_do_not_change_a_bit_of_large_tensors(case):
    assert np.prod(case.shape) >= _sweep.THREADED
    problem, results = build(case), []
    for threads in (1, 2):
        gpu_bn.set_num_threads(threads)
        results.append(run(problem))
    assert same_bits(*results)


def test_saving_for_backward_does_not_change_the_output(backend):
    problem = build(Case((16, 8, 12, 12), activation="silu"))
    arguments = problem.x, None, None, problem.weight, problem.bias, True
    y = gpu_bn.batch_norm(*arguments, activation="silu", backend=backend)
    assert same_bits(y, gpu_bn.batch_norm_forward(*arguments, activation="silu", backend=backend)[0])


def test_a_channel_does_not_depend_on_its_neighbours(backend):
    problem = build(Case((16, 8, 12, 12), mean=100.0, mode="train_no_stats"))
    y = gpu_bn.batch_norm(problem.x, training=True, backend=backend)
    other = problem.x.copy()
    other[:, ::2] *= 3
    assert same_bits(gpu_bn.batch_norm(other, training=True, backend=backend)[:, 1::2], y[:, 1::2])


@pytest.mark.parametrize(
    ("threads", "error", "text"),
    [
        (0, ValueError, "at least 1 thread, got 0"),
        (-1, ValueError, "at least 1 thread, got -1"),
        (2.5, TypeError, "threads should be an int, got float"),
        ("2", TypeError, "threads should be an int, got str"),
    ],
)
def test_a_number_of_threads_that_cannot_be_is_refused(threads, error, text):
    before = gpu_bn.get_num_threads()
    with pytest.raises(error, match=text):
        gpu_bn.set_num_threads(threads)
    assert gpu_bn.get_num_threads() == before
