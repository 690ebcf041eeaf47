"""``--verify-model``: the plan's predictions, against the clock and, where they may be read, the GPU's own counters."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_bn._console import table
from gpu_bn._explain import _size, _time
from gpu_bn.bench.trial import Result

SLOWER, FASTER = 1.25, 0.9
"""Measured over predicted time, beyond which a prediction is refuted."""
LAUNCH_SECONDS = 3e-6
"""That a launch may take, which the model leaves out."""
BYTES_SHARE, BYTES_MORE = 0.1, 256 << 10
"""By how much the bytes that are read may differ: a share, and bytes of vectors and partial sums."""
COUNTED = 12
"""Cases whose bytes are counted, each in a process of its own."""
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")

Runner = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Verdict:
    """A prediction and what became of it.

    Attributes:
        predicted: seconds, the plan's bytes over the bandwidth of a copy.
        read_bytes: predicted; ``counted`` by the GPU, ``None`` if they were not.
        refuted: in which way; empty if it holds.
    """

    result: Result
    predicted: float
    read_bytes: int
    counted: int | None
    refuted: str


class NotPermittedError(Exception):
    """Why bytes cannot be counted here."""


def verify(results: Sequence[Result], copy_bandwidth: float, run: Runner | None = None) -> tuple[str, list[Any]]:
    """Compare; ``run`` starts a command.

    Returns:
        The table, and what JSON keeps of it.
    """
    planned = [result for result in results if result.plan is not None and result.best is not None]
    reason, verdicts = "", []
    for index, result in enumerate(planned):
        counted = None
        if not reason and index < COUNTED:
            try:
                counted = count(result, run or _run)
            except NotPermittedError as error:
                reason = str(error)
        verdicts.append(verdict(result, copy_bandwidth, counted))
    limits = f"the first {COUNTED} cases" if len(planned) > COUNTED else "all cases"
    return _table(verdicts, reason or f"DRAM bytes were counted by ncu, of {limits}."), [_json(v) for v in verdicts]


def verdict(result: Result, copy_bandwidth: float, counted: int | None) -> Verdict:
    """Whether a prediction holds."""
    assert result.plan is not None
    assert result.best is not None
    plan, measured = result.plan, result.best.median
    predicted = plan.dram_bytes / copy_bandwidth
    read = plan.dram_bytes - sum(plan.written_bytes)
    refuted = []
    if measured > SLOWER * predicted + plan.launches * LAUNCH_SECONDS:
        refuted.append(f"time: {measured / predicted:.2f} times as long")
    if measured < FASTER * predicted:
        refuted.append(f"time: {measured / predicted:.2f} times as long: fewer bytes, or faster than a copy")
    if counted is not None and abs(counted - read) > BYTES_SHARE * read + BYTES_MORE:
        refuted.append(f"bytes: {counted / max(read, 1):.2f} times as many read")
    return Verdict(result, predicted, read, counted, "; ".join(refuted))


def count(result: Result, run: Runner) -> int:
    """Bytes that a call reads from the memory, by the profiler.

    Those that it writes are not judged: what is still in the cache at the end of a kernel has not been written.

    Raises:
        NotPermittedError: ncu is not there, or may not count.
    """
    case = result.case
    probe = ["x".join(map(str, case.shape)), case.short_dtype, case.layout, str(case.operation), result.by]
    command = ["ncu", "--profile-from-start", "off", "--cache-control", "none", "--metrics", ",".join(METRICS),
               "--csv", "--print-units", "base", sys.executable, "-m", "gpu_bn.bench.probe", *probe]  # fmt: skip
    try:
        done = run(command)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotPermittedError(f"DRAM bytes were not counted: ncu cannot be run ({type(error).__name__}).") from None
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise NotPermittedError("DRAM bytes were not counted: the driver does not permit it (ERR_NVGPUCTRPERM).")
    rows = list(csv.DictReader(line for line in done.stdout.splitlines() if line.startswith('"')))
    values = [row["Metric Value"] for row in rows if row.get("Metric Name") == METRICS[0]]
    if not values:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotPermittedError(f"DRAM bytes were not counted: ncu counted nothing ({said[-1] if said else 'silence'})")
    return int(sum(float(value.replace(",", "")) for value in values))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    if not shutil.which(command[0]):
        raise FileNotFoundError(command[0])
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def _table(verdicts: Sequence[Verdict], note: str) -> str:
    header = ["case", "by", "tier", "predicted", "measured", "read, predicted", "read, counted", "prediction"]
    rows = [
        [
            str(v.result.case), v.result.by, v.result.tier, _time(v.predicted),
            _time(v.result.best.median) if v.result.best else "-", _size(v.read_bytes),
            "-" if v.counted is None else _size(v.counted), f"REFUTED, {v.refuted}" if v.refuted else "holds",
        ]
        for v in verdicts
    ]  # fmt: skip
    refuted = sum(bool(v.refuted) for v in verdicts)
    caption = (
        f"{refuted} of {len(verdicts)} predictions are refuted. Predicted: the plan's bytes over the measured "
        f"bandwidth of a copy; {LAUNCH_SECONDS * 1e6:g} us a launch are allowed, and {SLOWER:g} times as long. {note}"
    )
    return table("The model, verified", header, rows, caption)


def _json(v: Verdict) -> dict[str, Any]:
    return {
        "case": str(v.result.case), "by": v.result.by, "predicted_seconds": v.predicted,
        "predicted_read_bytes": v.read_bytes, "counted_read_bytes": v.counted, "refuted": v.refuted,
    }  # fmt: skip
