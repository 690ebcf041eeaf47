"""One case: each implementation makes its call, is proved, and only then timed, all in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.bench.cases import Case
from gpu_bn.bench.correctness import Proof, problem_of
from gpu_bn.bench.implementations import Subject, data
from gpu_bn.bench.launches import observe
from gpu_bn.bench.model import floor_bytes, work_of
from gpu_bn.bench.timing import Call, Timer, Timing, measure, said
from gpu_bn.plan import LaunchPlan, NoPlanError
from gpu_bn.testing import ADAPTERS, Problem

TENSORS = ("x", "dy", "residual")
VECTORS = ("weight", "bias", "running_mean", "running_var")


class Entry(NamedTuple):
    """A subject, and the tier that it is forced to take."""

    subject: Subject
    tier: str | None = None

    @property
    def name(self) -> str:
        """In the report."""
        return self.subject.name if self.tier is None else f"{self.subject.name} {self.tier}"


@dataclass
class Result:
    """What came of one implementation's call.

    Attributes:
        by: the implementation; ``ours`` whether it is one of this library.
        error: the largest error as a share of the error allowed.
        refused: why it was not timed, if it is wrong or failed.
        not_served: why it does not take the case.
        timings: by regime.
        ratios: by regime, then by peer: our time over the peer's.
        plan: what was launched, of a GPU backend of ours; ``registers`` the most of its kernels.
        unseen: why these two are not known, where they should be.
        floor_bytes: of the case.
        threads: on a CPU, if it was timed with more than one number of them.
    """

    case: Case
    by: str
    ours: bool
    error: float | None = None
    refused: str = ""
    not_served: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    plan: LaunchPlan | None = None
    registers: int | None = None
    unseen: str = ""
    floor_bytes: int = 0
    threads: int | None = None

    @property
    def tier(self) -> str:
        """The tier that was launched."""
        if self.plan is None:
            return "-"
        return self.plan.tier if self.case.operation.training else "one pass"

    @property
    def best(self) -> Timing | None:
        """In the first regime that was measured: cold on a GPU."""
        return next(iter(self.timings.values()), None)

    @property
    def bandwidth(self) -> float | None:
        """Bytes of the floor per second."""
        return None if self.best is None else self.floor_bytes / self.best.median

    def as_json(self) -> dict[str, Any]:
        """What the report keeps of it."""
        case, plan = self.case, self.plan
        return {
            "case": str(case), "shape": case.shape, "dtype": case.dtype, "layout": case.layout,
            "operation": str(case.operation), "by": self.by, "ours": self.ours, "threads": self.threads,
            "error": self.error, "refused": self.refused, "not_served": self.not_served,
            "seconds": {regime: timing._asdict() for regime, timing in self.timings.items()}, "ratios": self.ratios,
            "tier": self.tier, "registers": self.registers, "floor_bytes": self.floor_bytes,
            "moved_bytes": None if plan is None else plan.dram_bytes,
            "launches": None if plan is None else plan.launches,
        }  # fmt: skip


class Tensors:
    """The data of the cases of one tensor: made once, converted once for each library, proved by one oracle."""

    def __init__(self, case: Case) -> None:
        self.problem = data(case)
        self.proof = Proof(self.problem)
        self._converted: dict[str, dict[str, Any]] = {}

    def of(self, adapter: str, problem: Problem) -> Problem:
        """A problem in the arrays of a library; running statistics are the call's own."""
        convert = ADAPTERS[adapter].to_backend
        if adapter not in self._converted:
            self._converted[adapter] = {name: convert(getattr(self.problem, name)) for name in TENSORS}
        tensors = {name: t for name, t in self._converted[adapter].items() if getattr(problem, name) is not None}
        return replace(problem, **tensors, **{name: convert(getattr(problem, name).copy()) for name in VECTORS})


def trial(case: Case, tensors: Tensors, entries: Iterable[Entry], timer: Timer, seconds: float) -> list[Result]:
    """Prove and time a case. What is wrong is never timed."""
    results, calls = {}, {}
    for entry in entries:
        result = Result(case, entry.name, entry.subject.ours, floor_bytes=floor_bytes(work_of(case)))
        results[entry.name] = result
        call = _proved(entry, case, tensors, result)
        if call is not None:
            calls[entry.name] = call
    for regime in timer.regimes:
        samples = measure(calls, timer, regime, seconds)
        for name, error in samples.errors.items():
            results[name].refused = error
            calls.pop(name)
        for name, found in samples.seconds.items():
            results[name].timings[regime] = Timing.of(found)
            if results[name].ours:
                others = [other for other in samples.seconds if not results[other].ours]
                results[name].ratios[regime] = {other: samples.ratio(name, other) for other in others}
    return list(results.values())


def _proved(entry: Entry, case: Case, tensors: Tensors, result: Result) -> Call | None:
    """A call that has given what it should; what came of it is noted in the result."""
    subject, operation = entry.subject, case.operation
    result.not_served = subject.refuses(case)
    if result.not_served:
        return None

    def make() -> Call:
        problem = tensors.of(subject.adapter, problem_of(operation, tensors.problem))
        return subject.build(operation, problem, entry.tier)

    try:
        with subject.setting():
            call = make()
            result.error = tensors.proof.check(subject, operation, call())
            if subject.ours:
                _look(subject, make, result)
    except (BackendUnavailableError, NoPlanError) as reason:
        result.not_served = said(reason)
    except AssertionError as error:
        result.refused = f"wrong: {said(error).removeprefix('AssertionError: ')}"
    except Exception as error:  # of any library: the others are timed all the same
        result.refused = said(error)
    if result.refused or result.not_served:
        return None

    def within_setting() -> Any:
        with subject.setting():
            return call()

    return within_setting


def _look(subject: Subject, make: Callable[[], Call], result: Result) -> None:
    """Note what a proved call launches; a time without it is better than none."""
    try:
        seen = observe(subject.adapter, make)
        result.plan, result.registers = seen.plan, max(seen.registers, default=None)
    except Exception as error:  # of the libraries whose insides are looked at
        result.unseen = said(error)
