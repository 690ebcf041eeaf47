"""Test that models are converted, and that reverting restores them."""

import copy
import pickle

import pytest

import gpu_bn

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.models_to_merge import image, norms
from support.networks import BatchNormAct2d, FrozenBatchNorm2d, MobileNet, ResNet, UNet, register
from torch.testing import assert_close

from gpu_bn import nn

NETWORKS = {"resnet": ResNet, "mobilenet": MobileNet, "unet": UNet}


MERGED = {"resnet": (17, 8), "mobilenet": (9, 0), "unet": (12, 0)}


def make_trained(make):
    """Return a network whose statistics differ from the initial ones."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for seed in range(2):
            model(2 * image(seed) + 0.5)
    return model


@pytest.fixture
def stand_ins(monkeypatch):
    register(monkeypatch)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_converted_and_reverted_is_the_same_model(name):
    model = make_trained(NETWORKS[name])
    state, text, keys, x = copy.deepcopy(model.state_dict()), repr(model), set(model.__dict__), image()
    expected, modules = model.eval()(x), list(model.modules())
    converted = nn.convert(model)
    assert converted is model
    assert len(norms(model)) > 5
    assert all(type(module) is not torch.nn.BatchNorm2d for module in model.modules())
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert nn.revert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert (repr(model), set(model.__dict__)) == (text, keys)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_fused_networks_train_as_the_plain_ones_and_fold(name):
    model = make_trained(NETWORKS[name]).train()
    plain = copy.deepcopy(model)
    report = nn.Report()
    fused = nn.convert(model, fuse=True, report=report)
    assert fused is model
    assert (len(report.merged), sum("sum" in what for what in report.merged.values())) == MERGED[name]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = image()
    results = []
    for network in (fused, plain):
        y = network(x)
        y.square().mean().backward()
        state = dict(network.named_buffers())
        gradients = {f"d{name}": p.grad for name, p in network.named_parameters()}
        results.append({"y": y.detach()} | state | gradients)
    assert results[0].keys() == results[1].keys()
    for name, other in results[1].items():
        mine = results[0][name]
        assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.double().abs().max().item() + 1e-6)
    expected = fused.eval()(x)
    folded = nn.fold(fused)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
    assert norms(fused), "nn.fold has changed the model that it was given"
    back = nn.revert(fused)
    assert back is model
    assert not norms(back)
    assert_close(back.state_dict(), fused.state_dict(), rtol=0, atol=0)
    assert_close(back.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_flags_and_shared_layers_are_kept():
    layer = torch.nn.BatchNorm1d(3).eval()
    layer.weight.requires_grad_(False)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    model = torch.nn.ModuleDict({"a": layer, "b": layer})
    nn.convert(model)
    assert model["a"] is model["b"] is layer
    assert type(layer) is nn.BatchNorm1d
    layer(torch.ones(2, 3))
    assert (seen, layer.training, layer.weight.requires_grad) == (["hook"], False, False)


def test_parametrised_layers():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = torch.nn.BatchNorm1d(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(5, 3)
    expected = layer(x)
    nn.convert(layer)
    assert isinstance(layer, nn.BatchNorm1d)
    assert_close(layer(x), expected)
    nn.revert(layer)
    assert not isinstance(layer, nn.BatchNorm1d)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (torch.nn.ReLU(), "relu"),
        (torch.nn.LeakyReLU(0.2), "leaky_relu(negative_slope=0.2)"),
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.Identity(), "identity"),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_a_fused_activation_is_kept(act, name):
    layer = BatchNormAct2d(3, act)
    text, x = repr(layer), image()
    expected = layer(x)
    nn.convert(layer)
    assert repr(layer.activation) == name
    assert_close(layer(x), expected)
    nn.revert(layer)
    assert (type(layer), repr(layer)) == (BatchNormAct2d, text)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("layer", [BatchNormAct2d(3, torch.nn.ReLU()), FrozenBatchNorm2d(3)])
def test_code_that_asks_for_a_librarys_class_finds_a_converted_layer(layer):
    theirs, x = type(layer), image()
    expected, ours = layer(x), nn.BatchNorm2d if isinstance(layer, torch.nn.BatchNorm2d) else nn.FrozenBatchNorm2d
    layer = nn.convert(copy.deepcopy(layer))
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), nn.convert(copy.copy(layer))):
        assert isinstance(each, theirs)
        assert isinstance(each, ours)
        assert type(each) is type(layer)
        assert_close(each(x), expected)
    layer.eps = 0.5
    assert not torch.allclose(layer(x), expected)
    assert type(nn.revert(layer)) is theirs


@pytest.mark.usefixtures("stand_ins")
def test_what_cannot_be_converted_is_left_as_it_is():
    class Special(torch.nn.BatchNorm2d):
        pass

    class Shifted(torch.nn.LeakyReLU):
        def forward(self, x):
            return super().forward(x) + 1

    watched = [torch.nn.ReLU(), torch.nn.Identity()]
    for module in watched:
        module.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    layers = [
        BatchNormAct2d(3, torch.nn.Mish()),
        BatchNormAct2d(3, torch.nn.ReLU(), torch.nn.Dropout()),
        BatchNormAct2d(3, Shifted(0.1)),
        BatchNormAct2d(3, watched[0]),
        BatchNormAct2d(3, torch.nn.ReLU(), watched[1]),
        Special(3),
    ]
    kinds = [type(layer) for layer in layers]
    nn.convert(torch.nn.Sequential(*layers))
    assert [type(layer) for layer in layers] == kinds


@pytest.mark.usefixtures("stand_ins")
def test_frozen_layers_of_torchvision():
    layer = FrozenBatchNorm2d(3)
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.uniform_(0.5, 2)
    x, state = image(), copy.deepcopy(layer.state_dict())
    expected = layer(x)
    nn.convert(layer)
    assert_close(layer(x), expected)
    layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(3)})
    assert_close(layer.state_dict(), state)
    nn.revert(layer)
    assert type(layer) is FrozenBatchNorm2d
    assert torch.equal(nn.FrozenBatchNorm2d(3)(x), nn.BatchNorm2d(3).eval()(x))


def test_torchs_sync_batch_norm_becomes_ours_and_serves_cpus():
    group = object()
    layer = torch.nn.SyncBatchNorm(3, process_group=group)
    x = torch.randn(4, 3, 5)
    nn.convert(layer)
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is group
    assert_close(layer(x), torch.nn.BatchNorm1d(3)(x))
    assert type(nn.revert(layer)) is torch.nn.SyncBatchNorm


class Derived(nn.BatchNorm2d):
    """A subclass of BatchNorm, which may compute something else."""


def test_converting_to_sync_batch_norm_keeps_what_a_layer_has():
    layers = [
        torch.nn.BatchNorm2d(3, eps=1e-3, momentum=None),
        torch.nn.SyncBatchNorm(3),
        nn.BatchNorm2d(3, activation=gpu_bn.leaky_relu(0.2)),
        nn.BatchNorm(3).eval(),
        nn.freeze(nn.BatchNorm3d(3, affine=False)),
        Derived(3),
        nn.FrozenBatchNorm2d(3),
    ]
    model = torch.nn.Sequential(*layers)
    called = []
    layers[0].register_forward_hook(lambda *_: called.append(True))
    before = [(dict(layer.named_parameters()), dict(layer.named_buffers()), layer.training) for layer in layers]
    group = object()
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    for layer, (parameters, buffers, training) in zip(model, before, strict=True):
        assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
        assert all(buffer is buffers[name] for name, buffer in layer.named_buffers())
        assert layer.training == training
    assert all(type(layer) is nn.SyncBatchNorm and layer.process_group is group for layer in layers[:5])
    assert [type(layer) for layer in layers[5:]] == [Derived, nn.FrozenBatchNorm2d]
    assert layers[2].activation == gpu_bn.leaky_relu(0.2)
    assert layers[4].frozen
    assert (layers[0].eps, layers[0].momentum) == (1e-3, None)
    layers[0](image())
    assert called == [True]
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layers[0]) is layers[0]
    layers[2].activation = gpu_bn.Activation("identity")
    nn.unfreeze(layers[4])
    kinds = [torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm, torch.nn.BatchNorm2d, nn.BatchNorm, torch.nn.BatchNorm3d]
    assert [type(nn.revert(layer)) for layer in layers[:5]] == kinds
    assert [hasattr(layer, "process_group") for layer in layers[:5]] == [False, True, False, False, False]


def test_lazy_layers_are_not_left_out_in_silence():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="run a batch through '1' first"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm1d
    model(torch.randn(4, 3))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is nn.SyncBatchNorm


def test_reverting_what_torch_cannot_do_is_refused():
    model = torch.nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, activation="relu"))
    with pytest.raises(ValueError, match="layer '1' has the activation relu, which torch's layer would lose"):
        nn.revert(model)
    assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="layer '' is frozen"):
        nn.revert(nn.freeze(nn.BatchNorm1d(3)))


def test_lazy_layers_are_converted_before_and_after_their_first_input():
    layer = nn.convert(torch.nn.LazyBatchNorm1d())
    assert type(layer) is nn.LazyBatchNorm1d
    layer(torch.randn(4, 3))
    assert type(layer) is nn.BatchNorm1d
    assert type(nn.revert(copy.deepcopy(layer))) is torch.nn.BatchNorm1d
    assert type(nn.revert(nn.SyncBatchNorm.convert_sync_batchnorm(layer))) is torch.nn.BatchNorm1d


class OwnFrozen(nn.FrozenBatchNorm2d):
    """A subclass of FrozenBatchNorm2d. Python allows no class with the bases (FrozenBatchNorm2d, OwnFrozen)."""


def test_a_layer_whose_class_cannot_be_joined_becomes_ours_alone():
    layer, x = OwnFrozen(3), image()
    expected = layer(x)
    assert type(nn.convert(layer)) is nn.FrozenBatchNorm2d
    assert_close(layer(x), expected)
    assert type(nn.revert(layer)) is OwnFrozen
