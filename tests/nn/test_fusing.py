"""Test that ``nn.convert(model, fuse=True)`` does not change what a model does."""

import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.fusing import Block, agree, calls_of_relu, fused_with, rows
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gpu_bn import nn
from gpu_bn.nn.fx.trace import Refused, record_steps


def test_a_fused_model_is_the_model():
    plain = torch.nn.Sequential(OrderedDict(stem=torch.nn.Sequential(Block(), Block()), head=Block()))
    fused, report = fused_with(plain, "stem.0.norm", "stem.1.norm", "head.norm")
    assert type(fused) is torch.nn.Sequential
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    agree(fused, plain, rows())
    agree(fused.stem[1], plain.stem[1], rows(1))
    assert str(report) == "3 converted, 3 merged, 0 folded, 0 left"
    assert "merged='relu'" in repr(fused)
    assert "gpu_bn.BatchNorm1d(4" in repr(fused)
    nn.revert(fused)
    assert repr(fused) == repr(plain)
    assert not any("forward" in vars(module) for module in fused.modules())


def test_the_layer_does_the_activation():
    fused, _ = fused_with(Block(), "norm")
    assert calls_of_relu(fused, rows()) == 0
    assert calls_of_relu(nn.revert(fused), rows()) == 1


class Region(Block):
    def __init__(self, context):
        super().__init__()
        self.context = context

    def forward(self, x):
        with self.context():
            y = self.norm(self.linear(x))
            y = self.act(y)
        return y + x


class Apart(Region):
    """A module with a statement between the layer and the activation."""

    def forward(self, x):
        with self.context():
            y = self.norm(self.linear(x))
        return self.act(y) + x


class Checkpointed(Block):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(lambda x: self.act(self.norm(self.linear(x))), x, use_reentrant=self.reentrant)


class Result(OrderedDict):
    """A result like those of models in transformers: its items can also be accessed by index."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Names(NamedTuple):
    out: torch.Tensor
    other: torch.Tensor


@pytest.mark.parametrize(
    "pack", [Result, dict, lambda **items: Names(**items), lambda **items: list(items.values()), OrderedDict]
)
@pytest.mark.parametrize("apart", [True, False])
def test_results_keep_their_type(pack, apart):
    class Packs(Block):
        def forward(self, x):
            y = self.norm(self.linear(x))
            if not apart:
                return pack(out=self.act(y), other=x)
            other = x
            y = self.act(y)
            return pack(out=y, other=other)

    plain = Packs()
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    mine, theirs = fused(rows()), plain(rows())
    assert type(mine) is type(theirs)
    assert_close(list(mine.values() if isinstance(mine, dict) else mine),
                 list(theirs.values() if isinstance(theirs, dict) else theirs))  # fmt: skip


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.norm(self.linear(x))
        return self.act(y) * self.calls


class Drawing(Block):
    def forward(self, x):
        y = self.norm(self.linear(x))
        return self.act(y) * (1.0 if torch.rand(()) < 0.5 else 2.0)


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", enabled=True), lambda: torch.autograd.graph.save_on_cpu()]
)
def test_regions_are_kept(context):
    plain = Region(context).float()
    fused, _ = fused_with(plain, "norm")
    agree(fused, plain, rows().float())


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", enabled=True), lambda: torch.autograd.graph.save_on_cpu()]
)
def test_graphs_have_no_regions(context):
    plain = Apart(context).float()
    fused, report = fused_with(plain)
    assert "runs under no_grad, autocast, checkpoint" in report.left["norm"]
    agree(fused, plain, rows().float())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_kept(reentrant):
    plain = Checkpointed(reentrant)
    fused, _ = fused_with(plain, "norm")
    agree(fused, plain, rows())


def test_a_checkpoint_that_is_not_recorded_leaves_no_hooks():
    """Hooks are removed even if the exception still exists."""
    with pytest.raises(Refused) as refused:
        record_steps(Checkpointed(False), lambda *_: True)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert refused.value.__cause__ is not None


@pytest.mark.parametrize(("kind", "reason"), [(Counting, "changes its attributes"), (Drawing, "draws random numbers")])
def test_what_leaves_something_behind_is_not_fused(kind, reason):
    plain = kind()
    fused, report = fused_with(plain)
    assert reason in report.left["norm"]
    assert vars(fused).get("calls", 0) == 0
    agree(fused, plain, rows())
