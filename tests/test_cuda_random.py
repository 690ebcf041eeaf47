"""Random calls at the edges of what the CuPy backend takes, against the oracle. A seed is a call.

``pytest -k 'seed-123'`` runs one; a failure prints the call that its seed has drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
from emulator import Checks, Device

from gpu_bn.plan import TIERS, NoPlanError
from gpu_bn.testing import Case, Problem, build, check
from gpu_bn.testing.cases import AFFINE, DTYPES, LAYOUTS, MASKS, MODES

pytestmark = pytest.mark.compile
USUAL, MORE, ALL = 16, 36, 76
"""Seeds of a usual run, with ``-m slow``, and with ``-m exhaustive``, each with those before it."""
SIZES = (1, 1, 2, 3, 5, 7, 8, 13, 16, 31, 49, 64, 97, 130)
MOST = 24_000
"""Elements of a tensor."""
SCALES = {"usual": (0.5, 1.5), "mean 1e4 sd": (1e4, 1.0), "1e15": (3e15, 1e15), "1e-15": (3e-15, 1e-15)}
CHANGES = ("none", "none", "none", "constant", "zeros of both signs", "some weights zero")


@dataclass(frozen=True)
class Call:
    """A call: a case, a change of its numbers, and where it runs."""

    case: Case
    change: str
    arch: int
    tier: str | None

    def problem(self) -> Problem:
        """The case's arrays, changed."""
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
    """The call of a seed."""
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


def marked(seed: int) -> Any:
    marks = [] if seed < USUAL else [pytest.mark.slow if seed < MORE else pytest.mark.exhaustive]
    return pytest.param(seed, id=f"seed-{seed}", marks=marks)


@pytest.mark.parametrize("seed", [marked(seed) for seed in range(ALL)])
def test_a_random_call(seed, make_gpu):
    call = draw(seed)
    gpu = make_gpu(call.arch, call.tier, Device(checks=Checks(races=seed % 4 == 0)))
    try:
        problem = call.problem()
        try:
            check(problem, gpu.backend)
        except NoPlanError:  # this tier cannot serve it; another can
            check(problem, type(gpu.backend)())
        assert gpu.launched
    except ValueError as error:  # what is refused, NumPy's backend refuses too, in the same words
        with pytest.raises(ValueError, match=re.escape(str(error))):
            check(call.problem(), "numpy")
    except BaseException as error:
        error.add_note(f"seed {seed}: {call}")
        raise


def test_seeds_meet_every_kind_of_call():
    """Or a change of the draw could leave some out."""
    calls = [draw(seed) for seed in range(MORE)]
    cases = [call.case for call in calls]
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.mode for case in cases} == set(MODES)
    assert {call.change for call in calls} == set(CHANGES)
    assert {call.tier for call in calls} == {None, *TIERS}
    assert {(case.mean, case.std) for case in cases} == set(SCALES.values())
    assert any(case.mask for case in cases)
    assert any(case.virtual_batch_size for case in cases)
    assert any(case.residual for case in cases)
    for axis in (0, 1):
        assert any(case.shape[axis] == 1 for case in cases)
