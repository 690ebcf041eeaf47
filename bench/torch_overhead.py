"""What a call costs on a tensor too small to compute anything: ``python bench/torch_overhead.py``. No GPU is needed.

``gpu_bn.nn`` against torch on the CPU, in one thread, in alternating pairs of batches of calls; a ratio is the median
of the pairs'. Times are the process's own, so that waiting for other processes does not count. torch's times include
its kernel. The first table has our times with the backend as it is, and with one that only allocates its outputs, which
leaves the cost of checks, dispatch and autograd.

The second table is of the Triton backend, whose compiled kernels do nothing; its tensors are on the CPU, where torch
allocates faster than on a GPU. A time is that of all that gpu_bn and autograd do in a later call of a shape: checks,
finding what has been prepared, allocating outputs, gathering arguments. The last column says how often a call launches
a kernel of ours, and how often it calls an operation of torch's that would launch one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from gpu_bn import nn, registry
from gpu_bn.backends.protocol import Grads, Moments, Saved
from gpu_bn.bench.timing import CpuTimer, Samples, TimedCall, take_samples
from gpu_bn.bench.training import count_operations
from gpu_bn.call import Call
from gpu_bn.nn.operators import cpu_calls
from gpu_bn.plan import DEVICES
from gpu_bn.spec import BatchNormSpec

Shape = tuple[int, ...]
SHAPE = (2, 3, 4, 4)
TIMER = CpuTimer(batch=0.003, pause=0, clock=time.process_time)
Calls = dict[str, TimedCall]
Norm = Callable[[torch.Tensor, bool], torch.Tensor]


class Nothing:
    """A backend that allocates and computes nothing."""

    zeros = torch.zeros(3, dtype=torch.float64)

    def vector(self, array: torch.Tensor) -> torch.Tensor:
        return array

    def forward(self, call: Call, spec: BatchNormSpec, _: bool = True) -> tuple[torch.Tensor, Saved]:
        moments = Moments(32, self.zeros, self.zeros)
        return torch.empty_like(call.x), Saved(call.x, None, moments, None, None, None, None, False, spec)

    def backward(self, dy: torch.Tensor, _: Saved, need: frozenset[str]) -> Grads:
        vectors = [torch.empty(3) if name in need else None for name in ("dweight", "dbias")]
        return Grads(torch.empty_like(dy), *vectors)


def calls(prefix: str, norm: Norm, others: Iterable[torch.Tensor], shape: Shape = SHAPE) -> Calls:
    """Return the timed calls of ``norm(x, training)``; its gradients are those of x and ``others``."""
    x, dy = torch.randn(shape), torch.randn(shape)
    leaf = x.clone().requires_grad_()
    leaves = (leaf, *others)
    return {
        f"{prefix}training, no grad": torch.no_grad()(lambda: norm(x, True)),
        f"{prefix}evaluation, no grad": torch.no_grad()(lambda: norm(x, False)),
        f"{prefix}forward": lambda: norm(leaf, True),
        f"{prefix}forward and backward": lambda: torch.autograd.grad(norm(leaf, True), leaves, dy),
    }


def function_calls(function: Callable[..., torch.Tensor]) -> Calls:
    """Return the timed calls of a function."""
    mean, var = torch.zeros(3), torch.ones(3)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    return calls("", lambda x, training: function(x, mean, var, weight, bias, training), (weight, bias))


def layer_calls(layer: torch.nn.Module, *residual: torch.Tensor, prefix: str = "", shape: Shape = SHAPE) -> Calls:
    """Return the timed calls of a layer."""
    layers = {True: layer, False: copy.deepcopy(layer).eval()}
    others = (*layer.parameters(), *residual)
    return calls(f"{prefix}layer, ", lambda x, training: layers[training](x, *residual), others, shape)


def in_pairs(ours: TimedCall, theirs: TimedCall, pairs: int) -> Samples:
    """Time two calls in turn."""
    return take_samples({"ours": ours, "theirs": theirs}, TIMER, "wall", 1, (pairs, pairs))


def time_on_cpu(pairs: int) -> None:
    """Print the table of the backend ``cpu``."""
    theirs = function_calls(F.batch_norm) | layer_calls(torch.nn.BatchNorm2d(3))
    ours = function_calls(nn.batch_norm) | layer_calls(nn.BatchNorm2d(3))
    serving, nothing = registry.backend_for, Nothing()
    print(f"{'':28}{'gpu_bn':>16}{'without a kernel':>20}{'torch':>10}")
    for name, call in ours.items():
        whole = in_pairs(call, theirs[name], pairs)
        registry.backend_for = lambda _: nothing  # type: ignore[assignment,return-value]
        empty = in_pairs(call, theirs[name], pairs)
        registry.backend_for = serving
        cells = (f"{1e6 * each.median('ours'):8.1f} ({each.ratio('ours', 'theirs'):4.1f}x)" for each in (whole, empty))
        print(f"{name:28}{'    '.join(cells)}{1e6 * whole.median('theirs'):10.1f}")


def time_triton(pairs: int) -> None:
    """Print the table of the Triton backend."""
    from gpu_bn.backends.triton.backend import TritonBackend

    launches: list[None] = []

    def launch(step: Any, _: tuple[Any, ...]) -> None:
        step.run = lambda *_: launches.append(None)
        step.run()

    backend = TritonBackend(launch, DEVICES["h100"])
    registry.backend_for = lambda _: backend
    cpu_calls.forward = lambda *_: None  # no kernel for CPU tensors: these stand for tensors on a GPU
    theirs = layer_calls(torch.nn.BatchNorm2d(3))
    residual = torch.randn(SHAPE, requires_grad=True)
    fused = layer_calls(nn.BatchNorm2d(3, activation="relu"), residual, prefix="relu, residual, ")
    print(f"\n{'by Triton':44}{'gpu_bn':>8}{'torch':>8}  launches, ours + torch's")
    for name, call in (layer_calls(nn.BatchNorm2d(3)) | fused).items():
        call()
        samples = in_pairs(call, theirs.get(name, call), pairs)
        launches.clear()
        counts = count_operations(call)
        torch_time = f"{1e6 * samples.median('theirs'):.1f}" if name in theirs else "-"
        times = f"{1e6 * samples.median('ours'):8.1f}{torch_time:>8}"
        listed = ", ".join(f"{count} {operation}" for operation, count in counts.items())
        print(f"{name:44}{times}  {len(launches)} + {counts.total()} {listed}".rstrip())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41, help="pairs of timings")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32 2x3x4x4, microseconds a call and ratio to torch")
    time_on_cpu(pairs)
    if find_spec("triton") is not None:
        time_triton(pairs)


if __name__ == "__main__":
    main()
