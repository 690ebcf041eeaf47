"""Run SyncBatchNorm in several processes, one of which makes a mistake or fails. Return what each process raises.

``support/processes.py`` calls the functions ``NAME(rank, world)`` in each process.
"""

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
from support.injection import at_c_call, run_with_error


def wrong_calls(rank):
    """Return for each check the arguments of a layer with 3 channels. Those of process 1 are wrong."""
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
    """Let the last process pass a wrong vector. Return what each process raises, and its counter after the call."""
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
    """Let process 1 make each mistake. Return what each process raises, and whether the state is unchanged."""
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


def error_message(call):
    """Return the message of a ``ValueError`` that a call raises; ``None`` without one."""
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
"""Wrong arguments that only one process passes. They fail there before anything is sent."""
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
"""Valid arguments that differ from those of the other processes."""


def one_differs(rank, table):
    """Let the last process pass the arguments of each row. Return the message and whether the state is unchanged."""
    results = {}
    for name, different in table.items():
        state = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
        arguments = {"input": torch.ones(4, 3, 5), **state}
        if rank == dist.get_world_size() - 1:
            arguments |= different
        text = error_message(lambda call=arguments: nn.sync_batch_norm(call.pop("input"), **call))
        mean, var, counter = state.values()
        results[name] = text, bool(mean.eq(0).all() and var.eq(1).all() and counter == 0)
    layer = nn.SyncBatchNorm(3)
    results["after"] = layer(torch.randn(4, 3)).shape, layer.num_batches_tracked.item()
    return results


def mistakes(rank, _):
    return one_differs(rank, MISTAKES)


def differences(rank, _):
    return one_differs(rank, DIFFERENCES)


def skipped(rank, world):
    """Let the last process skip or evaluate a layer. Return the messages, and the counters of the layers."""
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
            raised.append(error_message(lambda layer=layer, x=x: layer(x)))
            if raised[-1]:
                break
        results[name] = raised[-1], [layer.num_batches_tracked.item() for layer in layers]
        results[name + ", after"] = nn.SyncBatchNorm(3)(torch.randn(4, 3)).shape
    return results


def backwards(rank, world):
    """Let the backward passes of the last process differ. Return what each process raises."""
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
            results[name] = error_message(lambda calls=calls: in_turn(calls))
        results[name + ", unchanged"] = count == [layer.num_batches_tracked.item() for layer in layers]
        results[name + ", after"] = nn.SyncBatchNorm(3)(torch.randn(4, 3)).shape
    results["after the sums"] = memory_that_runs_out_after_the_sums(last)
    x = torch.randn(4, 3, requires_grad=not last)
    results["gradient"] = error_message(lambda: nn.SyncBatchNorm(3)(x))
    results["same bits"] = gradient_of_a_sum()
    return results


def memory_that_runs_out_after_the_sums(last):
    """Let memory run out in the last process after the exchange of sums.

    Return the message, which only that process gets, whether the state is unchanged, and the shape of a later output.
    """
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
    """Let a phase of the backend for CPU tensors raise ``MemoryError`` within this context; ``None`` for no phase."""
    engine = registry.backend_for(torch.empty(0))
    if phase is not None:
        setattr(engine, phase, out_of_memory)
    try:
        yield
    finally:
        if phase is not None:
            delattr(engine, phase)


def state_of(layer):
    """Return copies of the parameters and buffers of a layer."""
    return [value.clone() for value in layer.state_dict().values()]


def no_memory(rank, world):
    """Let memory run out in the last process, before the exchange and after it.

    Return the message, and whether the state is unchanged.
    """
    results = {}
    for channels in (3, 600):
        layer = nn.SyncBatchNorm(channels)
        layer(torch.randn(4, channels))
        before = state_of(layer)
        for phase in ("empty_like", "stats", "normalize"):
            with failing(phase if rank == world - 1 else None):
                text = error_message(lambda layer=layer: layer(torch.randn(4, layer.num_features)))
            results[phase, channels] = text, all(map(torch.equal, state_of(layer), before))
        results["after", channels] = layer(torch.randn(4, channels)).shape
    return results


PARTS = ("backends", "algorithm.py", "merge.py", "registry.py", "arguments.py", "aliasing.py")
"""Parts of the paths of code whose calls into C fail in turn: all code except that of the exchanges."""


def everywhere(rank, world):
    """Let memory run out in the last process in each call into C in turn.

    Return the message, and for each value of the state whether it is unchanged.
    """
    x = torch.linspace(0, 1, 60).view(4, 3, 5)
    old = state_of(nn.SyncBatchNorm(3, momentum=None, activation="silu"))
    outcomes, number, more, error = [], 0, torch.tensor(1), MemoryError("none left")
    while more:
        layer = nn.SyncBatchNorm(3, momentum=None, activation="silu")
        place = at_c_call(number if rank == world - 1 else -1, error, PARTS)
        call = partial(error_message, partial(layer, x))
        reached = run_with_error(lambda call=call: outcomes.append(call()), sys.setprofile, place, error)[1]
        state = state_of(layer)
        outcomes[-1] = outcomes[-1], [torch.equal(*pair) for pair in zip(state, old, strict=True)]
        more = torch.tensor(int(rank < world - 1 or reached > number))
        number += 1
        dist.all_reduce(more, dist.ReduceOp.MIN)
    return outcomes


def skipped_at_first(rank, world):
    """Let the last process skip a layer in the first calls, then let it create one layer more than the others."""
    results = []
    for more in (0, 1):
        layers = [nn.SyncBatchNorm(3) for _ in range(3 + (more if rank == world - 1 else 0))]
        called = [layer for at, layer in enumerate(layers[:3]) if not (at == 1 and rank == world - 1 and not more)]
        texts = [error_message(lambda layer=layer: layer(torch.randn(4, 3))) for layer in called[:2]]
        results.append((texts, [layer.num_batches_tracked.item() for layer in layers[:3]]))
    return results


def gradient_of_a_sum():
    """Return the gradient of a batch that is the same on all processes. All must get the same bits."""
    x = torch.linspace(0, 1, 12).view(4, 3).clone().requires_grad_()
    nn.SyncBatchNorm(3)(x).pow(3).sum().backward()
    return x.grad


def first_calls(rank, world):
    """Let the last process make a mistake in the first call of a layer. Then call all layers again."""
    first, second = nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)
    text = error_message(lambda: first("x" if rank == world - 1 else torch.randn(4, 3)))
    return text, [layer(torch.randn(4, 3)).shape for layer in (second, first, second)]


def aliases(rank, world):
    """Let the last process pass the running mean as another argument as well."""
    results, last = {}, rank == world - 1
    for name in ("running_var", "weight"):
        tensors = {"running_mean": torch.ones(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
        if last:
            tensors[name] = tensors["running_mean"]
        results[name] = error_message(lambda tensors=tensors: nn.sync_batch_norm(torch.randn(4, 3), **tensors))
        results[name + ", unchanged"] = all(tensor.eq(1).all().item() for tensor in tensors.values())
    return results


def compiled(rank, world):
    """Let the last process make mistakes after every process has compiled its layer as one graph."""
    results = {}
    x = torch.randn(4, 3, 5)
    calls = {"rank": (torch.randn(3),), "residual": (x, x[:2]), "activation": (x, None, "selu")}
    layer = nn.SyncBatchNorm(3)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name, arguments in calls.items():
        results[name] = error_message(lambda inputs=arguments if rank == world - 1 else (x,): call(*inputs))
    with failing("stats" if rank == world - 1 else None):
        results["memory"] = error_message(lambda: call(x))
    y = call(x.requires_grad_()).square().sum()
    with failing("backward_reduce" if rank == world - 1 else None):
        results["memory, backward"] = error_message(y.backward)
    y = call(x).square().sum()
    results["counter"] = layer.num_batches_tracked.item()
    other = nn.SyncBatchNorm(3)(x).square().sum()
    results["backward"] = error_message((other if rank == world - 1 else y).backward)
    results["after"] = nn.SyncBatchNorm(3)(x).shape
    results["output"] = memory_that_runs_out_for_a_compiled_output(x.detach(), rank == world - 1)
    return results


def memory_that_runs_out_for_a_compiled_output(x, last):
    """Let memory run out for the output in the last process. The others time out, so this must be the last call.

    Return the message, and whether the state is unchanged.
    """
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


def timed_error(call):
    """Return the message of a ``RuntimeError`` that a call raises, and the seconds until then."""
    start = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.monotonic() - start


def silent(rank, world):
    """Let the last process leave out a call. Return the error that the others get when the call times out."""
    group = dist.new_group()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)  # not earlier, as processes may join late
    if rank == world - 1:
        return None
    return timed_error(lambda: nn.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3)))


def killed(rank, world):
    """Kill the last process between two steps. Return the error of the others. Nothing can run after this."""
    layer = nn.SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return timed_error(lambda: layer(torch.randn(4, 3)))
