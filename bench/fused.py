"""What merging an activation into its normalisation gains on a CPU: ``python bench/fused.py``.

Compare a layer that applies the activation with the same layer followed by torch's module, as ``nn.convert(model)``
leaves them: a forward call in training, an evaluation, and a forward and backward call, on one thread in alternating
pairs. A cell is the median of the ratios of the pairs; if it is below 1, merging is faster.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import GELU, Identity, Sequential
from torch_overhead import layer_calls

import gpu_bn
from gpu_bn import nn
from gpu_bn.bench.timing import CpuTimer, take_samples

SHAPES = (8, 64, 16, 16), (32, 256, 14, 14), (256, 1024)
ACTIVATIONS: dict[str, torch.nn.Module] = {
    "relu": torch.nn.ReLU(), "relu6": torch.nn.ReLU6(), "leaky_relu": torch.nn.LeakyReLU(),
    "hardswish": torch.nn.Hardswish(), "elu": torch.nn.ELU(), "silu": torch.nn.SiLU(), "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(), "gelu": GELU(), "gelu_tanh": GELU("tanh"),
}  # fmt: skip
TIMER = CpuTimer(batch=0.003, pause=0)
TIMED = "training, no grad", "evaluation, no grad", "forward and backward"


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="per operation, at least 7 pairs")
    parser.add_argument("--only", default="", help="only activations whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu_bn.set_num_threads(1)
    torch.manual_seed(0)
    names = [name for name in ACTIVATIONS if arguments.only in name]
    print("| merged / apart | training, forward | evaluation | forward and backward |\n|---|---|---|---|")
    for shape in SHAPES:
        kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        for name in names:
            merged = layer_calls(Sequential(kind(shape[1], activation=name), Identity()), shape=shape)
            apart = layer_calls(Sequential(kind(shape[1]), ACTIVATIONS[name]), shape=shape)
            pairs = ({"merged": merged[f"layer, {each}"], "apart": apart[f"layer, {each}"]} for each in TIMED)
            timed = (take_samples(pair, TIMER, "wall", arguments.seconds / 2) for pair in pairs)
            cells = [f"{samples.ratio('merged', 'apart'):.2f}" for samples in timed]
            print(f"| {'x'.join(map(str, shape))}, {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
