"""SyncBatchNorm on an emulated GPU: reports merged and running statistics moved in one launch each, and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn import registry
from gpu_bn.merge import Pool
from gpu_bn.nn import sync
from gpu_bn.nn.distributed import (
    group,
    wire,
)
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.running import update_running
from gpu_bn.plan import DEVICES

pytestmark = pytest.mark.compile
VIEWS = {"view", "split", "select", "slice", "as_strided", "unbind", "detach", "unsqueeze", "permute", "alias", "empty",
         "empty_strided", "empty_like", "new_empty", "new_empty_strided", "expand", "t", "transpose", "wait_tensor",
         "split_with_sizes", "_unsafe_view", "set_", "lift_fresh"}  # fmt: skip
"""torch's operations that launch nothing."""


@pytest.fixture
def emulated(device, compile_triton, monkeypatch):
    """The backend of an emulated GPU in the place of that for CPU tensors."""
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    return backend


def signature(channels):
    return [0.0, 0.0, 0.0, float(channels), *[0.0] * 12]


def packets_of(reports):
    """What is gathered: of each part of the reports all processes' packets."""
    sent = [wire.pack(report, "", signature((len(report) - 2) // 2)) for report in reports]
    return [torch.stack(parts) for parts in zip(*sent, strict=True)]


def reports_of(counts, channels):
    reports = torch.zeros(len(counts), 2 + 2 * channels, dtype=torch.float64)
    for report, count in zip(reports, counts, strict=True):
        report[1] = count
        if count:
            report[2 : 2 + channels] = 1e4 + torch.randn(channels)
            report[2 + channels :] = torch.rand(channels) + 1e-6
    return reports


@pytest.mark.parametrize(
    ("counts", "channels"), [((5, 3), 3), ((1, 0, 7), 33), ((0, 0), 2), ((9,) * 17 + (2,), 40), ((4, 6), 700)], ids=str
)
def test_reports_merge_to_what_torch_merges_them_to(counts, channels, emulated):
    reports = reports_of(counts, channels)
    found = sync_operators.merge_packets(packets_of(reports), channels)
    assert [step.kernel.__name__ for step in emulated.steps] == ["bn_sync_merge_kernel"]
    for mine, expected in zip(found, sync_operators.merged(reports), strict=True):
        assert_close(mine, expected, rtol=1e-14, atol=0)
    again = sync_operators.merge_packets(packets_of(reports), channels)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("at", [(0, 0, 0), (2, 0, 0), (1, 0, 9), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("value", [7.0, wire.UNKNOWN])
def test_a_mistake_or_another_call_makes_statistics_nan(at, value, emulated):
    process, part, field = at
    reports = reports_of((5, 3, 2), 600)
    packets = packets_of(reports)
    assert len(packets) == 2
    packets[part][process, field] = value
    count, mean, var = sync_operators.merge_packets(packets, 600)
    wrong = field == 0 or value != wire.UNKNOWN
    assert mean.isnan().all() == wrong == var.isnan().all()
    assert not wrong or mean.isnan().any()
    assert count == 10
    assert len(emulated.steps) == 1


@pytest.mark.parametrize("count", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("momentum", [0.25, None, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_move_as_torch_moves_them(count, momentum, dtype, emulated):
    channels = 1030  # more than a program's block
    mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64)
    count = torch.tensor([count], dtype=torch.float64)
    weighs = torch.tensor(0.125) if momentum == "tensor" else momentum
    mine = [torch.randn(channels).to(dtype), torch.rand(channels).to(dtype), torch.tensor(4)]
    theirs = [tensor.clone() for tensor in mine]
    number, at = (None, weighs) if isinstance(weighs, torch.Tensor) else (weighs, None)
    sync_operators.update(*mine, number, at, count, mean, var)
    update_running(theirs, weighs, Pool(count, mean, var * count))
    assert [step.kernel.__name__ for step in emulated.steps] == ["bn_sync_update_kernel"]
    assert mine[2] == theirs[2] == 5
    for moved, expected in zip(mine[:2], theirs[:2], strict=True):
        assert_close(moved, expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-7, atol=0)


def test_what_is_not_tracked_is_left_alone(emulated):
    mean, count = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    counter, (running_mean, running_var) = torch.tensor(2), torch.ones(2, 3)
    sync_operators.update(None, None, counter, 0.5, None, count, mean, mean)
    sync_operators.update(running_mean, running_var, None, None, None, count, mean, mean)
    assert counter == 3
    assert (running_mean == 1).all()
    sync_operators.update(running_mean, running_var, None, 0.5, None, count, mean, mean)
    assert (running_mean == 0.5).all()
    assert len(emulated.steps) == 3


class Operations(TorchDispatchMode):
    """Counts torch's operations that would launch a kernel or copy memory."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")
        if name[0] == "aten" and name[2] not in VIEWS:
            self.found[name[2]] += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_takes_few_launches(emulated, monkeypatch):
    """Of two processes with the same part: what one launches between and besides the exchanges."""
    monkeypatch.setattr(sync, "several", lambda _: True)
    monkeypatch.setattr(group.Group, "of", staticmethod(lambda _: group.Group("", 2, 0)))
    monkeypatch.setattr(group, "gather", lambda packet, _: torch.stack((packet, packet)))
    layer = sync.SyncBatchNorm(8, activation="relu")
    x = torch.randn(40, 8, 50, requires_grad=True)
    y = layer(x)
    forward = [step.kernel.__name__ for step in emulated.steps]
    assert forward == [
        "bn_stats_kernel", "bn_merge_moments_kernel", "bn_sync_merge_kernel", "bn_normalize_kernel",
        "bn_sync_update_kernel",
    ]  # fmt: skip
    y.backward(torch.ones_like(y))
    backward = [step.kernel.__name__ for step in emulated.steps[len(forward) :]]
    assert backward == ["bn_backward_reduce_kernel", "bn_merge_sums_kernel", "bn_backward_input_kernel"]
    expected = torch.nn.BatchNorm1d(8).double()
    whole = torch.cat((x, x)).detach().double().requires_grad_()
    torch.relu(expected(whole)).backward(torch.ones_like(whole))
    assert_close(layer.running_var, expected.running_var.float())
    assert_close(layer.running_mean, expected.running_mean.float())
    assert layer.num_batches_tracked == 1
    assert_close(x.grad, whole.grad[:40].float(), rtol=1e-4, atol=1e-5)


def test_torch_launches_nothing_besides(emulated, monkeypatch):
    """What the operators merge and update with: one launch each, and without such kernels dozens of torch's."""
    packets = packets_of(reports_of((5, 3), 8))
    counted = []
    for fused in (True, False):
        running = (torch.zeros(8), torch.ones(8), torch.tensor(0))
        with Operations() as operations:  # it does not see into operators
            found = sync_operators._merge_packets(packets, 8)
            sync_operators._update(*running, 0.1, None, *found)
        counted.append(operations.found.total())
        assert len(emulated.steps) == 2
        if fused:
            monkeypatch.undo()
    assert counted[0] == 0
    assert counted[1] > 40
