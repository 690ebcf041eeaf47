"""What merging an activation into its normalisation gains on a CPU: ``python bench/fused.py``.

A layer that applies the activation against the same layer followed by torch's module, which is what
``nn.convert(model)`` leaves: a forward call in training, an evaluation, and a forward and backward call, on one thread
in alternating pairs. A cell is the median of the pairs' ratios; below 1, merging gains.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from pairs import in_pairs
from torch import Tensor

import gpu_bn
from gpu_bn import nn
from gpu_bn.bench.timing import CpuTimer, TimedCall

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


def operations(layer: torch.nn.Module, after: torch.nn.Module, x: Tensor, dy: Tensor) -> dict[str, TimedCall]:
    """The calls of a layer and of what follows it."""
    leaf = x.clone().requires_grad_()
    evaluated = torch.nn.Sequential(layer, after).eval()
    trained = torch.nn.Sequential(type(layer)(x.shape[1], activation=layer.activation), after)  # type: ignore[call-arg]

    def without_gradients(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(x)
            return result

    return {
        "training, forward": lambda: without_gradients(trained),
        "evaluation": lambda: without_gradients(evaluated),
        "forward and backward": lambda: torch.autograd.grad(trained(leaf), (leaf, *trained.parameters()), dy),
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
        kind: Any = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        for name, module in ACTIVATIONS.items():
            if arguments.only not in name:
                continue
            merged = operations(kind(shape[1], activation=name), torch.nn.Identity(), x, dy)
            apart = operations(kind(shape[1]), module, x, dy)
            pairs = (in_pairs(merged[each], apart[each], TIMER, arguments.seconds) for each in merged)
            cells = [f"{pair.ratio:.2f}" for pair in pairs]
            print(f"| {'x'.join(map(str, shape))}, {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
