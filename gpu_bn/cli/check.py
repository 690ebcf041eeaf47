"""``gpu-bn check``: run the conformance cases on the backends of this machine and print tables."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import NamedTuple

from gpu_bn import __version__, registry, testing
from gpu_bn.cli.console import Table, progress
from gpu_bn.cli.info import cores, environment_facts, unavailable


class Outcome(NamedTuple):
    """The outcome of one case on one backend.

    Attributes:
        errors: the largest error of each quantity, as a share of the error allowed.
        failure: the message of the failure; empty if the case has passed.
    """

    case: testing.Case
    errors: dict[str, float]
    failure: str


class BackendResult(NamedTuple):
    """The outcomes of one backend, the number of cases that were not run, and the time that the others took."""

    backend: str
    outcomes: list[Outcome]
    not_run: int
    seconds: float

    @property
    def failed(self) -> int:
        """The number of cases that have failed."""
        return sum(bool(outcome.failure) for outcome in self.outcomes)

    @property
    def row(self) -> list[str]:
        """The cells of this backend in the table of all backends."""
        numbers = [len(self.outcomes), len(self.outcomes) - self.failed, self.failed, self.not_run]
        return [self.backend, *(str(number) for number in numbers), *worst(self.outcomes), f"{self.seconds:.0f}"]


MAX_WORKERS = 16
"""The most threads or processes: each needs memory on the CPU and on the GPU for its libraries."""


def conformance(backend: str | None, quick: bool = False, workers: int | None = None, path: Path | None = None) -> bool:
    """Run the cases on one backend, or on all available ones, and print the outcomes.

    Args:
        backend: the name of the backend; ``None`` stands for all that are available.
        quick: run few cases, which cover every value of every option with every dtype.
        workers: the number of cases that run side by side on a GPU. ``None`` stands for one for each core, up to
            :data:`MAX_WORKERS`.
        path: a file to write the results to, as JSON.

    Returns:
        Whether all cases have passed.

    Raises:
        BackendUnavailableError: the requested backend is not available.
    """
    if backend is not None:
        registry.load(backend)
    results: list[BackendResult] = []
    cases = [*testing.cases(), *testing.extended_cases()]
    cases = covering(cases) if quick else cases
    for name in registry.NAMES if backend is None else (backend,):
        if why_not := unavailable(name):
            print(f"{name}: not run, {why_not}\n")
            continue
        start = time.perf_counter()
        with progress(f"Checking {name}: {len(cases)} cases", len(cases)) as tick:
            outcomes = run_all(cases, name, tick, workers)
        not_run = len(cases) - len(outcomes)
        results.append(BackendResult(name, outcomes, not_run, time.perf_counter() - start))
        print(summary(name, outcomes))
        if not_run:
            print(
                f"The GPU stopped answering in one of the last cases; {not_run} cases and later backends were not run."
            )
            break
    if left_out := testing.unavailable_cases():
        print(f"{len(left_out)} cases of bfloat16 were left out: the package ml_dtypes is not installed.")
    facts = environment_facts()
    print("\nTo paste into an issue:\n")
    print(overview(results, facts, quick))
    if path is not None:
        path.write_text(as_json(results, facts, quick))
    return not any(result.failed for result in results)


def overview(results: Sequence[BackendResult], facts: Sequence[str], quick: bool) -> str:
    """Return one table of all backends, with the facts about the machine as its caption."""
    header = ["backend", "cases", "passed", "failed", "not run", "largest error / allowed", "quantity", "seconds"]
    title = f"gpu-bn {__version__} check{' --quick' if quick else ''}"
    return Table(title, header, [result.row for result in results], "; ".join(facts)).text()


def as_json(results: Sequence[BackendResult], facts: Sequence[str], quick: bool) -> str:
    """Return the results as JSON, with the message of each failure."""
    backends = {
        result.backend: {
            "cases": len(result.outcomes), "failed": result.failed, "not_run": result.not_run,
            "seconds": result.seconds, "largest_error": worst(result.outcomes),
            "failures": [{"case": str(o.case), "failure": o.failure} for o in result.outcomes if o.failure],
        }
        for result in results
    }  # fmt: skip
    report = {"gpu_bn": __version__, "quick": quick, "facts": list(facts), "backends": backends}
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def covering(cases: Iterable[testing.Case]) -> list[testing.Case]:
    """Choose cases in which each dtype occurs with every option value and every rank that it has in all cases."""
    names = [field.name for field in fields(testing.Case) if field.name not in ("shape", "dtype", "mean", "std", "eps")]
    seen: set[tuple[object, ...]] = set()
    chosen = []
    for case in cases:
        pairs = {(case.dtype, name, getattr(case, name)) for name in names} | {(case.dtype, "rank", len(case.shape))}
        if pairs - seen:
            chosen.append(case)
            seen |= pairs
    return chosen


THREADS, PROCESSES = ("cupy",), ("triton",)
"""The GPU backends whose cases run side by side, in threads or in processes. Most of the time goes to compilers: NVRTC
compiles in several threads, Triton in several processes.
"""


def run_all(
    cases: Sequence[testing.Case], backend: str, tick: Callable[[int], None], workers: int | None = None
) -> list[Outcome]:
    """Run the cases until one breaks the GPU. After an access out of bounds all later cases would fail as well.

    ``tick(1)`` is called for each case, also for those that are not run.
    """
    _BROKEN.clear()
    count = min(cores(), MAX_WORKERS) if workers is None else workers
    if backend in PROCESSES:
        return run_in_processes(cases, backend, tick, count)
    outcomes = []
    with ThreadPoolExecutor(count if backend in THREADS else 1) as pool:
        for outcome in pool.map(partial(run_unless_broken, backend=backend), cases):
            tick(1)
            if outcome is not None:
                outcomes.append(outcome)
    return outcomes


ENDED = "The process that compiled and ran this case ended, by a crash of the compiler or for lack of memory."
"""The failure of a case whose process has ended."""


def run_in_processes(
    cases: Sequence[testing.Case], backend: str, tick: Callable[[int], None], count: int
) -> list[Outcome]:
    """Run the cases in ``count`` processes. A case that ends its process has failed; the others run in new processes.

    When a process ends, its pool ends with it and does not tell which case was to blame. The cases that may have been
    under way then run in one process, where it is the first case without an outcome.
    """
    done: dict[int, Outcome | None] = {}

    def attempt(numbers: Sequence[int], processes: int) -> list[int]:
        """Run some cases in a new pool. Return the numbers of those that have no outcome, because the pool ended."""
        call = partial(run_unless_broken, backend=backend)
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures: dict[Future[Outcome | None], int] = {}
            with suppress(BrokenProcessPool):
                futures.update((pool.submit(call, cases[number]), number) for number in numbers)
            for future in as_completed(futures):
                with suppress(BrokenProcessPool):
                    done[futures[future]] = future.result()
                    tick(1)
        return [number for number in numbers if number not in done]

    left: Sequence[int] = range(len(cases))
    while left := attempt(left, count):
        suspects, left = left[: count + 1], left[count + 1 :]  # a pool hands out one case more than it has processes
        while suspects := attempt(suspects, 1):
            done[suspects[0]] = Outcome(cases[suspects[0]], {}, ENDED)
            tick(1)
            suspects = suspects[1:]
    return [outcome for number in sorted(done) if (outcome := done[number]) is not None]


_BROKEN = Event()
"""Set when the GPU no longer answers in this process."""


def run_unless_broken(case: testing.Case, backend: str) -> Outcome | None:
    """Run a case in any thread or process. Return ``None`` if the GPU no longer answers in that process."""
    if _BROKEN.is_set():
        return None
    outcome = run(case, backend)
    if outcome.failure and not answers(backend):
        _BROKEN.set()
    return outcome


def answers(backend: str) -> bool:
    """Tell whether the GPU of a backend still answers; ``True`` if it uses no GPU."""
    try:
        if backend == "cupy":
            import_module("cupy").cuda.runtime.deviceSynchronize()
        elif backend == "triton":
            torch = import_module("torch")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception:  # each library has its own types of errors
        return False
    return True


def run(case: testing.Case, backend: str) -> Outcome:
    """Run one case. Any exception is recorded as its failure."""
    try:
        return Outcome(case, testing.check(case, backend), "")
    except Exception as error:
        return Outcome(case, {}, f"{type(error).__name__}: {error}")


def summary(backend: str, outcomes: list[Outcome]) -> str:
    """Return the table of one backend's outcomes by dtype and mode, and a line for each failure."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.case.dtype, outcome.case.mode), []).append(outcome)
    rows = []
    for (dtype, mode), members in sorted(groups.items()):
        failed = sum(bool(outcome.failure) for outcome in members)
        rows.append([dtype, mode, str(len(members)), str(failed or "-"), *worst(members)])
    header = ["dtype", "mode", "cases", "failed", "largest error / allowed", "quantity"]
    caption = "Errors are against a float64 oracle, forward and backward, of the cases that have passed."
    failures = [f"FAILED {outcome.case}\n  {outcome.failure}" for outcome in outcomes if outcome.failure]
    title = f"{backend}: {len(outcomes) - len(failures)} of {len(outcomes)} cases have passed"
    return "\n".join([str(Table(title, header, rows, caption)), *failures])


def worst(outcomes: Iterable[Outcome]) -> tuple[str, str]:
    """Return the largest error of some outcomes as a share of the allowed, and the quantity that has it."""
    errors = [(share, name) for outcome in outcomes for name, share in outcome.errors.items()]
    return (f"{max(errors)[0]:.2g}", max(errors)[1]) if errors else ("-", "-")
