"""Test which layers nn.fold folds, and which it leaves because something else reads, changes or replaces them."""

import copy

import pytest
from support import rng

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.networks import BatchNormAct2d, FrozenBatchNorm2d, register
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from gpu_bn import nn


@pytest.fixture
def stand_ins(monkeypatch):
    register(monkeypatch)


def tensor(*shape, seed=0):
    return torch.from_numpy(rng(seed).standard_normal(shape)).float()


def set_eval(model):
    """Set a model to evaluation mode, with parameters and statistics that differ from the initial ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value += 0.5 * torch.rand(value.shape, generator=generator)
    return model.eval()


def norms(model):
    kinds = torch.nn.modules.batchnorm._BatchNorm, nn.FrozenBatchNorm2d, FrozenBatchNorm2d
    return [module for module in model.modules() if isinstance(module, kinds)]


def pair(conv=None, norm=None):
    return torch.nn.Sequential(conv or torch.nn.Conv2d(3, 4, 3), norm or torch.nn.BatchNorm2d(4))


IMAGES = (2, 3, 6, 6)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: torch.nn.BatchNorm2d(4),
        lambda: torch.nn.SyncBatchNorm(4),
        lambda: nn.BatchNorm2d(4, activation="silu"),
        lambda: nn.BatchNorm(4),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.FrozenBatchNorm2d(4, activation="relu"),
        lambda: FrozenBatchNorm2d(4),
        lambda: BatchNormAct2d(4, torch.nn.LeakyReLU(0.2)),
        lambda: nn.convert(BatchNormAct2d(4, torch.nn.ReLU(inplace=True))),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_known_layers_are_folded_with_their_activations(norm):
    model, x = set_eval(pair(norm=norm())), tensor(*IMAGES)
    folded = nn.fold(model)
    assert not norms(folded)
    assert not folded.training
    assert_close(folded(x), model(x))


class Scaled(torch.nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class OursScaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class Standardised(torch.nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Shifted(torch.nn.LeakyReLU):
    def forward(self, x):
        return super().forward(x) + 1


def patch_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def add_hook(layer, register, hook):
    getattr(layer, register)(hook)
    return layer


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrise(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


DOUBLE_OUTPUT = ("register_forward_hook", lambda _module, _inputs, y: 2 * y)
DOUBLE_INPUT = ("register_forward_pre_hook", lambda _module, inputs: (2 * inputs[0],))
BACKWARD = ("register_full_backward_hook", lambda *_: None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pair(norm=Scaled(4)),
        lambda: pair(norm=OursScaled(4)),
        lambda: pair(Standardised(3, 4, 3)),
        lambda: pair(norm=BatchNormAct2d(4, Shifted(0.1))),
        lambda: pair(norm=BatchNormAct2d(4, add_hook(torch.nn.ReLU(), *DOUBLE_OUTPUT))),
        lambda: pair(norm=patch_forward(torch.nn.BatchNorm2d(4))),
        *(lambda hook=hook: pair(norm=add_hook(nn.BatchNorm2d(4), *hook)) for hook in (DOUBLE_OUTPUT, DOUBLE_INPUT)),
        *(lambda hook=hook: pair(add_hook(torch.nn.Conv2d(3, 4, 3), *hook)) for hook in (DOUBLE_OUTPUT, BACKWARD)),
        lambda: pair(parametrise(torch.nn.Conv2d(3, 4, 3))),
        lambda: pair(norm=parametrise(torch.nn.BatchNorm2d(4))),
        lambda: pair(norm=nn.convert(parametrise(torch.nn.BatchNorm2d(4)))),
        lambda: pair(torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 4, 3))),
        lambda: pair(prune.random_unstructured(torch.nn.Conv2d(3, 4, 3), "weight", 0.5)),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_layers_that_may_compute_something_else_are_left(make):
    model, x = set_eval(make()), tensor(*IMAGES)
    with torch.no_grad():
        expected = model(x)  # this call also recomputes a pruned weight, so that it can be copied
        folded = nn.fold(model)
        assert_close(folded(x), expected)
    assert len(norms(folded)) == 1


class TiedByReading(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.norm = torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return F.linear(torch.relu(self.norm(self.encode(x))), self.encode.weight.t())


class TiedByParameter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


@pytest.mark.parametrize("kind", [TiedByReading, TiedByParameter])
def test_weights_that_are_read_elsewhere_are_left(kind):
    model, x = set_eval(kind()), tensor(5, 6)
    folded = nn.fold(model)
    assert_close(folded(x), model(x))
    assert len(norms(folded)) == 1


class ByName(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.unused, self.unused_too = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
        self.layers = torch.nn.ModuleList([self.conv, self.norm])

    def forward(self, x):
        return self.norm(input=self.conv(input=x))


@pytest.mark.parametrize("batch", [(), (tensor(*IMAGES),)], ids=["traced", "observed"])
def test_calls_by_name_are_folded_and_all_else_is_kept(batch):
    model, x = set_eval(ByName()), tensor(*IMAGES)
    folded = nn.fold(model, *batch)
    assert_close(folded(x), model(x))
    assert type(folded) is ByName
    assert folded.layers[0] is folded.conv
    assert {name for name, _ in model.state_dict().items()} - set(folded.state_dict()) == {
        f"{norm}.{name}" for norm in ("norm", "layers.1") for name in model.norm.state_dict()
    }


NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)


class Listed(torch.nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()])


class AsksForItsClass(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, torch.nn.BatchNorm2d):
                x = 2 * x
        return x


class AsksForItsType(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if type(layer) not in NORMS else 2 * layer(x)
        return x


class ReadsANumber(Listed):
    def forward(self, x):
        conv, norm, act = self.layers
        return act(norm(conv(x))) + norm.eps


class ReadsABuffer(Listed):
    def forward(self, x):
        conv, norm, act = self.layers
        return act(norm(conv(x))) + norm.running_mean.mean()


class LooksForAnAttribute(Listed):
    def call(self, layer, x):
        return layer(x)

    def forward(self, x):
        doubled = [hasattr(layer, "running_var") for layer in self.layers]
        for layer, double in zip(self.layers, doubled, strict=True):
            x = 2 * self.call(layer, x) if double else self.call(layer, x)
        return x


class TakesItsDtype(Listed):
    def forward(self, x):
        conv, norm, act = self.layers
        return act(norm(conv(x.to(norm.weight.dtype))))


class ChecksItsBias(Listed):
    def __init__(self):
        super().__init__()
        self.scale = 1.0 if self.layers[1].bias is None else 2.0

    def half(self):
        return getattr(self.layers[1], "bias", None) is None

    def forward(self, x):
        conv, norm, act = self.layers
        return act(norm(conv(x))) * (0.5 if self.half() else self.scale)


class ReadsItsOwn(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + self.num_features


@pytest.mark.parametrize("batch", [(), (tensor(*IMAGES),)], ids=["traced", "observed"])
@pytest.mark.parametrize(
    "kind",
    [AsksForItsClass, AsksForItsType, ReadsANumber, ReadsABuffer, LooksForAnAttribute, TakesItsDtype, ChecksItsBias,
     ReadsItsOwn],
)  # fmt: skip
def test_normalisations_that_code_asks_about_are_left(kind, batch):
    model, x, report = set_eval(kind()), tensor(*IMAGES), nn.Report()
    folded = nn.fold(model, *batch, report=report)
    assert_close(folded(x), model(x))
    if kind is ReadsItsOwn:
        assert report.folded == {"layers.1": "layers.0"}
    else:
        assert report.left == {"layers.1": "the model's code asks for its class or attributes"}


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d(4), nn.BatchNorm2d(4, activation="relu")])
def test_what_is_left_of_a_folded_normalisation_can_be_looked_at(norm):
    folded = nn.fold(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm))
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(folded[1], name) is None
    assert (folded[1].eps, folded[1].momentum, folded[1].num_features) == (1e-5, 0.1, 4)
    assert (folded[1].affine, folded[1].track_running_stats) == (False, False)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert_close(copy.deepcopy(folded)(tensor(*IMAGES)), folded(tensor(*IMAGES)))


def test_tracers_enter_what_is_left_of_a_folded_normalisation():
    layers = [nn.BatchNorm2d(4, activation="relu"), torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.BatchNorm1d(5)]
    folded, x = nn.fold(set_eval(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), *layers))), tensor(2, 3, 6, 6)
    traced = torch.fx.symbolic_trace(folded)
    assert_close(traced(x), folded(x))
    assert not [module for module in traced.modules() if type(module).__module__.startswith("gpu_bn")]
    with pytest.raises(AssertionError, match="folded with the normalisation of 2D inputs"):
        torch.fx.symbolic_trace(folded[3:])(tensor(2, 3, 64))


class Closed(torch.nn.Module):
    """A module whose layers are called by a function. Copies of the module share that function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.function = lambda x: torch.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.function(x)


class ResidualOfItself(torch.nn.Module):
    """A module that adds the input of the normalisation to its output."""

    def __init__(self, by_name):
        super().__init__()
        self.conv, self.norm, self.by_name = torch.nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), by_name

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x, residual=x) if self.by_name else self.norm(x, x)


@pytest.mark.parametrize("batch", [(), (tensor(*IMAGES),)], ids=["traced", "observed"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_normalisation_whose_input_is_also_its_residual_is_left(by_name, batch):
    model, x, report = ResidualOfItself(by_name), tensor(*IMAGES), nn.Report()
    model(x)
    folded = nn.fold(model, *batch, report=report)
    assert report.folded == {}
    assert_close(folded(x), model.eval()(x))


@pytest.mark.parametrize("batch", [(), (tensor(*IMAGES),)], ids=["traced", "observed"])
def test_layers_that_a_function_holds_are_left_as_they_are(batch):
    model, x, report = set_eval(Closed()), tensor(*IMAGES), nn.Report()
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    folded = nn.fold(model, *batch, report=report)
    assert (report.folded, list(report.left)) == ({}, ["norm"])
    assert model.norm.training
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    model.eval()
    assert_close(folded(x), expected)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(4), (5, 4, 8)),
        (torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(1), (5, 1, 8)),
        (torch.nn.Linear(8, 4), torch.nn.BatchNorm2d(4), (5, 4, 2, 8)),
        (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm1d(4), (3, 6, 6)),  # a single image: its rows become the channels
    ],
)
def test_channels_that_are_not_the_layers_outputs_are_left(layer, norm, shape):
    model, x = set_eval(torch.nn.Sequential(layer, norm)), tensor(*shape)
    folded = nn.fold(model)
    assert len(norms(folded)) == 1
    assert_close(folded(x), model(x))


def test_a_batch_tells_how_many_axes_a_linear_layers_outputs_have():
    model = set_eval(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)))
    counter = model[1].num_batches_tracked.clone()
    for x, left in ((tensor(5, 8), 0), (tensor(5, 4, 8), 1)):
        folded = nn.fold(model, x)
        assert len(norms(folded)) == left
        assert_close(folded(x), model(x))
    assert model[1].num_batches_tracked == counter
    with pytest.raises(ValueError, match="2D inputs, got 3D: call nn"):
        nn.fold(model)(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 16])
def test_a_single_channel_is_that_of_all_outputs_of_a_linear_layer(bias, outputs):
    linear, norm = set_eval(torch.nn.Linear(8, outputs, bias=bias)), set_eval(torch.nn.BatchNorm1d(1))
    x = tensor(5, 1, 8)
    fused = nn.fuse_linear_bn_eval(linear, norm)
    assert_close(fused(x), norm(linear(x)))
    if bias:  # without a bias, torch's function returns a bias of one element
        assert_close(fused.state_dict(), torch.nn.utils.fuse_linear_bn_eval(linear, norm).state_dict())
    with pytest.raises(ValueError, match=f"outputs, {outputs}, got 3"):
        nn.fuse_linear_bn_eval(linear, set_eval(torch.nn.BatchNorm1d(3)))


def test_a_folded_normalisation_refuses_a_mask():
    folded = nn.fold(pair(norm=nn.BatchNorm2d(4)), tensor(*IMAGES))
    with pytest.raises(ValueError, match="a folded normalisation has no mask"):
        folded[1](tensor(2, 4, 4, 4), mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
