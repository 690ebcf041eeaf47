"""Converting models and back, merging activations and sums, folding, inserting identities."""

import copy
import io

import pytest
from support import rng
from support.networks import BatchNormAct2d, FrozenBatchNorm2d, mobilenet, register, resnet, unet

import gpu_bn

torch = pytest.importorskip("torch")

from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.fx import activations
from gpu_bn.nn.modules import Fused

NETWORKS = {"resnet": resnet, "mobilenet": mobilenet, "unet": unet}
MERGED = {"resnet": (17, 8), "mobilenet": (9, 0), "unet": (12, 0)}


def image(seed=0, size=32):
    return torch.from_numpy(rng(seed).standard_normal((4, 3, size, size))).float()


def trained(make):
    """A network whose statistics are not those it was made with."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for seed in range(2):
            model(2 * image(seed) + 0.5)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, Fused)]


@pytest.fixture
def stand_ins(monkeypatch):
    register(monkeypatch)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_converted_and_reverted_is_the_same_model(name):
    model = trained(NETWORKS[name])
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
    model = trained(NETWORKS[name]).train()
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
    assert norms(fused), "the model itself is left as it is"
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
    """It may compute something else."""


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


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x):
        return torch.nn.functional.dropout(torch.relu(self.norm(x)), training=self.training)


class Branching(Dropping):
    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Dropping, Branching])
@pytest.mark.parametrize("training", [True, False])
def test_what_a_graph_would_lose_is_kept(kind, training):
    plain = kind().train(training)
    report = nn.Report()
    fused = nn.convert(copy.deepcopy(plain), fuse=True, report=report)
    for seed in range(4):
        x = torch.from_numpy(rng(seed).standard_normal((5, 3))).float()
        results = []
        for model in (fused, plain):
            torch.manual_seed(0)
            results.append(model(x))
        assert_close(*results)
    assert list(report.merged) == (["norm"] if kind is Dropping else [])
    assert (kind is Dropping) or "cannot be traced" in report.left["norm"]


class Sums(torch.nn.Module):
    """What must not be merged: a layer used twice by the sum, an output used elsewhere, a scaled sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (torch.nn.BatchNorm1d(3) for _ in range(4))

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        return torch.relu(a + a) + torch.relu(b) + b + torch.relu(torch.add(c, x, alpha=2)) + torch.relu(3 + self.d(x))


def test_only_what_is_the_same_is_merged():
    model, x = Sums(), torch.randn(5, 3)
    expected = copy.deepcopy(model)(x)
    report = nn.Report()
    fused = nn.convert(model, fuse=True, report=report)
    assert not report.merged
    assert set(report.left) == {"a", "b", "c", "d"}
    assert_close(fused(x), expected)


class InputOverwritten(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)

    def forward(self, x):
        h = 2 * x
        a = self.a(h.detach())
        h.add_(1)
        b = self.b(h.detach())
        h.mul_(3)
        return torch.relu(a) + torch.relu(b + x) + h


class ResidualOverwritten(InputOverwritten):
    def forward(self, x):
        r = 3 * x
        z = self.a(x) + r
        r.mul_(2)
        return torch.relu(z) + self.b(r**3)


class SumInPlaceOfTheOther(InputOverwritten):
    def forward(self, x):
        h = 2 * x
        return torch.relu(h.add_(self.a(x))) + self.b(h**3)


class ALayerUsedTwice(InputOverwritten):
    """Its running statistics depend on the order of its calls."""

    def forward(self, x):
        a, b = self.a(x), self.a(2 * x + 1)
        c, d = self.b(x), self.b(3 * x - 1)
        return torch.relu(a) * b + torch.relu(d + c)


class Watched(InputOverwritten):
    def __init__(self):
        super().__init__()
        self.act = torch.nn.ReLU()
        self.act.register_forward_hook(lambda _module, _inputs, y: 2 * y)
        self.b.register_forward_hook(lambda _module, _inputs, y: -y)
        self.c, self.same = torch.nn.BatchNorm1d(3), torch.nn.Identity()
        self.same.register_forward_hook(lambda _module, _inputs, y: 3 * y)

    def forward(self, x):
        return self.act(self.a(x)) + torch.relu(self.b(x)) + torch.sigmoid(self.same(self.c(x)))


@pytest.mark.parametrize(
    "kind", [InputOverwritten, ResidualOverwritten, SumInPlaceOfTheOther, ALayerUsedTwice, Watched]
)
def test_merging_keeps_the_order_of_what_it_leaves(kind):
    plain = kind().double()
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    for seed in range(2):
        x = torch.from_numpy(rng(seed).standard_normal((6, 3))).requires_grad_()
        y, expected = fused(x), plain(x)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x))
    assert_close(fused.state_dict(), plain.state_dict())


def test_fused_activations_with_a_parameter():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Identity(), torch.nn.LeakyReLU(0.3),
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.GELU(approximate="tanh"),
    )  # fmt: skip
    x = torch.randn(8, 3)
    expected = copy.deepcopy(model)(x)
    fused = nn.convert(model, fuse=True)
    assert_close(fused(x), expected)
    evaluated = fused.eval()(x)
    folded = nn.fold(fused)
    assert_close(folded(x), evaluated)
    assert not norms(folded)
    with pytest.raises(ValueError, match="normalisation of 2D inputs, got 3D"):
        folded(torch.randn(2, 4, 3))
    assert_close(copy.deepcopy(fused)(x), evaluated)


class Normalising(torch.nn.Module):
    """It has tensors of its own, some of which its calls, its state or its order leave out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.rand(3, 1, 1))
        self.register_buffer("scale", torch.rand(3, 1, 1), persistent=False)
        self.register_buffer("unused", torch.rand(2), persistent=False)
        self.offset = torch.tensor(0.5)

    def forward(self, x):
        return (x - self.shift) * self.scale + self.offset


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.auxiliary = torch.nn.Linear(4, 2), torch.nn.Linear(4, 3)
        self.factor, self.spare = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        self.register_buffer("hidden", torch.rand(1), persistent=False)
        self.inputs, self.norm, self.act = Normalising(), torch.nn.BatchNorm2d(4), torch.nn.LeakyReLU(0.2)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.all = torch.nn.ModuleList([self.inputs, self.conv, torch.nn.Sequential()])

    def forward(self, x):
        y = self.conv(self.inputs(x))
        y = self.act(self.norm(y) + y)
        return self.head(y.mean((2, 3))) * self.factor + self.hidden


def states(model):
    """The names of all that a model has, and of all that it saves, in order."""
    names = (model.named_parameters(), model.named_buffers(), model.state_dict().items())
    return [[name for name, _ in pairs if name != "inputs.offset"] for pairs in names]


def test_a_fused_model_has_the_state_of_its_model():
    model = Whole()
    expected = states(model)
    fused = nn.convert(model, fuse=True)
    assert states(fused) == expected
    copied = copy.deepcopy(copy.deepcopy(fused.eval()))
    assert states(copied) == expected
    assert not any(module.training for module in copied.modules())
    assert_close(copied(image()), fused(image()))
    copied.auxiliary, copied.extra = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(1, 1)
    assert set(copy.deepcopy(copied).state_dict()) == set(copied.state_dict())


class PartlyInEvaluation(InputOverwritten):
    def __init__(self):
        super().__init__()
        self.all = torch.nn.Sequential(self.a)

    def forward(self, x):
        return torch.relu(self.b(self.a(x)))

    def train(self, mode=True):
        super().train(mode)
        self.a.eval()
        return self


@pytest.mark.parametrize("model", [PartlyInEvaluation, lambda: torch.nn.Sequential(PartlyInEvaluation())])
def test_a_fused_model_trains_what_its_model_does(model):
    fused = nn.convert(model(), fuse=True)
    for graph in (fused, copy.deepcopy(copy.deepcopy(fused)), nn.convert(fused, fuse=True)):
        for mode in (False, True):
            assert graph.train(mode) is graph
            assert [layer.training for layer in norms(graph)] == [False, mode]
            assert graph.training == mode


def test_reverting_gives_a_model_what_its_fused_one_has():
    model = Whole()
    fused = nn.convert(model, fuse=True)
    fused(image())
    with torch.no_grad():
        fused.inputs.shift.add_(1)
    fused.head = torch.nn.Linear(4, 5)
    fused.double().eval()
    x = image().double()
    expected, state = fused(x), fused.state_dict()
    assert nn.revert(fused) is model
    assert model.head is fused.head
    assert not any(module.training for module in model.modules())
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {tensor.dtype for tensor in (model.hidden, model.inputs.scale, model.factor)} == {torch.float64}
    assert_close(model(x), expected)
    assert_close(fused(x), expected)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        saved_and_loaded,
        copy.deepcopy,
        lambda fused: torch.nn.Sequential(fused, torch.nn.ReLU()),
        lambda fused: nn.convert(fused, fuse=True),
        lambda fused: saved_and_loaded(nn.convert(torch.nn.Sequential(fused, torch.nn.ReLU()), fuse=True)),
    ],
)
def test_fused_models_are_reverted_wherever_they_are(change):
    torch.manual_seed(0)
    changed = change(nn.convert(Whole(), fuse=True))
    changed(image(1))
    expected, x = copy.deepcopy(changed)(image()), image()
    model = nn.revert(changed)
    assert not norms(model)
    assert_close(model(x), expected)
    again = nn.convert(model, fuse=True)
    assert sum(layer.activation.is_identity for layer in norms(again)) == 1
    assert_close(again.eval()(x), model.eval()(x))


def test_a_fused_model_that_cannot_be_reverted_is_left_as_it_is():
    model = nn.convert(Whole(), fuse=True).eval()
    expected = model(image())
    nn.freeze(model)
    with pytest.raises(ValueError, match="layer 'norm' is frozen"):
        nn.revert(torch.nn.Sequential(model)[0])
    assert_close(model(image()), expected)
    assert len(norms(model)) == 1


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_and_linear_folding_as_torch(transpose, bias):
    cls = torch.nn.ConvTranspose2d if transpose else torch.nn.Conv2d
    conv, linear = cls(4, 6, 3, bias=bias).eval(), torch.nn.Linear(4, 6, bias=bias).eval()
    x, rows = torch.randn(2, 4, 8, 8), torch.randn(5, 4)
    for bn, layer, data, ours, theirs in (
        (nn.BatchNorm2d(6), conv, x, nn.fuse_conv_bn_eval, torch.nn.utils.fuse_conv_bn_eval),
        (nn.BatchNorm1d(6), linear, rows, nn.fuse_linear_bn_eval, torch.nn.utils.fuse_linear_bn_eval),
    ):
        bn(layer(data) * 2 + 1)
        bn.eval()
        mine = ours(layer, bn)
        assert_close(mine(data), bn(layer(data)), rtol=1e-4, atol=1e-5)
        other = theirs(layer, bn, transpose) if layer is conv else theirs(layer, bn)
        assert_close(mine.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
        assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in other.parameters()]
        bn.activation = gpu_bn.Activation("silu")
        assert_close(ours(layer, bn)(data), bn(layer(data)), rtol=1e-4, atol=1e-5)
        with pytest.raises(AssertionError, match="Fusion only for eval!"):
            ours(layer, bn.train())


def test_folding_leaves_what_it_cannot_fold():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = torch.nn.Conv1d(3, 3, 1), torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y + self.other(self.conv(x))

    model, x = Shared().eval(), torch.randn(2, 3, 4)
    folded = nn.fold(model)
    assert_close(folded(x), model(x))
    assert {name for name, _ in folded.named_children()} == {"conv", "bn", "other"}


def test_identities_inserted_into_a_trained_network():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(5 * 36, 4), torch.nn.Tanh()
    )
    x = image(size=8)
    expected = model(x)
    nn.insert_identity_(model, ["0", "3"], x, eps=1e-3)
    assert [type(model[i][1]) for i in (0, 3)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    for mode in (False, True):
        assert_close(model.train(mode)(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no modules named 7"):
        nn.insert_identity_(model, ["7"], x)


@pytest.mark.parametrize("names", [["0", "0.0"], ["0.0", "0"], ["0", "0"]])
def test_identities_inserted_into_a_module_and_into_what_it_is_in(names):
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Tanh())
    model, x = torch.nn.Sequential(inner, torch.nn.Conv2d(5, 2, 1)), image(size=8)
    expected = model(x)
    assert_close(nn.insert_identity_(model, names, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert model[0][0] is inner
    assert [type(layer) for layer in norms(model)] == [nn.BatchNorm2d] * len(set(names))


def test_identities_inserted_before_what_overwrites_its_input():
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(inplace=True)), image(size=8)
    expected = model(x)
    nn.insert_identity_(model, ["0"], x)
    for mode in (False, True):
        assert_close(model.train(mode)(x), expected, rtol=1e-4, atol=1e-5)


def test_an_identity_behind_what_gives_no_tensor_is_refused():
    model, x = torch.nn.Sequential(torch.nn.LSTM(3, 4)), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="0 should give a tensor of rank 2 to 5"):
        nn.insert_identity_(model, ["0"], x)
    assert type(model[0]) is torch.nn.LSTM


def test_every_activation_of_ours_is_known_by_torchs_name():
    names = {activation.name for activation in activations.LAYERS.values()} | {"leaky_relu", "elu"}
    assert names == set(gpu_bn.activations.ROWS)
