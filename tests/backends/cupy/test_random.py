"""Random calls at the limits of the CuPy backend, against the oracle. A seed gives a call and several small
ones like it.

``pytest -k 'seed-123'`` runs one; a failure prints the call that its seed has drawn.
"""

from __future__ import annotations

import pytest
from emulator import Checks, Device
from support.random_calls import CHANGES, SCALES, draw, family, marked, refused_alike

from gpu_bn.plan import TIERS, NoPlanError
from gpu_bn.testing import check
from gpu_bn.testing.cases import DTYPES, LAYOUTS, MODES

pytestmark = pytest.mark.compile
USUAL, MORE, ALL = 2, 16, 40
"""The number of seeds in a normal run, with ``-m slow`` and with ``-m exhaustive``, each including the former."""
LIKE_IT = 13
"""The number of small calls of a seed; both runs of CI together make 224 calls."""


@pytest.mark.parametrize("seed", [marked(seed, USUAL, MORE) for seed in range(ALL)])
def test_random_calls(seed, make_gpu):
    gpu = make_gpu(draw(seed).arch, draw(seed).tier, Device(checks=Checks(races=seed % 4 == 0)))
    planned = type(gpu.backend)()
    for call in family(seed, LIKE_IT):
        gpu.launched.clear()
        with refused_alike(seed, call):
            problem = call.problem()
            try:
                check(problem, gpu.backend)
            except NoPlanError:  # this tier cannot serve it; another can
                check(problem, planned)
            assert gpu.launched


def test_the_seeds_cover_every_kind_of_call():
    """The seeds cover all kinds of calls, also after a change of the draw."""
    calls = [call for seed in range(MORE) for call in family(seed, LIKE_IT)]
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
    assert len(calls) > 200
    for axis in (0, 1):
        assert any(case.shape[axis] == 1 for case in cases)
