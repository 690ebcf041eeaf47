"""Compare fused models with the original ones."""

import copy
import io

import torch
from torch.testing import assert_close

from gpu_bn import nn
from support import rng


def rows(seed=0, count=6, channels=4):
    return torch.from_numpy(rng(seed).standard_normal((count, channels)))


def fused_with(plain, *expected):
    """Return a fused copy of a model and its report. Assert that merges are in exactly the named layers."""
    report = nn.Report()
    fused = nn.convert(copy.deepcopy(plain), fuse=True, report=report)
    assert set(report.merged) == set(expected)
    return fused, report


def agree(fused, plain, *arguments, **options):
    """Assert that the outputs, input gradients and state of two models agree in both modes."""
    for mode in (True, False):
        results = []
        for model in (fused.train(mode), plain.train(mode)):
            inputs = [
                value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value
                for value in arguments
            ]
            torch.manual_seed(0)
            y = model(*inputs, **options)
            y.double().sin().sum().backward()
            results.append([y.detach(), *(value.grad for value in inputs if isinstance(value, torch.Tensor))])
        assert_close(*results)
        assert results[0][0].dtype == results[1][0].dtype
    assert_close(fused.state_dict(), plain.state_dict())


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.act = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()
        self.double()

    def forward(self, x):
        return self.act(self.norm(self.linear(x)))


def saved_and_loaded(model):
    """Save a model to a file and return the model that is loaded from it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def calls_of_relu(model, x):
    """Count the calls of torch's ReLU in a call of a model."""
    with torch.profiler.profile() as profile:
        model(x)
    return sum(event.name == "aten::relu" for event in profile.events())
