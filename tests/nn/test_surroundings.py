"""Test calls and conversions under default devices and modes, and with distributed tensors."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")

from support import rng
from support.networks import FrozenBatchNorm2d
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import gpu_bn
from gpu_bn import nn


def images(dtype=torch.float32):
    return torch.from_numpy(rng(0).standard_normal((6, 4, 5, 7))).to(dtype)


def running():
    return torch.zeros(4, device="cpu"), torch.ones(4, device="cpu")


def mask():
    return torch.arange(6, device="cpu").view(6, 1, 1, 1) > 1


CALLS = {
    "front door": lambda x: gpu_bn.batch_norm(x, training=True),
    "numpy": lambda x: gpu_bn.batch_norm(x, training=True, backend="numpy"),
    "mask": lambda x: gpu_bn.batch_norm(x, training=True, mask=mask()),
    "ghost batches": lambda x: nn.batch_norm(x, training=True, virtual_batch_size=2),
    "both": lambda x: nn.batch_norm(x, training=True, virtual_batch_size=3, mask=mask()),
    "renorm": lambda x: nn.batch_norm(x, *running(), training=True, renorm=(1.5, 0.5)),
    "momentum": lambda x: nn.batch_norm(x, *running(), training=True, momentum=torch.tensor(0.5, device="cpu")),
    "residual": lambda x: nn.batch_norm(x, training=True, residual=2 * x, activation="relu"),
    "evaluation": lambda x: nn.batch_norm(x, *running(), activation="gelu"),
    "sync": lambda x: nn.sync_batch_norm(x),
    "identity": lambda x: nn.BatchNorm2d(4, device="cpu").init_identity_(x)(x),
    "vmap": lambda x: torch.vmap(lambda one: nn.batch_norm(one, training=True))(torch.stack([x, x])),
}  # fmt: skip
VIEWS = [lambda x: x, lambda x: x.flip(0), lambda x: x[..., ::2], lambda x: x.transpose(2, 3), torch.Tensor.half]


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(name):
    for view in VIEWS:
        results = []
        for device in ("cpu", "meta"):
            x = view(images()).detach().requires_grad_(name != "front door")
            with torch.device(device):
                y = CALLS[name](x)
                if y.requires_grad:
                    y.backward(y.detach())
            results.append((y.detach(), x.grad))
        assert_close(*results, rtol=0, atol=0)


def test_models_are_converted_whatever_the_default_device():
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), FrozenBatchNorm2d(4)
    )
    with torch.device("meta"):
        ours = nn.convert(copy.deepcopy(plain), fuse=True, report=(report := nn.Report()))
        nn.update_population_stats(copy.deepcopy(ours), [images()])
        nn.insert_identity_(copy.deepcopy(ours), ["0"], images())
        folded = nn.fold(ours, images())
    assert report.converted == ["1", "3"]
    assert_close(folded(images()), plain.eval()(images()))
    assert_close(ours(images()), plain.train()(images()))


def test_models_of_fake_tensors_are_converted():
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        nn.convert(model, fuse=True, report=(report := nn.Report()))
        assert model(torch.empty(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    assert report.merged == {"1": "relu"}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("training", [True, False])
def test_distributed_tensors(training):
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    results = []
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    for model in (nn.convert(copy.deepcopy(plain), fuse=True), plain):
        shared = tensor.distribute_module(model.train(training), mesh)
        x = tensor.distribute_tensor(images(), mesh, [tensor.Shard(0)]).requires_grad_()
        y = shared(x)
        y.sin().sum().backward()
        results.append((y.full_tensor().detach(), x.grad.full_tensor()))
    assert_close(*results)


@pytest.mark.parametrize("observed", [False, True])
def test_weights_that_are_no_plain_tensors_are_not_folded_into(observed):
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    weight, x = model[0].weight.detach(), torch.from_numpy(rng(0).standard_normal((4, 3))).float()
    model[0].weight = torch.nn.Parameter(two.TwoTensor(weight, weight.clone()))
    folded = nn.fold(model, *[x] * observed, report=(report := nn.Report()))
    assert "subclass" in report.left["1"]
    assert_close(folded(x).a, model(x).a)


class InACycle(torch.nn.Module):
    """A module whose frame refers to itself, so that only the garbage collector frees its tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        frame = sys._getframe()
        y = self.conv(x)
        return self.norm(y) if frame else None


def test_tensors_in_garbage_are_not_taken_for_read():
    nn.fold(InACycle(), images(), report=(report := nn.Report()))
    assert report.folded == {"norm": "conv"}
