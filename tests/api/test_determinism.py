"""Equal inputs give equal bits, from run to run."""

import numpy as np
import pytest
from support import same_bits
from support.conformance import USUAL

import gpu_bn
from gpu_bn.testing import Case, build, cases, run

SMALL = [case for case in cases() if 4_000 < np.prod(case.shape) < 50_000 and case.activation in USUAL]


@pytest.mark.parametrize("case", SMALL[::3], ids=str)
@pytest.mark.one_in(3)
def test_runs_are_equal(case, backend):
    assert same_bits(run(build(case), backend), run(build(case), backend))


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
