"""Test that fused models notice later changes, and that repeated calls check for them quickly."""

import copy
from types import MethodType

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.fusing import Block, agree, calls_of_relu, fused_with, rows, saved_and_loaded
from torch.testing import assert_close

from gpu_bn.nn.fx.forward import Forward, Plan

CALLED = pytest.mark.parametrize("called", [False, True])


def fused_and_called(plain, called):
    """Return a fused copy of a model. If ``called``, call both a few times first: repeated calls check less."""
    fused, _ = fused_with(plain, "norm")
    for model in (fused, plain) * 2 * called:
        model(rows())
    return fused


@CALLED
@pytest.mark.parametrize("name", ["norm", "act", "linear"])
def test_hooks_that_come_later_are_called(name, called):
    plain = Block()
    fused = fused_and_called(plain, called)
    for model in (fused, plain):
        getattr(model, name).register_forward_hook(lambda _module, _inputs, y: 2 * y - 0.1)
    agree(fused, plain, rows())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "act", torch.nn.Tanh()),
        lambda model: setattr(model, "norm", torch.nn.Identity()),
        lambda model: setattr(model.act, "forward", torch.tanh),
        lambda model: setattr(model.norm, "forward", torch.tanh),
        lambda model: model.act.__dict__.update(forward=torch.tanh),
        lambda model: model._modules.update(act=torch.nn.Tanh()),
        lambda model: model.act.eval(),
        lambda model: model.norm.eval(),
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.linear),
        lambda model: model.float().double(),
    ],
)
@CALLED
def test_changes_that_come_later_count(change, called):
    x = rows()
    for mode in (True, False):
        plain = Block().train(mode)
        fused = fused_and_called(plain, called)
        for model in (fused, plain):
            change(model)
        assert_close(fused(x), plain(x))


def test_a_repeated_call_sees_that_another_attribute_has_come_for_one():
    plain = Switched()
    fused = fused_and_called(plain, True)
    for model in (fused, plain):
        del model.twice
        model.other = True
        with pytest.raises(AttributeError, match="twice"):
            model(rows())


class Outer(Block):
    """A module whose activation follows the last layer of a module that is fused as well."""

    def __init__(self):
        super().__init__()
        inner, norm = Block(), torch.nn.BatchNorm1d(4).double()
        self.body = torch.nn.Sequential(inner.linear, inner.norm, inner.act, norm)

    def forward(self, x):
        return self.act(self.body(self.norm(x)))


@CALLED
def test_a_forward_that_replaces_a_fused_one_is_called(called):
    plain = Outer()
    fused, _ = fused_with(plain, "body.1", "body.3")
    assert isinstance(vars(fused.body)["forward"], Forward)
    for model in (fused, plain) * 2 * called:
        model(rows())
    for model in (fused, plain):
        model.body.forward = torch.tanh
    agree(fused, plain, rows())


def test_a_repeated_call_does_not_look_at_each_condition(monkeypatch):
    looks = []
    agrees = Plan._conditions_hold
    monkeypatch.setattr(Plan, "_conditions_hold", lambda *arguments: looks.append(1) or agrees(*arguments))
    fused, _ = fused_with(Block(), "norm")
    looks.clear()
    for model, calls in ((fused, 1), (copy.deepcopy(fused), 1), (saved_and_loaded(fused), 1), (fused, 0)):
        for _ in range(3):
            model(rows())
        assert len(looks) == calls, calls
        looks.clear()
    handle = fused.linear.register_forward_hook(lambda *_: None)
    fused(rows())
    handle.remove()
    for _ in range(3):
        fused(rows())
    assert len(looks) == 1


class Switched(Block):
    def __init__(self):
        super().__init__()
        self.twice = False

    def forward(self, x):
        y = self.act(self.norm(self.linear(x)))
        return 2 * y if self.twice else y


@CALLED
def test_attributes_that_change_later_count(called):
    plain = Switched()
    fused = fused_and_called(plain, called)
    fused.twice = plain.twice = True
    agree(fused, plain, rows())


def test_a_library_that_binds_the_forward_again_gets_the_modules_own():
    """accelerate does this to cast inputs and outputs, and later removes its wrapper."""
    plain = Block()
    fused, _ = fused_with(plain, "norm")
    forward = fused.forward
    fused.forward = MethodType(forward.__func__, fused)
    agree(fused, plain, rows())
    fused.forward = forward
    agree(fused, plain, rows())
    assert calls_of_relu(fused, rows()) == 0
