"""Test that fused modules notice changes of values that their code only reads."""

import copy

import pytest

torch = pytest.importorskip("torch")

from support.fusing import Block, calls_of_relu, fused_with, rows, saved_and_loaded
from torch.testing import assert_close

from gpu_bn import nn


class Options:
    act = True

    def __init__(self):
        self.scales = [1.0]


class Reading(Block):
    """A module that depends on modules it does not call, on containers, objects, and an attribute of its class."""

    doubles = False

    def __init__(self, reads):
        super().__init__()
        self.norms, self.acts, self.more = (torch.nn.ModuleList(each) for each in ([self.norm], [self.act], []))
        self.kinds, self.options, self.part, self.drop = {"act": True}, Options(), Block(), torch.nn.Dropout(0.0)
        self.done = {"act"}, []
        self.drop.flag, self.reads = True, reads
        self.double()

    @property
    def acts_now(self):
        return self.options.act

    def forward(self, x):
        return getattr(self, self.reads)(self.linear(x))

    def containers(self, z):
        return self.acts[0](self.norms[0](z))

    def loop(self, z):
        for norm, act in zip(self.norms, self.acts, strict=True):
            z = act(norm(z))
        for module in self.more:
            z = module(z)
        return z

    def children_of_children(self, z):
        return self.part.act(self.part.norm(z))

    def entries(self, z):
        z = self.norm(z)
        return torch.relu(z) if self.kinds["act"] else z

    def objects(self, z):
        z = self.norm(z)
        return torch.relu(z) * self.options.scales[0] if self.acts_now else z

    def sets(self, z):
        z = self.norm(z)
        return torch.relu(z) if "act" in self.done[0] and not self.done[1] else z

    def flags(self, z):
        z = torch.relu(self.norm(z))
        return self.drop(z) if self.drop.flag else 2 * z

    def modes(self, z):
        z = torch.relu(self.norm(z))
        return 2 * z if self.drop.training else z

    def of_its_class(self, z):
        z = self.norm(z)
        return torch.relu(z + z) if self.doubles else torch.relu(z)


@pytest.mark.parametrize(
    ("reads", "change"),
    [
        ("containers", lambda model: model.acts.__setitem__(0, torch.nn.Tanh())),
        ("loop", lambda model: model.more.append(torch.nn.Tanh())),
        ("children_of_children", lambda model: setattr(model.part, "act", torch.nn.Tanh())),
        ("entries", lambda model: model.kinds.update(act=False)),
        ("objects", lambda model: setattr(model.options, "act", False)),
        ("objects", lambda model: model.options.scales.__setitem__(0, 2.0)),
        ("objects", lambda model: model.options.scales.insert(0, 2.0)),
        ("sets", lambda model: model.done[0].clear()),
        ("sets", lambda model: model.done[1].append(1)),
        ("flags", lambda model: setattr(model.drop, "flag", False)),
        ("modes", lambda model: model.drop.train(not model.drop.training)),
        ("of_its_class", lambda model: setattr(model, "doubles", True)),
    ],
)
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, saved_and_loaded])
def test_what_a_module_only_reads_counts_when_it_changes(reads, change, copied):
    x = rows()
    for mode in (True, False):
        plain = Reading(reads)
        fused = copied(nn.convert(copy.deepcopy(plain), fuse=True))
        if reads != "of_its_class":
            assert "forward" in vars(fused)
            assert calls_of_relu(fused, x) == 0
        plain.load_state_dict(fused.state_dict())
        for model in (fused.train(mode), plain.train(mode)):
            change(model)
        assert_close(fused(x), plain(x))


def test_what_a_module_reads_does_not_keep_it_from_compilers():
    plain = Reading("objects")
    fused, _ = fused_with(plain, "norm", "part.norm")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_close(compiled(rows()), plain(rows()))
    torch._dynamo.reset()


class Early(Block):
    """A module that does something before a branch that depends on a shape."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.kind == "overwrites":
            x.mul_(2)
        elif self.kind == "counts":
            self.count.add_(1)
        else:
            x = torch.nn.functional.dropout(x, 0.5, self.training)
        if x.shape[0] == 5:
            x = x + 1
        return torch.relu(self.norm(self.linear(x)))


@pytest.mark.parametrize("kind", ["overwrites", "counts", "drops"])
def test_what_happens_before_a_condition_happens_once(kind):
    plain = Early(kind)
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    results = []
    for model in (fused, plain):
        torch.manual_seed(0)
        x = rows()
        results.append((model(x), x, model.count))
    assert_close(*results)
