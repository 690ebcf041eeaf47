"""State claims about the training runs. A claim is made only if it holds for every seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpu_bn.demo.training import History

TARGET = 90.0
"""The test accuracy in per cent up to which steps are counted."""
Runs = Mapping[str, Sequence[History]]
"""The histories of each variant, one for each seed."""


class Claim(NamedTuple):
    """The claim that one number is lower than another in every seed.

    Attributes:
        text: the claim in words.
        lower: the numbers that should be lower, one for each seed.
        higher: the numbers that should be higher, one for each seed.
        digits: the number of decimals to print.
    """

    text: str
    lower: Sequence[float]
    higher: Sequence[float]
    digits: int = 0

    @property
    def seeds(self) -> int:
        """The number of seeds for which the claim holds."""
        return sum(low < high for low, high in zip(self.lower, self.higher, strict=True))

    def __str__(self) -> str:
        numbers = f"{spread(self.lower, self.digits)} against {spread(self.higher, self.digits)}"
        if self.seeds == len(self.lower):
            return f"In every seed: {self.text} ({numbers})."
        return f"Not claimed, for it holds in {self.seeds} of {len(self.lower)} seeds: {self.text} ({numbers})."


def claims(runs: Runs) -> list[Claim]:
    """Return the claims that are tested, with the numbers from the runs."""

    def claim(
        text: str, number: Callable[[History], float], digits: int = 0, lower: str = "learned", higher: str = "none"
    ) -> Claim:
        low, high = ([number(run) for run in runs[variant]] for variant in (lower, higher))
        return Claim(text, low, high, digits)

    reach = f"takes fewer steps to {TARGET:.0f} % test accuracy than no BN"
    less = "drifts less with the learned pair than without BN"
    ends = "the learned pair ends with"
    return [
        claim(f"BN with the learned pair {reach}", lambda run: run.steps_to(TARGET)),
        claim(f"BN with the fixed pair {reach}", lambda run: run.steps_to(TARGET), lower="fixed"),
        claim(f"{ends} a lower training loss than no BN", lambda run: run.loss[-1], 4),
        claim(f"{ends} a lower training loss than the fixed pair", lambda run: run.loss[-1], 4, higher="fixed"),
        claim(f"{ends} fewer test errors in per cent than no BN", lambda run: 100 - run.accuracy[-1], 1),
        claim(f"the mean of h1's outputs {less}", lambda run: run.drift("output")[0], 4),
        claim(f"the SD of h1's outputs {less}", lambda run: run.drift("output")[1], 4),
        claim(f"even before BN, the mean of h1's pre-activations {less}", lambda run: run.drift("raw")[0], 4),
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean over the seeds as text, for several seeds with the sample SD.

    If a value is not finite, return "never" or, for NaN, "undefined", and the number of such seeds.
    """
    if odd := sum(not np.isfinite(value) for value in values):
        return f"{'undefined' if np.isnan(values).any() else 'never'} in {odd} of {len(values)} seeds"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"
