"""The backends for CPUs against torch, side by side: ``python bench/cpu.py``.

Our calls and torch's are timed in turn on the same tensors, for some milliseconds each, and the order changes from pair
to pair; :class:`gpu_bn.bench.timing.CpuTimer` waits before each sample. A cell is the median of the ratios of the pairs
(below 1: gpu_bn is faster) and both times in microseconds. Each result is first compared with the oracle; a wrong one
ends the run. Each number of threads is measured in a new process, which pins several threads to cores. ``--compile``
adds the same operation compiled by ``torch.compile`` as a second peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

import gpu_bn
from gpu_bn import nn
from gpu_bn.bench.cases import OPERATIONS, Case, Operation
from gpu_bn.bench.implementations import Implementation, by_name, compiled_norm, torch_call, torch_norm
from gpu_bn.bench.machine import processor
from gpu_bn.bench.measurement import Tensors, measure
from gpu_bn.bench.timing import CpuTimer
from gpu_bn.testing import Problem

CASES = (
    "32x64x56x56", "8x64x112x112", "2x32x32x64x64", "32x256x14x14", "32x512x7x7", "16x128x1024",
    "32x64x56x56 channels-last", "256x1024", "4x8", "2x3x4x4", "32x64x56x56 float64", "32x256x14x14 float64",
    "32x256x14x14 float16", "32x256x14x14 bfloat16",
)  # fmt: skip
"""Shapes in torch's order (channels second), with the memory format and the dtype unless contiguous and float32."""
COLUMNS = {
    "forward": "forward", "+relu": "forward+relu", "+residual+relu": "forward+add+relu", "eval": "eval",
    "backward": "backward", "backward+relu": "backward+relu", "backward+residual+relu": "backward+add+relu",
}  # fmt: skip
"""Operations by the name of their column."""
Row = dict[str, tuple[float, float, float]]
"""The median of the ratios, and our and the peer's median time in microseconds, by column."""


def our_norm(operation: Operation, problem: Problem) -> Callable[..., torch.Tensor]:
    """Return our function of torch tensors, which the backend ``cpu`` serves."""
    p, activation = problem, "relu" if operation.relu else None
    return lambda x, weight, bias, residual=None: nn.batch_norm(
        x, p.running_mean, p.running_var, weight, bias, operation.training, p.momentum, p.eps,
        residual=residual, activation=activation,
    )  # fmt: skip


BACKENDS = {
    "cpu": Implementation("cpu", "cpu", "torch", torch_call(our_norm), ours=True),
    "numpy": by_name("gpu_bn numpy"),
}
PEERS = {
    name: Implementation(name, "cpu", "torch", torch_call(partial(norm, inplace=False)))
    for name, norm in (("torch", torch_norm), ("torch.compile", compiled_norm))
}


def case_of(name: str) -> Case:
    """Return the forward case of a name in :data:`CASES`."""
    size, *kinds = name.split()
    dtype = next((kind for kind in kinds if "float" in kind), "float32")
    return Case(tuple(map(int, size.split("x"))), dtype, "nhwc" if "channels-last" in kinds else "nchw")


def measure_rows(arguments: argparse.Namespace, threads: int) -> dict[str, Row]:
    """Measure the row of each case, backend and peer in this process; raise ``AssertionError`` for a wrong result."""
    gpu_bn.set_num_threads(threads)
    torch.set_num_threads(threads)
    timer, rows = CpuTimer(batch=0.01), {}
    peers = PEERS if arguments.compile else ["torch"]
    columns = [column for column in COLUMNS if arguments.operation in column]
    for name in CASES:
        if not any(part in name for part in arguments.only.split(",")):
            continue
        case = case_of(name)
        tensors = Tensors(case)
        for peer, backend in product(peers, arguments.backend.split(",")):
            if backend == "numpy" and (case.dtype == "bfloat16" or peer != "torch"):
                continue  # NumPy has no such type; a second peer is for the backend that serves by default
            row, pair = {}, [BACKENDS[backend], PEERS[peer]]
            for column in columns:
                operation = replace(case, operation=OPERATIONS[COLUMNS[column]])
                results = measure(operation, tensors, pair, timer, arguments.seconds / 2)
                for result in results:
                    why_not = result.refused or result.not_served
                    assert not why_not, f"{result.case} by {result.by}: {why_not}"
                ours, theirs = (1e6 * result.timings["wall"].median for result in results)
                row[column] = results[0].ratios["wall"][peer], ours, theirs
            rows[f"{name}, {backend} / {peer}"] = row
        print(".", end="", flush=True, file=sys.stderr)
    return rows


def measure_in_process(arguments: argparse.Namespace, threads: int) -> dict[str, Row]:
    """Measure the rows in a new process with a number of threads, each of which stays on a core."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close" if threads > 1 else "false"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_rows, arguments, threads).result()


def environment() -> str:
    """Return the versions and the processor on which the numbers depend."""
    versions = f"gpu_bn {gpu_bn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {processor()}, {os.cpu_count()} cores"


def table(results: dict[str, Row]) -> str:
    """Return the rows as Markdown."""
    names = list(next(iter(results.values())))
    lines = ["| ours / theirs (µs) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, row in results.items():
        cells = (f"{ratio:.2f} ({ours:.0f} / {theirs:.0f})" for ratio, ours, theirs in row.values())
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, measured: dict[str, dict[str, Row]]) -> None:
    """Write rows by number of threads; keep other rows of the file if it was written in the same environment."""
    before = json.loads(path.read_text()) if path.exists() else {}
    results = before["results"] if before.get("environment") == environment() else {}
    for threads, rows in measured.items():
        merged = results.get(threads, {}) | rows
        order = sorted(merged, key=lambda row: CASES.index(row.partition(", ")[0]))
        results[threads] = {name: merged[name] for name in order}
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))


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
    arguments = parser.parse_args()
    results = {}
    for threads in arguments.threads.split(","):
        results[threads] = measure_in_process(arguments, int(threads))
        print(f"\n{environment()}, {threads} thread{'s' * (threads != '1')} each\n\n{table(results[threads])}")
    if arguments.json:
        write(arguments.json, results)


if __name__ == "__main__":
    main()
