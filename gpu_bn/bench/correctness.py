"""Comparing a call's outputs with the oracle: nothing is timed before it is right.

A large tensor is compared on some of its channels, the first and the last among them. The call has worked on all of
them; the oracle computes these alone, because channels are independent.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from gpu_bn.bench.cases import Operation
from gpu_bn.bench.implementations import Implementation
from gpu_bn.spec import VECTORS
from gpu_bn.testing import ADAPTERS, Problem, Truth, compare, oracle, tolerance

TENSORS = ("x", "dy", "residual")
CHECKED_ELEMENTS = 250_000
"""About how many elements of a tensor are compared with the oracle; at least two channels."""
PEERS_ERROR = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-3, "float64": 1e-6}
"""The error allowed to a peer, by the tensors' dtype: the root mean square of its errors, as a share of the truth's. A
peer may round between its steps, which moves single elements across a ReLU's kink, and with them the gradients of the
vectors; this is enough to see that it computes the same thing."""


class Reference:
    """The true outputs of a problem on some channels.

    Attributes:
        channels: the indices of the channels that are compared.
    """

    def __init__(self, problem: Problem) -> None:
        count = problem.x.shape[1]
        wanted = max(2, CHECKED_ELEMENTS * count // max(problem.x.size, 1))
        self.channels = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))
        sample = _some_channels(problem, self.channels)

        @cache
        def truth(training: bool, residual: bool, relu: bool) -> tuple[Problem, Truth]:
            found = problem_of(Operation("forward" if training else "eval", residual, relu), sample)
            return found, oracle(found)

        self._truth = truth

    def check(self, implementation: Implementation, operation: Operation, outputs: tuple[Any, ...]) -> float:
        """Compare a call's outputs with the truth.

        Returns:
            The largest error as a share of the error allowed.

        Raises:
            AssertionError: an error is above the one allowed; the message names the quantity.
        """
        problem, truth = self._truth(operation.training, operation.residual, operation.relu)
        allowed = tolerance(problem, truth) if implementation.ours else None
        worst = 0.0
        for name, output in zip(operation.outputs, outputs, strict=False):
            got, exact = self._on_host(implementation.adapter, output), getattr(truth, name)
            if allowed is None:
                share = _compare_peer(name, got, exact, PEERS_ERROR[str(problem.x.dtype)])
            else:
                share = compare(name, got, exact, allowed[name])
            worst = max(worst, share)
        return worst

    def _on_host(self, adapter: str, output: Any) -> Any:
        output = output.detach() if hasattr(output, "detach") else output
        axis, dtype = int(output.ndim > 1), output.dtype
        bits = str(dtype) == "bfloat16"  # NumPy's and CuPy's; CuPy cannot select channels of it
        output = output.view(np.int16) if bits else output
        some = ADAPTERS[adapter].to_numpy(output[(slice(None),) * axis + (self.channels.tolist(),)])
        return some.view(dtype) if bits else some


def problem_of(operation: Operation, problem: Problem) -> Problem:
    """Return the problem with the operation's options, without the residual if the operation has none."""
    return replace(
        problem,
        training=operation.training,
        activation=("relu" if operation.relu else "identity", 0.0),
        residual=problem.residual if operation.residual else None,
    )


def _some_channels(problem: Problem, channels: Any) -> Problem:
    tensors = {name: getattr(problem, name)[:, channels] for name in TENSORS}
    vectors = {name: getattr(problem, name)[channels] for name in VECTORS}
    return replace(problem, **tensors, **vectors)


def _compare_peer(name: str, got: Any, exact: Any, allowed: float) -> float:
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, expected {exact.shape}"
    error = float(np.sqrt(np.mean((got.astype(np.float64) - exact) ** 2) / max(np.mean(exact**2), 1e-300)))
    assert error <= allowed, f"{name} is off by {error:.2g} of its root mean square"  # also if it is NaN
    return error / allowed
