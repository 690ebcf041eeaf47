"""The compiled backend: a case of each kind of input, for both array libraries."""

import pytest

from gpu_bn import registry
from gpu_bn.testing import Case, check

KINDS = [
    Case((4, 6, 5, 7)),
    Case((12, 8, 10, 11), activation="relu", residual=True),
    Case((12, 8, 10, 11), mode="eval", activation="relu", residual=True),
    Case((12, 8, 10, 11), layout="channels_last", activation="relu", residual=True),
    Case((12, 8, 10, 11), layout="sliced", activation="relu", residual=True),
    Case((300, 41)),
    Case((300, 41), mode="eval"),
    Case((2100, 3, 5)),
    Case((2, 3, 4, 4), "float64", mode="eval"),
    Case((12, 8, 10, 11), mask="random", virtual_batch_size=4),
]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_case(case):
    assert all(share <= 1 for share in check(case, "cpu").values())


def test_it_loads_for_arrays_after_it_has_for_tensors():
    pytest.importorskip("gpu_bn.backends.cpu.tensors")
    assert registry.load.__wrapped__("cpu", "numpy").name == "cpu"
    assert registry.load.__wrapped__("cpu", "torch").name == "cpu"
