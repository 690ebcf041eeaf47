"""Check that results do not depend on the order in which warps and blocks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .errors import EmulatorError
from .machine import Device


def require_same_results(
    run: Callable[[Device], Sequence[np.ndarray]],
    seeds: Sequence[int] = range(4),
    device: Device | None = None,
) -> list[np.ndarray]:
    """Run once in the default order and once for each seed; fail unless all results have the same bits.

    `run` must make new inputs each time, launch on the device that it is given, and return its outputs.
    """
    pattern = device or Device()
    expected = [np.array(result) for result in run(replace(pattern, seed=None, reports=[]))]
    for seed in seeds:
        results = run(replace(pattern, seed=seed, reports=[]))
        for position, (want, got) in enumerate(zip(expected, results, strict=True)):
            differing = np.ascontiguousarray(want).view(np.uint8) != np.ascontiguousarray(got).view(np.uint8)
            if differing.any():
                raise EmulatorError(
                    "schedule dependent",
                    f"result {position} differs in {int(differing.sum())} bytes under schedule {seed}",
                )
    return expected
