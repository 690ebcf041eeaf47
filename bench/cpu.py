"""The backends for CPUs against torch, side by side: ``python bench/cpu.py``.

For each shape and operation, ours and torch's are timed in turn on the same tensors, some milliseconds' worth of calls
each, and the order changes from pair to pair. Between them the process waits without sleeping (a core that wakes up is
slow at first), because the threads of torch's OpenMP runtime go on spinning for some milliseconds after their work.
A cell is the median of the pairs' ratios (below 1: gpu_bn is faster) and both times in microseconds. Each result is
first compared with torch's; a wrong one is not timed. First one thread each, then two, pinned to cores of their own,
each in a process of its own. ``--compile`` adds what ``torch.compile`` makes of the same operation as a second peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pairs import Pair, in_pairs
from torch._functorch import config as functorch_config

import gpu_bn
from gpu_bn import nn
from gpu_bn.bench.machine import processor
from gpu_bn.bench.timing import CpuTimer

CASES = (
    "32x64x56x56", "8x64x112x112", "2x32x32x64x64", "32x256x14x14", "32x512x7x7", "16x128x1024",
    "32x64x56x56 channels-last", "256x1024", "4x8", "2x3x4x4", "32x64x56x56 float64", "32x256x14x14 float64",
    "32x256x14x14 float16", "32x256x14x14 bfloat16",
)  # fmt: skip
"""Shapes as torch gives them (channels second), with the memory format and the dtype if they are not the usual ones."""
TIMER = CpuTimer(batch=0.01)
BACKENDS = "cpu", "numpy"
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-12}
Call = Callable[[], torch.Tensor]


class Tensors:
    """One case's tensors, and its operations."""

    def __init__(self, case: str) -> None:
        torch.manual_seed(0)
        size, *kinds = case.split()
        shape = tuple(map(int, size.split("x")))
        dtype, channels = getattr(torch, next((kind for kind in kinds if "float" in kind), "float32")), shape[1]
        x, self.dy, self.residual = (torch.randn(shape).to(dtype) for _ in range(3))
        if "channels-last" in kinds:
            x, self.dy, self.residual = (
                t.contiguous(memory_format=torch.channels_last) for t in (x, self.dy, self.residual)
            )
        kind = torch.float64 if dtype is torch.float64 else torch.float32
        z = F.batch_norm(x, None, None, training=True)
        for close in (z, z + self.residual):  # a rounding decides on which side of ReLU's corner these are: no gradient
            self.dy.masked_fill_(close.abs() < 10 * TOLERANCES[dtype], 0)
        self.running = torch.zeros(channels, dtype=kind), torch.ones(channels, dtype=kind)
        self.leaves = [x, torch.ones(channels, dtype=kind), torch.zeros(channels, dtype=kind)]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def calls(self, norm: Callable[..., torch.Tensor]) -> dict[str, Call]:
        """The operations by a function of torch's tensors: ``norm(x, mean, var, weight, bias, training, r, relu)``."""
        leaves, running = self.leaves, self.running

        def evaluate() -> torch.Tensor:
            with torch.no_grad():
                return norm(leaves[0], *running, *leaves[1:], False, None, False)

        def backward(relu: bool, residual: torch.Tensor | None = None) -> Call:
            y = norm(leaves[0], None, None, *leaves[1:], True, residual, relu)
            wanted = leaves if residual is None else [*leaves, residual]
            return lambda: torch.autograd.grad(y, wanted, self.dy, retain_graph=True)[0]

        return {
            "forward": lambda: norm(leaves[0], *running, *leaves[1:], True, None, False),
            "+relu": lambda: norm(leaves[0], *running, *leaves[1:], True, None, True),
            "+residual+relu": lambda: norm(leaves[0], *running, *leaves[1:], True, self.residual, True),
            "eval": evaluate,
            "backward": backward(False),
            "backward+relu": backward(True),
            "backward+residual+relu": backward(True, self.residual.detach().requires_grad_()),
        }

    def numpy_calls(self) -> dict[str, Call]:
        """The operations by the NumPy backend, on the same memory."""
        x, weight, bias, dy, residual, *running = (
            t.detach().numpy() for t in (*self.leaves, self.dy, self.residual, *self.running)
        )

        def forward(**options: Any) -> Any:
            return gpu_bn.batch_norm_forward(x, *running, weight, bias, True, backend="numpy", **options)

        def backward(**options: Any) -> Call:
            _, saved = forward(**options)
            return lambda: torch.from_numpy(gpu_bn.batch_norm_backward(dy, saved, backend="numpy").dx)

        return {
            "forward": lambda: torch.from_numpy(forward()[0]),
            "+relu": lambda: torch.from_numpy(forward(activation="relu")[0]),
            "+residual+relu": lambda: torch.from_numpy(forward(residual=residual, activation="relu")[0]),
            "eval": lambda: torch.from_numpy(gpu_bn.batch_norm(x, *running, weight, bias, backend="numpy")),
            "backward": backward(),
            "backward+relu": backward(activation="relu"),
            "backward+residual+relu": backward(residual=residual, activation="relu"),
        }


def torchs(x: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, residual: Any, relu: bool) -> Any:
    """Torch's."""
    y = F.batch_norm(x, mean, var, weight, bias, training)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def compiled(x: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, residual: Any, relu: bool) -> Any:
    """What ``backend="cpu"`` serves."""
    activation = "relu" if relu else None
    return nn.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation=activation)


def compare(ours: Call, theirs: Call, seconds: float) -> Pair:
    """Check one operation, then time it in pairs."""
    got, expected = ours().detach(), theirs().detach()
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    del got, expected
    return in_pairs(ours, theirs, TIMER, seconds)


def start_helpers(threads: int) -> None:
    """Start our helpers on cores of their own: they would inherit the one to which OpenMP binds the caller."""
    if threads > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(1, threads))
        gpu_bn.batch_norm(np.ones((64, 1 << 17), np.float32), training=True, backend="cpu")
        os.sched_setaffinity(0, {0})


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Pair]]:
    """All cases in this process, by case and by backend and peer."""
    gpu_bn.set_num_threads(arguments.threads)
    start_helpers(arguments.threads)
    torch.set_num_threads(arguments.threads)
    functorch_config.donated_buffer = False  # a graph's backward call is repeated
    peers = {"torch": torchs} | ({"torch.compile": torch.compile(torchs, dynamic=False)} if arguments.compile else {})
    results = {}
    for case in CASES:
        if not any(part in case for part in arguments.only.split(",")):
            continue
        tensors = Tensors(case)
        torch.compiler.reset()  # what is compiled anew too often is no longer compiled
        for peer, norm in peers.items():
            theirs = tensors.calls(norm)
            for backend in arguments.backend.split(","):
                if backend == "numpy" and ("bfloat16" in case or peer != "torch"):
                    continue  # NumPy has no such type; a second peer is for the backend that serves by default
                ours = tensors.calls(compiled) if backend == "cpu" else tensors.numpy_calls()
                results[f"{case}, {backend} / {peer}"] = {
                    name: compare(ours[name], theirs[name], arguments.seconds)
                    for name in ours
                    if arguments.operation in name
                }
        print(".", end="", flush=True, file=sys.stderr)
    return results


def measure_apart(threads: int) -> dict[str, dict[str, Pair]]:
    """All cases in a process with this one's options and so many threads, each on a core of its own."""
    command = [sys.executable, *sys.argv, "--apart", f"--threads={threads}"]
    pinned = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close" if threads > 1 else "false"}
    done = subprocess.run(command, env=os.environ | pinned, stdout=subprocess.PIPE, check=True)
    return {case: {name: Pair(*pair) for name, pair in row.items()} for case, row in json.loads(done.stdout).items()}


def environment() -> str:
    """What the numbers depend on."""
    return (
        f"gpu_bn {gpu_bn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{processor()}, {os.cpu_count()} cores"
    )


def table(results: dict[str, dict[str, Pair]]) -> str:
    """Markdown: ratio, and both times in microseconds."""
    names = list(next(iter(results.values())))
    lines = ["| ours / theirs (µs) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, row in results.items():
        cells = [f"{row[name].ratio:.2f} ({row[name].ours:.0f} / {row[name].theirs:.0f})" for name in names]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def merged(arguments: argparse.Namespace, found: dict[int, Any]) -> dict[str, Any]:
    """What was found, and what the file has of other cases in the same environment."""
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    known: dict[str, Any] = kept["results"] if kept.get("environment") == environment() else {}
    together = {str(threads): known.get(str(threads), {}) | rows for threads, rows in found.items()}
    return known | {
        threads: dict(sorted(rows.items(), key=lambda row: CASES.index(row[0].partition(", ")[0])))
        for threads, rows in together.items()
    }


def main() -> None:
    """Print the tables, and write all figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="numbers of threads, a table each (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per operation, at least 7 pairs; 0: one")
    parser.add_argument("--only", default="", help="only cases whose name contains one of these, with commas")
    parser.add_argument("--operation", default="", help="only operations whose name contains this")
    parser.add_argument("--backend", default=",".join(BACKENDS), help="of cpu,numpy")
    parser.add_argument("--compile", action="store_true", help="against torch.compile too, which takes minutes")
    parser.add_argument("--json", type=Path, help="write all figures there, beside those of other cases")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apart:
        arguments.threads = int(arguments.threads)
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for threads in map(int, arguments.threads.split(",")):
        found[threads] = measure_apart(threads)
        print(f"\n{environment()}, {threads} thread{'s' * (threads > 1)} each\n\n{table(found[threads])}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment(), "results": merged(arguments, found)}, indent=1)
        )


if __name__ == "__main__":
    main()
