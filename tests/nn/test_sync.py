"""Test SyncBatchNorm over processes that communicate by gloo against one process that has the whole batch."""

import copy
import inspect
from collections import deque

import pytest

torch = pytest.importorskip("torch")

from support import sync_scenarios as scenarios
from support.processes import launch, once, results
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_bn import nn
from gpu_bn.merge import Pool
from gpu_bn.nn.distributed import wire
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.running import update_running


@pytest.fixture(scope="module")
def four(tmp_path_factory, whole):
    del whole  # it compiles kernels once, before four processes do
    return results(
        4, once(tmp_path_factory, "four", lambda folder: launch(4, "support.sync_scenarios", ["equality"], folder))
    )


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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = ["numerics", "second", "compiled", "in_ddp", "fused_in_ddp", "inside_a_group"]
    names += ["masked", "population", "accumulated"]
    return results(2, once(tmp_path_factory, "two", lambda folder: launch(2, "support.sync_scenarios", names, folder)))


def join_results(two, name, key, at=None):
    """Concatenate the tensors that the processes have returned along the batch."""
    found = [result[name][key] for result in two]
    return torch.cat(found if at is None else [parts[at] for parts in found])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_inputs_and_channels_last(two, dtype):
    layer = nn.BatchNorm(3, activation="relu")
    x = scenarios.split_batch(0, 2, 3, 9, 7, dtype=dtype)[1].requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    for at, expected in enumerate((y.detach(), dx)):
        assert_close(join_results(two, "numerics", dtype, at), expected)
        assert all(result["numerics"][dtype][at].is_contiguous(memory_format=torch.channels_last) for result in two)
    assert all(torch.equal(result["numerics"][dtype][2], two[0]["numerics"][dtype][2]) for result in two)
    assert_close(two[0]["numerics"][dtype][2], layer.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 3, 4)], ids=len)
def test_inputs_of_any_rank(two, shape):
    expected = nn.BatchNorm(3, dtype=torch.float64)(scenarios.split_batch(0, 2, *shape)[1])
    assert_close(join_results(two, "numerics", len(shape)), expected.detach())


def test_one_position_on_each_process_is_a_batch(two):
    layer = nn.BatchNorm(3, dtype=torch.float64)
    expected = layer(scenarios.split_batch(0, 2, 3, size=2)[1])
    assert_close(join_results(two, "numerics", "one each", 0), expected.detach())
    assert_close(two[1]["numerics"]["one each"][1], layer.state_dict())


def test_nothing_on_any_process_changes_nothing_but_the_counter(two):
    y, dx, dweight, state = two[0]["numerics"]["nothing"]
    assert y.shape == dx.shape == (0, 3, 4)
    assert torch.equal(dweight, torch.zeros(3, dtype=torch.float64))
    fresh = nn.BatchNorm(3, dtype=torch.float64).state_dict()
    assert_close(state, fresh | {"num_batches_tracked": torch.tensor(1)})


def test_squares_beyond_float32_on_one_process(two):
    x = scenarios.split_batch(0, 2, 3, 64, dtype=torch.float32)[1].double()
    x[:3] *= 1e20
    x[3:] *= 1e25
    assert_close(join_results(two, "numerics", "wide"), nn.BatchNorm(3).double()(x).detach().float())


def test_a_frozen_layer_waits_for_nobody(two):
    x = scenarios.split_batch(0, 2, 3)[0]
    assert_close(two[0]["numerics"]["frozen"], nn.BatchNorm(3, dtype=torch.float64).eval()(x).detach())


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_double_backward(two, activation):
    norm = nn.BatchNorm(3, dtype=torch.float64, activation=activation)
    expected = scenarios.penalty(norm, *(scenarios.split_batch(0, 2, 3, 4, seed=seed)[1] for seed in range(3)))
    for at, whole in enumerate(expected):
        parts = [result["second"][activation][at] for result in two]
        assert_close(torch.cat(parts) if whole.dim() > 1 else sum(parts), whole)


def test_compiled_whole_with_the_same_bits(two):
    for result in two:
        eager, compiled = result["compiled"]
        assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path):
    for result in launch(2, "support.sync_scenarios", ["by_inductor"], tmp_path):
        eager, compiled = result["by_inductor"]
        assert_close(compiled, eager)


def test_fused_models_in_ddp(two):
    whole = scenarios.steps_of_blocks(scenarios.two_blocks(), *(scenarios.data(step, 6, 3, 8, 8) for step in range(2)))
    for rank, result in enumerate(two):
        plain, fused, shared = result["fused_in_ddp"]
        assert_close(fused, plain)
        assert_close(shared, (whole[0].chunk(2)[rank], *whole[1:]))


def test_two_forward_calls_before_a_backward_call_in_ddp(two):
    """This works with broadcast_buffers=True, with which torch's own layer failed before version 2.13."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.BatchNorm1d(4, activation="relu")).double()
    for which, batches in enumerate(
        (
            [scenarios.split_batch(rank, 2, 3, seed=seed)[0] for rank in range(2) for seed in range(2)],
            [scenarios.split_batch(0, 2, 3, seed=seed)[1] for seed in range(2)],
        )
    ):
        model.zero_grad()
        (sum((model(batch) ** 2).sum() for batch in batches) / 2).backward()
        for result in two:
            assert_close(result["in_ddp"][which], [parameter.grad for parameter in model.parameters()])


def test_a_group_of_one_and_a_process_outside_are_alone(two):
    for rank, result in enumerate(two):
        x = scenarios.split_batch(rank, 2, 3)[0]
        assert_close(result["inside_a_group"], nn.BatchNorm(3, dtype=torch.float64)(x).detach())


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_masks_count_over_all_processes(two, activation):
    norm = nn.BatchNorm(3, dtype=torch.float64, activation=activation)
    y, firsts, again, seconds, state = scenarios.masked_step(norm, *scenarios.masked_inputs())
    assert not y.isnan().any()
    results = [result["masked"][activation] for result in two]
    assert_close(torch.cat([result[0] for result in results]), y)
    for which, whole in ((1, firsts), (2, again), (3, seconds)):
        for at, expected in enumerate(whole):
            parts = [result[which][at] for result in results]
            assert_close(torch.cat(parts) if expected.dim() > 1 else sum(parts), expected)
    for result in results:
        assert_close(result[4], state, rtol=1e-12, atol=1e-12)


def test_masked_micro_batches_make_one_update(two):
    layer = nn.BatchNorm(3, dtype=torch.float64)
    x, _, _, mask = scenarios.masked_inputs()
    layer(x, mask=mask)
    for result in two:
        assert_close(result["masked"]["accumulated"], layer.state_dict(), rtol=1e-12, atol=1e-12)


def test_population_statistics_over_processes(two):
    x = scenarios.data(1, 15, 3, 4) * 3 + 1e3
    for result in two:
        found = result["population"]["plain"]
        assert_close(found["running_mean"], x.mean((0, 2)), rtol=1e-15, atol=0)
        assert_close(found["running_var"], x.var((0, 2), correction=0), rtol=1e-12, atol=0)
        assert found["num_batches_tracked"] == 0
        expected = "needs the same number of batches on every process, but 1 of 2 processes have no more"
        assert expected in result["population"]["uneven"]


def test_population_statistics_of_layers_that_share_a_batch(two):
    """The first layer normalises the batches of both processes together, and the second gets its output."""
    x = scenarios.data(1, 15, 3, 4) * 3 + 1e3
    steps = torch.cat((x[:5], x[8:10])), torch.cat((x[5:8], x[10:14]))
    layer = nn.BatchNorm(3, dtype=torch.float64)
    second = torch.cat([layer(step).detach() for step in steps])
    for result in two:
        found = result["population"]["shared"]
        assert_close(found["0.running_var"], torch.cat(steps).var((0, 2), correction=0), rtol=1e-12, atol=0)
        assert_close(found["1.running_mean"], second.mean((0, 2)), rtol=0, atol=1e-12)
        assert_close(found["1.running_var"], second.var((0, 2), correction=0), rtol=1e-10, atol=0)


def test_micro_batches_of_all_processes_make_one_update(two):
    layer = nn.BatchNorm(3, dtype=torch.float64)
    layer(scenarios.split_batch(0, 2, 3, 4)[1])
    for result in two:
        assert_close(result["accumulated"], layer.state_dict(), rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------- in one process
@pytest.mark.parametrize(("shape", "dtype"), [((3, 2, 4), torch.float32), ((0, 2, 4), torch.float16)], ids=str)
def test_the_operators_do_what_they_say(shape, dtype):
    x, dy, residual = (scenarios.data(seed, *shape, dtype=dtype) for seed in range(3))
    weight, bias = torch.ones(2), torch.zeros(2)
    valid = torch.ones(shape[0], 1, shape[2], dtype=torch.bool)
    report = sync_operators.report(x, valid)
    reports = torch.stack((report, report))
    count, mean, var = sync_operators.merge_reports(reports)
    layer = (x, weight, bias, residual, valid, count, mean, var, 1e-5, "silu", 0.0)
    sums, dz = sync_operators.reduce(dy, *layer, True)
    packets = wire.pack(report, "", signature(2))
    for operator, arguments in (
        (wire.pack, (report, "", signature(2))),
        (wire.error_packet, (x, "", "why")),
        (wire.compare, (torch.cat((packets, packets)), "")),
        (wire.unpack, ([torch.cat((packets, packets))], 2)),
        (wire.add, ([torch.cat((packets, packets))], 6)),
        (sync_operators.report, (x, None)),
        (sync_operators.report, (x, valid)),
        (sync_operators.merge_reports, (reports,)),
        (sync_operators.merge_packets, ([torch.cat((packets, packets))], 2)),
        (sync_operators.update, (mean.float(), var.float(), torch.tensor(0), 0.1, None, count, mean, var)),
        (sync_operators.update, (None, None, torch.tensor(0), None, None, count, mean, var)),
        (sync_operators.report_packets, (x, valid, "", signature(2))),
        (sync_operators.reduce_packets, (dy, *layer, True, "", signature(2))),
        (
            sync_operators.finish,
            (mean.float(), var.float(), torch.tensor(0), 0.1, None, count, mean, var, x, 2, "", signature(2)),
        ),
        (sync_operators.normalize, layer),
        (sync_operators.reduce, (dy, *layer, True)),
        (sync_operators.reduce, (dy, *layer, False)),
        (sync_operators.backward_input, (dy, *layer, sums, dz)),
        (sync_operators.backward_input, (dy, *layer, sums, None)),
    ):
        torch.library.opcheck(operator, arguments)


def test_it_looks_like_torchs():
    ours, theirs = nn.SyncBatchNorm(3, 1e-3, None), torch.nn.SyncBatchNorm(3, 1e-3, None)
    assert repr(ours) == f"gpu_bn.{theirs!r}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    mine, other = (
        list(inspect.signature(cls).parameters.values()) for cls in (nn.SyncBatchNorm, torch.nn.SyncBatchNorm)
    )
    assert [(p.name, p.default, p.kind) for p in mine[:-1]] == [(p.name, p.default, p.kind) for p in other]
    assert mine[-1].name == "activation"
    copied = copy.deepcopy(nn.SyncBatchNorm(3, activation="relu"))
    assert repr(copied).endswith("activation=relu)")


def test_nothing_is_read_back_from_a_device():
    """Tensors on the device "meta" have no values that could be read."""
    reports = torch.empty(3, 8, dtype=torch.float64, device="meta")
    count, mean, var = sync_operators.merge_reports(reports)
    running = torch.empty(2, 3, device="meta")
    for momentum in (0.1, None):
        counter = torch.empty((), dtype=torch.int64, device="meta")
        update_running((*running, counter), momentum, Pool(count, mean, var * count))


SIGNATURE = [0.0, -1.0, 0.0, 3.0, 2.0, 0.0, 0.0, 1e-5, 0.1, *[0.0] * 7]


def signature(channels):
    return [*SIGNATURE[:3], float(channels), *SIGNATURE[4:]]


def gather(*packets):
    return torch.stack(packets)


def test_a_mistake_poisons_statistics_where_packets_are_not_read():
    """On a GPU packets are not read, so the other processes get statistics that are NaN."""
    report = sync_operators.report(torch.randn(4, 3), None)
    (good,) = wire.pack(report, "", SIGNATURE)
    (other,) = wire.pack(report, "", [*SIGNATURE[:5], 1.0, *SIGNATURE[6:]])
    for packets, poisoned in (
        ((good, wire.error_packet(report, "", "why")), True),
        ((good, other), True),
        ((good, good), False),
    ):
        _, mean, var = sync_operators.merge_reports(wire.unpack([gather(*packets)], 3))
        assert mean.isnan().all() == poisoned
        assert var.isnan().all() == poisoned
        assert wire.add([gather(*packets)], 8).isnan().all() == poisoned


def test_packets_from_a_gpu_are_checked_once_they_have_arrived(monkeypatch):
    arrivals = deque()
    monkeypatch.setattr(wire, "ARRIVALS", arrivals)
    report = sync_operators.report(torch.randn(4, 3), None)
    (good,) = wire.pack(report, "", SIGNATURE)
    arrived = []
    bad = gather(good, wire.error_packet(report, "", "no sense"), good)
    arrivals.extend([(lambda: True, gather(good, good), "g"), (lambda: bool(arrived), bad, "g")])
    wire.check_arrivals()
    assert len(arrivals) == 1
    arrived.append(True)
    with pytest.raises(ValueError, match="process 1 of 3: no sense"):
        wire.check_arrivals()
    assert not arrivals


def test_what_fails_on_a_gpu_is_raised_once_the_others_have_all_packets():
    packets = wire.make_error_packets(MemoryError("none left"), torch.empty(0), "a group", 2 + 2 * 600).to("meta")
    assert len(packets) == 2
    wire._compare(packets[:1], "a group")
    with pytest.raises(MemoryError, match="none left"):
        wire._compare(packets[1:], "a group")
    assert wire._compare(packets[:1], "a group").shape == packets[:1].shape
    assert wire.CALLS.pop("a group") == 1


def test_headers_differ_wherever_two_that_are_known_differ():
    unknown, nan = wire.UNKNOWN, torch.nan
    heads = torch.tensor([[1.0, 1, unknown, unknown, nan], [1, unknown, 2, unknown, nan], [1, 2, 3, unknown, nan]])
    assert wire.differing_columns(heads).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("channels", [3, 512, 513, 2000])
def test_packets_have_one_size_and_hold_any_report(channels):
    report = torch.arange(2.0 + 2 * channels, dtype=torch.float64)
    report[0] = 0
    packets = wire.pack(report, "", signature(channels))
    assert packets.shape == (wire.packet_count(len(report)), wire.HEADER + wire.ROOM)
    found = [wire.compare(gather(packet, packet), "") for packet in packets]
    assert torch.equal(wire.unpack(found, channels), torch.stack((report, report)))


class Operations(TorchDispatchMode):
    """A mode that records the devices of the tensors that each operation takes."""

    def __init__(self):
        super().__init__()
        self.devices = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.devices.setdefault(str(operation), set()).update(tensor.device.type for tensor in tensors)
        return operation(*args, **(kwargs or {}))


def test_a_packet_on_a_gpu_takes_nothing_from_the_memory_of_the_host():
    """A copy from the host fails in a captured CUDA graph, or waits for the GPU. Here ``meta`` stands for the GPU."""
    report = torch.arange(3000, dtype=torch.float64)
    on_gpu = report.to("meta")
    with Operations() as operations:
        wire.make_packets(on_gpu, "", SIGNATURE)
    assert set.union(*operations.devices.values()) == {"meta"}
    packets = wire.pack(report, "", SIGNATURE)
    heads = packets[:, : wire.HEADER]
    written = torch.zeros_like(packets)
    wire.write_headers(written, heads.tolist(), by_arguments=True)
    assert torch.equal(written[:, : wire.HEADER], heads)
    assert not written[:, wire.HEADER :].any()


def test_torchs_layers_merge_with_activations_and_fold():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.SyncBatchNorm(4), torch.nn.ReLU()).double()
    x = scenarios.data(0, 4, 3, 5, 5)
    expected = torch.nn.Sequential(copy.deepcopy(model[0]), torch.nn.BatchNorm2d(4).double(), torch.nn.ReLU())(x)
    fused = nn.convert(model, fuse=True)
    assert_close(fused(x), expected)
    assert [type(layer) for layer in fused.children()][:2] == [torch.nn.Conv2d, nn.SyncBatchNorm]
    assert_close(nn.fold(fused)(x), fused.eval()(x))


def test_alone_it_is_a_layer_of_ours_with_its_errors():
    x = scenarios.data(0, 4, 3, 5)
    layer, plain = (cls(3, dtype=x.dtype, activation="relu") for cls in (nn.SyncBatchNorm, nn.BatchNorm))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x, x), plain.train(mode)(x, x))
    assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer.train()(x[:1, :, 0])
    assert torch.equal(nn.sync_batch_norm(x, activation="relu"), nn.batch_norm(x, training=True, activation="relu"))
