"""Calls that run on the threads of torch: equal bits, no other threads, and not more threads than allowed."""

import ctypes
import os
import threading

import pytest
from support.fresh import python

import gpu_bn

torch = pytest.importorskip("torch", reason="the team of threads is torch's: pip install torch")
pytest.importorskip("numba")

from gpu_bn import nn
from gpu_bn.backends.cpu import plans, team, threads
from gpu_bn.kernels.cpu.compiler import kernel
from gpu_bn.kernels.cpu.scalars import claim
from gpu_bn.kernels.cpu.team import run_phases

LAYOUTS = {
    "channels in groups": ((16, 64, 32, 32), torch.contiguous_format),
    "parts of few channels": ((2, 3, 700, 700), torch.contiguous_format),
    "rows": ((8, 64, 32, 32), torch.channels_last),
}


@pytest.fixture(autouse=True)
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def set_threads(count):
    torch.set_num_threads(count)
    gpu_bn.set_num_threads(count)


def results(layout, training=True, dtype=torch.float32):
    """Return the output, the gradients and the running statistics of a layer."""
    shape, order = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator, dtype=dtype).to(memory_format=order) for _ in range(2))
    layer = nn.BatchNorm2d(shape[1], dtype=dtype, activation="relu").train(training)
    y = layer(x.requires_grad_())
    return y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy), layer.running_mean, layer.running_var


@pytest.fixture
def no_pool(monkeypatch):
    def refuse(*_):
        raise AssertionError("the pool was asked")

    monkeypatch.setattr(threads, "run", refuse)


@pytest.mark.skipif(team.address() is None, reason="this torch does not use OpenMP")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("no_pool")
def test_results_are_the_same_to_the_last_bit(layout, training):
    set_threads(1)
    alone = results(layout, training)
    for count in (2, 3):
        set_threads(count)
        assert all(map(torch.equal, results(layout, training), alone))


@pytest.mark.skipif(team.address() is None, reason="this torch does not use OpenMP")
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_threads_take_part_than_are_allowed(most):
    """A kernel counts its calls in five phases: two run on ``most`` threads each, and three on one thread."""

    @kernel
    def mark(phase, counter):  # noqa: ARG001
        claim(counter)

    @kernel
    def marked(parallel, number, most, address, counter):
        run_phases(parallel, number, most, address, 31, (counter,))

    torch.set_num_threads(3)
    counter = torch.zeros(1, dtype=torch.int64)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(plans.address(marked))
    call(*team.address(), most, plans.address(mark), counter.data_ptr())
    assert counter.item() == 3 + 2 * most


@pytest.mark.parametrize("reason", ["torch has one thread", "there is no team"])
def test_without_a_team_the_pool_serves(reason, monkeypatch):
    set_threads(1)
    alone = results("channels in groups")
    set_threads(3)
    if reason == "there is no team":
        monkeypatch.setattr(team, "_forked", True)
    else:
        torch.set_num_threads(1)
    asked, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda work, count: (asked.append(count), run(work, count)))
    assert all(map(torch.equal, results("channels in groups"), alone))
    assert asked


@pytest.mark.skipif(team.address() is None, reason="this torch does not use OpenMP")
@pytest.mark.usefixtures("no_pool")
def test_python_threads_have_teams_of_their_own():
    set_threads(2)
    layouts, found = list(LAYOUTS), {}
    expected = {layout: results(layout) for layout in layouts}
    workers = [threading.Thread(target=lambda at=at: found.update({at: results(layouts[at % 3])})) for at in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(all(map(torch.equal, found[at], expected[layouts[at % 3]])) for at in range(6))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_without_the_team():
    """In the child, OpenMP would wait for threads that only the parent has."""
    code = """
import os, torch, gpu_bn
from gpu_bn import nn
torch.set_num_threads(2)
gpu_bn.set_num_threads(2)
x = torch.ones(4, 64, 64, 64)
layer = nn.BatchNorm2d(64)
with torch.no_grad():
    layer(x)
    child = os.fork()
    if not child:
        y = layer(x)
        os._exit(0 if y[0, 0, 0, 0].item() == 0.0 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert python(code) == ["0"]
