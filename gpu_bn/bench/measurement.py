"""Measuring one case: each implementation makes its call, which is compared with the oracle and only then timed.

A large tensor is compared on some of its channels, the first and the last among them. The call has worked on all of
them; the oracle computes these alone, because channels are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpu_bn.backends.protocol import BackendUnavailableError
from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.implementations import Implementation
from gpu_bn.bench.model import work_of
from gpu_bn.bench.timing import TimedCall, Timer, Timing, in_words, take_samples
from gpu_bn.plan import LaunchPlan, NoPlanError
from gpu_bn.spec import VECTORS
from gpu_bn.testing import ADAPTERS, Problem, Truth, compare, oracle, tolerance
from gpu_bn.testing.cases import numpy_dtype

TENSORS = ("x", "dy", "residual")
PERIOD = 4_194_301
"""The period of a tensor's values: a prime, which divides no size."""
ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes, as torch's do: a vector in a register is then one line of the cache."""
CHECKED_ELEMENTS = 250_000
"""About how many elements of a tensor are compared with the oracle; at least two channels."""
PEERS_ERROR = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-3, "float64": 1e-6}
"""The error allowed to a peer, by the tensors' dtype: the root mean square of its errors, as a share of the truth's. A
peer may round between its steps, which moves single elements across a ReLU's kink, and with them the gradients of the
vectors; this is enough to see that it computes the same thing."""


@dataclass
class Result:
    """What was found of one implementation's call.

    Attributes:
        error: the largest error as a share of the error allowed.
        refused: why it was not timed, if it is wrong or failed; ``not_served``, if it does not take the case.
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
    def median(self) -> float | None:
        """The median in that regime, in seconds; ``None`` if nothing was timed."""
        return self.timings[self.regime].median if self.timings else None

    @property
    def bandwidth(self) -> float:
        """The floor's bytes per second; 0 if nothing was timed."""
        return self.floor_bytes / self.median if self.median else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what the report keeps: the case's fields and the plan's, in place of case and plan."""
        found = vars(self) | vars(self.case) | {"case": self.case, "seconds": self.timings, "tier": self.tier}
        found |= {"moved_bytes": self.plan and self.plan.dram_bytes, "launches": self.plan and self.plan.launches}
        return {name: value for name, value in found.items() if name not in ("plan", "timings")}


def data(case: Case) -> Problem:
    """Return a case's tensors in NumPy, with a residual; the same for all operations on the tensor.

    Values repeat after :data:`PERIOD`, so that channels differ and a large tensor costs no time.
    """
    rng = np.random.default_rng(0)
    dtype, size, channels = numpy_dtype(case.dtype), int(np.prod(case.shape)), case.shape[1]
    noise = rng.normal(0.5, 1.5, (3, min(size, PERIOD)))

    def tensor(row: int) -> Any:
        memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        dense = memory[start : start + size * dtype.itemsize].view(dtype)
        dense[:] = np.resize(noise[row].astype(dtype), size)
        if case.layout != "nhwc":
            return dense.reshape(case.shape)
        return np.moveaxis(dense.reshape(case.shape[0], *case.shape[2:], channels), -1, 1)

    vectors: dict[str, Any] = {
        "running_mean": rng.normal(0.5, 0.1, channels), "running_var": rng.uniform(1, 4, channels),
        "weight": rng.uniform(0.5, 2, channels), "bias": rng.standard_normal(channels),
    }  # fmt: skip
    kind = np.float64 if case.dtype == "float64" else np.float32
    return Problem(
        x=tensor(0), dy=tensor(1), residual=tensor(2), training=True, momentum=0.1, eps=1e-5,
        activation=("identity", 0.0), channel_axis=1, **{name: each.astype(kind) for name, each in vectors.items()},
    )  # fmt: skip


def problem_of(operation: Operation, problem: Problem) -> Problem:
    """Return the problem with the operation's options, without the residual if the operation has none."""
    return replace(
        problem, training=operation.training, activation=("relu" if operation.relu else "identity", 0.0),
        residual=problem.residual if operation.residual else None,
    )  # fmt: skip


class Tensors:
    """The data of all cases of one tensor: made once, converted once for each library, compared with one oracle.

    ``channels`` are the indices of those that are compared.
    """

    def __init__(self, case: Case) -> None:
        self.problem = data(case)
        size, count = self.problem.x.size, case.shape[1]
        wanted = max(2, CHECKED_ELEMENTS * count // max(size, 1))
        self.channels = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))
        self._converted: dict[str, dict[str, Any]] = {}
        self._truths: dict[Operation, tuple[Problem, Truth]] = {}

    def of(self, adapter: str, operation: Operation) -> Problem:
        """Return an operation's problem in the arrays of a library; each call gets running statistics of its own."""
        convert, problem = ADAPTERS[adapter].to_backend, problem_of(operation, self.problem)
        if adapter not in self._converted:
            self._converted[adapter] = {name: convert(getattr(self.problem, name)) for name in TENSORS}
        tensors = {name: t for name, t in self._converted[adapter].items() if getattr(problem, name) is not None}
        return replace(problem, **tensors, **{name: convert(getattr(problem, name).copy()) for name in VECTORS})

    def check(self, implementation: Implementation, operation: Operation, outputs: tuple[Any, ...]) -> float:
        """Compare a call's outputs with the truth; return the largest error as a share of the error allowed.

        Raises:
            AssertionError: it is above 1; the message names the quantity.
        """
        forward = operation if operation.direction != "backward" else replace(operation, direction="forward")
        if forward not in self._truths:
            tensors = {name: getattr(self.problem, name)[:, self.channels] for name in TENSORS}
            vectors = {name: getattr(self.problem, name)[self.channels] for name in VECTORS}
            sample = problem_of(forward, replace(self.problem, **tensors, **vectors))
            self._truths[forward] = sample, oracle(sample)
        problem, truth = self._truths[forward]
        allowed, shares = tolerance(problem, truth) if implementation.ours else None, []
        for name, output in zip(operation.outputs, outputs, strict=False):
            got, exact = self._on_host(implementation.adapter, output), getattr(truth, name)
            if allowed is None:
                shares.append(_compare_peer(name, got, exact, PEERS_ERROR[str(problem.x.dtype)]))
            else:
                shares.append(compare(name, got, exact, allowed[name]))
        return max(shares)

    def _on_host(self, adapter: str, output: Any) -> Any:
        output = output.detach() if hasattr(output, "detach") else output
        axis, dtype = int(output.ndim > 1), output.dtype
        bits = str(dtype) == "bfloat16"  # of NumPy's type for them, CuPy has no kernels that select channels
        output = output.view(np.int16) if bits else output
        some = ADAPTERS[adapter].to_numpy(output[(slice(None),) * axis + (self.channels.tolist(),)])
        return some.view(dtype) if bits else some


def _compare_peer(name: str, got: Any, exact: Any, allowed: float) -> float:
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, expected {exact.shape}"
    error = float(np.sqrt(np.mean((got.astype(np.float64) - exact) ** 2) / max(np.mean(exact**2), 1e-300)))
    assert error <= allowed, f"{name} is off by {error:.2g} of its root mean square"  # NaN fails too
    return error / allowed


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
        peers = [name for name in samples.seconds if not results[name].ours]
        for name, found in samples.seconds.items():
            results[name].timings[regime] = Timing.of(found)
            if results[name].ours:
                results[name].ratios[regime] = {peer: samples.ratio(name, peer) for peer in peers}
    return list(results.values())


def _checked_call(implementation: Implementation, tensors: Tensors, result: Result) -> TimedCall | None:
    """Return a call whose outputs are right; what was found is noted in the result."""
    operation = result.case.operation
    result.not_served = implementation.refuses(result.case)
    if result.not_served:
        return None
    launches: Sequence[Any] = ()

    def on_plan(plan: LaunchPlan, found: Sequence[Any]) -> None:
        nonlocal launches  # the last plan counts: a backward call's forward call is planned before it
        result.plan, launches = plan, found

    try:
        problem = tensors.of(implementation.adapter, operation)
        call = implementation.build(operation, problem, **({"on_plan": on_plan} if implementation.ours else {}))
        result.error = tensors.check(implementation, operation, call())
        result.registers = max((one.registers for one in launches if one.registers is not None), default=None)
        return call
    except (BackendUnavailableError, NoPlanError) as reason:
        result.not_served = in_words(reason)
    except AssertionError as error:
        result.refused = f"wrong: {in_words(error).removeprefix('AssertionError: ')}"
    except Exception as error:  # any library may raise; the others are timed all the same
        result.refused = in_words(error)
    return None
