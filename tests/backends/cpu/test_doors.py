"""The builtin functions that pass tensors straight to a kernel: the calls that they serve and those they refuse."""

import contextlib
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from support.tensors import data

from gpu_bn import nn
from gpu_bn.backends.cpu import doors
from gpu_bn.nn.operators import plain_calls

if not doors._dlpack_reader():
    pytest.skip("this torch has no DLPack exchange interface", allow_module_level=True)


def layouts(x):
    """Return the tensor in layouts that the builtin functions serve, by name."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype)
    wide[:, 1 : 1 + x.shape[1]] = x
    return {"dense": x, "channels last": x.to(memory_format=torch.channels_last), "gaps": wide[:, 1 : 1 + x.shape[1]]}


@contextlib.contextmanager
def without_doors():
    """Turn the builtin functions off, so that calls go through Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_calls, "forward", lambda *_: None)
        yield


def results(x, residual, activation, vectors, dy, quick, training=True):
    """Return the output, the gradients and the running statistics of a call, with the doors or without them."""
    given = [one.detach().clone().requires_grad_() for one in vectors[:2]]
    leaves = [one.detach().requires_grad_() for one in (x, residual) if one is not None]
    running = [one.clone() for one in vectors[2:]]
    counter = torch.tensor(3) if training else None
    with contextlib.nullcontext() if quick else without_doors():
        other = leaves[1] if len(leaves) > 1 else None
        y = nn.batch_norm(
            leaves[0], *running, *given, training=training, residual=other, activation=activation,
            num_batches_tracked=counter,
        )  # fmt: skip
    assert ("CpuCall" in type(y.grad_fn).__name__) == quick
    outputs = [y, *torch.autograd.grad(y, [*leaves, *given], dy), *running]
    return [*outputs, counter] if training else outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.one_in(3)
def test_results_are_those_without_the_doors(dtype, training, activation):
    x, added, dy = (data(4, 3, 5, 7, seed=seed, dtype=dtype) for seed in range(3))
    vectors = [torch.rand(3) + 0.5 for _ in range(4)]
    vectors[3] = vectors[3].double()
    pairs = [(one, None) for one in layouts(x).values()] + [(x, added), (x, layouts(added)["gaps"])]
    for one, other in pairs:
        quick, usual = (results(one, other, activation, vectors, dy, way, training) for way in (True, False))
        for mine, its in zip(quick, usual, strict=True):
            assert mine.stride() == its.stride()
            assert torch.equal(mine, its)


def refused_changes():
    """Return changes of the arguments that a door refuses, by name."""
    x, vector, memory = data(4, 3, 5), torch.ones(3), torch.ones(64)
    return {
        "two statistics in one": {"mean": memory[:3], "var": memory[2:5]},
        "statistics in the input": {"x": memory[:60].view(4, 3, 5), "mean": memory[58:61]},
        "statistics in the residual": {"residual": memory[:60].view(4, 3, 5), "var": memory[2:5]},
        "statistics in the weight": {"weight": memory[:3], "var": memory[2:5]},
        "counter in the statistics": {"mean": memory[:3], "counter": memory[2:4].view(torch.int64)[0]},
        "half statistics": {"mean": vector.half()},
        "half weight": {"weight": vector.half()},
        "statistics with gaps": {"mean": memory[:6:2]},
        "whole numbers": {"bias": vector.long()},
        "too long": {"var": torch.ones(4)},
        "counter of 32 bits": {"counter": torch.tensor(0, dtype=torch.int32)},
        "residual of another dtype": {"residual": x.double()},
        "residual of another shape": {"residual": x[:, :, :4]},
        "expanded": {"x": x[:1].expand(4, 3, 5)},
        "elsewhere": {"weight": vector.to("meta")},
        "zeros without memory": {"weight": torch._efficientzerotensor((3,))},
        "negated": {"bias": torch._neg_view(vector)},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(refused_changes()))
def test_a_refused_call_changes_nothing(name):
    given = {"x": data(4, 3, 5), "residual": None, "weight": torch.ones(3), "bias": torch.zeros(3),
             "mean": torch.zeros(3), "var": torch.ones(3), "counter": torch.tensor(0)}  # fmt: skip
    names = ("x", "weight", "bias", "residual", "mean", "var", "counter")

    def forward(given):
        return plain_calls.forward(tuple([given[name] for name in names]), True, 0.5, 1e-5, "identity", 0.0)

    assert forward(given) is not None
    assert given["counter"] == 1
    given |= refused_changes()[name]
    written = [given[one] for one in ("mean", "var", "counter")]
    before = [one.clone() for one in written]
    assert forward(given) is None
    assert all(torch.equal(one, old) for one, old in zip(written, before, strict=True))


def test_hooks_may_change_the_layout_of_saved_tensors():
    x, dy = data(4, 3, 5, 6), data(4, 3, 5, 6, seed=1)

    def gradient(unpack):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: one, unpack):
            y = nn.batch_norm(leaf, training=True, activation="silu")
        return torch.autograd.grad(y, leaf, dy)[0]

    last = gradient(lambda one: one.to(memory_format=torch.channels_last) if one.dim() == 4 else one)
    torch.testing.assert_close(last, gradient(lambda one: one), rtol=1e-5, atol=1e-6)


def test_threads_of_python_do_not_disturb_each_other():
    problems = [(data(8, 16, 40, 40, seed=seed), [torch.rand(16) + 0.5 for _ in range(4)]) for seed in range(4)]
    want = [results(x, None, "relu", vectors, x, False) for x, vectors in problems]
    wrong = []

    def work(at):
        for _ in range(10):
            x, vectors = problems[at]
            if not all(map(torch.equal, results(x, None, "relu", vectors, x, True), want[at])):
                wrong.append(at)

    workers = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong
