"""Train networks with torch's layers and with ours, in eager and in compiled mode, and compare them."""

import copy

import pytest
from support import rng

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.networks import MobileNet, ResNet, UNet

from gpu_bn import nn

pytestmark = pytest.mark.usefixtures("forget_compilations")

NETWORKS = {"resnet": ResNet, "mobilenet": MobileNet, "unet": UNet}
STEPS = 5


def train(model, call, dtype, steps=STEPS):
    """Train for some steps. Return the losses and the state dict."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    losses = []
    for _ in range(steps):
        x = torch.from_numpy(rng().standard_normal((6, 3, 32, 32))).to(dtype)
        optimizer.zero_grad()
        y = call(x)
        target = torch.from_numpy(rng(1).standard_normal(y.shape)).to(dtype)
        loss = (y - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model.state_dict()


def pair(name, dtype, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    plain = NETWORKS[name]().to(dtype=dtype, memory_format=memory_format)
    return plain, copy.deepcopy(plain)


@pytest.mark.parametrize(
    ("name", "fuse"),
    [("resnet", True), ("mobilenet", False), ("unet", True)]
    + [
        pytest.param(*rest, marks=pytest.mark.slow)
        for rest in (("resnet", False), ("mobilenet", True), ("unet", False))
    ],
)
def test_eager_training_stays_with_torch(name, fuse):
    """In float64, where rounding hides no mistake, the losses of all steps agree to 9 digits."""
    plain, converted = pair(name, torch.float64)
    ours = nn.convert(converted, fuse=fuse)
    (losses, state), (expected, theirs) = train(ours, ours, torch.float64), train(plain, plain, torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert state.keys() == theirs.keys()
    torch.testing.assert_close(state, theirs, rtol=1e-7, atol=1e-9)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", ["resnet", pytest.param("unet", marks=pytest.mark.slow)])
def test_eager_training_in_float32_and_channels_last(name):
    plain, ours = pair(name, torch.float32, torch.channels_last)
    nn.convert(ours)
    (losses, _), (expected, _) = train(ours, ours, torch.float32), train(plain, plain, torch.float32)
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "name", ["mobilenet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "unet"))]
)
def test_compiled_training_is_bitwise_that_of_eager(name):
    """The backend aot_eager runs the same operators as eager mode, so results are equal bit for bit."""
    eager, compiled = (nn.convert(model) for model in pair(name, torch.float32))
    losses, state = train(eager, eager, torch.float32, 2)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    other, other_state = train(compiled, call, torch.float32, 2)
    assert torch.equal(losses, other)
    assert all(torch.equal(value, other_state[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("mobilenet", "resnet", "unet")],
)
def test_inductor_training_stays_with_torch(name):
    plain, ours = pair(name, torch.float64)
    call = torch.compile(nn.convert(ours), fullgraph=True)
    (losses, state), (expected, theirs) = train(ours, call, torch.float64), train(plain, plain, torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(state, theirs, rtol=1e-7, atol=1e-9)
    ours.eval()
    x = torch.from_numpy(rng().standard_normal((2, 3, 32, 32)))
    torch.testing.assert_close(call(x), plain.eval()(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_autocast_stays_near_float32(name):
    plain, ours = pair(name, torch.float32)
    nn.convert(ours)
    x = torch.from_numpy(rng().standard_normal((6, 3, 32, 32))).float()
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(x), plain(x)
    exact = plain(x)
    assert mine.dtype == other.dtype
    assert (mine - exact).abs().max() < 3 * (other - exact).abs().max() + 1e-2
