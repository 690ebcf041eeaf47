"""What merging an activation into its normalisation gains on a CPU: ``python bench/fused.py``.

A layer that applies the activation against the same layer followed by torch's module, which is what
``nn.convert(model)`` leaves: a forward call in training, an evaluation, and a forward and backward call, on one thread
in alternating pairs. A cell is the median of the pairs' ratios; below 1, merging gains.
"""

from __future__ import annotations

import argparse
import copy

import torch

import gpu_bn
from gpu_bn import nn
from gpu_bn.bench.timing import CpuTimer, TimedCall, take_samples

SHAPES = (8, 64, 16, 16), (32, 256, 14, 14), (256, 1024)
ACTIVATIONS: dict[str, torch.nn.Module] = {
    "relu": torch.nn.ReLU(),
    "relu6": torch.nn.ReLU6(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "hardswish": torch.nn.Hardswish(),
    "elu": torch.nn.ELU(),
    "silu": torch.nn.SiLU(),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
}
TIMER = CpuTimer(batch=0.003, pause=0)


def calls(model: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, TimedCall]:
    """Return the calls of a model."""
    leaf, evaluated = x.clone().requires_grad_(), copy.deepcopy(model).eval()
    return {
        "training, forward": torch.no_grad()(lambda: model(x)),
        "evaluation": torch.no_grad()(lambda: evaluated(x)),
        "forward and backward": lambda: torch.autograd.grad(model(leaf), (leaf, *model.parameters()), dy),
    }


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="per operation, at least 7 pairs")
    parser.add_argument("--only", default="", help="only activations whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu_bn.set_num_threads(1)
    torch.manual_seed(0)
    print("| merged / apart | training, forward | evaluation | forward and backward |\n|---|---|---|---|")
    for shape in SHAPES:
        x, dy = torch.randn(shape), torch.randn(shape)
        kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        for name, module in ACTIVATIONS.items():
            if arguments.only not in name:
                continue
            merged = calls(torch.nn.Sequential(kind(shape[1], activation=name), torch.nn.Identity()), x, dy)
            apart = calls(torch.nn.Sequential(kind(shape[1]), module), x, dy)
            pairs = ({"merged": merged[each], "apart": apart[each]} for each in merged)
            found = (take_samples(pair, TIMER, "wall", arguments.seconds / 2) for pair in pairs)
            cells = [f"{samples.ratio('merged', 'apart'):.2f}" for samples in found]
            print(f"| {'x'.join(map(str, shape))}, {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
