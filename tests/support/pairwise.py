"""Choose a pairwise covering set of cases: it has each pair of values that any case has."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from itertools import combinations
from math import prod

from gpu_bn.testing import Case


def covering(cases: Sequence[Case]) -> list[Case]:
    """Choose cases with all pairs of values and all shapes, by a greedy set cover."""
    pairs = [_pairs(case) for case in cases]
    missing: set[Hashable] = set().union(*pairs)
    # The number of missing pairs in a case only falls, so a case is the best if its number in the queue is current.
    queue = [(-len(pairs[index]), prod(case.shape), index) for index, case in enumerate(cases)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        _, size, index = heapq.heappop(queue)
        current = (-len(pairs[index] & missing), size, index)
        if queue and current > queue[0]:
            heapq.heappush(queue, current)
        else:
            chosen.append(cases[index])
            missing -= pairs[index]
    return chosen


def _pairs(case: Case) -> set[Hashable]:
    """Return the shape of a case and all pairs of its other values."""
    values = asdict(case)
    shape = values.pop("shape")
    return {shape, *combinations(values.items(), 2)}
