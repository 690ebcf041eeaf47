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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cases import CPU, Case
from torch._functorch import config as functorch_config

import gpu_bn
from gpu_bn import nn

PAUSE = 0.005
"""Seconds between timings; OpenMP's default spinning is over by then."""
BATCH = 0.01
"""Seconds of calls in one timing, at least one call."""
BACKENDS = "cpu", "numpy"
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-12}
Call = Callable[[], torch.Tensor]


class Result(NamedTuple):
    """Medians over the pairs; times in microseconds."""

    ratio: float
    ours: float
    theirs: float


class Tensors:
    """One case's tensors, and its operations."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype, channels = getattr(torch, case.dtype), case.shape[1]
        x, self.dy, self.residual = (torch.randn(case.shape).to(dtype) for _ in range(3))
        if case.channels_last:
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


def compare(ours: Call, theirs: Call, seconds: float) -> Result:
    """Check one operation, then time it in pairs."""
    got, expected = ours().detach(), theirs().detach()
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    del got, expected
    calls = max(1, round(BATCH / max(elapsed(ours, 3), elapsed(theirs, 3))))
    pairs = []
    start = time.perf_counter()
    while len(pairs) < 7 or (time.perf_counter() - start < seconds and len(pairs) < 201):
        first_ours = len(pairs) % 2 == 0
        first = elapsed(ours if first_ours else theirs, calls)
        second = elapsed(theirs if first_ours else ours, calls)
        pairs.append((first, second) if first_ours else (second, first))
    mine, its = zip(*pairs, strict=True)
    return Result(
        statistics.median(a / b for a, b in pairs), statistics.median(mine) * 1e6, statistics.median(its) * 1e6
    )


def elapsed(call: Call, calls: int) -> float:
    """Seconds a call, over several in a row after a pause."""
    start = time.perf_counter()
    while time.perf_counter() < start + PAUSE:
        pass
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def start_helpers(threads: int) -> None:
    """Start our helpers on cores of their own: they would inherit the one to which OpenMP binds the caller."""
    if threads > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(1, threads))
        gpu_bn.batch_norm(np.ones((64, 1 << 17), np.float32), training=True, backend="cpu")
        os.sched_setaffinity(0, {0})


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Result]]:
    """All cases in this process, by case and by backend and peer."""
    gpu_bn.set_num_threads(arguments.threads)
    start_helpers(arguments.threads)
    torch.set_num_threads(arguments.threads)
    functorch_config.donated_buffer = False  # a graph's backward call is repeated
    peers = {"torch": torchs} | ({"torch.compile": torch.compile(torchs, dynamic=False)} if arguments.compile else {})
    results = {}
    for case in CPU:
        if not any(part in str(case) for part in arguments.only.split(",")):
            continue
        tensors = Tensors(case)
        torch.compiler.reset()  # what is compiled anew too often is no longer compiled
        for peer, norm in peers.items():
            theirs = tensors.calls(norm)
            for backend in arguments.backend.split(","):
                if backend == "numpy" and (case.dtype == "bfloat16" or peer != "torch"):
                    continue  # NumPy has no such type; a second peer is for the backend that serves by default
                ours = tensors.calls(compiled) if backend == "cpu" else tensors.numpy_calls()
                row = {
                    name: compare(ours[name], theirs[name], arguments.seconds)
                    for name in ours
                    if arguments.operation in name
                }
                results[f"{case}, {backend} / {peer}"] = row
        print(".", end="", flush=True, file=sys.stderr)
    return results


def measure_apart(threads: int, arguments: argparse.Namespace) -> dict[str, dict[str, Result]]:
    """All cases in a process with so many threads, each on a core of its own."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("seconds", "only", "backend", "operation")]
    command = [sys.executable, __file__, "--apart", f"--threads={threads}", *options]
    pinned = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close" if threads > 1 else "false"}
    done = subprocess.run(
        [*command, *(["--compile"] if arguments.compile else [])],
        env=os.environ | pinned, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return {
        case: {name: Result(*result) for name, result in row.items()} for case, row in json.loads(done.stdout).items()
    }


def environment() -> str:
    """What the numbers depend on."""
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in facts if line.startswith("model name")), "")
    return (
        f"gpu_bn {gpu_bn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{model.strip() or platform.machine()}, {os.cpu_count()} cores"
    )


def table(results: dict[str, dict[str, Result]]) -> str:
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
    cases = list(map(str, CPU))
    return known | {
        str(threads): dict(
            sorted((known.get(str(threads), {}) | rows).items(), key=lambda row: cases.index(row[0].partition(", ")[0]))
        )
        for threads, rows in found.items()
    }


def main() -> None:
    """Print the tables, and write all figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="numbers of threads, a table each (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per operation, at least 7 pairs")
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
        found[threads] = measure_apart(threads, arguments)
        print(f"\n{environment()}, {threads} thread{'s' * (threads > 1)} each\n\n{table(found[threads])}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment(), "results": merged(arguments, found)}, indent=1)
        )


if __name__ == "__main__":
    main()
