"""Test that modules of many kinds compute the same after fusing and folding, also if copied or hooked later."""

import contextlib
import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support import rng
from support.networks import BatchNormAct2d
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from gpu_bn import nn


def images(seed=0):
    return torch.from_numpy(rng(seed).standard_normal((4, 3, 6, 6)))


class Base(torch.nn.Module):
    merged, inputs, options = ("bn",), (images(),), {}

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.conv2, self.bn2 = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.act = torch.nn.ReLU()


class Caught(Base):
    def forward(self, x):
        try:
            y = self.act(self.bn(self.conv(x.flatten(1))))
        except RuntimeError:
            y = self.act(self.bn(self.conv(x)))
        return y


class Suppressed(Base):
    merged = ()

    def forward(self, x):
        y = self.conv(x)
        with contextlib.suppress(ValueError):
            z = self.bn(y.flatten())
            y = 2 * self.act(z)
        return y


class Within(Base):
    """A module with a context manager, which could change anything, so nothing is merged across its end."""

    merged = ()

    def forward(self, x):
        with torch.device("cpu"):
            y = self.bn(self.conv(x))
        return self.act(y)


class Head(Base):
    """A module whose activation is at the beginning of another module."""

    merged = ("stem.1",)

    def __init__(self):
        super().__init__()
        self.stem, self.head = (
            torch.nn.Sequential(self.conv, self.bn),
            torch.nn.Sequential(self.act, torch.nn.Flatten()),
        )
        del self.conv, self.bn

    def forward(self, x):
        return self.head(self.stem(x))


class HeadAndMore(Head):
    merged = ()

    def forward(self, x):
        y = self.stem(x)
        return self.head(y).sum() + y


class Ordered(Base):
    merged = ("bn", "bn2")

    def forward(self, x):
        found = OrderedDict()
        found["first"] = y = self.act(self.bn(self.conv(x)))
        found["second"] = F.silu(self.bn2(self.conv2(y)))
        return found


class WithParameters(Base):
    merged = ("bn", "bn2")

    def forward(self, x):
        y = F.leaky_relu(self.bn(self.conv(x)), 0.3, inplace=True)
        return F.gelu(self.bn2(self.conv2(y)), approximate="tanh")


class WithParametersInText(Base):
    def forward(self, x):
        y = F.elu(self.bn(self.conv(x)), 0.5)
        return y * len(f"{float(y.detach().sum()):.3}")


class WithVariables(Base):
    merged = ()

    def forward(self, x):
        return F.leaky_relu(self.bn(self.conv(x)), x.size(0) / 100)


class Scripted(Base):
    """A module with a scripted module that reads the input of the normalisation."""

    merged = ("bn",)

    def __init__(self):
        super().__init__()
        self.gate = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.Sigmoid()))

    def forward(self, x):
        y = self.conv(x)
        return self.act(self.bn(y)) * self.gate(y)


class Remembering(Base):
    merged = ()

    def forward(self, x):
        self.last = self.bn(self.conv(x))
        return self.act(self.last)


class Overwritten(Base):
    merged = ()

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y[:, :2]
        F.relu_(y)
        return y, z


class LaterOverwritten(Base):
    merged = ()

    def forward(self, x):
        residual = self.conv(x) + 0
        y = F.relu(self.bn(self.conv(x)) + residual)
        residual.zero_()
        return y + residual


class Scaled(Base):
    merged = ()

    def forward(self, x):
        y = self.conv(x)
        return self.act(torch.add(self.bn(y), y, alpha=3))


class Shared(Base):
    def forward(self, x):
        return F.silu(self.bn(self.conv2(F.relu(self.bn(self.conv(x))))))


class Recursive(Base):
    merged = ("bn", "bn2")

    def forward(self, x, depth=2):
        y = self.act(self.bn2(self.conv2(self.act(self.bn(self.conv(x))))))
        return y if depth == 0 else self(x + 0.1 * y[:, :3], depth - 1)


class Contained(Base):
    merged = ("parts.a.1", "parts.b.0.1")

    def __init__(self):
        super().__init__()
        a = torch.nn.ModuleList([self.conv, self.bn, self.act])
        b = torch.nn.ModuleList([torch.nn.Sequential(self.conv2, self.bn2, torch.nn.GELU())])
        self.parts = torch.nn.ModuleDict({"a": a, "b": b})
        del self.conv, self.bn, self.conv2, self.bn2, self.act

    def forward(self, x):
        for part in self.parts.values():
            for module in part:
                x = module(x)
        return x


class ByName(Base):
    inputs, options = (), {"x": images(), "gain": 2.0}

    def forward(self, *, x, gain=1.0):
        return self.act(self.bn(self.conv(x))) * gain


class AnyNumber(Base):
    inputs, options = (images(), images(1)), {"flag": True}

    def forward(self, *terms, **options):
        y = self.act(self.bn(self.conv(sum(terms))))
        return y if options.get("flag") else -y


class NestedInputs(Base):
    inputs = ((images(), (images(1), {"more": images(2)})),)

    def forward(self, given):
        a, (b, c) = given
        return self.act(self.bn(self.conv(a + b * c["more"])))


@dataclass
class Outputs:
    y: torch.Tensor
    hidden: list[torch.Tensor]


class GivesADataclass(Base):
    merged = ("bn", "bn2")

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return Outputs(self.act(self.bn2(self.conv2(y))), [y])


class Tied(Base):
    merged = ("bn", "bn2")

    def __init__(self):
        super().__init__()
        self.bn2.weight = self.bn.weight

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn(self.conv(x))))))


class Parametrised(Tied):
    def __init__(self):
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.conv)
        torch.nn.utils.parametrizations.spectral_norm(self.conv2)


class Hooked(Tied):
    merged = ("bn2",)

    def __init__(self):
        super().__init__()
        self.bn.register_full_backward_hook(lambda _module, given, _got: (2 * given[0],))


class OnTensors(Base):
    merged = ()

    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return self.act(y)


class Untracked(Tied):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.bn2 = torch.nn.BatchNorm2d(4, momentum=None)


class PartlyFixed(Tied):
    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


class Generating(Tied):
    def forward(self, x):
        def results():
            y = self.act(self.bn(self.conv(x)))
            yield y
            yield self.act(self.bn2(self.conv2(y)))

        return list(results())


class OwnActivation(Base):
    """A module with a layer that holds its activation, as in timm."""

    merged = ()

    def __init__(self):
        super().__init__()
        self.bn = BatchNormAct2d(4, torch.nn.SiLU(), torch.nn.Identity())

    def forward(self, x):
        return self.bn(self.conv(x))


KINDS = [
    Caught, Suppressed, Within, Head, HeadAndMore, Ordered, WithParameters, WithParametersInText, WithVariables,
    Scripted, Remembering, Overwritten, LaterOverwritten, Scaled, Shared, Recursive, Contained, ByName, AnyNumber,
    NestedInputs, GivesADataclass, Tied, Parametrised, Hooked, OnTensors, Untracked, PartlyFixed, Generating,
    OwnActivation,
]  # fmt: skip


def tensors(values):
    values = list(vars(values).values()) if isinstance(values, Outputs) else values
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def run_and_differentiate(model, training=True):
    """Call a model and differentiate. Return the type of the result, its tensors, and the gradients by name."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(0)
    result = model(*model.inputs, **model.options)
    found = tensors(result)
    sum(tensor.sin().sum() for tensor in found).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return type(result), [tensor.detach() for tensor in found], gradients


def names_of_called_modules(model):
    """Return the names of the modules whose hooks a call of the model runs, in order."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(lambda *_, name=name: names.append(name))
    model.eval()(*model.inputs, **model.options)
    return names


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_this_kind(kind, monkeypatch):
    if kind is OwnActivation:
        monkeypatch.setattr(BatchNormAct2d, "__module__", "timm.layers.norm_act")

    def make(way=lambda model: model):
        torch.manual_seed(0)
        return way(kind().double())

    report = nn.Report()
    plain, fused = make(), make(lambda model: nn.convert(model, fuse=True, report=report))
    assert set(report.merged) == set(kind.merged)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for mode in (True, True, False):
        assert_close(run_and_differentiate(fused, mode)[1:], run_and_differentiate(plain, mode)[1:])
    assert_close(fused.state_dict(), plain.state_dict())
    assert run_and_differentiate(fused)[0] is run_and_differentiate(plain)[0]
    fused.load_state_dict(plain.state_dict())

    want = tensors(plain.eval()(*kind.inputs, **kind.options))
    for batch in (False, True):
        given = (kind.inputs, kind.options) if batch else ((), {})
        for model in (plain, fused):
            folded = nn.fold(model, *given[0], **given[1])
            assert_close(tensors(folded(*kind.inputs, **kind.options)), want)
    if kind is not Remembering:  # torch cannot copy this one
        for copied in (copy.deepcopy(fused), torch.optim.swa_utils.AveragedModel(fused).module):
            assert_close(run_and_differentiate(copied)[1:], run_and_differentiate(copy.deepcopy(plain))[1:])
    plain.load_state_dict(fused.state_dict())
    assert names_of_called_modules(fused) == names_of_called_modules(plain)
    assert_close(tensors(nn.revert(fused).eval()(*kind.inputs, **kind.options)), want)


def test_what_is_put_into_a_layer_later_counts(monkeypatch):
    monkeypatch.setattr(BatchNormAct2d, "__module__", "timm.layers.norm_act")
    plain = OwnActivation().double()
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    for change in (
        lambda layer: layer.act.register_forward_hook(lambda _module, _given, y: 2 * y),
        lambda layer: setattr(layer, "act", torch.nn.Tanh()),
        lambda layer: setattr(layer, "drop", torch.nn.Threshold(0.1, 0.0)),
        lambda layer: setattr(layer.act, "forward", torch.sigmoid),
    ):
        for model in (plain, fused):
            change(model.bn)
        assert_close(run_and_differentiate(fused)[1:], run_and_differentiate(plain)[1:])
    assert_close(run_and_differentiate(nn.revert(fused))[1:], run_and_differentiate(plain)[1:])
