"""Test that a call on a CPU that raises has changed no statistics and no counter, wherever the fault occurs."""

import contextlib
import signal
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.injection import INJECTIONS, PACKAGE, run_with_error

import gpu_bn
from gpu_bn import (
    algorithm,
    nn,
)
from gpu_bn.merge import Pool
from gpu_bn.nn.running import update_running


def data():
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))


def with_attributes(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def call_under_grad(layer):
    def loss(x):
        return torch.func.functional_call(layer, {}, (x,)).square().sum()

    return torch.func.grad(loss)(data())


def call_function(layer, call=nn.batch_norm, **options):
    return call(data(), layer.running_mean, layer.running_var, training=True, **options)


CALLS = {
    "plain": lambda layer: layer(data()),
    "differentiated": lambda layer: layer(data().requires_grad_()),
    "half statistics": lambda layer: layer.to(torch.float16)(data().half()),
    "mask": lambda layer: layer(data(), mask=data()[:, 0] > -1),
    "ghost batches": lambda layer: with_attributes(layer, virtual_batch_size=2)(data()),
    "renorm": lambda layer: with_attributes(layer, renorm=(2.0, 1.0))(data()),
    "torch.func": call_under_grad,
    "functional": call_function,
    "front door": partial(call_function, call=gpu_bn.batch_norm),
    "named backend": partial(call_function, call=gpu_bn.batch_norm, backend="numpy"),
    "population": lambda layer: nn.update_population_stats(layer, [data(), data()]),
    "micro-batches": lambda layer: accumulate(layer),
    "several processes": lambda layer: update_from_pool(layer),
}


def accumulate(layer):
    with nn.accumulate_statistics(layer):
        for part in data().split(3):
            layer(part)


def update_from_pool(layer):
    """Update a layer from a pool, as SyncBatchNorm does after it has received the reports of all processes."""
    pool = Pool(torch.tensor([6.0]), torch.ones(3).double(), torch.ones(3).double())
    update_running((layer.running_mean, layer.running_var, layer.num_batches_tracked), None, pool)


def state_of(layer):
    return [value.clone() for value in layer.state_dict().values()]


def all_equal(one, other):
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("install", "place", "error"), INJECTIONS)
def test_statistics_and_counter_are_all_old_or_all_new(call, install, place, error):
    def fresh():
        layer = nn.BatchNorm(3, momentum=0.5 if call in (CALLS["renorm"], CALLS["several processes"]) else None)
        return layer.to(torch.float16) if call is CALLS["half statistics"] else layer

    whole = fresh()
    old = state_of(whole)
    call(whole)
    new = state_of(whole)
    assert not all_equal(old, new)
    number = 0
    while True:
        layer = fresh()
        raised, _ = run_with_error(partial(call, layer), install, place(number, error), error)
        state = state_of(layer)
        assert all_equal(state, old) or all_equal(state, new), (number, state)
        if not raised:
            break
        number += 1
    assert all_equal(state, new)
    assert number > 5


# -------------------------------------------------------------------------------------------------- counters of a GPU
def interrupt_at(number):
    """Return a trace function that sends SIGINT at the package's line event ``number``, and the count of events."""
    seen = [0]

    def local(_, event, __):
        if event == "line":
            seen[0] += 1
            if seen[0] == number + 1:
                signal.raise_signal(signal.SIGINT)
        return local

    return (lambda frame, *_: local if frame.f_code.co_filename.startswith(PACKAGE) else None), seen


@pytest.mark.parametrize("fails", [False, True])
def test_a_counter_moves_with_what_kernels_write_wherever_ctrl_c_strikes(fails):
    """Ctrl-C strikes at each line of ``increment_and_call``, around a launch that writes statistics at once."""
    number, raised = 0, True
    while raised:
        counter, statistic = np.zeros((), np.int64), np.zeros(3)

        def launch(statistic=statistic):
            if fails:
                raise MemoryError
            statistic += 1
            return "y"

        raised, _ = run_with_error(
            partial(call_ignoring_memory_error, algorithm.increment_and_call, counter, launch),
            sys.settrace,
            interrupt_at(number),
            KeyboardInterrupt(),
        )
        assert (counter == statistic).all()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        number += 1
    assert number > 8
    assert counter == (not fails)


def call_ignoring_memory_error(call, *arguments):
    with contextlib.suppress(MemoryError):
        call(*arguments)


def test_a_layer_on_an_emulated_gpu_counts_what_it_has_tracked(make_gpu):
    """Ctrl-C strikes at every fifth line of a call whose launch has been prepared."""
    gpu = make_gpu(80)
    x = gpu.asarray(data().numpy())
    layer = gpu_bn.BatchNorm(3, device="cuda")
    layer(x)
    first = layer.running_mean.get()
    number, raised = 0, True
    while raised:
        layer.num_batches_tracked[...] = 0
        layer.running_mean[...] = gpu.asarray(np.zeros(3, np.float32))
        raised, _ = run_with_error(partial(layer, x), sys.settrace, interrupt_at(number), KeyboardInterrupt())
        moved = bool((layer.running_mean.get() == first).all())
        assert moved or not layer.running_mean.get().any()
        assert moved == (layer.num_batches_tracked.get() == 1), number
        number += 5
    assert number > 50
    assert moved
