"""``gpu-bn check``: the conformance cases on this machine's backends, in a table."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import NamedTuple

from gpu_bn import __version__, registry, testing
from gpu_bn.cli.console import Table, progress
from gpu_bn.cli.info import cores, facts_of_cuda, unavailable


class Outcome(NamedTuple):
    """One case on one backend.

    Attributes:
        errors: per quantity, its largest error as a share of the error allowed.
        failure: what went wrong; empty if the case has passed.
    """

    case: testing.Case
    errors: dict[str, float]
    failure: str


class Found(NamedTuple):
    """One backend's outcomes, how many cases were not run, and how long it took."""

    backend: str
    outcomes: list[Outcome]
    left: int
    seconds: float

    @property
    def failed(self) -> int:
        """How many cases have failed."""
        return sum(bool(outcome.failure) for outcome in self.outcomes)

    @property
    def row(self) -> list[str]:
        """Return a line of the table of all backends."""
        numbers = [len(self.outcomes), len(self.outcomes) - self.failed, self.failed, self.left]
        return [self.backend, *(str(number) for number in numbers), *worst(self.outcomes), f"{self.seconds:.0f}"]


MOST_WORKERS = 16
"""Threads or processes, each with what a library needs of memory, on the CPU and the GPU."""


def conformance(
    backend: str | None, quick: bool = False, workers: int | None = None, results: Path | None = None
) -> bool:
    """Run the cases on one backend, or on all available ones, and print the outcomes.

    Args:
        backend: its name.
        quick: run few cases, which cover every value of every option with every dtype.
        workers: how many cases run side by side on a GPU; ``None`` is one for each core, up to :data:`MOST_WORKERS`.
        results: where to write them as JSON.

    Returns:
        Whether all have passed.

    Raises:
        BackendUnavailableError: the backend asked for is not available.
    """
    if backend is not None:
        registry.load(backend)
    found: list[Found] = []
    cases = [*testing.cases(), *testing.extended_cases()]
    cases = covering(cases) if quick else cases
    for name in registry.NAMES if backend is None else (backend,):
        if why_not := unavailable(name):
            print(f"{name}: not run, {why_not}\n")
            continue
        start = time.perf_counter()
        with progress(f"Checking {name}: {len(cases)} cases", len(cases)) as tick:
            outcomes = run_all(cases, name, tick, workers)
        found.append(Found(name, outcomes, len(cases) - len(outcomes), time.perf_counter() - start))
        print(summary(name, outcomes))
        if left := found[-1].left:
            print(
                f"The GPU does not answer since one of the last of these; {left} cases and later backends were not run."
            )
            break
    if left_out := testing.unavailable_cases():
        print(f"{len(left_out)} cases of bfloat16 were left out: the package ml_dtypes is not installed.")
    facts = facts_of_cuda()
    print("\nTo paste into an issue:\n")
    print(overview(found, facts, quick))
    if results is not None:
        results.write_text(as_json(found, facts, quick))
    return not any(one.failed for one in found)


def overview(found: Sequence[Found], facts: Sequence[str], quick: bool) -> str:
    """Return one table of all backends, with the versions that it depends on."""
    header = ["backend", "cases", "passed", "failed", "not run", "largest error / allowed", "quantity", "seconds"]
    title = f"gpu-bn {__version__} check{' --quick' if quick else ''}"
    return Table(title, header, [one.row for one in found], "; ".join(facts)).text()


def as_json(found: Sequence[Found], facts: Sequence[str], quick: bool) -> str:
    """Return the outcomes for JSON, with the text of each failure."""
    backends = {
        one.backend: {
            "cases": len(one.outcomes), "failed": one.failed, "not_run": one.left, "seconds": one.seconds,
            "largest_error": worst(one.outcomes),
            "failures": [{"case": str(o.case), "failure": o.failure} for o in one.outcomes if o.failure],
        }
        for one in found
    }  # fmt: skip
    whole = {"gpu_bn": __version__, "quick": quick, "facts": list(facts), "backends": backends}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def covering(cases: Iterable[testing.Case]) -> list[testing.Case]:
    """Choose some cases in which each value of each field, and each rank, meets each dtype that it meets in all."""
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
"""Backends of a GPU, whose cases run side by side: most of their time goes to compilers. NVRTC compiles in several
threads, Triton in several processes.
"""


def run_all(
    cases: Sequence[testing.Case], backend: str, tick: Callable[[int], None], workers: int | None = None
) -> list[Outcome]:
    """Run the cases, up to one that breaks the GPU: after an access out of bounds all others would fail as well."""
    _BROKEN.clear()
    count = min(cores(), MOST_WORKERS) if workers is None else workers
    one = partial(run_unless_broken, backend=backend)
    executor: Executor = ThreadPoolExecutor(count if backend in THREADS else 1)
    if backend in PROCESSES and count > 1:
        executor = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    found = []
    with executor as pool:
        for outcome in pool.map(one, cases):
            tick(1)
            found += [] if outcome is None else [outcome]
    return found


_BROKEN = Event()
"""Whether this process's GPU has stopped answering."""


def run_unless_broken(case: testing.Case, backend: str) -> Outcome | None:
    """Run a case, in any thread or process; ``None`` if the process's GPU does not answer any more."""
    if _BROKEN.is_set():
        return None
    found = run(case, backend)
    if found.failure and not answers(backend):
        _BROKEN.set()
    return found


def answers(backend: str) -> bool:
    """Ask a backend's GPU, if it has one, whether it still answers."""
    try:
        if backend == "cupy":
            import_module("cupy").cuda.runtime.deviceSynchronize()
        elif backend == "triton":
            torch = import_module("torch")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception:  # each library raises types of its own
        return False
    return True


def run(case: testing.Case, backend: str) -> Outcome:
    """Run one case; whatever it raises is its failure."""
    try:
        return Outcome(case, testing.check(case, backend), "")
    except Exception as error:
        return Outcome(case, {}, f"{type(error).__name__}: {error}")


def summary(backend: str, outcomes: list[Outcome]) -> str:
    """Return the table, and a line for each failure."""
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
    """Return the largest error of a group, and which quantity has it."""
    errors = [(share, name) for outcome in outcomes for name, share in outcome.errors.items()]
    return (f"{max(errors)[0]:.2g}", max(errors)[1]) if errors else ("-", "-")
