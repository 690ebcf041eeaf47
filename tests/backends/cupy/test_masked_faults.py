"""Faults planted in the CUDA code for masks and ghost batches: each must be reported."""

from __future__ import annotations

import pytest
from emulator import Device, EmulatorError
from support.cuda_masked import check_masked
from support.cuda_masked_faults import FAULTS

pytestmark = pytest.mark.compile


SHORT = (
    "mask dropped in the sums of the backward pass", "counts of blocks not merged", "idle lanes counted",
    "stride of groups wrong", "empty group moves the running statistics",
)  # fmt: skip
"""The faults of a normal run."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in SHORT else [pytest.mark.slow]) for fault in FAULTS]
)
def test_a_planted_fault_is_reported(fault, make_gpu, caught_faults):
    old, new, masked = FAULTS[fault]

    def edit(source: str) -> str:
        assert old in source, f"the kernels no longer hold {old!r}"
        return source.replace(old, new)

    gpu = make_gpu(90, None, Device(max_steps=50_000))
    gpu.edit_source = edit
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        check_masked(gpu, masked)
    assert "no longer hold" not in str(caught.value)
    caught_faults[f"CUDA, masked: {fault}"] = str(caught.value).partition("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("masked", dict.fromkeys(masked for _, _, masked in FAULTS.values()), ids=str)
def test_the_kernels_without_faults_are_clean(masked, make_gpu):
    check_masked(make_gpu(90), masked)
