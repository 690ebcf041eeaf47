"""Measuring one case: each implementation makes its call, which is compared with the oracle and only then timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.correctness import TENSORS, Reference, problem_of
from gpu_bn.bench.implementations import Implementation, data
from gpu_bn.bench.model import work_of
from gpu_bn.bench.timing import TimedCall, Timer, Timing, in_words, take_samples
from gpu_bn.plan import LaunchPlan, NoPlanError
from gpu_bn.spec import VECTORS
from gpu_bn.testing import ADAPTERS, Problem


@dataclass
class Result:
    """What was found of one implementation's call.

    Attributes:
        case: what was computed.
        by: the implementation; ``ours`` is whether it is one of this library.
        error: the largest error as a share of the error allowed.
        refused: why it was not timed, if it is wrong or failed.
        not_served: why it does not take the case.
        timings: its times, by regime.
        ratios: our time over a peer's, by regime, then by peer.
        plan: what a GPU backend of ours launched; ``registers`` is the most of its kernels.
        floor_bytes: the case's bytes if every tensor is read and written once.
        threads: how many, if a CPU was timed with more than one number of them.
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
    floor_bytes: int = 0
    threads: int | None = None

    @property
    def tier(self) -> str:
        """The tier that was launched."""
        if self.plan is None:
            return "-"
        return self.plan.tier if self.case.operation.training else "one pass"

    @property
    def regime(self) -> str:
        """The first regime that was measured: cold on a GPU."""
        return next(iter(self.timings), "")

    @property
    def best(self) -> Timing | None:
        """The timing in that regime."""
        return self.timings.get(self.regime)

    @property
    def bandwidth(self) -> float:
        """The floor's bytes per second; 0 if nothing was timed."""
        return 0.0 if self.best is None else self.floor_bytes / self.best.median

    def as_json(self) -> dict[str, Any]:
        """Return what the report keeps."""
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
    """The data of all cases of one tensor: made once, converted once for each library, with one reference."""

    def __init__(self, case: Case) -> None:
        self.problem = data(case)
        self.reference = Reference(self.problem)
        self._converted: dict[str, dict[str, Any]] = {}

    def of(self, adapter: str, operation: Operation) -> Problem:
        """Return an operation's problem in the arrays of a library; each call gets running statistics of its own."""
        convert, problem = ADAPTERS[adapter].to_backend, problem_of(operation, self.problem)
        if adapter not in self._converted:
            self._converted[adapter] = {name: convert(getattr(self.problem, name)) for name in TENSORS}
        tensors = {name: t for name, t in self._converted[adapter].items() if getattr(problem, name) is not None}
        return replace(problem, **tensors, **{name: convert(getattr(problem, name).copy()) for name in VECTORS})


def measure(
    case: Case, tensors: Tensors, implementations: Iterable[Implementation], timer: Timer, seconds: float
) -> list[Result]:
    """Compare each implementation's call with the oracle, and time those that are right."""
    results, calls = {}, {}
    for implementation in implementations:
        name = implementation.name
        results[name] = Result(case, name, implementation.ours, floor_bytes=work_of(case).floor_bytes)
        call = _checked_call(implementation, tensors, results[name])
        if call is not None:
            calls[name] = call
    for regime in timer.regimes:
        samples = take_samples(calls, timer, regime, seconds)
        for name, error in samples.errors.items():
            results[name].refused = error
            calls.pop(name)
        for name, found in samples.seconds.items():
            results[name].timings[regime] = Timing.of(found)
            if results[name].ours:
                others = [other for other in samples.seconds if not results[other].ours]
                results[name].ratios[regime] = {other: samples.ratio(name, other) for other in others}
    return list(results.values())


def _checked_call(implementation: Implementation, tensors: Tensors, result: Result) -> TimedCall | None:
    """Return a call whose outputs are right; what was found is noted in the result."""
    operation = result.case.operation
    result.not_served = implementation.refuses(result.case)
    if result.not_served:
        return None

    launches: Sequence[Any] = ()

    def on_plan(plan: LaunchPlan, found: Sequence[Any]) -> None:
        nonlocal launches  # of a backward call, the forward call before it is planned first
        result.plan, launches = plan, found

    try:
        with implementation.setting():
            problem = tensors.of(implementation.adapter, operation)
            options = {"tier": implementation.tier, "on_plan": on_plan} if implementation.ours else {}
            call = implementation.build(operation, problem, **options)
            result.error = tensors.reference.check(implementation, operation, call())
            registers = [launch.registers for launch in launches if launch.registers is not None]
            result.registers = max(registers, default=None)
    except (BackendUnavailableError, NoPlanError) as reason:
        result.not_served = in_words(reason)
    except AssertionError as error:
        result.refused = f"wrong: {in_words(error).removeprefix('AssertionError: ')}"
    except Exception as error:  # of any library: the others are timed all the same
        result.refused = in_words(error)
    if result.refused or result.not_served:
        return None

    def within_setting() -> Any:
        with implementation.setting():
            return call()

    return within_setting
