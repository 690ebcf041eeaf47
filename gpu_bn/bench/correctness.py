"""No time without a proof: what a call returns, against the oracle, before it is timed.

A large tensor is proved on some of its channels, the first and the last among them: channels are independent, so the
oracle can be asked for these alone, while the call has worked on all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpu_bn.bench.cases import Operation
from gpu_bn.bench.implementations import Subject
from gpu_bn.testing import ADAPTERS, Problem, Truth, compare, oracle, tolerance

CHECKED_ELEMENTS = 250_000
"""About how many elements of a tensor are compared with the oracle; at least two channels'."""
PEERS_ERROR = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-3, "float64": 1e-6}
"""Of a peer: the root mean square of its errors, as a share of the truth's. It may round between its steps, which moves
single elements across a ReLU's kink; this is enough to see that it computes the same thing."""


class Proof:
    """The truth of a problem on some channels.

    Attributes:
        channels: which.
    """

    def __init__(self, problem: Problem) -> None:
        count = problem.x.shape[1]
        wanted = max(2, CHECKED_ELEMENTS * count // max(problem.x.size, 1))
        self.channels = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))
        self._problem = sample(problem, self.channels)
        self._truths: dict[tuple[bool, bool, bool], tuple[Problem, Truth]] = {}

    def check(self, subject: Subject, operation: Operation, outputs: tuple[Any, ...]) -> float:
        """Compare a call's outputs with the truth.

        Returns:
            The largest error as a share of the error allowed.

        Raises:
            AssertionError: an error above the one allowed; the message names the quantity.
        """
        problem, truth = self._truth(operation)
        allowed = tolerance(problem, truth) if subject.ours else {}
        worst = 0.0
        for name, output in zip(operation.outputs, outputs, strict=False):
            got, exact = self._on_host(subject, output), getattr(truth, name)
            error = compare(name, got, exact, allowed[name]) if subject.ours else _relative(name, got, exact)
            worst = max(worst, error)
        return worst

    def _truth(self, operation: Operation) -> tuple[Problem, Truth]:
        key = (operation.training, operation.residual, operation.relu)
        if key not in self._truths:
            problem = problem_of(operation, self._problem)
            self._truths[key] = (problem, oracle(problem))
        return self._truths[key]

    def _on_host(self, subject: Subject, output: Any) -> Any:
        output = output.detach() if hasattr(output, "detach") else output
        axis = 1 if output.ndim > 1 else 0
        dtype = output.dtype
        if str(dtype) == "bfloat16":  # NumPy's and CuPy's: the second cannot choose channels of it
            output = output.view(np.int16)
        some = ADAPTERS[subject.adapter].to_numpy(output[(slice(None),) * axis + (self.channels.tolist(),)])
        return some.view(dtype) if str(dtype) == "bfloat16" else some


def problem_of(operation: Operation, problem: Problem) -> Problem:
    """A problem with the operation's options, and without the residual if it has none."""
    return replace(
        problem,
        training=operation.training,
        activation=("relu" if operation.relu else "identity", 0.0),
        residual=problem.residual if operation.residual else None,
    )


def sample(problem: Problem, channels: Any) -> Problem:
    """A problem of some of the channels."""
    tensors = {name: getattr(problem, name)[:, channels] for name in ("x", "dy", "residual")}
    vectors = {name: getattr(problem, name)[channels] for name in ("weight", "bias", "running_mean", "running_var")}
    return replace(problem, **tensors, **vectors)


def _relative(name: str, got: Any, exact: Any) -> float:
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, expected {exact.shape}"
    error = np.sqrt(np.mean((got.astype(np.float64) - exact) ** 2) / max(np.mean(exact**2), 1e-300))
    share = float(error) / PEERS_ERROR[str(got.dtype)]
    assert share <= 1, f"{name} is off by {float(error):.2g} of its root mean square"  # also if it is NaN
    return share
