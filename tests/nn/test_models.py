"""Test networks of torchvision and timm with random weights: converted, fused, trained beside torch's, and reverted."""

import copy
import json

import pytest
from support import rng
from support.paths import ROOT

torch = pytest.importorskip("torch")

from model_proof import LIMIT, RECORD, examine, of_rounding, table
from support.model_zoo import declare_operators, names

from gpu_bn import nn

REASON = "torchvision and timm are not installed: pip install -e '.[models]'"


@pytest.fixture(scope="module")
def torchvision():
    """Import torchvision. Its wheel for CUDA needs two operators that a CPU build of torch does not declare."""
    declare_operators()
    return pytest.importorskip("torchvision", reason=REASON, exc_type=ImportError)


@pytest.fixture(scope="module")
def timm(torchvision):
    del torchvision  # timm imports it
    return pytest.importorskip("timm", reason=REASON, exc_type=ImportError)


def train(model, size, steps=2):
    """Train for some steps in float64. Return the losses and the state dict."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    losses = []
    for _ in range(steps):
        x = torch.from_numpy(rng().standard_normal((4, 3, size, size)))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model.state_dict()


def require_same_training(plain, size, fuse):
    """Require that a network and its converted copy train alike, and that reverting the copy keeps its outputs."""
    torch.manual_seed(0)
    plain = plain.double().train()
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    ours = nn.convert(copy.deepcopy(plain), fuse=fuse)
    layers = [layer for layer in ours.modules() if isinstance(layer, nn.modules.Fused)]
    assert layers
    (losses, state), (expected, theirs) = train(ours, size), train(plain, size)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0)
    assert state.keys() == theirs.keys()
    torch.testing.assert_close(state, theirs, rtol=1e-6, atol=1e-8)
    x = torch.from_numpy(rng(2).standard_normal((2, 3, size, size)))
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-6, atol=1e-8)
    reverted = nn.revert(ours)
    assert not any(isinstance(layer, nn.modules.Fused) for layer in reverted.modules())
    torch.testing.assert_close(reverted(x), plain(x), rtol=1e-6, atol=1e-8)


# With 32x32 images the last layers of mobilenet_v2 normalise only four values. After three steps a difference of one
# rounding in torch's weights then grows to 1e-5.
@pytest.mark.parametrize(
    ("name", "size", "fuse"),
    [("resnet18", 32, False), ("resnet18", 32, True), ("mobilenet_v2", 64, True)],
)
def test_torchvision(name, size, fuse, torchvision):
    require_same_training(torchvision.models.get_model(name, weights=None, num_classes=10), size, fuse)


@pytest.mark.parametrize(("name", "fuse"), [("resnet18", True), ("mobilenetv3_small_050", False)])
def test_timm(name, fuse, timm):
    require_same_training(timm.create_model(name, pretrained=False, num_classes=10), 32, fuse)


def test_the_backbone_of_a_detector_with_frozen_layers(torchvision):
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d).double()
    ours = nn.convert(copy.deepcopy(plain))
    assert any(isinstance(layer, nn.FrozenBatchNorm2d) for layer in ours.modules())
    x = torch.from_numpy(rng().standard_normal((2, 3, 32, 32)))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("converted", [False, True])
def test_folding_keeps_timms_activations(converted, timm):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=10).double()
    x = torch.from_numpy(rng().standard_normal((2, 3, 32, 32)))
    model(x)
    expected = model.eval()(x)
    folded = nn.fold(nn.convert(model) if converted else model)
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)


def test_folding_torchvisions_frozen_layers(torchvision):
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d).double().eval()
    folded = nn.fold(model)
    assert not any(isinstance(layer, torchvision.ops.misc.FrozenBatchNorm2d) for layer in folded.modules())
    x = torch.from_numpy(rng().standard_normal((2, 3, 32, 32)))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_050", "transformers/ResNet", "monai/UNet",
     "ultralytics/yolov8n.yaml", "smp/FPN:resnet18"],
)  # fmt: skip
def test_a_model_of_each_library(name, torchvision):
    del torchvision
    library = name.partition("/")[0]
    package = {"smp": "segmentation_models_pytorch"}.get(library, library)
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[zoo]'")
    done = examine(name)
    assert done["converted"] == done["norms"]
    assert done["merged"] == done["mergeable"]
    assert done["folded_batch"] == done["foldable"]
    assert of_rounding(done) < LIMIT


def test_the_page_is_that_of_the_record():
    lines = RECORD.read_text().splitlines()
    page = ROOT / "docs" / "models.md"
    assert page.read_text() == table(lines)
    models = [json.loads(line) for line in lines[1:]]
    assert [one["name"] for one in models] == sorted(names())
    assert all(one["converted"] == one["norms"] and one["folded_batch"] == one["foldable"] for one in models)
    assert all(of_rounding(one) < LIMIT for one in models)
    assert sum(one["merged"] for one in models) >= 0.95 * sum(one["mergeable"] for one in models)
