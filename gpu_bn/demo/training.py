"""Train one network. Record its loss and accuracy, and the drift of the values in its hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_bn.demo.data import Digits
from gpu_bn.demo.network import HiddenValues, Network, cross_entropy

Array = Any
BATCH = 60
EVERY = 20
"""The number of steps between two records."""
PERCENTILES = (15, 50, 85)


@dataclass
class History:
    """The T records of one training run, one every :data:`EVERY` steps.

    Attributes:
        steps: the number of the step, from 0.
        loss: the cross-entropy of all training images in nats, in evaluation mode.
        accuracy: the accuracy on the test images in per cent, in evaluation mode.
        moments: for each field of :class:`HiddenValues` in h1, the mean and SD of each unit over the test images,
            (2, units) each.
        bands: the percentiles of each sigmoid's input in h2 over the test images, (3, units) each.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    moments: dict[str, list[Array]] = field(default_factory=lambda: {kind: [] for kind in HiddenValues._fields})
    bands: list[Array] = field(default_factory=list)

    def drifts(self, kind: str) -> tuple[Array, Array]:
        """Return the drift of the mean and of the SD of h1's units between records, averaged over the units.

        Returns:
            ``|mean' - mean| / SD`` and ``|ln(SD' / SD)|``, T - 1 each, where primes mark the later record. NaN where an
            SD is 0.
        """
        moments = np.array(self.moments[kind], np.float64)
        mean, sd = moments[:, 0], np.where(moments[:, 1] > 0, moments[:, 1], np.nan)
        mean_drift = np.abs(np.diff(mean, axis=0)) / sd[:-1]
        sd_drift = np.abs(np.diff(np.log(sd), axis=0))
        return mean_drift.mean(1), sd_drift.mean(1)

    def drift(self, kind: str) -> tuple[float, float]:
        """Return the averages of :meth:`drifts` over the records; NaN if an SD is 0."""
        mean_drift, sd_drift = self.drifts(kind)
        return float(mean_drift.mean()), float(sd_drift.mean())

    def steps_to(self, accuracy: float) -> float:
        """Return the first recorded step with at least this test accuracy; infinity if there is none."""
        return next(
            (float(step) for step, got in zip(self.steps, self.accuracy, strict=True) if got >= accuracy), np.inf
        )


def train(net: Network, data: Digits, steps: int, rate: float, seed: int, tick: Callable[[int], None]) -> History:
    """Train for ``steps``, a multiple of :data:`EVERY`. ``tick`` is called with the number of steps since the last."""
    history = History()
    batches = shuffled_batches(len(data.train_x), seed)
    for step in range(steps + 1):
        if step % EVERY == 0:
            record(history, step, net, data)
            tick(min(EVERY, steps - step))
        batch = net.xp.asarray(next(batches))
        _, gradient = cross_entropy(net.xp, net.forward(data.train_x[batch]), data.train_y[batch])
        net.backward(gradient)
        net.descend(rate)
    return history


def shuffled_batches(count: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield batches of shuffled indices without end. An epoch has each index at most once."""
    rng = np.random.default_rng([seed, 2])
    while True:
        yield from rng.permutation(count)[: count - count % BATCH].reshape(-1, BATCH)


def record(history: History, step: int, net: Network, data: Digits) -> None:
    """Append the state of the network after ``step`` steps to the history."""
    xp = net.xp
    net.train(False)
    loss, _ = cross_entropy(xp, net.forward(data.train_x), data.train_y)
    right = net.forward(data.test_x).argmax(1) == data.test_y
    net.train()
    h1, h2 = net.watch(data.test_x)
    history.steps.append(step)
    history.loss.append(loss)
    history.accuracy.append(100 * float(right.mean()))
    for kind, values in h1._asdict().items():
        history.moments[kind].append(host(xp.stack([values.mean(0), values.std(0)])))
    history.bands.append(host(xp.percentile(h2.sigmoid_input, xp.asarray(PERCENTILES), axis=0)))


def host(array: Array) -> np.ndarray[Any, Any]:
    """Return a NumPy array, copied from the GPU if needed."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
