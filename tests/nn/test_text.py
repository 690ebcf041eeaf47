"""Test that modules which torch.fx cannot trace are fused by the text of their ``forward``."""

import copy
import functools
import linecache
import math
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from support import rng
from torch.testing import assert_close

from gpu_bn import nn


class Untraceable(torch.nn.Module):
    """A module that computes a padding from a shape, as for convolutions of TensorFlow."""

    def __init__(self, act=None):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.act = torch.nn.ReLU(inplace=True) if act is None else act

    def padded(self, x):
        return self.conv(F.pad(x, (0, int(x.shape[-1]) % 2)))


class Guarded(Untraceable):
    def forward(self, x, scale=1.0):
        """A
            docstring of two lines.
        """  # fmt: skip
        x = self.padded(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.act is not None:
            x = self.act(x)
        return x * scale


class Nested(Untraceable):
    def forward(self, x, **options):
        if options.get("plain"):
            return self.norm(self.padded(x))
        return self.act(self.norm(self.padded(x)))


class Functional(Untraceable):
    def forward(self, x):
        if int(x.shape[0]) > 100:
            return x
        return torch.nn.functional.relu(self.norm(self.padded(x)), inplace=True)


class Several(Untraceable):
    def forward(self, xs):
        math.sqrt(len(xs))  # CPython compiles it unlike a method's call, as math is imported
        found = ()
        for x in xs if isinstance(xs, (list, tuple)) else [xs]:
            with torch.no_grad():
                x = self.padded(x)
                x = self.norm(x)
                x = self.act(x)
            found += (x,)
        return found[0]


class ReadTwice(Untraceable):
    def forward(self, x):
        y = self.norm(self.padded(x))
        z = self.act(y)
        return y + z


class Between(Untraceable):
    def forward(self, x):
        x = self.norm(self.padded(x))
        x = x + 1
        x = self.act(x)
        return x


class Within(Untraceable):
    def forward(self, x):
        x = self.norm(self.padded(x))
        x = self.act(x) + x
        return x


def doubled(function):
    @functools.wraps(function)
    def call(self, x):
        return 2 * function(self, x)

    return call


class Mangled(Untraceable):
    def forward(self, x):
        self.__count = 1
        return self.act(self.norm(self.padded(x)))


class Decorated(Untraceable):
    @doubled
    def forward(self, x):
        return self.act(self.norm(self.padded(x)))


class OfItsClass(Untraceable):
    def forward(self, x):
        return self.act(self.norm(super().padded(x)))


class Named(Untraceable):
    def forward(self, x, normalise=True):
        return self.act(self.norm(self.padded(x))) if normalise else x


class Defaults(Untraceable):
    scale = 0.5

    def forward(self, x, scale=scale, *, shift=-scale):
        return self.act(self.norm(self.padded(x))) * scale + shift


relu = torch.relu


class Shadowed(Untraceable):
    def forward(self, x):
        x = self.padded(x)
        return sum(relu(self.norm(x)) for relu in [torch.tanh])


class Captured(Untraceable):
    def forward(self, x):
        relu = torch.tanh
        x = self.padded(x)
        return (lambda: relu(self.norm(x)))()


class OtherSelf(Untraceable):
    def forward(self, x):
        x, other = self.padded(x), copy.copy(self)
        other._modules = {**self._modules, "act": torch.nn.Tanh()}
        return (lambda self: self.act(self.norm(x)))(other)


class MangledWithin(Untraceable):
    def forward(self, x):
        x = self.padded(x)
        return (lambda: self.act(self.norm(x)) * self.__scale)()

    __scale = 2


MERGED = [Guarded, Nested, Functional, Several, Named]
LEFT = [ReadTwice, Between, Within, Mangled, Decorated, OfItsClass, Defaults, Shadowed, Captured, OtherSelf,
        MangledWithin]  # fmt: skip


def images(count=4):
    return torch.from_numpy(rng(0).standard_normal((count, 3, 6, 7)))


def fused(cls, **options):
    torch.manual_seed(0)
    plain = cls(**options).double()
    report = nn.Report()
    return plain, nn.convert(copy.deepcopy(plain), fuse=True, report=report), report


def calls_of(monkeypatch):
    """Record the activations with which layers of gpu_bn are called."""
    seen = []
    own = nn.modules.Fused.forward

    def forward(self, input, residual=None, activation=None, mask=None):
        seen.append(getattr(activation, "name", None))
        return own(self, input, residual, activation, mask)

    monkeypatch.setattr(nn.modules.Fused, "forward", forward)
    return seen


@pytest.mark.parametrize("cls", [*MERGED, *LEFT])
def test_it_is_what_it_was(cls, monkeypatch):
    plain, model, report = fused(cls)
    assert report.merged == ({"norm": "relu"} if cls in MERGED else {})
    if cls in LEFT:
        assert "norm" in report.left
    seen = calls_of(monkeypatch)
    for training in (True, False):
        x, y = images().requires_grad_(), images().requires_grad_()
        ours, theirs = model.train(training)(x), plain.train(training)(y)
        assert_close(ours, theirs)
        if ours.requires_grad:
            (ours.square().sum() + theirs.square().sum()).backward()
            assert_close(x.grad, y.grad)
    assert_close(model.state_dict(), plain.state_dict())
    assert set(seen) == ({"relu"} if cls in MERGED else {None})
    assert type(nn.revert(model).norm) is torch.nn.BatchNorm2d
    assert "forward" not in vars(model)
    assert_close(model(images()), plain(images()))


def test_any_arguments_are_served():
    plain, model, _ = fused(Guarded)
    for arguments, options in (((images(), 3.0), {}), ((), {"x": images(), "scale": 2.0})):
        assert_close(model(*arguments, **options), plain(*arguments, **options))
    plain, model, _ = fused(Nested)
    assert_close(model(images(), plain=True), plain(images(), plain=True))


def test_changes_afterwards_are_followed(monkeypatch):
    seen = calls_of(monkeypatch)
    for change in (
        lambda model: setattr(model, "act", torch.nn.Tanh()),
        lambda model: setattr(model, "act", None),
        lambda model: setattr(model.norm, "activation", "silu") if isinstance(model.norm, nn.BatchNorm2d)
        else setattr(model, "norm", torch.nn.Sequential(model.norm, torch.nn.SiLU())),
        lambda model: model.norm.register_forward_hook(lambda _module, _inputs, y: y - 1),
        lambda model: model.act.register_forward_pre_hook(lambda _, inputs: inputs[0] - 1),
    ):  # fmt: skip
        plain, model, _ = fused(Guarded)
        change(plain)
        change(model)
        seen.clear()
        assert_close(model(images()), plain(images()))
        assert seen[0] in (None, "identity")


def test_a_fused_model_can_be_copied_and_saved(monkeypatch):
    plain, model, _ = fused(Several)
    seen = calls_of(monkeypatch)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(again([images()]), plain([images()]))
    assert seen == ["relu", "relu"]


def test_a_text_that_is_not_the_functions_is_not_used(monkeypatch):
    file = Nested.forward.__code__.co_filename
    lines = [line.replace("self.act(self.norm(", "self.act(self.norm(0 * ") for line in linecache.getlines(file)]
    monkeypatch.setitem(linecache.cache, file, (0, None, lines, file))
    plain, model, report = fused(Nested)
    assert report.merged == {}
    assert_close(model(images()), plain(images()))


class InnerFunction(Untraceable):
    """A module with an inner function, which has separate names."""

    def forward(self, x):
        def after(self, x):
            return self.act(self.norm(x))

        return after(self, self.padded(x))


class OwnName(Untraceable):
    """A module that calls another function by the name of an activation."""

    def forward(self, x):
        relu = torch.neg
        return relu(self.norm(self.padded(x)))


class OwnSlope(Untraceable):
    """A module that computes the parameter of the activation."""

    def forward(self, x):
        return F.leaky_relu(self.norm(self.padded(x)), float(x.shape[0]))


@pytest.mark.parametrize("cls", [InnerFunction, OwnName, OwnSlope])
def test_texts_that_may_mean_something_else_are_left(cls):
    plain, model, report = fused(cls)
    assert report.merged == {}
    assert_close(model(images()), plain(images()))


class Traceable(Untraceable):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("cls", [Guarded, Traceable])
@pytest.mark.parametrize(
    ("act", "name", "value"),
    [(torch.nn.GELU(), "approximate", "tanh"), (torch.nn.LeakyReLU(0.3), "negative_slope", 0.2)],
)
def test_parameters_of_activations(cls, act, name, value, monkeypatch):
    plain, model, report = fused(cls, act=act)
    assert report.merged
    seen = calls_of(monkeypatch)
    assert_close(model(images()), plain(images()))
    assert seen[0] is not None
    for each in (plain, model):
        setattr(each.act, name, value)
    assert_close(model(images()), plain(images()))


def test_a_forward_of_the_module_itself_is_kept():
    plain = Nested().double()
    plain.forward = lambda x: x + 1
    model = nn.convert(copy.deepcopy(plain), fuse=True)
    assert_close(model(images()), images() + 1)
