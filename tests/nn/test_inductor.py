"""Count the kernels that inductor generates around the operators for conv-BN-ReLU-conv-BN-add-ReLU.

The counts are compared with those of torch's layers, which inductor decomposes into operations and fuses.
"""

import copy

import pytest
from support import needs_a_compiler

torch = pytest.importorskip("torch")

from torch._inductor import config, metrics
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode

from gpu_bn import nn
from gpu_bn.plan import DEVICES, Work, plan

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MOST = {("contiguous", True): 5, ("channels_last", True): 1, ("contiguous", False): 6, ("channels_last", False): 2}
"""By memory format and training: the most kernels that inductor may generate with our layers."""
PASSES = {"contiguous": (7.5, 26), "channels_last": (3.1, 23)}
"""By memory format: how many times inductor's kernels move a whole tensor in training, at most with our layers and at
least with torch's. Inductor counts a tensor once for each kernel, even if the kernel reads it twice."""
WORKS = (
    Work(32, 64, 3136, 2),
    Work(32, 64, 3136, 2, backward=True, reads=2, staged=2),
    Work(32, 64, 3136, 2, reads=2, sign_bits=True),
    Work(32, 64, 3136, 2, backward=True, reads=2, writes=2, staged=2, sign_bits=True),
)
"""The calls of the block's layers."""


class Block(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.ours = ours
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        norm = (lambda: nn.BatchNorm2d(8, activation="relu")) if ours else (lambda: torch.nn.BatchNorm2d(8))
        self.norms = torch.nn.ModuleList(norm() for _ in range(2))

    def forward(self, x):
        z = self.norms[0](self.convolutions[0](x))
        if self.ours:
            return self.norms[1](self.convolutions[1](z), x)
        return torch.relu(self.norms[1](self.convolutions[1](torch.relu(z))) + x)


def results(model, x, training):
    """Return the output of a call; in training also the gradients of the input and the parameters, and the buffers."""
    x.grad = None
    y = model(x)
    if not training:
        return [y]
    y.backward(y.detach().sin())
    return [y, x.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()]


def measure_compiled(ours, memory_format, training):
    """Return how many kernels inductor generates for both passes, and how many times they move a tensor like the input.

    The convolutions and our operators are not counted. Also check that results equal those without a compiler.
    """
    torch._dynamo.reset()
    metrics.reset()
    model = Block(ours).to(memory_format=FORMATS[memory_format]).train(training)
    x = torch.randn(2, 8, 24, 24).to(memory_format=FORMATS[memory_format]).requires_grad_(training)
    moved, generate = [], GraphLowering.codegen

    def codegen(graph):
        code = generate(graph)
        ours = [node for node in graph.scheduler.nodes if isinstance(node, (SchedulerNode, FusedSchedulerNode))]
        moved.extend(node.get_read_write_buffers_sizes() for node in ours)
        return code

    with config.patch(force_disable_caches=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "codegen", codegen)
        found = results(torch.compile(copy.deepcopy(model), fullgraph=True), x, training)
    torch._dynamo.reset()
    torch.testing.assert_close(found, results(model, x, training), rtol=1e-3, atol=1e-3)  # sums have a thousand terms
    assert all(tensor.stride() == x.stride() for tensor in found[: 1 + training])
    return metrics.generated_kernel_count, sum(moved) / x.nbytes


def count_own_passes(tier):
    """Return how many times our GPU kernels move a tensor in a training step of the block, by their plans."""
    plans = [plan(work, DEVICES["h100"], tier) for work in WORKS]
    moved = [sum(one.read_bytes) + sum(one.written_bytes) for one in plans]
    return sum(moved) / WORKS[0].tensor_bytes


@needs_a_compiler
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.one_in(2)
def test_no_copies_around_the_operators(memory_format, training):
    count, moved = measure_compiled(True, memory_format, training)
    assert count <= MOST[memory_format, training]
    assert not training or moved <= PASSES[memory_format][0]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_no_more_kernels_and_bytes_than_with_torchs_layers(memory_format, training):
    count, moved = measure_compiled(False, memory_format, training)
    own_launches = 8 if training else 0
    assert count >= MOST[memory_format, training] + own_launches
    assert not training or moved >= PASSES[memory_format][1]


@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_the_operators_move_fewer_bytes_than_the_composed_form(memory_format):
    """This holds even for the split tier: a call then has two launches, and each of them reads the tensor."""
    around, composed = PASSES[memory_format]
    assert count_own_passes("cooperative") < count_own_passes("split")
    assert around + count_own_passes("split") < composed
