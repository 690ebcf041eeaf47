"""How many kernels inductor makes around the operators: for conv-BN-ReLU-conv-BN-add-ReLU, beside torch's layers."""

import pytest
from support import needs_a_compiler

torch = pytest.importorskip("torch")

from torch._inductor import config, metrics  # noqa: E402

from gpu_bn import nn  # noqa: E402

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MOST = {("contiguous", True): 5, ("channels_last", True): 1, ("contiguous", False): 6, ("channels_last", False): 2}
"""Format and training: kernels with our layers, those of the convolutions and the skip's gradient included."""


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


def kernels(ours, memory_format, training):
    """How many kernels the forward and the backward graph have, and the output's strides."""
    torch._dynamo.reset()
    metrics.reset()
    model = Block(ours).to(memory_format=FORMATS[memory_format]).train(training)
    x = torch.randn(2, 8, 6, 6).to(memory_format=FORMATS[memory_format]).requires_grad_(training)
    with config.patch(force_disable_caches=True):
        y = torch.compile(model, fullgraph=True)(x)
        if training:
            y.backward(torch.randn_like(y))
            assert x.grad.stride() == x.stride()
    torch._dynamo.reset()
    assert y.stride() == x.stride()
    return metrics.generated_kernel_count


@needs_a_compiler
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_no_copies_around_the_operators(memory_format, training):
    assert kernels(True, memory_format, training) <= MOST[memory_format, training]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", list(FORMATS))
def test_no_more_kernels_than_with_torchs_layers(memory_format, training):
    assert kernels(False, memory_format, training) >= MOST[memory_format, training]
