"""The CUDA kernels compiled by g++ for the CPU (``tests/host``): a second execution besides the emulator, with another
compiler and another runtime, under the address, undefined-behaviour and thread sanitizers.

Results are equal to the last bit if both do the same arithmetic. Neither may then fuse a multiplication and an addition
(``--fmad=false`` for NVRTC, ``-ffp-contract=off`` for g++). Functions such as ``exp`` differ between the libraries, and
CuPy flushes float32 numbers below 1.2e-38, which g++ does not: such cases are compared with the oracle only.
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
SYNC_FAULTS = list(itertools.takewhile(lambda planted: planted.fault != "one vector too many", faults.PLANTED))
"""The planted faults of barriers, copies, fences and counters."""
MARKS = {
    "cooperative: relaxed wait": (),
    **dict.fromkeys(["cluster: no barrier before leaving", "split: ticket without fences"], pytest.mark.slow),
    "block sum: no barrier before reuse": pytest.mark.slow,
    **dict.fromkeys(["cluster: relaxed barrier", "block sum: no barrier before reading"], pytest.mark.slow),
}
"""The faults of a normal and of a long run, since each takes a compilation; test_faults.py emulates all of them."""
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
    cuda_sources = importlib.import_module("gpu_bn.backends.cupy.sources")  # the module that this backend uses
    monkeypatch.setattr(cuda_sources, "OPTIONS", (*cuda_sources.OPTIONS, "--fmad=false"))
    expected = results(job.case, emulated.backend)
    assert outcome.results.keys() == expected.keys()
    for name, array in expected.items():
        assert outcome.results[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------------------------ races
RACES = {"cooperative": (), "cluster": pytest.mark.slow}
"""The tiers whose blocks wait for each other; the others run with ``-m exhaustive``."""


def run_under_thread_sanitizer(job, tmp_path):
    if host_compile.runtime("thread") is None:
        pytest.skip("g++ has no ThreadSanitizer")
    return run_jobs([job], "thread", tmp_path)[0]


@pytest.mark.parametrize(
    "planted",
    [pytest.param(planted, marks=MARKS.get(planted.fault, pytest.mark.exhaustive)) for planted in SYNC_FAULTS],
    ids=lambda planted: planted.fault,
)
def test_a_planted_synchronisation_fault_is_found(planted, tmp_path, caught_faults):
    outcome = run_under_thread_sanitizer(Job(planted.tier, planted.case, planted.edits, times=2), tmp_path)
    caught_faults[f"CUDA by g++: {planted.fault}"] = f"{outcome.fault}: ThreadSanitizer or the oracle"
    assert outcome.fault.startswith(EXPECTED), outcome.said[-2000:]


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=RACES.get(job.tier, pytest.mark.exhaustive)) for job in SLICE],
    ids=lambda job: f"{job.tier} {job.case}",
)
def test_the_kernels_have_no_data_race(job, tmp_path):
    outcome = run_under_thread_sanitizer(job, tmp_path)
    assert outcome.fault == "", outcome.said[-2000:]
