"""What a call costs on a tensor too small to compute anything: ``python bench/torch_overhead.py``.

``gpu_bn.nn`` against torch on the CPU, in one thread, in alternating pairs of batches of calls; the figure is the
median of the pairs' ratios. Times are the thread's own, so that waiting for other processes does not count. Three
columns: with the backend as it is; with a backend that only allocates its outputs, which leaves the cost of
checks, dispatch and autograd; and torch, whose time includes its kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pairs import Pair, in_pairs

from gpu_bn import nn, registry
from gpu_bn.backends.protocol import Grads, Moments, Saved
from gpu_bn.bench.timing import CpuTimer
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

TIMER = CpuTimer(batch=0.003, pause=0, clock=time.thread_time)


class Nothing:
    """A backend that allocates and computes nothing."""

    def __init__(self) -> None:
        self.zeros = torch.zeros(3, dtype=torch.float64)

    def vector(self, array: torch.Tensor) -> torch.Tensor:
        return array

    def forward(self, call: Call, spec: BatchNormSpec, _: bool = True) -> tuple[torch.Tensor, Saved]:
        moments = Moments(32, self.zeros, self.zeros)
        return torch.empty_like(call.x), Saved(call.x, None, moments, None, None, None, None, False, spec)

    def backward(self, dy: torch.Tensor, _: Saved, need: frozenset[str]) -> Grads:
        vectors = [torch.empty(3) if name in need else None for name in ("dweight", "dbias")]
        return Grads(torch.empty_like(dy), *vectors)


def operations(function: Callable[..., torch.Tensor], layer: torch.nn.Module) -> dict[str, Callable[[], Any]]:
    """The calls that are timed."""
    x, dy = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    leaf = x.clone().requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)

    def quiet(training: bool) -> torch.Tensor:
        with torch.no_grad():
            return function(x, mean, var, weight, bias, training)

    def both() -> Any:
        y = function(leaf, mean, var, weight, bias, True)
        return torch.autograd.grad(y, (leaf, weight, bias), dy)

    return {
        "training, no grad": lambda: quiet(True),
        "evaluation, no grad": lambda: quiet(False),
        "forward": lambda: function(leaf, mean, var, weight, bias, True),
        "forward and backward": both,
        "layer, training, no grad": lambda: quietly(layer, x),
        "layer, forward": lambda: layer(leaf),
        "layer, forward and backward": lambda: torch.autograd.grad(layer(leaf), (leaf, *layer.parameters()), dy),
    }


def quietly(layer: torch.nn.Module, x: torch.Tensor) -> Any:
    """A call that nothing is differentiated of."""
    with torch.no_grad():
        return layer(x)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41, help="pairs of timings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs = operations(F.batch_norm, torch.nn.BatchNorm2d(3))
    ours = operations(nn.batch_norm, nn.BatchNorm2d(3))
    rows: dict[str, list[Pair]] = {name: [] for name in ours}
    true, nothing = registry.serving, Nothing()
    for engine in (true, lambda *_: nothing):
        registry.serving = engine  # type: ignore[assignment]
        for name, call in ours.items():
            rows[name].append(in_pairs(call, theirs[name], TIMER, pairs=(arguments.pairs, arguments.pairs)))
    registry.serving = true
    print(f"torch {torch.__version__}, float32 2x3x4x4, microseconds a call and ratio to torch")
    print(f"{'':28}{'gpu_bn':>16}{'without a kernel':>20}{'torch':>10}")
    for name, (whole, empty) in rows.items():
        found = f"{whole.ours:8.1f} ({whole.ratio:4.1f}x){empty.ours:12.1f} ({empty.ratio:4.1f}x){whole.theirs:10.1f}"
        print(f"{name:28}{found}")


if __name__ == "__main__":
    main()
