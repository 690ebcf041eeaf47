"""Plain calls take a short path to the same launches; other calls take the general path."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend, RecordingBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_bn
from gpu_bn import nn, registry
from gpu_bn.backends import alike
from gpu_bn.backends.triton import plain as plain_calls
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.backends.triton.launch import ClusterError
from gpu_bn.plan import DEVICES


class PlainRecorder(RecordingBackend):
    """Records arguments that are not tensors, too, and which plain calls were served."""

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

    def record(self, step, args):
        super().record(step, args)
        names = [parameter.name for parameter in step.kernel.params]
        numbers = {n: a for n, a in zip(names, args, strict=False) if not isinstance(a, torch.Tensor)}
        if step.kernel.__name__ == "bn_normalize_kernel" and "mean" not in numbers:  # frozen: mean is a tensor
            del numbers["momentum"]  # not read
        self.launches[-1] += (numbers,)


def run(monkeypatch, plain, call, **options):
    backend = PlainRecorder(plain, **options)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
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


def replacing(name, tensor):
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
    "a weight with gaps": replacing("weight", lambda _: torch.ones(16)[::2]),
    "a counter of 32 bits": replacing("num_batches_tracked", lambda _: torch.zeros((), dtype=torch.int32)),
    "a weight in the running mean": replacing("weight", lambda layer: layer.running_mean),
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
    """Each call is checked: a known signature does not vouch for other tensors, or for the same ones after a change."""
    backend = PlainRecorder(True)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
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
    backend = PlainRecorder(True)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 6, 6, requires_grad=True)
    layer(x).sum().backward()  # dy is expanded from a scalar
    layer(x).backward(torch.empty(4, 8, 6, 6).to(memory_format=torch.channels_last))
    assert backend.served == ["forward", "forward"]
    assert len(backend.launches) == 4


def test_signatures_are_bounded(monkeypatch):
    backend = PlainRecorder(True)
    backend.plain.known.most = 3
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
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
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer, x = nn.BatchNorm2d(64), torch.empty(32, 64, 56, 56, dtype=torch.float16, requires_grad=True)
    for _ in range(2):
        y = layer(x)
        y.backward(torch.empty_like(y))
    assert len(refused) == 1
    assert {step.num_ctas for step in launched} == {1}
    assert layer.running_mean._version > 1


class Subclass(torch.Tensor):
    pass


def inference_zeros():
    with torch.inference_mode():
        return torch.zeros(8)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def changing_data(name, tensor):
    """Return a function that replaces the data of a tensor of the layer, which stays the same object."""

    def change(layer, _):
        getattr(layer, name).data = tensor

    return change


CHANGES = NOT_PLAIN | {
    "a weight of another dtype": changing_data("weight", torch.ones(8).double()),
    "a weight that has got gaps": changing_data("weight", torch.ones(16)[::2]),
    "a weight of another length": changing_data("weight", torch.ones(9)),
    "a weight of a type of one's own": replacing("weight", lambda _: torch.ones(8).as_subclass(Subclass)),
    "a negated variance": replacing("running_var", lambda _: torch._neg_view(torch.ones(8))),
    "a mean that needs gradients": replacing("running_mean", lambda _: torch.zeros(8, requires_grad=True)),
    "a mean of inference mode": replacing("running_mean", lambda _: inference_zeros()),
    "statistics in one place": replacing("running_var", lambda layer: layer.running_mean),
    "statistics on another device": replacing("running_var", lambda _: torch.zeros(8, device="meta")),
    "a sparse weight": replacing("weight", lambda _: torch.ones(8).to_sparse()),
    "a sparse input": lambda _, x: x.detach().to_sparse(),
    "an input in oneDNN's memory": lambda _, x: x.detach().float().to_mkldnn(),
    "an input of a type of one's own": lambda _, x: x.detach().as_subclass(Subclass),
    "an input of another dtype": lambda _, x: x.detach().double(),
    "an input of other strides": lambda _, x: x.detach().to(memory_format=torch.channels_last),
    "an input of another shape": lambda _, x: x.detach().view(8, 8, 8, 16),
    "an input with more channels": lambda _, x: x.detach().view(4, 16, 8, 16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_known_signature_hides_no_change(name, monkeypatch):
    outcomes = []
    for quick in (True, False):

        def call():
            layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 16, 16, dtype=torch.float16, requires_grad=True)
            for _ in range(2):
                layer(x)
            changed = CHANGES[name](layer, x)
            layer(x if changed is None else changed)

        try:
            outcomes.append(run(monkeypatch, quick, call)[1])
        except (RuntimeError, ValueError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


WATCHES = {
    "a mode": Watch,
    "forward-mode differentiation": torch.autograd.forward_ad.dual_level,
    "statistics left alone": nn.no_tracking,
}


@pytest.mark.parametrize("name", WATCHES)
def test_a_known_signature_hides_no_one_who_watches(name, monkeypatch):
    backend = PlainRecorder(True)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 16, 16, requires_grad=True)
    y = layer(x)
    with WATCHES[name]():
        layer(x)
    assert backend.served == ["forward"]
    torch.func.grad(lambda x: layer(x).sum())(x.detach())
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert backend.served == ["forward", "backward"]
    torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True, retain_graph=True)
    assert backend.served == ["forward", "backward"]


def test_kinds_of_calls_of_one_shape_are_remembered_side_by_side(monkeypatch):
    backend = PlainRecorder(True)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layers = [nn.BatchNorm2d(8), nn.BatchNorm2d(8).requires_grad_(False)]
    x = torch.empty(4, 8, 6, 6)
    inputs = [x, x.clone().requires_grad_(), x.to(memory_format=torch.channels_last), torch.nn.Parameter(x)]
    prepare = Mock(side_effect=plain_calls.prepare_forward)
    monkeypatch.setattr(plain_calls, "prepare_forward", prepare)
    for _ in range(3):
        for layer, x in product(layers, inputs):
            y = layer(x)
            if y.requires_grad:
                y.backward(torch.empty_like(y))
    assert prepare.call_count == len(layers) * len(inputs)
    assert Counter(backend.served) == {"forward": 24, "backward": 18}


def test_saved_tensors_that_come_back_otherwise_are_looked_at(monkeypatch):
    backend = PlainRecorder(True)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 6, 6, requires_grad=True)
    for order in (torch.contiguous_format, torch.channels_last):

        def unpack(one, order=order):
            return one.clone(memory_format=order) if one.dim() == 4 else one

        with torch.autograd.graph.saved_tensors_hooks(lambda one: one, unpack):
            y = layer(x)
        y.backward(torch.empty_like(y))
    assert backend.served == ["forward", "backward", "forward"]


def test_a_call_comes_to_its_kernel_in_five_files(monkeypatch):
    """CONTRIBUTING has a diagram of these files."""
    ways, package = [], Path(gpu_bn.__file__).parent

    def launch(step, _):
        frames = [Path(frame.filename) for frame in traceback.extract_stack()]
        ways.append([*dict.fromkeys(path.name for path in frames if package in path.parents)])
        ways[-1].append(Path(step.kernel.fn.__code__.co_filename).name)

    monkeypatch.setattr(registry, "backend_for", lambda _: backend)
    backend = TritonBackend(launch, DEVICES["a100"])
    layer, x = nn.BatchNorm2d(8), torch.empty(4, 8, 6, 6, requires_grad=True)
    for _ in range(2):
        layer(x).backward(x.detach())
    front = ["fused.py", "plain_calls.py"]
    assert ways == 2 * [
        [*front, "plain.py", "launch.py", "forward.py"],
        [*front[1:], "plain.py", "launch.py", "backward.py"],
    ]


class ByAddress(EmulatedBackend):
    """Launches compiled steps with the addresses of tensors, as on a GPU."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.by_address, self.tensors = 0, {}

    def new(self, *args):
        made = super().new(*args)
        self.remember(*(made.unbind() if made.dim() == 2 else ()), made)
        return made

    def remember(self, *tensors):
        self.tensors |= {one.data_ptr(): one for one in tensors if isinstance(one, torch.Tensor)}

    def launch_on_emulator(self, step, args):
        super().launch_on_emulator(step, args)
        self.remember(*args)
        pointers = [isinstance(one, torch.Tensor) for one in args]

        def run(*args):
            self.by_address += 1
            assert not any(isinstance(one, torch.Tensor) for one in args)
            found = [self.tensors[one] if is_one else one for one, is_one in zip(args, pointers, strict=True)]
            super(ByAddress, self).launch_on_emulator(step, found)

        step.run = run


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
@pytest.mark.parametrize("kind", [EmulatedBackend, ByAddress])
def test_plain_calls_compute_what_torch_does(tier, kind, device, compile_triton, monkeypatch):
    backend = kind(device, compile_triton, 80, replace(DEVICES["a100"], sms=4), tier=tier)
    monkeypatch.setattr(registry, "backend_for", lambda *_: backend)
    ours, theirs = nn.BatchNorm1d(6, activation="relu"), torch.nn.BatchNorm1d(6)
    with torch.no_grad():
        for one in (ours.weight, ours.bias):
            one.copy_(torch.randn(6))
    theirs.load_state_dict(ours.state_dict())
    x, added = (torch.randn(4, 6, 5, requires_grad=True) for _ in range(2))
    found, dy = [], torch.ones_like(x)
    for layer, call in ((ours, ours), (theirs, lambda x, added: (theirs(x) + added).relu())):
        for _ in range(2):
            y = call(x, added)
            gradients = torch.autograd.grad(y, [x, added, layer.weight, layer.bias], dy)
        layer.eval()
        found.append([y, *gradients, *[call(x, added) for _ in range(2)], *layer.buffers()])
    assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(backend.plain.known) == 2
    assert kind is EmulatedBackend or backend.by_address == {"cta": 3, "split": 5}[tier]


@pytest.mark.parametrize("devices", [1, 2])
def test_new_tensors_of_a_gpu_are_of_its_device(devices, monkeypatch):
    """The fast function of torch allocates on the current GPU, so that it is used only if there is one GPU."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(alike._guards, "_empty_strided_cuda", lambda *layout: calls.append(layout))
    monkeypatch.setattr(torch, "empty_strided", lambda *layout, **options: calls.append((*layout, options)))
    device, layout = torch.device("cuda", devices - 1), alike.contiguous_layout((2, 3), torch.float16)
    assert layout == ((2, 3), (3, 1), torch.float16)
    alike.allocator(device)(*layout)
    assert calls == [layout if devices == 1 else ((2, 3), (3, 1), {"dtype": torch.float16, "device": device})]
