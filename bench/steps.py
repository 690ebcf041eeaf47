"""Whole networks on a CPU with torch's layers and with ours: ``python bench/steps.py``.

Time a training step and an evaluation of ResNet-18 and MobileNetV3-large on eight images of 64 x 64, with all variants
in turn; a ratio is the median of the ratios to torch's layers. Peak memory is that of torch tensors beyond the memory
before the step. The first gradient of each variant is compared with that of torch's layers in float64. The variants
share their parameters in evaluation, because addresses change a time by some per cent. In the variant ``copying`` each
normalisation only copies its input, the least work of a layer with a new output. MobileNetV3-large needs torchvision:
``pip install -e '.[models]'``.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import nn

import gpu_bn
from gpu_bn import nn as ours
from gpu_bn.bench.timing import CpuTimer, TimedCall, take_samples
from gpu_bn.bench.training import LAYERS, Make, check_gradients, resnet18


def mobilenet() -> nn.Module:
    """Return a MobileNetV3-large without dropout, so that all variants compute the same."""
    return import_module("torchvision.models").mobilenet_v3_large(dropout=0.0)


NETWORKS = {"ResNet-18": resnet18, "MobileNetV3-large": mobilenet}


class Copy(nn.Module):
    """A layer that copies its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def copying(model: nn.Module) -> nn.Module:
    """Replace the normalisations of a model by copies."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, Copy())
    return model


TRAINED: dict[str, Make] = dict(zip(("torch", "converted", "fused"), LAYERS.values(), strict=True))
EVALUATED: dict[str, Make] = TRAINED | {"folded": lambda model: ours.fold(model), "copying": copying}


def rows(model: nn.Module, pairs: int) -> Iterator[str]:
    """Yield the row of each variant."""
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    timer, rounds = CpuTimer(batch=0), (pairs, pairs)
    steps, peaks, refused = check_gradients(TRAINED, model, images, labels)
    assert not refused, refused
    trained = take_samples(steps, timer, "wall", 1, rounds)
    evaluations = {name: evaluation(model, make, images) for name, make in EVALUATED.items()}
    evaluated = take_samples(evaluations, timer, "wall", 1, rounds)
    for name in EVALUATED:  # a variant that failed raises an error here
        step = "- | - | -"
        if name in steps:
            step = f"{trained.ratio(name, 'torch'):.2f} | {1e3 * trained.median(name):.0f} | {peaks[name] / 1e6:.1f}"
        yield f"{name} | {step} | {evaluated.ratio(name, 'torch'):.2f} | {1e3 * evaluated.median(name):.1f}"


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks of up to 32 MB: new memory costs a page fault for each 4 KB.

    Otherwise the memory of some variants returns to the system after a step by chance, and the page faults of the next
    step take up to a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD


def evaluation(model: nn.Module, make: Make, images: torch.Tensor) -> TimedCall:
    """Return an evaluation of a variant, which shares the parameters of ``model``."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    variant = make(copy.deepcopy(model, shared).eval()).eval()
    return torch.no_grad()(lambda: variant(images))


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    gpu_bn.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print("| network | layers | training step / torch | ms | peak MB | evaluation / torch | ms |")
    print("|---" * 7 + "|")
    for network, make in NETWORKS.items():
        if arguments.only in network:
            for row in rows(make(), arguments.pairs):
                print(f"| {network} | {row} |")


if __name__ == "__main__":
    main()
