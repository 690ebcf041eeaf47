"""How much of a call on a CPU is memory, how much Python: ``python bench/copies.py``, in one thread.

Calls are timed in turn: an operation of torch that reads and writes as many bytes (a copy of x to y, or for backward
the sum of x and dy to dx), our kernel and torch's without allocations, and both whole calls. Times are first quartiles
in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch.nn import functional

import gpu_bn
from gpu_bn import nn
from gpu_bn.backends.cpu import doors
from gpu_bn.bench.timing import CpuTimer, TimedCall, take_samples

TIMER = CpuTimer(batch=0.01, pause=0)


def kernel_call(door: doors.Door | None, *arguments: Any) -> TimedCall:
    """Return the call of our kernel in one thread."""
    usable = None if door is None else doors.with_function(door)
    assert usable is not None, "no kernel serves these tensors"
    return partial(usable.function, usable.record, *arguments, doors.scratch_address(), 1)  # type: ignore[arg-type]


def forward_calls(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> dict[str, TimedCall]:
    """Return the calls of a forward pass, with autograd in training, or of an evaluation."""
    x, y = torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype)
    ones = torch.ones(6, shape[1], dtype=torch.promote_types(dtype, torch.float32))
    mean, var, weight, bias, *saved = (vector.clone() for vector in ones)
    moments, options = torch.empty(2 * shape[1], dtype=torch.float64), (training, 0.1, 1e-5)
    leaves = [one.clone().requires_grad_(training) for one in (x, weight, bias)]
    door = doors.forward(x, None, training, "identity")
    return {
        "copy": lambda: y.copy_(x),
        "kernel": kernel_call(door, x, None, y, weight, bias, mean, var, None, moments, *options[1:], 0.0),
        "torch's kernel": torch.no_grad()(
            lambda: torch.native_batch_norm(x, weight, bias, mean, var, *options, out=(y, *saved))
        ),
        "call": lambda: nn.batch_norm(leaves[0], mean, var, *leaves[1:], *options),
        "torch's call": lambda: functional.batch_norm(leaves[0], mean, var, *leaves[1:], *options),
    }


def backward_calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TimedCall]:
    """Return the calls of a backward pass, without torch's kernel, which always allocates its outputs."""
    x, dy, dx = (torch.randn(shape).to(dtype) for _ in range(3))
    ones = torch.ones(6, shape[1], dtype=torch.promote_types(dtype, torch.float32))
    mean, var, weight, bias, *gradients = (vector.clone() for vector in ones)
    moments, leaves = torch.ones(2 * shape[1], dtype=torch.float64), [x.clone(), weight.clone(), bias.clone()]
    graphs = [
        function(leaves[0].requires_grad_(), mean, var, *[one.requires_grad_() for one in leaves[1:]], True)
        for function in (nn.batch_norm, functional.batch_norm)
    ]
    door = doors.backward(x, None, dy, True, False, True, True, "identity")
    call, torch_call = (partial(torch.autograd.grad, y, leaves, dy, retain_graph=True) for y in graphs)
    return {
        "sum": lambda: torch.add(x, dy, out=dx),
        "kernel": kernel_call(door, x, None, dy, dx, None, weight, bias, *gradients, moments, 1e-5, 0.0),
        "call": call,
        "torch's call": torch_call,
    }


def main() -> None:
    """Print a line for each shape and operation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="256x1024,32x512x7x7,32x256x14x14,16x128x1024", help="with commas")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time")
    arguments = parser.parse_args()
    gpu_bn.set_num_threads(1)
    torch.set_num_threads(1)
    for text in arguments.shapes.split(","):
        tensor = tuple(map(int, text.split("x"))), getattr(torch, arguments.dtype)
        for operation, calls in {
            "evaluation": forward_calls(*tensor, False),
            "forward": forward_calls(*tensor, True),
            "backward": backward_calls(*tensor),
        }.items():
            samples = take_samples(calls, TIMER, "wall", arguments.seconds)
            times = [f"{name} {1e6 * statistics.quantiles(samples.times(name))[0]:.0f}" for name in calls]
            print(f"{text} {operation}: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    main()
