"""Random calls at the limits of the Triton backend, against the oracle; ``cupy/test_random.py`` draws them alike."""

import pytest

from gpu_bn.testing import check

pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from emulator import Checks, Device
from support.random_calls import draw, family, marked, refused_alike
from support.triton_backends import EmulatedBackend

pytestmark = pytest.mark.compile
FIRST, USUAL, MORE, ALL = 1002, 1, 8, 40
"""The first seed, and the number of seeds in a normal run, with ``-m slow`` and with ``-m exhaustive``."""
LIKE_IT = 6
"""The number of small calls of a seed; both runs of CI together make 56 calls."""


@pytest.mark.parametrize("seed", [marked(seed, USUAL, MORE, FIRST) for seed in range(ALL)])
def test_random_calls(seed, compile_triton):
    arch = {75: 75, 80: 80, 90: 90, 120: 100}[draw(seed).arch]
    backend = EmulatedBackend(Device(checks=Checks(races=seed % 4 == 0)), compile_triton, arch)
    for call in family(seed, LIKE_IT):
        backend.steps.clear()
        with refused_alike(seed, call):
            assert check(call.problem(), backend)
            assert backend.steps
