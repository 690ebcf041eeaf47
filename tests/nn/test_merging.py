"""Test merging activations and sums into layers, and reverting fused models."""

import copy

import pytest
from support import rng

torch = pytest.importorskip("torch")
from support.fusing import saved_and_loaded
from support.models_to_merge import image, norms
from torch.testing import assert_close

from gpu_bn import nn


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
    """A module with nothing to merge: an output added to itself, outputs used twice, sums with a factor or a number."""

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
    """A module with a layer that is called twice. Its running statistics depend on the order of the calls."""

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
    """A module with tensors that the state dict leaves out, and a buffer that ``forward`` does not read."""

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


def names_in_state(model):
    """Return the names of a model's parameters, of its buffers, and of the entries of its state dict, in order."""
    names = (model.named_parameters(), model.named_buffers(), model.state_dict().items())
    return [[name for name, _ in pairs if name != "inputs.offset"] for pairs in names]


def test_a_fused_model_has_the_state_of_its_model():
    model = Whole()
    expected = names_in_state(model)
    fused = nn.convert(model, fuse=True)
    assert names_in_state(fused) == expected
    copied = copy.deepcopy(copy.deepcopy(fused.eval()))
    assert names_in_state(copied) == expected
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
