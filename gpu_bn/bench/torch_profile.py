"""What torch's profiler sees of a call: the operations that launch kernels, and the memory that tensors take."""

from __future__ import annotations

import gc
import json
import tempfile
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from gpu_bn.bench.timing import TimedCall

LAUNCH_NOTHING = {
    "empty", "empty_strided", "empty_like", "new_empty", "view", "unbind", "split", "select", "slice", "as_strided",
    "detach", "alias", "to", "expand", "permute",
}  # fmt: skip
"""Operations that only make or look at tensors. A conversion that is one is seen as what it calls."""


def operations(call: TimedCall) -> Counter[str]:
    """Count torch's operations of a call that would launch a kernel, by autograd's thread too."""
    names = [event.name.removeprefix("aten::") for event in _profiled(call).events() if event.name.startswith("aten::")]
    return Counter(name for name in names if name not in LAUNCH_NOTHING)


def peak_bytes(call: TimedCall, kind: str) -> int:
    """Measure the most memory that torch's tensors take in a call, beyond what they took before it."""
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        _profiled(call, profile_memory=True).export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes), default=0)


def _profiled(call: TimedCall, **options: Any) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True, **options) as profile:
        call()
    return profile
