"""Run cases of the CuPy backend on the CPU, each in a process of its own, under a sanitizer.

``python -m host.run SANITIZER FOLDER`` runs the jobs in ``FOLDER/jobs.pickle``; :func:`run_jobs` starts it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpu_bn.testing import Case, build, check, run

from . import gpu
from .compile import runtime

HERE = Path(__file__).parents[1]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1 suppress_equal_stacks=0 suppress_equal_addresses=0",
}
FOUND = {"data race": "ThreadSanitizer: data race", "wrong result": "AssertionError"}
"""The text that a sanitizer or the oracle writes, by the name of the fault."""


class Shared:
    """The steps of SyncBatchNorm besides its phases: packets of three processes, one empty, in two parts each."""

    def __str__(self) -> str:
        return "shared statistics"

    def run(self, backend: Any) -> dict[str, np.ndarray]:
        """Merge reports of 40 channels, add sums, and update running statistics; return the results by name."""
        sizes, own = {"header": 5, "room": 50, "unknown": -1.0}, backend.xp.asarray
        numbers = np.random.default_rng(0).standard_normal((2, 3, 55))
        numbers[:, :, :5], numbers[0, :, 6] = 0, (5, 0, 3)
        packets = [own(part) for part in numbers]
        moments = backend.merge_packets(packets, 40, *sizes.values())
        sums = backend.sum_packets(packets, 80, *sizes.values())
        running = own(np.ones(40, np.float16)), own(np.ones(40, np.float32)), own(np.array(4))
        backend.update_shared(*running, None, None, *moments)
        names = ("count", "mean", "var", "sums", "running_mean", "running_var", "counter")
        return dict(zip(names, map(np.asarray, (*moments, sums, *running)), strict=True))


class Job(NamedTuple):
    """A case on a tier, with edits of the kernel source, run ``times`` times."""

    tier: str
    case: Case | Shared
    edits: tuple[tuple[str, str], ...] = ()
    times: int = 1

    def edit(self, source: str) -> str:
        for old, new in self.edits:
            assert old in source, f"the kernels no longer hold {old!r}"
            source = source.replace(old, new)
        return source


class Outcome(NamedTuple):
    """The output of a job's process, and its results, or ``None`` if it failed."""

    said: str
    results: dict[str, np.ndarray] | None

    @property
    def fault(self) -> str:
        """The name of the fault that was found; empty if there was none."""
        if self.results is not None:
            return ""
        names = [name for name, text in FOUND.items() if text in self.said]
        if not names and "SHIM: " in self.said:
            return self.said.partition("SHIM: ")[2].splitlines()[0]
        return names[0] if names else self.said[-2000:]


def run_jobs(jobs: Sequence[Job], sanitizer: str, folder: Path) -> list[Outcome]:
    """Run jobs one after another and return their outcomes."""
    (folder / "jobs.pickle").write_bytes(pickle.dumps(list(jobs)))
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": str(runtime(sanitizer))}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, "-m", "host.run", sanitizer, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [_outcome(folder, index) for index in range(len(jobs))]


def _outcome(folder: Path, index: int) -> Outcome:
    said, results = folder / f"{index}.txt", folder / f"{index}.npz"
    if not results.exists():
        return Outcome(said.read_text(errors="replace"), None)
    with np.load(results) as found:
        return Outcome(said.read_text(errors="replace"), {name: found[name] for name in found.files})


def _run(job: Job, sanitizer: str, path: Path) -> None:
    backend = gpu.backend(pytest.MonkeyPatch(), job.tier, sanitizer)
    backend.gpu.edit_source = job.edit
    for _ in range(job.times):  # a later call finds the counters of the former
        if isinstance(job.case, Case):
            check(job.case, backend)
    np.savez(path, **{name: _storable(array) for name, array in results(job.case, backend).items()})


def results(case: Case | Shared, backend: Any) -> dict[str, np.ndarray]:
    """Return the results of a case on a backend, by name."""
    return run(build(case), backend) if isinstance(case, Case) else case.run(backend)


def _storable(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def main(sanitizer: str, folder: Path) -> None:
    """Run each job in a forked process, because a sanitizer that finds a fault ends the process."""
    for index, job in enumerate(pickle.loads((folder / "jobs.pickle").read_bytes())):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        output = os.open(folder / f"{index}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            _run(job, sanitizer, folder / f"{index}.npz")
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
