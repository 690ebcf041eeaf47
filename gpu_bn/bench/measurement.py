"""Measure one case: compare the outputs of each implementation's call with the oracle, then time the call.

Of a large tensor only some channels are compared, among them the first and the last. The call computes all channels;
the oracle computes only the compared ones, because channels are independent.
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
from gpu_bn.bench.timing import TimedCall, Timer, Timing, describe_error, take_samples
from gpu_bn.plan import LaunchPlan, NoPlanError
from gpu_bn.spec import VECTORS
from gpu_bn.testing import ADAPTERS, Problem, Truth, compare, oracle, tolerance
from gpu_bn.testing.cases import numpy_dtype

TENSORS = ("x", "dy", "residual")
PERIOD = 4_194_301
"""The period with which the values of a tensor repeat: a prime, which divides no size."""
ALIGNMENT = 64
"""Tensors begin at a multiple of this number of bytes, as in torch, so that no vector load crosses a cache line."""
CHECKED_ELEMENTS = 250_000
"""The approximate number of elements of a tensor that are compared with the oracle; at least two channels are."""
PEERS_ERROR = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-3, "float64": 1e-6}
"""The largest root mean square of a peer's errors, as a share of that of the truth, by dtype. A peer may round between
its steps. That moves single elements across the kink of a ReLU, and changes the gradients of weight and bias. These
limits only show that the peer computes the same function."""


@dataclass
class Result:
    """The results of one implementation's call.

    Attributes:
        error: the largest error as a share of the error allowed.
        refused: why a wrong or failing call was not timed.
        not_served: why the implementation does not take the case.
        ratios: our time over that of a peer, by regime, then by peer.
        registers: the most registers of a thread in the plan's kernels.
        floor_bytes: the bytes of the case if every tensor is read or written once.
        threads: the number of threads; ``None`` if the libraries chose it.
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
        """The tier that was launched; ``-`` without a plan."""
        if self.plan is None:
            return "-"
        return self.plan.tier if self.case.operation.training else "one pass"

    @property
    def regime(self) -> str:
        """The first regime that was measured, which is cold on a GPU; empty if nothing was timed."""
        return next(iter(self.timings), "")

    @property
    def median(self) -> float | None:
        """The median in that regime, in seconds; ``None`` if nothing was timed."""
        return self.timings[self.regime].median if self.timings else None

    @property
    def bandwidth(self) -> float:
        """The floor's bytes per second in that regime; 0 if nothing was timed."""
        return self.floor_bytes / self.median if self.median else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the report: those of the case are added, and the plan is replaced by its numbers."""
        fields = vars(self) | vars(self.case) | {"case": self.case, "seconds": self.timings, "tier": self.tier}
        fields |= {"moved_bytes": self.plan and self.plan.dram_bytes, "launches": self.plan and self.plan.launches}
        return {name: value for name, value in fields.items() if name not in ("plan", "timings")}


def make_problem(case: Case) -> Problem:
    """Return a forward call in training with a residual, as NumPy arrays; equal for all operations on one tensor.

    Values repeat after :data:`PERIOD`, so that channels differ and a large tensor takes little time.
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

    def vector(values: Any) -> Any:
        return values.astype(np.float64 if case.dtype == "float64" else np.float32)

    return Problem(
        x=tensor(0), dy=tensor(1), residual=tensor(2), training=True, momentum=0.1, eps=1e-5,
        running_mean=vector(rng.normal(0.5, 0.1, channels)), running_var=vector(rng.uniform(1, 4, channels)),
        weight=vector(rng.uniform(0.5, 2, channels)), bias=vector(rng.standard_normal(channels)),
        activation=("identity", 0.0), channel_axis=1,
    )  # fmt: skip


def with_operation(problem: Problem, operation: Operation) -> Problem:
    """Return the problem with an operation's options, and without the residual if the operation has none."""
    return replace(
        problem, training=operation.training, activation=("relu" if operation.relu else "identity", 0.0),
        residual=problem.residual if operation.residual else None,
    )  # fmt: skip


class Tensors:
    """The tensors for all cases of one tensor: made once, converted once for each library, compared with one oracle.

    ``channels`` are the indices of the channels that are compared.
    """

    def __init__(self, case: Case) -> None:
        self.base = make_problem(case)
        size, count = self.base.x.size, case.shape[1]
        wanted = max(2, CHECKED_ELEMENTS * count // size)
        self.channels = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))
        self._converted: dict[str, dict[str, Any]] = {}
        self._truths: dict[Operation, tuple[Problem, Truth]] = {}

    def problem(self, adapter: str, operation: Operation) -> Problem:
        """Return an operation's problem in the arrays of a library; the vectors are copied for each call."""
        convert, problem = ADAPTERS[adapter].to_backend, with_operation(self.base, operation)
        if adapter not in self._converted:
            self._converted[adapter] = {name: convert(getattr(self.base, name)) for name in TENSORS}
        tensors = {name: t for name, t in self._converted[adapter].items() if getattr(problem, name) is not None}
        return replace(problem, **tensors, **{name: convert(getattr(problem, name).copy()) for name in VECTORS})

    def check(self, implementation: Implementation, operation: Operation, outputs: tuple[Any, ...]) -> float:
        """Compare the outputs of a call with the truth; return the largest error as a share of the error allowed.

        Raise ``AssertionError`` with the name of the quantity if a share is above 1.
        """
        forward = replace(operation, direction="forward") if operation.training else operation
        if forward not in self._truths:
            tensors = {name: getattr(self.base, name)[:, self.channels] for name in TENSORS}
            vectors = {name: getattr(self.base, name)[self.channels] for name in VECTORS}
            sample = with_operation(replace(self.base, **tensors, **vectors), forward)
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
        bits = str(dtype) == "bfloat16"  # CuPy has no kernels that select channels of this NumPy dtype
        output = output.view(np.int16) if bits else output
        some = ADAPTERS[adapter].to_numpy(output[(slice(None),) * axis + (self.channels.tolist(),)])
        return some.view(dtype) if bits else some


def _compare_peer(name: str, got: Any, exact: Any, allowed: float) -> float:
    """Return the root mean square of a peer's errors as a share of the allowed one."""
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, expected {exact.shape}"
    error = float(np.sqrt(np.mean((got.astype(np.float64) - exact) ** 2) / max(np.mean(exact**2), 1e-300)))
    assert error <= allowed, f"{name} is off by {error:.2g} of its root mean square"  # NaN fails too
    return error / allowed


def measure(
    case: Case, tensors: Tensors, implementations: Iterable[Implementation], timer: Timer, seconds: float
) -> list[Result]:
    """Compare the call of each implementation with the oracle, and time the correct calls in turn."""
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
        for name, times in samples.seconds.items():
            results[name].timings[regime] = Timing.from_samples(times)
            if results[name].ours:
                results[name].ratios[regime] = {peer: samples.ratio(name, peer) for peer in peers}
    return list(results.values())


def _checked_call(implementation: Implementation, tensors: Tensors, result: Result) -> TimedCall | None:
    """Return a call if its outputs are correct, else ``None``; note errors, reasons and the plan in ``result``."""
    operation = result.case.operation
    result.not_served = implementation.refuses(result.case)
    if result.not_served:
        return None
    launches: Sequence[Any] = ()

    def on_plan(plan: LaunchPlan, kernels: Sequence[Any]) -> None:
        nonlocal launches  # keep the last plan: the forward call of a backward call is planned first
        result.plan, launches = plan, kernels

    try:
        problem = tensors.problem(implementation.adapter, operation)
        call = implementation.build(operation, problem, **({"on_plan": on_plan} if implementation.ours else {}))
        result.error = tensors.check(implementation, operation, call())
        result.registers = max((one.registers for one in launches if one.registers is not None), default=None)
        return call
    except (BackendUnavailableError, NoPlanError) as reason:
        result.not_served = describe_error(reason)
    except AssertionError as error:
        result.refused = f"wrong: {describe_error(error).removeprefix('AssertionError: ')}"
    except Exception as error:  # any library may raise; the other calls are still timed
        result.refused = describe_error(error)
    return None
