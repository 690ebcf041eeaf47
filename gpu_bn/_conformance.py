"""``gpu-bn check``: the conformance cases on this machine's backends, in a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from threading import Event
from typing import NamedTuple

from gpu_bn import dispatch, testing
from gpu_bn._console import progress, table
from gpu_bn._info import unavailable


class Outcome(NamedTuple):
    """One case on one backend.

    Attributes:
        errors: per quantity, its largest error as a share of the error allowed.
        failure: what went wrong; empty if the case has passed.
    """

    case: testing.Case
    errors: dict[str, float]
    failure: str


def conformance(backend: str | None) -> bool:
    """Run the cases on one backend, or on all that can be had, and print what comes of it.

    Returns:
        Whether all have passed.

    Raises:
        BackendUnavailableError: the backend asked for cannot be had.
    """
    if backend is not None:
        dispatch.load(backend)
    passed = True
    for name in dispatch.NAMES if backend is None else (backend,):
        if why_not := unavailable(name):
            print(f"{name}: not run, {why_not}\n")
            continue
        cases = [*testing.cases(), *testing.extended_cases()]
        with progress(f"Checking {name}: {len(cases)} cases", len(cases)) as tick:
            outcomes = run_all(cases, name, tick)
        print(summary(name, outcomes))
        passed &= not any(outcome.failure for outcome in outcomes)
        if left := len(cases) - len(outcomes):
            print(
                f"The GPU does not answer since one of the last of these; {left} cases and later backends were not run."
            )
            break
    if left_out := testing.unavailable_cases():
        print(f"{len(left_out)} cases of bfloat16 were left out: the package ml_dtypes is not installed.")
    return passed


THREADS = {"cupy": min(os.cpu_count() or 1, 8)}
"""Of backends whose cases run side by side: most of their time goes to NVRTC, which compiles in several threads."""


def run_all(cases: Iterable[testing.Case], backend: str, tick: Callable[[int], None]) -> list[Outcome]:
    """Run the cases, up to one that breaks the GPU: after an access out of bounds all others would fail as well."""
    broken = Event()

    def outcome(case: testing.Case) -> Outcome | None:
        if broken.is_set():
            return None
        found = run(case, backend, tick)
        if found.failure and not answers(backend):
            broken.set()
        return found

    with ThreadPoolExecutor(THREADS.get(backend, 1)) as pool:
        return [found for found in pool.map(outcome, cases) if found is not None]


def answers(backend: str) -> bool:
    """Whether a backend's GPU, if it has one, still does what it is told."""
    try:
        if backend == "cupy":
            import_module("cupy").cuda.runtime.deviceSynchronize()
        elif backend == "triton":
            torch = import_module("torch")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception:  # each library has its own
        return False
    return True


def run(case: testing.Case, backend: str, tick: Callable[[int], None]) -> Outcome:
    """Run one case; whatever it raises is its failure."""
    try:
        return Outcome(case, testing.check(case, backend), "")
    except Exception as error:
        return Outcome(case, {}, f"{type(error).__name__}: {error}")
    finally:
        tick(1)


def summary(backend: str, outcomes: list[Outcome]) -> str:
    """The table, and a line for each failure."""
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
    return "\n".join([table(title, header, rows, caption), *failures])


def worst(outcomes: Iterable[Outcome]) -> tuple[str, str]:
    """The largest error of a group, and which quantity has it."""
    errors = [(share, name) for outcome in outcomes for name, share in outcome.errors.items()]
    return (f"{max(errors)[0]:.2g}", max(errors)[1]) if errors else ("-", "-")
