"""Test folding one layer as torch does, and identity layers inserted into trained networks."""

import pytest

import gpu_bn

torch = pytest.importorskip("torch")
from support.models_to_merge import image, norms
from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.fx import activations


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
    assert {*activations.NAMES.values(), "leaky_relu", "elu"} == set(gpu_bn.activations.ROWS)
