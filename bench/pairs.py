"""Two calls timed in alternating pairs, for the scripts here."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from gpu_bn.bench.timing import LEAST_ROUNDS, MOST_ROUNDS, CpuTimer, TimedCall, take_samples


class Pair(NamedTuple):
    """The median of the pairs' ratios (below 1: ours is faster), and the median times in microseconds."""

    ratio: float
    ours: float
    theirs: float


def in_pairs(
    ours: TimedCall,
    theirs: TimedCall,
    timer: CpuTimer,
    seconds: float = 1.0,
    pairs: tuple[int, int] = (LEAST_ROUNDS, MOST_ROUNDS),
) -> Pair:
    """Time two calls for ``seconds`` together; ``pairs`` are the least and the most, and 0 seconds means one."""
    found = take_samples({"ours": ours, "theirs": theirs}, timer, "wall", seconds / 2, pairs)
    if found.errors:
        raise RuntimeError(found.errors)
    mine, its = (1e6 * statistics.median(found.seconds[name]) for name in ("ours", "theirs"))
    return Pair(found.ratio("ours", "theirs"), mine, its)
