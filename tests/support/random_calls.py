"""Draw random calls of GPU backends with unusual shapes, layouts and values. A seed determines the calls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest

from gpu_bn.plan import TIERS
from gpu_bn.testing import Case, Problem, build, check
from gpu_bn.testing.cases import AFFINE, DTYPES, LAYOUTS, MASKS, MODES

SIZES = (1, 1, 2, 3, 5, 7, 8, 13, 16, 31, 49, 64, 97, 130)
MOST, FEW = 12_000, 1500
"""The most elements of a tensor in the first call of a seed, and about the most in later ones."""
SCALES = {"usual": (0.5, 1.5), "mean 1e4 sd": (1e4, 1.0), "1e15": (3e15, 1e15), "1e-15": (3e-15, 1e-15)}
CHANGES = ("none", "none", "none", "constant", "zeros of both signs", "some weights zero")


@dataclass(frozen=True)
class Call:
    """A case, a change of its data, and the architecture and tier on which it runs."""

    case: Case
    change: str
    arch: int
    tier: str | None

    def problem(self) -> Problem:
        """Return the arrays of the case after the change."""
        problem = build(self.case)
        x, weight = problem.x, problem.weight
        if x.flags.writeable and self.case.layout != "broadcast" and self.case.mask is None:
            if self.change == "constant":
                x[...] = x.reshape(-1)[0]
            elif self.change == "zeros of both signs":
                x[...] = np.where(np.signbit(x.astype(np.float32)), -0.0, 0.0)
        if self.change == "some weights zero" and weight is not None:
            weight = weight.copy()
            weight[::2] = 0
        return replace(problem, weight=weight)


def draw(seed: int) -> Call:
    """Draw the call of a seed."""
    rng = np.random.default_rng(seed)

    def one(choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    shape: tuple[int, ...] = (MOST + 1,)
    while prod(shape) > MOST:
        shape = tuple(one(SIZES) for _ in range(rng.integers(2, 5)))
    dtype = one(DTYPES)
    scales = ("usual", "mean 1e4 sd") if dtype == "float16" else tuple(SCALES)
    mean, std = SCALES[one(scales)]
    mask = one(MASKS) if rng.random() < 0.15 else None
    groups = [size for size in (2, 3, 4, 8) if shape[0] % size == 0 and shape[0] > size]
    case = Case(
        shape, dtype, one(LAYOUTS), activation=one(("identity", "relu", "gelu")), residual=bool(rng.random() < 0.4),
        affine=one(AFFINE[:4]), mode=one(MODES), mean=mean, std=std, mask=mask,
        virtual_batch_size=one(groups) if groups and mask is None and rng.random() < 0.4 else None,
    )  # fmt: skip
    return Call(case, one(CHANGES), one((75, 80, 90, 90, 120)), one((None, None, *TIERS)))


def marked(seed: int, usual: int, more: int, first: int = 0) -> Any:
    """Return ``first + seed`` as a parameter for pytest, marked by the run that includes it.

    Seeds below ``usual`` are in the normal run, those below ``more`` in the long one, others in the exhaustive one.
    """
    marks = [] if seed < usual else [pytest.mark.slow if seed < more else pytest.mark.exhaustive]
    return pytest.param(first + seed, id=f"seed-{first + seed}", marks=marks)


def family(seed: int, count: int) -> Iterator[Call]:
    """Yield the call of a seed, and ``count`` small ones with other sizes and values, which use the same kernels.

    The sizes of axes stay the same modulo 8, as they determine the vector width of the kernels. The last call has
    another layout.
    """
    call = draw(seed)
    yield call
    rng = np.random.default_rng((seed, count))
    case, least = call.case, call.case.virtual_batch_size or 1
    for at in range(count):
        shape, room = case.shape, FEW
        while prod(shape) > room or shape is case.shape:
            room += FEW // 8  # no shape may be small enough
            sizes = [size if size <= 16 else size % 8 + 8 * rng.integers(1, 3) for size in case.shape[1:]]
            shape = (least * int(rng.integers(1 + (least > 1), 9)), *map(int, sizes))
        scales = list(SCALES)[: 2 if case.dtype == "float16" else None]
        mean, std = SCALES[scales[rng.integers(len(scales))]]
        layout = LAYOUTS[rng.integers(len(LAYOUTS))] if at == count - 1 else case.layout
        small = replace(case, shape=shape, layout=layout, mean=mean, std=std)
        yield replace(call, case=small, change=CHANGES[rng.integers(len(CHANGES))])


@contextmanager
def refused_alike(seed: int, call: Call) -> Iterator[None]:
    """Allow a ``ValueError`` within this context if the NumPy backend raises the same. Add the seed to other errors."""
    try:
        yield
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            check(call.problem(), "numpy")
    except BaseException as error:
        error.add_note(f"seed {seed}: {call}")
        raise
