"""Choose a few cases that cover many: any two values that some case has together, one of the few has together too."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from itertools import combinations
from math import prod

from gpu_bn.testing import Case


def covering(cases: Sequence[Case]) -> list[Case]:
    """Choose cases with all pairs of values, and all shapes: at each step the one that adds most (greedy set cover)."""
    aspects = [_aspects(case) for case in cases]
    left: set[Hashable] = set().union(*aspects)
    # Counts of what is new only fall, so that the best is the first whose count is still true.
    queue = [
        (-len(found), prod(case.shape), index) for index, (case, found) in enumerate(zip(cases, aspects, strict=True))
    ]
    heapq.heapify(queue)
    chosen = []
    while left:
        _, size, index = heapq.heappop(queue)
        now = (-len(aspects[index] & left), size, index)
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
        else:
            chosen.append(cases[index])
            left -= aspects[index]
    return chosen


def _aspects(case: Case) -> set[Hashable]:
    values = asdict(case)
    shape = values.pop("shape")
    return {shape, *combinations(values.items(), 2)}
