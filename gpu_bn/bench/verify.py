"""``--verify-model``: compare the plan's predictions with measured times and, if permitted, with the GPU's counters.

``python -m gpu_bn.bench.verify SHAPE DTYPE LAYOUT OPERATION IMPLEMENTATION`` makes a call for the profiler ncu.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Sequence

from gpu_bn.bench import timing
from gpu_bn.bench.cases import rows_by_tensor, select
from gpu_bn.bench.implementations import by_name
from gpu_bn.bench.measurement import Result, Tensors
from gpu_bn.cli.console import Table, megabytes, microseconds

SLOWER, FASTER = 1.25, 0.9
"""The bounds of measured over predicted time, beyond which a prediction is refuted."""
LAUNCH_SECONDS = 3e-6
"""The seconds allowed for each launch, which the predicted time leaves out."""
BYTES_SHARE, BYTES_MORE = 0.1, 256 << 10
"""The difference allowed to counted bytes: a share of the prediction, and bytes for vectors and partial results."""
COUNTED = 12
"""The number of cases whose bytes are counted, each in a new process."""
METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
Bytes = dict[str, int]
"""Bytes ``read`` from the memory and ``written`` to it."""


class Verdict:
    """A prediction, the plan's bytes over the bandwidth of a copy, and whether it holds; the fields go into the report.

    ``counted_bytes`` is ``None`` if nothing was counted. ``refuted`` says how the prediction fails; empty if it holds.
    """

    def __init__(self, result: Result, copy_bandwidth: float, l2_bytes: int, counted: Bytes | None) -> None:
        plan, measured = result.plan, result.median
        assert plan is not None
        assert measured is not None
        self.case, self.by, self.tier, self.measured_seconds = result.case, result.by, result.tier, measured
        self.predicted_seconds = plan.dram_bytes / copy_bandwidth
        written = sum(plan.written_bytes)
        self.predicted_bytes = {"read": plan.dram_bytes - written, "written": written}
        self.counted_bytes = counted
        times, failures = measured / self.predicted_seconds, []
        if measured > SLOWER * self.predicted_seconds + plan.launches * LAUNCH_SECONDS:
            failures.append(f"time: {times:.2f} times as long")
        if times < FASTER:
            failures.append(f"time: {times:.2f} times as long: fewer bytes, or faster than a copy")
        for direction, count in (counted or {}).items():
            # at the end of a call, the cache may hold bytes that are not written to the memory yet
            predicted, held = self.predicted_bytes[direction], l2_bytes if direction == "written" else 0
            margin = BYTES_SHARE * predicted + BYTES_MORE
            if not predicted - held - margin <= count <= predicted + margin:
                failures.append(f"bytes: {count / max(predicted, 1):.2f} times as many {direction}")
        self.refuted = "; ".join(failures)


def verify(results: Sequence[Result], copy_bandwidth: float, l2_bytes: int) -> tuple[list[Table | str], list[Verdict]]:
    """Compare predictions with results of a GPU with a cache of ``l2_bytes``; return the table and the JSON."""
    planned = [result for result in results if result.plan and result.median]
    reason, verdicts = "", []
    for index, result in enumerate(planned):
        counted = None if reason or index >= COUNTED else count_bytes(result)
        if isinstance(counted, str):
            reason, counted = f"DRAM bytes were not counted: {counted}", None
        verdicts.append(Verdict(result, copy_bandwidth, l2_bytes, counted))
    limits = f"the first {COUNTED} cases" if len(planned) > COUNTED else "all cases"
    note = reason or f"DRAM bytes were counted by ncu, of {limits}."
    return [verdicts_table(verdicts, note)], verdicts


def count_bytes(result: Result) -> Bytes | str:
    """Count the bytes that a call reads from and writes to the memory, with the profiler ncu; or return why not."""
    case = result.case
    arguments = ["x".join(map(str, case.shape)), case.short_dtype, case.layout, str(case.operation), result.by]
    command = ["ncu", "--profile-from-start", "off", "--cache-control", "none", "--metrics", ",".join(METRICS.values()),
               "--csv", "--print-units", "base", sys.executable, "-m", "gpu_bn.bench.verify", *arguments]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=600,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ncu cannot be run ({type(error).__name__})."
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        return "the driver does not permit it (ERR_NVGPUCTRPERM)."
    rows, counted = list(csv.DictReader(line for line in done.stdout.splitlines() if line.startswith('"'))), {}
    try:
        for direction, metric in METRICS.items():
            values = [float(row["Metric Value"].replace(",", "")) for row in rows if row.get("Metric Name") == metric]
            counted[direction] = int(sum(values) if values else math.nan)
        return counted
    except (ValueError, AttributeError):  # n/a, no values, or a row that is cut off
        output = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        return f"ncu counted nothing ({output[-1]})"


def verdicts_table(verdicts: Sequence[Verdict], note: str) -> Table:
    """Return the table of predictions; ``note`` says which bytes were counted."""

    def cells(row: Verdict) -> list[str]:
        times = microseconds(row.predicted_seconds), microseconds(row.measured_seconds)
        counts = row.predicted_bytes, row.counted_bytes or {}
        moved = [megabytes(each.get(direction)) for direction in METRICS for each in counts]
        result = f"REFUTED, {row.refuted}" if row.refuted else "holds"
        return [f"  {row.case.operation}", row.by, row.tier, *times, *moved, result]

    header = [
        "operation", "by", "tier", "predicted (us)", "measured (us)", "read (MB)", "counted", "written", "counted",
        "prediction",
    ]  # fmt: skip
    refuted = sum(bool(row.refuted) for row in verdicts)
    caption = (
        f"{refuted} of {len(verdicts)} predictions are refuted. Predicted: the plan's bytes over the measured "
        f"bandwidth of a copy; {LAUNCH_SECONDS * 1e6:g} us a launch are allowed, and {SLOWER:g} times as long. Bytes "
        f"may differ by {BYTES_SHARE:.0%}; what the L2 cache can hold need not have been written yet. {note}"
    )
    return Table("The model, verified", header, rows_by_tensor(verdicts, cells), caption, keys=2)


def main(arguments: list[str]) -> None:
    """Make a call twice to warm up, flush the cache, and make the call once more under the profiler."""
    shape, dtype, layout, operation, by = arguments
    (case,) = select([shape], [dtype], ["nchw" if layout == "nc" else layout], [operation])
    gpu, why_not = timing.find_gpu()
    if gpu is None:
        raise SystemExit(why_not)
    implementation = by_name(by)
    call = implementation.build(case.operation, Tensors(case).problem(implementation.adapter, case.operation))
    start, stop = gpu.profiler()
    call(), call()
    gpu.flush()
    gpu.synchronize()
    start()
    call()
    gpu.synchronize()
    stop()


if __name__ == "__main__":
    main(sys.argv[1:])
