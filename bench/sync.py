"""What sharing statistics between processes costs: ``python bench/sync.py``.

Starts groups of processes on this machine that talk by gloo, and calls one layer forward and backward on each: first
:class:`gpu_bn.nn.BatchNorm`, which exchanges nothing, then :class:`gpu_bn.nn.SyncBatchNorm`. (torch's own
``SyncBatchNorm`` refuses CPUs.) Bytes and messages are what one process writes to its sockets for a step, counted by
the system (``/proc/self/io``); beside them what the module documentation promises. Times are medians over steps, and
of processes that share this machine's cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from gpu_bn import nn
from gpu_bn.cli.console import Table
from gpu_bn.nn.distributed import wire

WARM = 5


def written() -> torch.Tensor:
    """Return the bytes that this process has written so far, and the number of its writes."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return torch.tensor([int(lines["wchar"]), int(lines["syscw"])], dtype=torch.float64)


def measure(layer: torch.nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the median seconds of a step, and the mean bytes and messages that it writes."""
    dy, times = torch.randn_like(x), []
    for step in range(WARM + steps):
        if step == WARM:
            dist.barrier()
            before = written()
        start = time.perf_counter()
        torch.autograd.backward(layer(x), dy)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARM:])
    return torch.tensor([seconds, *((written() - before) / steps)], dtype=torch.float64)


def run(rank: int, world: int, shape: list[int], steps: int, folder: str) -> None:
    """Measure both layers in one process of the group; rank 0 saves the mean over the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    x = torch.randn(shape, requires_grad=True)
    results = torch.stack([measure(kind(shape[1]), x, steps) for kind in (nn.BatchNorm, nn.SyncBatchNorm)])
    dist.all_reduce(results)
    if rank == 0:
        torch.save(results / world, f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()


def row(world: int, shape: list[int], steps: int) -> list[str]:
    """Return the row of the table for a group of ``world`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (world, shape, steps, folder), world)
        (plain, *noise), (shared, *wrote) = torch.load(f"{folder}/result").tolist()
    size, messages = (total - other for total, other in zip(wrote, noise, strict=True))
    packets = wire.packet_count(2 + 2 * shape[1]) + 1 + wire.packet_count(2 * shape[1])  # one more ends the forward
    payload = (world - 1) * 8 * (wire.HEADER + wire.ROOM) * packets
    times = f"{1e3 * plain:.2f}", f"{1e3 * shared:.2f}"
    return [str(world), *times, f"{size:,.0f}", f"{payload:,.0f}", f"{messages:.1f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="sizes of the groups")
    parser.add_argument("--shape", default="8,64,28,28", help="of each process's part")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    shape = [int(size) for size in options.shape.split(",")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    header = ["processes", "plain, ms", "shared, ms", "bytes", "bytes, model", "messages"]
    title = f"A step (forward, backward) of one layer, {options.shape} float32 a process, {os.cpu_count()} cores"
    rows = [row(world, shape, options.steps) for world in options.ranks]
    caption = "Bytes and messages: written by each process, on average. Model: a ring's, of the payload alone."
    print(Table(title, header, rows, caption))


if __name__ == "__main__":
    main()
