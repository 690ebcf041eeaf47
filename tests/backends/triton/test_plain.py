"""Plain calls launch what other calls launch, in fewer steps; whatever is not plain goes the other way."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend
from torch.testing import assert_close

from gpu_bn import nn, registry
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.backends.triton.launch import ClusterError
from gpu_bn.plan import DEVICES


class Noting(RecordingBackend):
    """Notes the arguments that are no tensors, too, and what plain calls were served."""

    forward_at_once = TritonBackend.forward_at_once

    def __init__(self, plain, **options):
        super().__init__(DEVICES["a100"], **options)
        self.served, ways = [], self.plain
        if plain:
            for name in ("forward", "backward"):
                setattr(ways, name, self.counting(name, getattr(ways, name)))
        else:
            del self.plain

    def counting(self, name, method):
        def call(*args):
            found = method(*args)
            self.served += [name] * (found is not None)
            return found

        return call

    def note(self, step, args):
        super().note(step, args)
        names = [parameter.name for parameter in step.kernel.params]
        numbers = {n: a for n, a in zip(names, args, strict=False) if not isinstance(a, torch.Tensor)}
        if step.kernel.__name__ == "bn_normalize_kernel" and "mean" not in numbers:  # it is a tensor, frozen
            del numbers["momentum"]  # which is not read
        self.launches[-1] += (numbers,)


def run(monkeypatch, plain, call, **options):
    backend = Noting(plain, **options)
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    call()
    kinds = [(step.kernel.__name__, step.grid, special.key, numbers) for step, special, numbers in backend.launches]
    return backend, kinds


def layer_call(shape=(4, 8, 16, 16), dtype=torch.float16, residual=False, needs=True, activation="relu", change=None,
               frozen=False, **options):  # fmt: skip
    def call():
        layer = nn.BatchNorm2d(shape[1], activation=activation, **options).train(not frozen)
        x, added = (torch.empty(shape, dtype=dtype, requires_grad=needs) for _ in range(2))
        if change is not None:
            changed = change(layer, x)
            x = x if changed is None else changed
        y = layer(x, added) if residual else layer(x)
        if needs:
            y.backward(torch.empty_like(y))

    return call


@pytest.mark.parametrize("tier", ["cta", "split"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_the_same_launches(tier, residual, needs, options, frozen, activation, monkeypatch):
    call = layer_call(residual=residual, needs=needs, activation=activation, frozen=frozen, **options)
    backend, plain = run(monkeypatch, True, call, tier=tier)
    assert backend.served[:1] == ["forward"]
    assert backend.served[1:] in ([], ["backward"])
    _, other = run(monkeypatch, False, call, tier=tier)
    assert plain == other
    assert plain


def put(name, tensor):
    def change(layer, _):
        if name in layer._parameters:
            layer._parameters[name] = torch.nn.Parameter(tensor(layer))
        else:
            layer._buffers[name] = tensor(layer)

    return change


def misaligned(_, x):
    return torch.empty(x.numel() + 1, dtype=x.dtype, requires_grad=True)[1:].view(x.shape)


NOT_PLAIN = {
    "an input at an odd address": misaligned,
    "an input with gaps": lambda _, x: torch.empty(4, 8, 16, 32, dtype=x.dtype, requires_grad=True)[..., ::2],
    "a weight with gaps": put("weight", lambda _: torch.ones(16)[::2]),
    "a counter of 32 bits": put("num_batches_tracked", lambda _: torch.zeros((), dtype=torch.int32)),
    "a weight in the running mean": put("weight", lambda layer: layer.running_mean),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_goes_the_other_way(name, monkeypatch):
    outcomes = []
    for plain in (True, False):
        try:
            backend, kinds = run(monkeypatch, plain, layer_call(change=NOT_PLAIN[name]))
            assert "forward" not in backend.served
        except ValueError as error:
            kinds = str(error)
        outcomes.append(kinds)
    assert outcomes[0] == outcomes[1]


def test_what_is_remembered_does_not_hide_a_change(monkeypatch):
    """Each call is looked at: a signature that is known says nothing of other tensors, or of the same ones later."""
    backend = Noting(True)
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 6, 6)
    layer(x)
    with pytest.raises(RuntimeError, match="should contain 6 elements not 8"):
        layer(torch.empty(4, 6, 8, 6))
    layer.weight.data = torch.ones(9)
    with pytest.raises(RuntimeError, match="should contain 8 elements not 9"):
        layer(x)
    layer.weight.data = torch.ones(8)
    layer.running_var = layer.running_mean
    with pytest.raises(ValueError, match="two tensors"):
        layer(x)
    assert backend.served == ["forward"]


def test_gradients_of_another_form_go_the_other_way(monkeypatch):
    backend = Noting(True)
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 6, 6, requires_grad=True)
    layer(x).sum().backward()  # an expanded number
    layer(x).backward(torch.empty(4, 8, 6, 6).to(memory_format=torch.channels_last))
    assert backend.served == ["forward", "forward"]
    assert len(backend.launches) == 4


def test_signatures_are_bounded(monkeypatch):
    backend = Noting(True)
    backend.plain.known.most = 3
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    layer = nn.BatchNorm2d(8).requires_grad_(False)
    for size in range(2, 12):
        layer(torch.empty(2, 8, size, size))
    assert backend.served == ["forward"] * 10
    assert len(backend.plain.known) == 3


def test_a_plain_call_is_planned_again_without_clusters_where_they_fail(monkeypatch):
    refused, launched = [], []

    def launch(step, args):
        del args
        (refused if step.num_ctas > 1 else launched).append(step)
        if step.num_ctas > 1:
            raise ClusterError("no clusters here")

    backend = TritonBackend(launch, DEVICES["h100"])
    backend.builder.clusters = True
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    layer, x = nn.BatchNorm2d(64), torch.empty(32, 64, 56, 56, dtype=torch.float16, requires_grad=True)
    for _ in range(2):
        y = layer(x)
        y.backward(torch.empty_like(y))
    assert len(refused) == 1
    assert {step.num_ctas for step in launched} == {1}
    assert layer.running_mean._version > 1


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
def test_plain_calls_compute_what_torch_does(tier, device, compile_triton, monkeypatch):
    backend = EmulatedBackend(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    monkeypatch.setattr(registry, "serving", lambda *_: backend)
    ours, theirs = nn.BatchNorm1d(6, activation="relu"), torch.nn.BatchNorm1d(6)
    with torch.no_grad():
        for one in (ours.weight, ours.bias):
            one.copy_(torch.randn(6))
    theirs.load_state_dict(ours.state_dict())
    x, added = (torch.randn(4, 6, 5, requires_grad=True) for _ in range(2))
    found = []
    for layer, call in ((ours, ours), (theirs, lambda x, added: (theirs(x) + added).relu())):
        y = [call(x, added) for _ in range(2)][-1]
        gradients = torch.autograd.grad(y, [x, added, layer.weight, layer.bias], torch.ones_like(x))
        layer.eval()
        found.append([y, *gradients, call(x, added), *layer.buffers()])
    assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(backend.plain.known) == 2
    assert None not in backend.plain.known.values()
