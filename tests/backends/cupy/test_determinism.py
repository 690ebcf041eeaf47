"""The CUDA kernels give the same bits under each order of warps and blocks that is tried."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Checks
from emulator.schedules import Device, require_same_results

from gpu_bn.testing import Case, build
from gpu_bn.testing.check import run

pytestmark = pytest.mark.compile
TIERS = ["cta", "cluster", "cooperative", "split"]
CASES = [
    Case((2, 7, 4, 8), activation="relu", residual=True),  # more channels than co-resident blocks have at a time
    Case((270, 16), activation="relu"),
]


def require_same_bits(make_gpu, tier, case, seeds):
    def results(device: Device) -> list[np.ndarray]:
        gpu = make_gpu(90, tier, device)
        found = run(build(case), gpu.backend)
        assert {"y", "mean", "rstd", "running_var", "dx", "dweight", "dbias"} <= found.keys()
        assert any("backward" in name for name in gpu.launched)
        return list(found.values())

    require_same_results(results, seeds, Device(checks=Checks(races=False)))


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_results_do_not_depend_on_the_schedule(tier, case, make_gpu):
    require_same_bits(make_gpu, tier, case, range(1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*CASES, Case((9, 3, 41, 12), "bfloat16", activation="elu")], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_results_do_not_depend_on_any_of_many_schedules(tier, case, make_gpu):
    require_same_bits(make_gpu, tier, case, range(1, 10))
