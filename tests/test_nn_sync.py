"""SyncBatchNorm over processes that talk by gloo, against one process on the whole batch."""

import pytest

torch = pytest.importorskip("torch")

import sync_scenarios as scenarios  # noqa: E402
from processes import launch  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from gpu_bn import nn  # noqa: E402


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(4, "sync_scenarios", ["equality"], tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def whole():
    return scenarios.train(scenarios.Net(nn.BatchNorm), slice(None), lambda _: None)


@pytest.mark.parametrize("sizes", scenarios.SPLITS, ids=str)
def test_a_split_batch_trains_as_the_whole(four, whole, sizes):
    parts = [result["equality"][sizes] for result in four[: len(sizes)]]
    for name in ("y", "dx"):
        assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-10, atol=1e-11)
    for part in parts:
        assert_close(part["gradients"], whole["gradients"], rtol=1e-9, atol=1e-10)
        assert_close(part["state"], whole["state"], rtol=1e-10, atol=1e-11)
        assert all(torch.equal(part["state"][name], parts[0]["state"][name]) for name in part["state"])
