"""Let something go wrong on one process of a SyncBatchNorm, by ``support/processes.py``; return what each gets."""

import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from gpu_bn import nn, registry
from gpu_bn.activations import elu
from support.injection import at_c_call, injected


def wrong_calls(rank):
    """Return, for each check, the wrong call of a layer of 3 channels that one process makes."""
    x = torch.randn(4, 3, 5)
    calls = {
        "rank": (torch.randn(3),),
        "channels": (torch.randn(4, 5, 2),),
        "dtype": (torch.ones(4, 3, dtype=torch.int64),),
        "residual": (x, x[:2]),
        "mask": (x, None, None, torch.ones(4, 4, dtype=torch.bool)),
    }
    return {name: call if rank == 1 else (x,) for name, call in calls.items()}


def wrong_vectors(rank, world):
    """Return what each process raises if one gives a vector that does not fit, and the counts then."""
    results = {}
    x, three, four = torch.randn(4, 3), torch.ones(3), torch.ones(4)
    for name, wrong in {
        "weight": {"weight": four},
        "bias": {"bias": three[:, None]},
        "running": {"running_mean": three, "running_var": four},
        "dtype": {"running_mean": three.int(), "running_var": three},
        "device": {"weight": three.to("meta")},
        "pair": {"running_mean": three},
    }.items():
        counter = torch.tensor(0)
        right = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        arguments = wrong if rank == world - 1 else right
        try:
            nn.sync_batch_norm(x, **arguments, num_batches_tracked=counter)
        except ValueError as error:
            results[name] = str(error), counter.item()
    return results


def troubles(rank, _):
    """Return what each process raises if one makes a mistake, and whether that changed anything."""
    results = {}
    layer = nn.SyncBatchNorm(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for name, arguments in wrong_calls(rank).items():
        try:
            layer(*arguments)
        except ValueError as error:
            results[name] = str(error)
    results["unchanged"] = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    results["after"] = layer(torch.randn(4, 3)).shape  # the group still works
    return results


def text_of(call):
    """Return the text of an error, if the call raises one of ours."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


MISTAKES = {
    "activation": {"activation": "selu"},
    "input": {"input": [1.0, 2.0]},
    "residual": {"residual": "x"},
    "eps": {"eps": "a"},
    "momentum": {"momentum": "much"},
    "infinite eps": {"eps": float("inf")},
    "mask": {"mask": [True]},
    "counter": {"num_batches_tracked": 3},
}
"""Arguments of any type that only one process gives, and which fail there before anything is sent."""
DIFFERENCES = {
    "activation": {"activation": "relu"},
    "parameter": {"activation": elu(2.0)},
    "momentum": {"momentum": 0.2},
    "no momentum": {"momentum": None},
    "eps": {"eps": 1e-3},
    "residual": {"residual": torch.ones(4, 3, 5)},
    "mask": {"mask": torch.ones(4, 5, dtype=torch.bool)},
    "weight": {"weight": torch.ones(3)},
    "running statistics": {"running_mean": None, "running_var": None},
    "dtype": {"input": torch.ones(4, 3, 5, dtype=torch.float64)},
    "channels": {"input": torch.ones(4, 700, 5), "running_mean": torch.zeros(700), "running_var": torch.ones(700)},
    "gradient": {"input": torch.ones(4, 3, 5, requires_grad=True)},
}
"""Arguments that are right in themselves, but not what the other processes give."""


def one_differs(rank, table):
    """Return for each row each process's text, and whether anything has changed; the last process differs."""
    results = {}
    for name, different in table.items():
        state = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
        arguments = {"input": torch.ones(4, 3, 5), **state}
        given = arguments | (different if rank == dist.get_world_size() - 1 else {})
        text = text_of(lambda given=given: nn.sync_batch_norm(given.pop("input"), **given))
        kept = [state[key] for key in state]
        same = kept[0].eq(0).all() and kept[1].eq(1).all() and kept[2] == 0
        results[name] = text, bool(same)
    layer = nn.SyncBatchNorm(3)
    results["after"] = layer(torch.randn(4, 3)).shape, layer.num_batches_tracked.item()
    return results


def mistakes(rank, _):
    return one_differs(rank, MISTAKES)


def differences(rank, _):
    return one_differs(rank, DIFFERENCES)


def skipped(rank, world):
    """Let one process leave a layer out, or evaluate it; return what all get, and the layers' counters."""
    results = {}
    for name in ("skipped", "evaluated", "other channels"):
        layers = [nn.SyncBatchNorm(3) for _ in range(3)]
        for layer in layers:
            layer(torch.randn(4, 3))
        if name == "other channels":
            layers[1] = nn.SyncBatchNorm(600 if rank == world - 1 else 3)
        if rank == world - 1 and name == "evaluated":
            layers[1].eval()
        raised = []
        for at, layer in enumerate(layers):
            if name == "skipped" and rank == world - 1 and at == 1:
                continue
            x = torch.randn(4, layer.num_features)
            raised.append(text_of(lambda layer=layer, x=x: layer(x)))
            if raised[-1]:
                break
        results[name] = raised[-1], [layer.num_batches_tracked.item() for layer in layers]
        results[name + ", after"] = nn.SyncBatchNorm(3)(torch.randn(4, 3)).shape
    return results


def backwards(rank, world):
    """Return what each process gets if the last one's backward passes differ from those of the others."""
    results = {}
    last = rank == world - 1

    def outputs(count=2):
        layers = [nn.SyncBatchNorm(3) for _ in range(count)]
        xs = [torch.randn(4, 3, requires_grad=True) for _ in layers]
        return layers, [layer(x).square().sum() for layer, x in zip(layers, xs, strict=True)]

    def in_turn(calls):
        for call in calls:
            call()

    for name in ("skipped", "forward", "other order", "of weights only", "create_graph", "no memory"):
        layers, (first, second) = outputs()
        count = [layer.num_batches_tracked.item() for layer in layers]
        calls = [first.backward, second.backward]
        if name == "forward":
            calls = [lambda: layers[0](torch.randn(4, 3)), *calls] if last else calls  # noqa: B023
        elif name == "other order":
            calls = calls[::-1] if last else calls
        elif name == "of weights only":
            calls = [lambda: torch.autograd.grad(first, layers[0].weight), calls[1]] if last else calls  # noqa: B023
        elif name == "create_graph":
            calls = [lambda: first.backward(create_graph=last)]  # noqa: B023
        elif name == "skipped":
            calls = calls[1:] if last else calls
        with failing("backward_reduce" if name == "no memory" and last else None):
            results[name] = text_of(lambda calls=calls: in_turn(calls))
        results[name + ", unchanged"] = count == [layer.num_batches_tracked.item() for layer in layers]
        results[name + ", after"] = nn.SyncBatchNorm(3)(torch.randn(4, 3)).shape
    results["after the sums"] = memory_that_runs_out_after_the_sums(last)
    x = torch.randn(4, 3, requires_grad=not last)
    results["gradient"] = text_of(lambda: nn.SyncBatchNorm(3)(x))
    results["same bits"] = gradient_of_a_sum()
    return results


def memory_that_runs_out_after_the_sums(last):
    """Return what the last process raises alone, whether all states agree after it, and whether the group goes on."""
    layer = nn.SyncBatchNorm(3)
    loss = layer(torch.linspace(0, 1, 12).view(4, 3).clone().requires_grad_()).square().sum()
    before, text = state_of(layer), None
    with failing("backward_input" if last else None):
        try:
            loss.backward()
        except MemoryError as error:
            text = str(error)
    return text, all(map(torch.equal, state_of(layer), before)), nn.SyncBatchNorm(3)(torch.randn(4, 3)).shape


def out_of_memory(*_):
    raise MemoryError("none left")


@contextmanager
def failing(phase):
    """Let a phase of the backend that serves tensors on the CPU find no memory."""
    engine = registry.backend_for(torch.empty(0))
    if phase is not None:
        setattr(engine, phase, out_of_memory)
    try:
        yield
    finally:
        if phase is not None:
            delattr(engine, phase)


def state_of(layer):
    return [value.clone() for value in layer.state_dict().values()]


def no_memory(rank, world):
    """Return what all get, and the state, if memory runs out on one process before the exchange and after it."""
    results = {}
    for channels in (3, 600):
        layer = nn.SyncBatchNorm(channels)
        layer(torch.randn(4, channels))
        before = state_of(layer)
        for phase in ("empty_like", "stats", "normalize"):
            with failing(phase if rank == world - 1 else None):
                text = text_of(lambda layer=layer: layer(torch.randn(4, layer.num_features)))
            results[phase, channels] = text, all(map(torch.equal, state_of(layer), before))
        results["after", channels] = layer(torch.randn(4, channels)).shape
    return results


PARTS = ("backends", "algorithm.py", "merge.py", "registry.py", "arguments.py", "aliasing.py")
"""Code whose calls into C fail in turn: all but that of the exchanges themselves."""


def everywhere(rank, world):
    """Let memory run out on one process in each call into C in turn; return whether each raised and changed."""
    x = torch.linspace(0, 1, 60).view(4, 3, 5)
    old = state_of(nn.SyncBatchNorm(3, momentum=None, activation="silu"))
    outcomes, number, more, error = [], 0, torch.tensor(1), MemoryError("none left")
    while more:
        layer = nn.SyncBatchNorm(3, momentum=None, activation="silu")
        place = at_c_call(number if rank == world - 1 else -1, error, PARTS)
        call = partial(text_of, partial(layer, x))
        reached = injected(lambda call=call: outcomes.append(call()), sys.setprofile, place, error)[1]
        state = state_of(layer)
        outcomes[-1] = outcomes[-1], [torch.equal(*pair) for pair in zip(state, old, strict=True)]
        more = torch.tensor(int(rank < world - 1 or reached > number))
        number += 1
        dist.all_reduce(more, dist.ReduceOp.MIN)
    return outcomes


def skipped_at_first(rank, world):
    """Let one process leave out a layer that was never called; in the end it has made one more than others."""
    results = []
    for more in (0, 1):
        layers = [nn.SyncBatchNorm(3) for _ in range(3 + (more if rank == world - 1 else 0))]
        called = [layer for at, layer in enumerate(layers[:3]) if not (at == 1 and rank == world - 1 and not more)]
        texts = [text_of(lambda layer=layer: layer(torch.randn(4, 3))) for layer in called[:2]]
        results.append((texts, [layer.num_batches_tracked.item() for layer in layers[:3]]))
    return results


def gradient_of_a_sum():
    """Return gradients of a batch that is the same on all processes: they are equal to the last bit."""
    x = torch.linspace(0, 1, 12).view(4, 3).clone().requires_grad_()
    nn.SyncBatchNorm(3)(x).pow(3).sum().backward()
    return x.grad


def first_calls(rank, world):
    """Make a mistake on one process in a layer's first call: later the group and all layers still work."""
    first, second = nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)
    text = text_of(lambda: first("x" if rank == world - 1 else torch.randn(4, 3)))
    return text, [layer(torch.randn(4, 3)).shape for layer in (second, first, second)]


def aliases(rank, world):
    """Pass a statistic as another argument too, on one process."""
    results, last = {}, rank == world - 1
    for name in ("running_var", "weight"):
        tensors = {"running_mean": torch.ones(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
        if last:
            tensors[name] = tensors["running_mean"]
        results[name] = text_of(lambda tensors=tensors: nn.sync_batch_norm(torch.randn(4, 3), **tensors))
        results[name + ", unchanged"] = all(tensor.eq(1).all().item() for tensor in tensors.values())
    return results


def compiled(rank, world):
    """Make mistakes on one process where every process has compiled its layer whole."""
    results = {}
    x = torch.randn(4, 3, 5)
    calls = {"rank": (torch.randn(3),), "residual": (x, x[:2]), "activation": (x, None, "selu")}
    layer = nn.SyncBatchNorm(3)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name, arguments in calls.items():
        results[name] = text_of(lambda given=arguments if rank == world - 1 else (x,): call(*given))
    with failing("stats" if rank == world - 1 else None):
        results["memory"] = text_of(lambda: call(x))
    y = call(x.requires_grad_()).square().sum()
    with failing("backward_reduce" if rank == world - 1 else None):
        results["memory, backward"] = text_of(y.backward)
    y = call(x).square().sum()
    results["counter"] = layer.num_batches_tracked.item()
    other = nn.SyncBatchNorm(3)(x).square().sum()
    results["backward"] = text_of((other if rank == world - 1 else y).backward)
    results["after"] = nn.SyncBatchNorm(3)(x).shape
    results["output"] = memory_that_runs_out_for_a_compiled_output(x.detach(), rank == world - 1)
    return results


def memory_that_runs_out_for_a_compiled_output(x, last):
    """Return what each process raises (the last alone knows why), and whether states are as before; run at the end."""
    group = dist.new_group()
    layer = nn.SyncBatchNorm(3, process_group=group)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    call(x)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    before, text = state_of(layer), None
    with failing("normalize" if last else None):
        try:
            call(x)
        except (MemoryError, RuntimeError) as error:
            text = str(error)
    return text, all(map(torch.equal, state_of(layer), before))


def caught(call):
    """Return the text of an error, and how long it took."""
    start = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.monotonic() - start


def silent(rank, world):
    """Leave one process out of a call; its next collective call then meets the others after their error."""
    group = dist.new_group()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)  # only now: processes may come late to a group
    if rank == world - 1:
        return None
    return caught(lambda: nn.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3)))


def killed(rank, world):
    """End one process between two steps; nothing is to be run after this."""
    layer = nn.SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return caught(lambda: layer(torch.randn(4, 3)))
