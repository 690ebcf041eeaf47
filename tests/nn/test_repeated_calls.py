"""Test that repeated calls use what earlier calls have prepared, and that different or observed calls do not."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from support.tensors import data
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_bn import nn, registry
from gpu_bn.backends.cpu import doors
from gpu_bn.nn.operators import autograd, cpu_calls

if not doors._dlpack_reader():
    pytest.skip("this torch has no DLPack exchange interface", allow_module_level=True)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Return the dict of prepared calls, which is empty at first."""
    found = {}
    monkeypatch.setattr(cpu_calls, "_cache", found)
    return found


def pair(training=False, **options):
    """Return a layer of gpu_bn and one of torch with equal values, after two calls each, which prepare later ones."""
    ours, theirs = nn.BatchNorm2d(3, **options), torch.nn.BatchNorm2d(3, **options)
    for layer in (ours, theirs):
        for at, vector in enumerate((*layer.parameters(), layer.running_mean, layer.running_var)):
            vector.data.copy_(data(3, seed=at).abs() + 0.5)
        layer.train(training)
        for _ in range(2):
            layer(data(4, 3, 5, 6))
    return ours, theirs


def signatures(known):
    return [way for ways in known.values() for way in ways]


@pytest.mark.parametrize("training", [True, False])
def test_calls_alike_are_prepared_once(training, known, monkeypatch):
    ours, theirs = pair(training)
    assert len(signatures(known)) == 1
    before = ours.running_var._version
    monkeypatch.setattr(cpu_calls, "_prepare", None)
    monkeypatch.setattr(autograd, "plain_tensors", None)
    for _ in range(2):
        x, dy, leaves = data(4, 3, 5, 6, seed=7), data(4, 3, 5, 6, seed=8), list(ours.parameters())
        y, want = ours(x), theirs(x)
        torch.testing.assert_close(y, want)
        gradients = torch.autograd.grad(y, leaves, dy)
        torch.testing.assert_close(gradients, torch.autograd.grad(want, list(theirs.parameters()), dy))
        (way,) = signatures(known)
        assert len(way.backward) == 1
        monkeypatch.setattr(cpu_calls, "_prepare_backward", None)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.running_var._version == before + 2 * training


def changes():
    """Return changes of a layer by name, each with the input of the next call. Only some set the layer to training."""
    x = data(4, 3, 5, 6, seed=3)

    def double(layer):
        layer.weight.data = layer.weight.data.double()

    return {
        "nothing": (lambda _: None, x),
        "channels last": (lambda _: None, x.to(memory_format=torch.channels_last)),
        "gaps": (lambda _: None, data(4, 6, 5, 6)[:, ::2]),
        "another shape": (lambda _: None, data(2, 3, 5, 6)),
        "differentiated": (lambda _: None, x.clone().requires_grad_()),
        "a Parameter": (lambda _: None, torch.nn.Parameter(x)),
        "other memory": (lambda layer: setattr(layer.weight, "data", data(3, seed=5)), x),
        "other statistics": (lambda layer: setattr(layer, "running_var", data(3, seed=5).abs()), x),
        "another eps": (lambda layer: setattr(layer, "eps", 0.5), x),
        "an eps of 1": (lambda layer: setattr(layer, "eps", 1), x),
        "no bias": (lambda layer: setattr(layer, "bias", None), x),
        "frozen": (lambda layer: layer.requires_grad_(False), x),
        "trained": (lambda layer: layer.train(), x),
        "a cumulative average": (lambda layer: setattr(layer.train(), "momentum", None), x),
        "its own statistics": (lambda layer: setattr(layer, "running_mean", layer.running_var), x),
        "one tensor twice": (lambda layer: setattr(layer, "bias", layer.weight), x),
    }


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("name", list(changes()))
def test_what_has_changed_is_seen(name, grows):
    layers, (change, x) = pair(), changes()[name]
    results = []
    for layer in layers:
        change(layer)
        for _ in range(2):
            with torch.set_grad_enabled(grows):
                y = layer(x)
        leaves = [one for one in (x, *layer.parameters()) if one.requires_grad]
        assert y.requires_grad == bool(grows and leaves)
        results.append([y, *(torch.autograd.grad(y, leaves, x) if y.requires_grad else ()), layer.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_new_activation_and_a_residual_are_seen():
    (layer, theirs), x, added = pair(), data(4, 3, 5, 6, seed=3), data(4, 3, 5, 6, seed=4)
    want = theirs(x)
    for _ in range(2):
        for name, function in (("relu", torch.relu), ("identity", lambda z: z), ("tanh", torch.tanh)):
            layer.activation = name
            for residual in (None, added, x):
                z = want if residual is None else want + residual
                torch.testing.assert_close(layer(x, residual), function(z))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_whoever_watches_sees_the_operator(training):
    (layer, _), x = pair(training), data(4, 3, 5, 6)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        with Seen() as seen:
            layer(x)
        traced = make_fx(lambda x: layer(x))(x)
    name = "gpu_bn.train" if training else "gpu_bn.infer"
    assert any(name in one for one in seen.names)
    assert any(name in str(node.target) for node in traced.graph.nodes)


def test_transforms_and_tracers_see_plain_tensors_too(known):
    (layer, theirs), x = pair(), data(4, 3, 5, 6)
    layer.requires_grad_(False)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        traced = torch.jit.trace(lambda z: layer(x) + z, torch.ones(()), check_trace=False)
        assert "batch_norm" in str(traced.graph)
        seen = []

        def of_scalar(scale):  # x is not wrapped by the transform, which is active
            seen.append(len(signatures(known)))
            return (layer(x) * scale).sum()

        before = len(signatures(known))
        want = theirs(x).sum()
        torch.testing.assert_close(torch.func.grad(of_scalar)(torch.ones(())), want)
        torch.testing.assert_close(torch.vmap(of_scalar)(torch.ones(2)), want.expand(2))
    assert seen == [before, before]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [forward_ad.unpack_dual(one(dual)).tangent for one in (layer, theirs)]
    torch.testing.assert_close(*tangents)


def test_inference_mode_and_its_tensors():
    (layer, theirs), x = pair(True), data(4, 3, 5, 6)
    with torch.inference_mode():
        inside = data(4, 3, 5, 6, seed=1)
        for one in (x, inside, x):
            torch.testing.assert_close(layer(one), theirs(one))
    for each in (layer, theirs):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="Inference tensors"):
                each(inside).sum().backward()
        each(x)
    torch.testing.assert_close(layer.running_mean, theirs.running_mean)


def test_statistics_are_left_alone_where_that_is_asked():
    (layer, _), x = pair(True), data(4, 3, 5, 6, seed=9)
    before = copy.deepcopy(layer.state_dict())
    with nn.no_tracking():
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before)


def test_another_choice_of_backends_is_asked(monkeypatch):
    (layer, _), asked = pair(), []

    def serving(array):
        asked.append(array)
        return registry.load("numpy", "torch")

    monkeypatch.setattr(registry, "backend_for", serving)
    layer(data(4, 3, 5, 6))
    assert asked


def test_what_is_remembered_is_bounded(known, monkeypatch):
    monkeypatch.setattr(cpu_calls, "MOST", 4)
    layer = nn.BatchNorm2d(3).eval()
    for size in range(1, 12):
        layer(data(2, 3, size, 2))
        for axis in range(2, 4):
            layer(data(2, 3, size, 2).transpose(2, axis).contiguous().transpose(2, axis))
        assert len(known) <= 4
    assert all(len(ways) <= cpu_calls.VARIANTS for ways in known.values())
