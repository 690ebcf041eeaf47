"""NumPy backend against torch on the CPU, side by side: ``python bench/cpu.py``.

For each shape and operation the two are timed in turn, some milliseconds' worth of calls each, and the order changes
from pair to pair. Between them the process waits without sleeping (a core that wakes up is slow at first), because the
threads of torch's OpenMP runtime go on spinning for some milliseconds after their work and would compete with the
other library. The figure is the median of the pairs' ratios (below 1: gpu_bn is faster). Each result is first compared
with torch's; a wrong one is not timed.

Where the outputs come from decides as much as the arithmetic: the C library either hands out memory that the process
already holds, or fresh pages that the kernel must first clear. Which of the two depends on what ran before. So all is
timed three times, each in a process of its own: with the allocator as it comes (``default``), told to keep what is
freed (``held``), and told to return it (``fresh``).
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
from threadpoolctl import threadpool_info

import gpu_bn

PAUSE = 0.005
"""Seconds between timings; OpenMP's default spinning is over by then."""
BATCH = 0.005
"""Seconds of calls in one timing, at least one call."""
REGIMES: dict[str, dict[str, str]] = {
    "default": {},
    "held": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)},
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)},
}


class Result(NamedTuple):
    """Medians over the pairs."""

    ratio: float
    ours_ms: float
    torch_ms: float


def operations(case: Case) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The operations to time, ours and torch's."""
    rng = np.random.default_rng(0)
    channels = case.shape[1]

    def tensor() -> np.ndarray:
        values = rng.standard_normal(case.shape).astype(case.dtype)
        return np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1) if case.channels_last else values

    x, dy = tensor(), tensor()
    parameter_dtype = np.float64 if case.dtype == "float64" else np.float32
    weight, bias = np.ones(channels, parameter_dtype), np.zeros(channels, parameter_dtype)
    running = [np.zeros(channels, parameter_dtype), np.ones(channels, parameter_dtype)]
    tx, tdy, tweight, tbias = (torch.from_numpy(a.copy(order="K")) for a in (x, dy, weight, bias))
    trunning = [torch.from_numpy(a.copy()) for a in running]
    leaves = [t.requires_grad_() for t in (tx, tweight, tbias)]
    _, saved = gpu_bn.batch_norm_forward(x, *running, weight, bias, True)
    ty = F.batch_norm(tx, *trunning, tweight, tbias, True)

    def torch_eval() -> torch.Tensor:
        with torch.no_grad():
            return F.batch_norm(tx, *trunning, tweight, tbias)

    return {
        "forward": (
            lambda: gpu_bn.batch_norm_forward(x, *running, weight, bias, True)[0],
            lambda: F.batch_norm(tx, *trunning, tweight, tbias, True),
        ),
        "forward+relu": (
            lambda: gpu_bn.batch_norm_forward(x, *running, weight, bias, True, activation="relu")[0],
            lambda: F.relu(F.batch_norm(tx, *trunning, tweight, tbias, True)),
        ),
        "eval": (lambda: gpu_bn.batch_norm(x, *running, weight, bias), torch_eval),
        "backward": (
            lambda: gpu_bn.batch_norm_backward(dy, saved).dx,
            lambda: torch.autograd.grad(ty, leaves, tdy, retain_graph=True)[0],
        ),
    }


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float) -> Result:
    """Check one operation, then time it in pairs."""
    got, expected = ours(), theirs().detach().numpy()
    tolerance = {"float16": 4e-3, "float32": 2e-5, "float64": 1e-12}[str(expected.dtype)]
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    del got, expected
    calls = max(1, round(BATCH / max(elapsed(ours, 3), elapsed(theirs, 3))))
    pairs = []
    start = time.perf_counter()
    while len(pairs) < 11 or (time.perf_counter() - start < seconds and len(pairs) < 201):
        first_ours = len(pairs) % 2 == 0
        first = elapsed(ours if first_ours else theirs, calls)
        second = elapsed(theirs if first_ours else ours, calls)
        pairs.append((first, second) if first_ours else (second, first))
    mine, its = zip(*pairs, strict=True)
    return Result(
        statistics.median(a / b for a, b in pairs), statistics.median(mine) * 1e3, statistics.median(its) * 1e3
    )


def elapsed(call: Callable[[], Any], calls: int) -> float:
    """Seconds a call, over several in a row after a pause."""
    start = time.perf_counter()
    while time.perf_counter() < start + PAUSE:
        pass
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(threads: int, seconds: float, only: str) -> dict[str, dict[str, Result]]:
    """All cases in this process."""
    gpu_bn.set_num_threads(threads)
    torch.set_num_threads(threads)
    results = {}
    for case in CPU:
        if only in str(case):
            results[str(case)] = {
                name: compare(ours, theirs, seconds) for name, (ours, theirs) in operations(case).items()
            }
            print(".", end="", flush=True, file=sys.stderr)
    return results


def measure_apart(regime: str, arguments: argparse.Namespace) -> dict[str, dict[str, Result]]:
    """All cases in a process whose allocator works in the regime."""
    command = [sys.executable, __file__, "--regime", regime, "--threads", str(arguments.threads)]
    command += ["--seconds", str(arguments.seconds), "--only", arguments.only]
    done = subprocess.run(command, env=os.environ | REGIMES[regime], stdout=subprocess.PIPE, check=True)
    return {
        case: {name: Result(*result) for name, result in row.items()} for case, row in json.loads(done.stdout).items()
    }


def environment(threads: int) -> str:
    """What the numbers depend on."""
    blas = ", ".join(
        f"{i['internal_api']} {i.get('architecture', '')}" for i in threadpool_info() if "blas" in i["user_api"]
    )
    return (
        f"gpu_bn {gpu_bn.__version__}, numpy {np.__version__} ({blas}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {threads} threads each"
    )


def table(results: dict[str, dict[str, dict[str, Result]]]) -> str:
    """Ratios as Markdown, one column for each operation, ``held / fresh`` in each."""
    names = list(next(iter(next(iter(results.values())).values())))
    lines = ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in next(iter(results.values())):
        cells = [" / ".join(f"{results[regime][case][name].ratio:.2f}" for regime in results) for name in names]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write all figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="per operation, at least 11 pairs")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--regime", choices=REGIMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.regime:
        print(json.dumps(measure(arguments.threads, arguments.seconds, arguments.only)))
        return
    results = {regime: measure_apart(regime, arguments) for regime in REGIMES}
    print(
        f"\ngpu_bn / torch, median of paired ratios, memory {' / '.join(results)}\n{environment(arguments.threads)}\n"
    )
    print(table(results))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment(arguments.threads), "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
