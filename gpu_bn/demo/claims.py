"""What the runs show: a claim is made if it holds in every seed, and otherwise named as one that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpu_bn.demo.training import History

TARGET = 90.0
"""The test accuracy, in per cent, whose first step is reported."""
Runs = Mapping[str, Sequence[History]]
"""Per variant, one history for each seed."""


class Claim(NamedTuple):
    """The claim that one number is lower than another in every seed.

    Attributes:
        text: the claim in words.
        lower, higher: the numbers, one of each for every seed.
        digits: decimals to print.
    """

    text: str
    lower: Sequence[float]
    higher: Sequence[float]
    digits: int = 0

    @property
    def seeds(self) -> int:
        """The number of seeds in which it holds."""
        return sum(low < high for low, high in zip(self.lower, self.higher, strict=True))

    def __str__(self) -> str:
        numbers = f"{spread(self.lower, self.digits)} against {spread(self.higher, self.digits)}"
        if self.seeds == len(self.lower):
            return f"In every seed: {self.text} ({numbers})."
        return f"Not claimed, for it holds in {self.seeds} of {len(self.lower)} seeds: {self.text} ({numbers})."


def claims(runs: Runs) -> list[Claim]:
    """Return the claims that the runs are asked about."""

    def final(variant: str, what: str) -> list[float]:
        return [getattr(history, what)[-1] for history in runs[variant]]

    def steps(variant: str) -> list[float]:
        return [history.steps_to(TARGET) for history in runs[variant]]

    def drift(variant: str, kind: str, moment: int) -> list[float]:
        return [history.drift(kind)[moment] for history in runs[variant]]

    def errors(variant: str) -> list[float]:
        return [100 - accuracy for accuracy in final(variant, "accuracy")]

    reach = f"takes fewer steps to {TARGET:.0f} % test accuracy than no BN"
    less = "of what h1 passes on drifts less with the learned pair than without BN"
    loss = "the learned pair ends with a lower training loss than"
    return [
        Claim(f"BN with the learned pair {reach}", steps("learned"), steps("none")),
        Claim(f"BN with the fixed pair {reach}", steps("fixed"), steps("none")),
        Claim(f"{loss} no BN", final("learned", "loss"), final("none", "loss"), 4),
        Claim(f"{loss} the fixed pair", final("learned", "loss"), final("fixed", "loss"), 4),
        Claim(
            "the learned pair ends with fewer test errors in per cent than no BN", errors("learned"), errors("none"), 1
        ),
        Claim(f"the mean {less}", drift("learned", "output", 0), drift("none", "output", 0), 4),
        Claim(f"the SD {less}", drift("learned", "output", 1), drift("none", "output", 1), 4),
        Claim(
            "even before BN, the mean of h1's pre-activations drifts less with the learned pair than without BN",
            drift("learned", "raw", 0),
            drift("none", "raw", 0),
            4,
        ),
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean over the seeds and, for several, the sample SD; infinity stands for never."""
    if odd := sum(not np.isfinite(value) for value in values):
        return f"{'undefined' if np.isnan(values).any() else 'never'} in {odd} of {len(values)} seeds"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"
