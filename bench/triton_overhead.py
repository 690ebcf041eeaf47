"""What a call of the Triton backend costs in Python: ``python bench/triton_overhead.py``. No GPU is needed.

Counted is all that gpu_bn and autograd do in a later call of a shape: checks, registry, looking up what has been
prepared, allocating outputs, gathering arguments. Nothing is launched; tensors are on the CPU, where torch allocates
faster than on a GPU. torch's own operator, for comparison, computes 96 numbers besides. The table says how often a call
launches a kernel of ours, and how often it calls an operation of torch's that would launch one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from gpu_bn import nn, registry
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.bench.timing import CpuTimer, take_samples
from gpu_bn.plan import DEVICES

TIMER = CpuTimer(batch=0.003, pause=0, clock=time.process_time)  # also of autograd's thread
LAUNCH_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "view", "split", "slice", "select", "as_strided",
            "detach", "alias", "permute", "expand", "unbind"}  # fmt: skip
"""torch's operations that launch nothing."""


class Nothing(TritonBackend):
    """The backend, whose launches are counted and do nothing."""

    forward_at_once = TritonBackend.forward_at_once

    def __init__(self) -> None:
        super().__init__(self.count, DEVICES["h100"])
        self.launches = 0

    def count(self, *_: Any) -> None:
        self.launches += 1


def cases(layer: torch.nn.Module, dtype: torch.dtype, residual: bool) -> dict[str, Callable[[], Any]]:
    """The calls that are timed."""
    x, dy = torch.randn(2, 3, 4, 4, dtype=dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    leaf, added = x.clone().requires_grad_(), x.clone().requires_grad_()
    inputs = [leaf, *layer.parameters(), *[added] * residual]

    def forward() -> torch.Tensor:
        return layer(leaf, added) if residual else layer(leaf)  # type: ignore[no-any-return]

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return layer.eval()(x)  # type: ignore[no-any-return]

    return {
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(forward(), inputs, dy),
        "evaluation": evaluate,
    }


def operations(call: Callable[[], Any]) -> Counter[str]:
    """torch's operations of a call that would launch a kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    names = [event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")]
    return Counter(name for name in names if name not in LAUNCH_NOTHING)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21, help="pairs of timings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    nothing = Nothing()
    registry.serving = lambda *_: nothing  # type: ignore[assignment]
    print(f"torch {torch.__version__}, 2x3x4x4, microseconds a call; launches ours + torch's")
    print(f"{'':42}{'gpu_bn':>8}{'torch':>8}  launches")
    for name, ours, theirs, dtype, residual in (
        ("float32", nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3), torch.float32, False),
        ("float32, relu, residual", nn.BatchNorm2d(3, activation="relu"), None, torch.float32, True),
    ):
        peers = {} if theirs is None else cases(theirs, dtype, residual)
        for what, call in cases(ours, dtype, residual).items():
            call()
            calls = {"ours": call} | ({"theirs": peers[what]} if peers else {})
            samples = take_samples(calls, TIMER, "wall", 1, rounds=(arguments.pairs, arguments.pairs)).seconds
            mine, its = (1e6 * statistics.median(samples.get(name, [0])) for name in ("ours", "theirs"))
            nothing.launches = 0
            found = operations(call)
            others = ", ".join(f"{count} {op}" for op, count in found.items())
            print(f"{name + ', ' + what:42}{mine:8.1f}{its:8.1f}  {nothing.launches} + {found.total()} {others}")


if __name__ == "__main__":
    main()
