"""``--verify-model``: compare the plan's predictions with the clock and, where they may be read, the GPU's counters."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from gpu_bn.bench.measurement import Result
from gpu_bn.cli.console import Table, megabytes, microseconds

SLOWER, FASTER = 1.25, 0.9
"""Bounds of measured over predicted time; beyond them a prediction is refuted."""
LAUNCH_SECONDS = 3e-6
"""Time allowed for a launch, which the predicted time leaves out."""
BYTES_SHARE, BYTES_MORE = 0.1, 256 << 10
"""How far counted bytes may differ: a share, and bytes of vectors and partial sums."""
COUNTED = 12
"""How many cases have their bytes counted, each in a process of its own."""
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


class Bytes(NamedTuple):
    """Bytes that reach the memory, predicted or counted by the GPU."""

    read: int
    written: int


@dataclass(frozen=True)
class Verdict:
    """A prediction, and whether it holds.

    Attributes:
        predicted: seconds: the plan's bytes over the bandwidth of a copy.
        bytes: predicted; ``counted`` are the GPU's, ``None`` if nothing was counted.
        refuted: how the prediction fails; empty if it holds.
    """

    result: Result
    predicted: float
    bytes: Bytes
    counted: Bytes | None
    refuted: str


class CountingError(Exception):
    """Bytes cannot be counted here; the message says why."""


def verify(results: Sequence[Result], copy_bandwidth: float, l2_bytes: int) -> tuple[Table, list[Any]]:
    """Compare the predictions for results on a GPU with a cache of ``l2_bytes``.

    Returns:
        The table, and what goes into the JSON.
    """
    planned = [result for result in results if result.plan is not None and result.best is not None]
    reason, verdicts = "", []
    for index, result in enumerate(planned):
        counted = None
        if not reason and index < COUNTED:
            try:
                counted = count(result)
            except CountingError as error:
                reason = str(error)
        verdicts.append(verdict(result, copy_bandwidth, l2_bytes, counted))
    limits = f"the first {COUNTED} cases" if len(planned) > COUNTED else "all cases"
    return _table(verdicts, reason or f"DRAM bytes were counted by ncu, of {limits}."), [_json(v) for v in verdicts]


def verdict(result: Result, copy_bandwidth: float, l2_bytes: int, counted: Bytes | None) -> Verdict:
    """Judge a prediction.

    At the end of a call the cache may hold what has not been written yet: so much less may be counted.
    """
    assert result.plan is not None
    assert result.best is not None
    plan, measured = result.plan, result.best.median
    predicted = plan.dram_bytes / copy_bandwidth
    written = sum(plan.written_bytes)
    expected = Bytes(plan.dram_bytes - written, written)
    refuted = []
    if measured > SLOWER * predicted + plan.launches * LAUNCH_SECONDS:
        refuted.append(f"time: {measured / predicted:.2f} times as long")
    if measured < FASTER * predicted:
        refuted.append(f"time: {measured / predicted:.2f} times as long: fewer bytes, or faster than a copy")
    if counted is not None:
        for what, held in (("read", 0), ("written", l2_bytes)):
            found, wanted = getattr(counted, what), getattr(expected, what)
            margin = BYTES_SHARE * wanted + BYTES_MORE
            if not wanted - held - margin <= found <= wanted + margin:
                refuted.append(f"bytes: {found / max(wanted, 1):.2f} times as many {what}")
    return Verdict(result, predicted, expected, counted, "; ".join(refuted))


def count(result: Result) -> Bytes:
    """Count the bytes that a call reads from the memory and writes to it, by the profiler ncu.

    Raises:
        CountingError: ncu is missing, or may not count.
    """
    case = result.case
    arguments = ["x".join(map(str, case.shape)), case.short_dtype, case.layout, str(case.operation), result.by]
    command = ["ncu", "--profile-from-start", "off", "--cache-control", "none", "--metrics", ",".join(METRICS),
               "--csv", "--print-units", "base", sys.executable, "-m", "gpu_bn.bench.profiled", *arguments]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=600,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CountingError(f"DRAM bytes were not counted: ncu cannot be run ({type(error).__name__}).") from None
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise CountingError("DRAM bytes were not counted: the driver does not permit it (ERR_NVGPUCTRPERM).")
    rows = list(csv.DictReader(line for line in done.stdout.splitlines() if line.startswith('"')))
    values = {name: [row["Metric Value"] for row in rows if row.get("Metric Name") == name] for name in METRICS}
    try:
        found = Bytes(*(int(sum(float(value.replace(",", "")) for value in values[name])) for name in METRICS))
    except (ValueError, TypeError):  # n/a, or a row that is cut off
        values = {}
    if not all(values.get(name) for name in METRICS):
        output = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise CountingError(f"DRAM bytes were not counted: ncu counted nothing ({output[-1]})")
    return found


def _table(verdicts: Sequence[Verdict], note: str) -> Table:
    header = [
        "operation", "by", "tier", "predicted (us)", "measured (us)", "read (MB)", "counted", "written", "counted",
        "prediction",
    ]  # fmt: skip
    rows: list[list[str] | str] = []
    for tensor, group in groupby(verdicts, lambda v: v.result.case.tensor):
        rows += [tensor, *map(_row, group)]
    refuted = sum(bool(v.refuted) for v in verdicts)
    caption = (
        f"{refuted} of {len(verdicts)} predictions are refuted. Predicted: the plan's bytes over the measured "
        f"bandwidth of a copy; {LAUNCH_SECONDS * 1e6:g} us a launch are allowed, and {SLOWER:g} times as long. Bytes "
        f"may differ by {BYTES_SHARE:.0%}; what the L2 cache can hold need not have been written yet. {note}"
    )
    return Table("The model, verified", header, rows, caption, keys=2)


def _row(v: Verdict) -> list[str]:
    counted = ("-", "-") if v.counted is None else (megabytes(v.counted.read), megabytes(v.counted.written))
    return [
        f"  {v.result.case.operation}", v.result.by, v.result.tier, microseconds(v.predicted),
        microseconds(v.result.best.median) if v.result.best else "-", megabytes(v.bytes.read), counted[0],
        megabytes(v.bytes.written), counted[1], f"REFUTED, {v.refuted}" if v.refuted else "holds",
    ]  # fmt: skip


def _json(v: Verdict) -> dict[str, Any]:
    return {
        "case": str(v.result.case), "by": v.result.by, "predicted_seconds": v.predicted,
        "predicted_bytes": v.bytes._asdict(), "counted_bytes": v.counted._asdict() if v.counted else None,
        "refuted": v.refuted,
    }  # fmt: skip
