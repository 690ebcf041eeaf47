"""SyncBatchNorm on emulated GPUs: one launch merges packets, and one updates running statistics and the counter."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from emulator import EmulatorError

torch = pytest.importorskip("torch", reason="SyncBatchNorm takes torch tensors: pip install torch")

from support import gpu_sync_faults
from support.cupy_on_emulator import backend_for_tensors
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn import nn, registry
from gpu_bn.merge import Pool
from gpu_bn.nn import sync
from gpu_bn.nn.distributed import group, wire
from gpu_bn.nn.operators import library
from gpu_bn.nn.operators import sync as phases
from gpu_bn.nn.running import update_running
from gpu_bn.plan import DEVICES

pytestmark = pytest.mark.compile
ON_CUPY = pytest.mark.parametrize("launches", ["cupy"], indirect=True)
VIEWS = {"view", "split", "select", "slice", "as_strided", "unbind", "detach", "unsqueeze", "permute", "alias", "empty",
         "empty_strided", "empty_like", "new_empty", "new_empty_strided", "expand", "t", "transpose", "wait_tensor",
         "split_with_sizes", "_unsafe_view", "set_", "lift_fresh"}  # fmt: skip
"""The torch operations that launch no kernel."""


def triton(request):
    """Return the Triton backend on an emulated GPU, and a function that names the launched kernels."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from support.triton_backends import EmulatedBackend

    device, compile_triton = map(request.getfixturevalue, ("device", "compile_triton"))
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4))
    return backend, lambda: [step.kernel.__name__ for step in backend.steps]


def cupy(request):
    """Return the CuPy backend on an emulated GPU, and a function that names the launched kernels."""
    make_gpu, monkeypatch = map(request.getfixturevalue, ("make_gpu", "monkeypatch"))
    backend = backend_for_tensors(make_gpu(80), monkeypatch)
    return backend, lambda: [re.search(r"bn_[a-z_]+_kernel", name)[0] for name in backend.gpu.launched]


@pytest.fixture(params=["cupy", "triton"])
def launches(request, monkeypatch):
    """Let an emulated GPU serve CPU tensors, and return a function that names its launched kernels."""
    backend, names = {"cupy": cupy, "triton": triton}[request.param](request)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    return names


def test_cupy_serves_cuda_tensors_where_triton_is_not_installed(monkeypatch):
    rows = tuple(row for row in registry.ROWS if row.device == "cuda")
    monkeypatch.setattr(registry, "unavailable_reason", registry.unavailable_reason.__wrapped__)
    for absent, serves in (("", "triton"), ("triton", "cupy")):
        monkeypatch.setattr(registry, "_is_installed", lambda package, absent=absent: package != absent)
        assert registry._first.__wrapped__(rows).name == serves


def signature(channels):
    return [0.0, 0.0, 0.0, float(channels), *[0.0] * 12]


def packets_of(vectors):
    """Return what processes gather: for each part of the vectors, the packets of all processes."""
    sent = [wire.pack(vector, "", signature((len(vector) - 2) // 2)) for vector in vectors]
    return [torch.stack(parts) for parts in zip(*sent, strict=True)]


def reports_of(counts, channels):
    """Return reports of data whose mean is 10,000 times the standard deviation."""
    reports = torch.zeros(len(counts), 2 + 2 * channels, dtype=torch.float64)
    for report, count in zip(reports, counts, strict=True):
        report[1] = count
        if count:
            report[2 : 2 + channels] = 1e4 + torch.randn(channels)
            report[2 + channels :] = torch.rand(channels) + 1e-6
    return reports


def require_merged(reports, channels):
    found = phases.merge_packets(packets_of(reports), channels)
    for mine, expected in zip(found, phases.merge_reports(reports), strict=True):
        assert_close(mine, expected, rtol=1e-14, atol=0)
    return found


COUNTS = pytest.mark.parametrize(
    ("counts", "channels"), [((5, 3), 3), ((1, 0, 7), 33), ((0, 0), 2), ((9,) * 17 + (2,), 40), ((4, 6), 700)], ids=str
)


@COUNTS
def test_reports_merge_to_what_torch_merges_them_to(counts, channels, launches):
    reports = reports_of(counts, channels)
    found = require_merged(reports, channels)
    assert launches() == ["bn_sync_merge_kernel"]
    again = phases.merge_packets(packets_of(reports), channels)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def require_summed(vectors):
    """Require right sums of packets, with any address and strides; return the packets."""
    packets = packets_of(vectors)
    found = wire.add(packets, vectors.shape[1])
    assert_close(found, vectors.sum(0), rtol=1e-14, atol=0)
    memory = torch.empty(len(vectors), 2 * packets[0].shape[1], dtype=torch.float64)
    for moved in (memory.flatten()[1 : 1 + packets[0].numel()].view_as(packets[0]), memory[:, ::2]):
        again = wire.add([moved.copy_(packets[0]), *packets[1:]], vectors.shape[1])
        assert torch.equal(again, found)
    return packets


@COUNTS
def test_sums_of_the_backward_pass_are_added_in_one_launch(counts, channels, launches):
    vectors = reports_of(counts, channels)
    packets = require_summed(vectors)
    assert launches() == ["bn_sync_sum_kernel"] * 3
    packets[-1][-1, 3] += 1
    assert wire.add(packets, vectors.shape[1]).isnan().all()


@pytest.mark.parametrize("at", [(0, 0, 0), (2, 0, 0), (1, 0, 9), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("value", [7.0, wire.UNKNOWN])
def test_a_mistake_or_another_call_makes_statistics_nan(at, value, launches):
    process, part, field = at
    reports = reports_of((5, 3, 2), 600)
    packets = packets_of(reports)
    assert len(packets) == 2
    packets[part][process, field] = value
    count, mean, var = phases.merge_packets(packets, 600)
    sums = wire.add(packets, 1202)
    wrong = field == 0 or value != wire.UNKNOWN
    for vector in (mean, var, sums):
        assert vector.isnan().all() == wrong == vector.isnan().any()
    assert count == 10
    assert launches() == ["bn_sync_merge_kernel", "bn_sync_sum_kernel"]


def test_headers_differ_wherever_two_that_are_known_differ(launches):
    packets = packets_of(reports_of((5, 3, 2), 40))
    packets[0][:, 9] = torch.tensor([wire.UNKNOWN, 1.0, 2.0])
    assert phases.merge_packets(packets, 40)[1].isnan().all()
    packets[0][2, 9] = 1.0
    assert not phases.merge_packets(packets, 40)[1].isnan().any()
    assert len(launches()) == 2


@pytest.mark.parametrize(
    "field", [(3.0, 3.0, 3.0), (wire.UNKNOWN, 1.0, 2.0), (wire.UNKNOWN, 1.0, wire.UNKNOWN), (1.0, 1.0, -7.0)], ids=str
)
@pytest.mark.parametrize("at", [0, 9])
def test_sums_are_nan_where_those_of_torch_are(at, field, launches, monkeypatch):
    packets = packets_of(reports_of((5, 3, 2), 40))
    packets[0][:, at] = torch.tensor(field)
    found = wire.add(packets, 82)
    assert launches() == ["bn_sync_sum_kernel"]
    monkeypatch.undo()  # on the CPU, torch adds the packets
    assert_close(found, wire.add(packets, 82), rtol=1e-14, atol=0, equal_nan=True)


def test_nan_stays_in_its_channel(launches):
    reports = reports_of((5, 3), 40)
    reports[1, 2 + 7] = torch.nan
    count, mean, var = phases.merge_packets(packets_of(reports), 40)
    running = torch.zeros(40), torch.ones(40), torch.tensor(0)
    phases.update(*running, 0.1, None, count, mean, var)
    for vector in (mean, var, *running[:2], wire.add(packets_of(reports), 82)[2:]):
        assert vector.isnan().nonzero().tolist() == [[7]]
    assert launches() == ["bn_sync_merge_kernel", "bn_sync_update_kernel", "bn_sync_sum_kernel"]


@pytest.mark.parametrize("count", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("momentum", [0.25, None, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_move_as_torch_moves_them(count, momentum, dtype, launches):
    require_moved(count, torch.tensor(0.125) if momentum == "tensor" else momentum, dtype)
    assert launches() == ["bn_sync_update_kernel"]


def require_moved(count, momentum, dtype=torch.float32):
    channels = 1030  # more than one program handles
    mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64)
    count = torch.tensor([count], dtype=torch.float64)
    mine = [torch.randn(channels).to(dtype), torch.rand(channels).to(dtype), torch.tensor(4)]
    theirs = [tensor.clone() for tensor in mine]
    number, at = (None, momentum) if isinstance(momentum, torch.Tensor) else (momentum, None)
    versions = [tensor._version for tensor in mine]
    phases.update(*mine, number, at, count, mean, var)
    update_running(theirs, momentum, Pool(count, mean, var * count))
    assert [tensor._version for tensor in mine] == [version + 1 for version in versions]
    assert mine[2] == theirs[2] == 5
    for moved, expected in zip(mine[:2], theirs[:2], strict=True):
        assert_close(moved, expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-7, atol=0)


def test_what_is_not_tracked_is_left_alone(launches):
    mean, count = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    counter, (running_mean, running_var) = torch.tensor(2), torch.ones(2, 3)
    phases.update(None, None, counter, 0.5, None, count, mean, mean)
    phases.update(running_mean, running_var, None, None, None, count, mean, mean)
    assert counter == 3
    assert (running_mean == 1).all()
    phases.update(running_mean, running_var, None, 0.5, None, count, mean, mean)
    assert (running_mean == 0.5).all()
    assert len(launches()) == 3


def test_torch_updates_a_counter_that_kernels_cannot(launches):
    mean, count = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    counter = torch.tensor(2, dtype=torch.int32)
    phases.update(None, None, counter, None, None, count, mean, mean)
    assert counter == 3
    assert launches() == []
    assert not library.is_countable(torch.tensor(2), torch.empty(0, device="meta"))  # a counter on another device


def test_statistics_with_gaps_in_memory_move_alone(launches):
    mean, count = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    running = torch.ones(3, 4)
    phases.update(running[:, 1], running[:, 2], None, 0.5, None, count, mean, mean)
    assert_close(running, torch.tensor([[1, 0.5, 0.5, 1]]).expand(3, 4))
    assert launches() == ["bn_sync_update_kernel"]


@ON_CUPY
def test_a_kernel_that_cannot_be_compiled_leaves_statistics_alone(launches, monkeypatch):
    device = importlib.import_module("gpu_bn.backends.cupy.device")
    monkeypatch.setattr(device.cuda_sources, "source", lambda _: "no C++")
    mean, count = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    running = torch.ones(3), torch.ones(3), torch.tensor(2)
    with pytest.raises(registry.BackendUnavailableError, match="bn_sync_update_kernel<double> could not be compiled"):
        phases.update(*running, 0.5, None, count, mean, mean)
    assert_close(running, (torch.ones(3), torch.ones(3), torch.tensor(2)), rtol=0, atol=0)
    assert launches() == []


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation", "masked"),
    [((3, 5), torch.float32, "relu", False), ((6, 0, 1), torch.float16, "silu", False),
     ((4, 0, 2), torch.float32, "relu", True)],
    ids=str,
)  # fmt: skip
def test_parts_of_a_batch_are_normalised_as_the_whole(sizes, dtype, activation, masked, launches, monkeypatch):
    x, residual, dy = (torch.randn(sum(sizes), 3, 4, dtype=torch.float64).mul(2).add(5).to(dtype) for _ in range(3))
    weight, bias, valid = torch.rand(3), torch.randn(3), torch.rand(sum(sizes), 1, 4) > 0.3 if masked else None
    parts = list(zip(*[whole.split(sizes) for whole in (x, residual, dy)], strict=True))
    masks = valid.split(sizes) if masked else [None] * len(sizes)
    reports = [phases.report(part[0], mask) for part, mask in zip(parts, masks, strict=True)]
    moments = phases.merge_packets(packets_of(reports), 3)
    calls = [
        (part, (weight, bias, rest, mask, *moments, 1e-5, activation, 0.0), up)
        for (part, rest, up), mask in zip(parts, masks, strict=True)
    ]
    y = torch.cat([phases.normalize(part, *layer) for part, layer, _ in calls])
    reduced = [phases.reduce(up, part, *layer, True) for part, layer, up in calls]
    sums = wire.add(packets_of([own.flatten() for own, _ in reduced]), 6).view(2, 3)
    dx = torch.cat([phases.backward_input(up, part, *layer, sums, None) for part, layer, up in calls])
    results = y, dx, sums[1].float(), sums[0].float(), torch.cat([dz for _, dz in reduced])
    assert launches().count("bn_sync_merge_kernel") == 1

    monkeypatch.undo()
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, residual)]
    whole = nn.batch_norm(
        inputs[0], None, None, *inputs[1:3], True, residual=inputs[3], activation=activation, mask=valid
    )
    expected = whole.detach(), *torch.autograd.grad(whole, inputs, dy)
    half = dtype == torch.float16
    for mine, other in zip(results, expected, strict=True):
        assert_close(mine, other, rtol=2e-3 if half else 1e-5, atol=1e-2 if half else 1e-4)


class Operations(TorchDispatchMode):
    """A mode that counts torch operations that would launch a kernel or copy memory."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")
        if name[0] == "aten" and name[2] not in VIEWS:
            self.found[name[2]] += 1
        return func(*args, **(kwargs or {}))


FORWARD = {
    "cupy": ["bn_stats_kernel", "bn_sync_merge_kernel", "bn_normalize_kernel", "bn_sync_update_kernel"],
    "triton": ["bn_stats_kernel", "bn_merge_moments_kernel", "bn_sync_merge_kernel", "bn_normalize_kernel",
               "bn_sync_update_kernel"],
}  # fmt: skip
BACKWARD = {
    "cupy": ["bn_backward_reduce_kernel", "bn_sync_sum_kernel", "bn_backward_input_kernel"],
    "triton": ["bn_backward_reduce_kernel", "bn_merge_sums_kernel", "bn_sync_sum_kernel", "bn_backward_input_kernel"],
}


def test_a_layer_takes_few_launches(launches, monkeypatch, request):
    """Each of two processes launches few kernels around the exchanges; both have the same part of the batch."""
    monkeypatch.setattr(sync, "has_peers", lambda _: True)
    monkeypatch.setattr(group.Group, "of", staticmethod(lambda _: group.Group("", 2, 0)))
    monkeypatch.setattr(group, "gather", lambda packet, _: torch.stack((packet, packet)))
    layer, backend = sync.SyncBatchNorm(8, activation="relu"), request.node.callspec.params["launches"]
    x = torch.randn(40, 8, 50, requires_grad=True)
    y = layer(x)
    assert launches() == FORWARD[backend]
    y.backward(torch.ones_like(y))
    assert launches() == FORWARD[backend] + BACKWARD[backend]
    expected = torch.nn.BatchNorm1d(8).double()
    whole = torch.cat((x, x)).detach().double().requires_grad_()
    torch.relu(expected(whole)).backward(torch.ones_like(whole))
    assert_close(layer.running_var, expected.running_var.float())
    assert_close(layer.running_mean, expected.running_mean.float())
    assert layer.num_batches_tracked == 1
    assert_close(x.grad, whole.grad[:40].float(), rtol=1e-4, atol=1e-5)


def test_torch_launches_nothing_besides(launches, monkeypatch):
    """The operators launch one kernel each; without these kernels, torch would launch dozens."""
    packets = packets_of(reports_of((5, 3), 8))
    counted = []
    for fused in (True, False):
        running = (torch.zeros(8), torch.ones(8), torch.tensor(0))
        with Operations() as operations:  # the mode does not see inside operators
            found = phases._merge_packets(packets, 8)
            phases._update(*running, 0.1, None, *found)
            wire._sum(packets, 18)
        counted.append(operations.found.total())
        assert len(launches()) == 3
        if fused:
            monkeypatch.undo()
    assert counted[0] == 0
    assert counted[1] > 40


# ------------------------------------------------------------------------------------------------ planted faults
def require_refused(channels):
    """Require NaN results if the last part of the packets has an error or headers that differ."""
    for field, values in ((0, (7.0, 7.0)), (9, (0.0, 7.0))):
        packets = packets_of(reports_of((5, 3), channels))
        packets[-1][:, field] = torch.tensor(values)
        assert wire.add(packets, 2 + 2 * channels).isnan().all()
        assert phases.merge_packets(packets, channels)[1].isnan().all()


FAULTS = {"cupy": gpu_sync_faults.CUDA, "triton": gpu_sync_faults.TRITON}
PLANTED = [(backend, fault) for backend, faults in FAULTS.items() for fault in (None, *faults)]


def plant(before, after, folder, monkeypatch):
    """Plant a fault in the kernels of the backend."""
    backend = registry.backend_for(None)
    if hasattr(backend, "gpu"):
        assert importlib.import_module("gpu_bn.backends.cupy.sources").source(None).count(before) == 1
        backend.gpu.edit_source = lambda source: source.replace(before, after)
        return
    module = importlib.import_module("gpu_bn.backends.triton.sync")
    text = Path(module.sync_kernels.__file__).read_text()
    assert text.count(before) >= 1
    (folder / "faulty_sync_kernels.py").write_text(text.replace(before, after))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "faulty_sync_kernels", raising=False)
    monkeypatch.setattr(module, "sync_kernels", importlib.import_module("faulty_sync_kernels"))


@pytest.mark.parametrize(("launches", "fault"), PLANTED, indirect=["launches"])
def test_a_planted_fault_is_noticed(fault, launches, tmp_path, monkeypatch, request):
    del launches
    before, after, says = FAULTS[request.node.callspec.params["launches"]][fault] if fault else ("", "", "")
    if fault:
        plant(before, after, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, EmulatorError), match=says) if fault else nullcontext():
        require_merged(reports_of((1, 0, 7), 33), 33)
        require_summed(reports_of((1,) * 17, 31))
        require_refused(33)
        require_refused(600)
        require_moved(0.0, None)
        require_moved(60.0, None)
