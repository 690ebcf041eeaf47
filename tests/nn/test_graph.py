"""Test fusing, folding and reverting models with constants, buffers, views or single layers."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from torch.testing import assert_close

from gpu_bn import nn


class Positions(torch.nn.Module):
    """A module that computes with a buffer, a tensor that it creates, and constants."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.randn(1, 4, 9, 9))
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        x = (x + self.shift[:, :, :8, :8]) * torch.tensor([1.0, 2.0]).sum() + self.scale * 3
        return torch.relu(self.norm(self.conv(x)))


def test_a_model_that_computes_with_buffers_and_constants_is_fused_and_folded():
    model, x = Positions(), torch.randn(2, 4, 8, 8)
    names, before = list(model.__dict__), model.state_dict().keys()
    plain = copy.deepcopy(model)
    fused = nn.convert(model, fuse=True)
    assert list(model.__dict__) == [*names, "forward"]
    assert fused.state_dict().keys() == before
    assert fused is model
    assert_close(fused(x), plain(x))
    for either in (fused, plain):
        either.load_state_dict({"shift": torch.ones(1, 4, 9, 9)}, strict=False)
    assert_close(copy.deepcopy(fused)(x), plain(x))
    assert_close(nn.fold(plain)(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    assert list(plain.__dict__) == names


class WithNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(4)


class OtherConstant(WithNorm):
    def forward(self, x):
        return torch.relu(self.norm(x)) * (2.0 if self.training else 1.0)


def test_each_mode_has_its_own_steps():
    model, x = OtherConstant(), torch.randn(2, 4, 8, 8)
    names, plain = list(model.__dict__), copy.deepcopy(model)
    fused, report = model, nn.Report()
    nn.convert(model, fuse=True, report=report)
    assert report.merged == {"norm": "relu"}
    for mode in (True, False, True):
        assert_close(fused.train(mode)(x), plain.train(mode)(x))
    assert list(nn.revert(model).__dict__) == names


class ViewOverwritten(WithNorm):
    def forward(self, x):
        residual = x * 2
        part = residual[:, :2]
        y = self.norm(x) + residual
        part.zero_()
        return torch.relu(y) + residual


class BaseOverwritten(WithNorm):
    def forward(self, x):
        base = x * 2
        y = self.norm(x) + base.view(x.shape)
        base.zero_()
        return torch.relu(y) + base


@pytest.mark.parametrize("kind", [ViewOverwritten, BaseOverwritten])
def test_a_residual_that_is_overwritten_through_other_names_is_not_merged(kind):
    model, x = kind(), torch.randn(2, 4, 8, 8, requires_grad=True)
    want = copy.deepcopy(model)(x)
    got = nn.convert(model, fuse=True)(x)
    assert_close(got, want)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)), rtol=1e-4, atol=1e-5)


class Flattened(WithNorm):
    """A module whose residual is also read by a call with the argument 1, which is not ``True``."""

    def forward(self, x):
        residual = x * 2
        return torch.relu(self.norm(x) + residual).flatten(1) + residual.flatten(1)


def test_the_number_1_overwrites_nothing():
    report = nn.Report()
    nn.convert(Flattened(), fuse=True, report=report)
    assert report.merged == {"norm": "sum, relu"}


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3, activation="relu")])
def test_a_layer_alone_has_nothing_to_be_merged_with_or_folded_into(layer):
    x = torch.randn(5, 3)
    want = copy.deepcopy(layer)(x)
    converted = nn.convert(layer, fuse=True)
    assert converted is layer
    assert_close(converted(x), want)
    assert_close(nn.fold(layer)(x), layer.eval()(x))
