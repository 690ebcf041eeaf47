"""The CUDA kernels compiled by g++ for the CPU (``tests/host``): a second execution beside the emulator, by another
compiler and another runtime, under the address, undefined-behaviour and thread sanitizers.

Where both do the same arithmetic, results are equal to the last bit: with multiplications and additions rounded one
after the other (NVRTC's ``--fmad=false``, g++'s ``-ffp-contract=off``; an explicit ``fma`` is one rounding in both).
By default NVRTC fuses them where it likes, which changes last bits; functions such as ``exp`` are each library's own;
and CuPy flushes float32 numbers below 1.2e-38, which g++ does not. So those are compared with the oracle only.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
from emulator import Checks, Device
from host import compile as host_compile
from host.run import Job, Shared, results, run_jobs
from support import cuda_faults as faults

from gpu_bn.testing import Case

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(host_compile.compiler() is None, reason="g++ is not installed"),
]

SLICE = [
    Job("cta", Case((3, 2, 41, 8), activation="relu", residual=True)),
    Job("cta", Case((40, 12), "float16", activation="relu")),
    Job("cluster", Case((3, 3, 41, 12), "float64")),
    Job("cooperative", Case((3, 5, 4, 8), "bfloat16", layout="channels_last", mode="train_no_stats")),
    Job("split", Case((4, 2, 64, 32), affine="none", activation="leaky_relu")),
    Job("split", Case((6, 3, 5, 7), mask="random", virtual_batch_size=2)),
    Job("split", Shared()),
]
MEETING = list(itertools.takewhile(lambda planted: planted.fault != "one vector too many", faults.PLANTED))
"""The planted faults of barriers, copies, fences and counters."""
MARKS = {
    "cooperative: relaxed wait": (),
    **dict.fromkeys(["cluster: no barrier before leaving", "split: ticket without fences"], pytest.mark.slow),
    "block sum: no barrier before reuse": pytest.mark.slow,
    **dict.fromkeys(["cluster: relaxed barrier", "block sum: no barrier before reading"], pytest.mark.slow),
}
"""Of the normal and of the long run; each fault takes a compilation. The emulator is given all in test_faults.py."""
EXPECTED = ("data race", "wrong result", "shared memory of a block that has ended", "deadlock")


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=() if index in (0, 5, 6) else pytest.mark.slow) for index, job in enumerate(SLICE)],
    ids=lambda job: f"{job.tier} {job.case}",
)
def test_two_executions_agree_to_the_last_bit(job, tmp_path, make_gpu, monkeypatch):
    if host_compile.runtime("address") is None:
        pytest.skip("g++ has no AddressSanitizer")
    (outcome,) = run_jobs([job], "address", tmp_path)
    assert outcome.fault == "", outcome.said
    emulated = make_gpu(90, job.tier, Device(checks=Checks(races=False, initialised=False)))
    cuda_sources = importlib.import_module("gpu_bn.backends.cupy.sources")  # which this backend has imported
    monkeypatch.setattr(cuda_sources, "OPTIONS", (*cuda_sources.OPTIONS, "--fmad=false"))
    expected = results(job.case, emulated.backend)
    assert outcome.results.keys() == expected.keys()
    for name, array in expected.items():
        assert outcome.results[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------------------------ races
RACES = {"cooperative": (), "cluster": pytest.mark.slow}
"""The tiers whose blocks wait for each other; the others are tried by hand."""


def under_threads(job, tmp_path):
    if host_compile.runtime("thread") is None:
        pytest.skip("g++ has no ThreadSanitizer")
    return run_jobs([job], "thread", tmp_path)[0]


@pytest.mark.parametrize(
    "planted",
    [pytest.param(planted, marks=MARKS.get(planted.fault, pytest.mark.exhaustive)) for planted in MEETING],
    ids=lambda planted: planted.fault,
)
def test_a_planted_fault_of_a_meeting_is_found(planted, tmp_path, caught_faults):
    outcome = under_threads(Job(planted.tier, planted.case, planted.edits, times=2), tmp_path)
    caught_faults[f"CUDA by g++: {planted.fault}"] = f"{outcome.fault}: ThreadSanitizer or the oracle"
    assert outcome.fault.startswith(EXPECTED), outcome.said[-2000:]


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=RACES.get(job.tier, pytest.mark.exhaustive)) for job in SLICE],
    ids=lambda job: f"{job.tier} {job.case}",
)
def test_the_kernels_have_no_data_race(job, tmp_path):
    outcome = under_threads(job, tmp_path)
    assert outcome.fault == "", outcome.said[-2000:]
