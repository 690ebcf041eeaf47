"""The report: tables for people, JSON for programs. What is measured and what is modelled never share a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_bn.bench.cases import NETWORKS, Shape
from gpu_bn.bench.measurement import Result
from gpu_bn.bench.model import Modelled
from gpu_bn.cli.console import Table, megabytes, microseconds, milliseconds, three_digits
from gpu_bn.plan import TIERS

SCHEMA = 1
"""The version of the JSON's structure."""
MODEL_NOTE = (
    "A model, nothing here was measured: launches of 2.5 us, and bytes that reach the memory over 88 % of the data "
    "sheet's bandwidth. Ours by the plan, also what idle SMs and the exchange of sums cost (gpu_bn/gpu_model.py). Of "
    "the others, what their kernels read and write (gpu_bn/bench/model.py), less what of it the cache may hold."
)
SLOWER, SLOWER_MARK = 1.5, "!"
"""A time with several threads is marked if it is so many times that with one: it measures threads that wait."""


@dataclass
class Report:
    """All that a run of a command line has found on a machine (:func:`gpu_bn.bench.machine.machine`).

    Attributes:
        left_out: peers and parts of the benchmark that did not run here, and why.
        extra, texts: what further parts of the benchmark have found, by name, for JSON; and their tables.
        forced: the results measured with forced tiers.
        failed: what else is wrong with ours, or ended the run.
        warnings: why times should not be trusted.
    """

    command: str
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    modelled: list[Modelled] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    texts: list[Table | str] = field(default_factory=list)
    forced: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def summed_up(self) -> list[Result]:
        """The results of one number of threads, for pictures and sums."""
        return [result for result in self.results if (result.threads or 0) == self.threads]

    @property
    def threads(self) -> int:
        """The most threads of a result, or 1 if more have slowed something down; 0 if nobody chose their number."""
        return 1 if slower(self.results) else max((result.threads or 0 for result in self.results), default=0)

    @property
    def wrong(self) -> list[Result]:
        """Results of ours that were refused."""
        return [result for result in [*self.results, *self.forced] if result.ours and result.refused]

    def measured_texts(self) -> list[Table | str]:
        """Return the tables of what was measured, and what was not timed."""
        return [
            *measured_table(self.results, self.machine["copy_bandwidth"]),
            *layers_table(self.summed_up),
            refusals([*self.results, *self.forced]),
            *self.texts,
        ]

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        found = {
            "schema": SCHEMA, "command": self.command, "machine": self.machine,
            "measured": [result.as_json() for result in self.results],
            "model": [row.as_json() for row in self.modelled], "left_out": self.left_out,
            "failed": self.failed, "warnings": self.warnings,
            "raced": [result.as_json() for result in self.forced], **self.extra,
        }  # fmt: skip
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        part.replace(path)  # only a whole report takes the place of an earlier one


# ----------------------------------------------------------------------------------------------------- measured
def measured_table(results: Sequence[Result], copy_bandwidth: float) -> list[Table]:
    """Return the table of our times and of the ratios to each peer, a line a result; nothing if none was timed."""
    ours = [result for result in results if result.ours and result.timings]
    if not ours:
        return []
    lines = _Lines(results, ours, copy_bandwidth)
    rows: list[list[str] | str] = []
    for tensor, group in groupby(ours, lambda result: result.case.tensor):
        rows += [tensor, *([cell for _, cell in lines.columns(result)] for result in group)]
    header = [name for name, _ in lines.columns(ours[0])]
    return [Table("Measured", header, rows, lines.caption(), keys=3 if lines.threads else 2)]


class _Lines:
    """Makes the lines of the table: our times, each peer's time and the ratio to it, all in one unit."""

    def __init__(self, results: Sequence[Result], ours: Sequence[Result], copy_bandwidth: float) -> None:
        self.first, self.copy_bandwidth = ours[0], copy_bandwidth
        self.regime, self.regimes = ours[0].regime, list(ours[0].timings)
        self.peers = list(dict.fromkeys(peer for result in ours for peer in result.ratios[self.regime]))
        self.on_gpu = any(result.plan is not None for result in results)
        self.threads = any(result.threads is not None for result in results)
        self.medians = {(str(r.case), r.by, r.threads): r.best.median for r in results if r.best}
        self.slower = slower(results)
        self.unit, self.factor = ("ms", 1e3) if max(self.medians.values()) >= 1e-3 else ("us", 1e6)

    def columns(self, result: Result) -> Iterator[tuple[str, str]]:
        """Yield the name and the cell of each column."""
        yield "operation", f"  {result.case.operation}"
        yield "by", result.by
        if self.threads:
            yield "threads", str(result.threads or "-")
        if self.on_gpu:
            yield "tier", result.tier
            yield "registers", "-" if result.registers is None else str(result.registers)
            yield "moved / floor", f"{result.plan.dram_bytes / result.floor_bytes:.2f}" if result.plan else "-"
        for regime in self.regimes:
            mark = self._mark(result, result.by) if regime == self.regime else ""
            timing = result.timings.get(regime)
            yield f"{regime} ({self.unit})", self._time(timing.median) + mark if timing else "-"
        spread = result.timings[self.regime].spread
        yield "IQR", "-" if spread is None else self._time(spread)
        yield "GB/s", three_digits(result.bandwidth / 1e9)
        yield "of copy", f"{result.bandwidth / self.copy_bandwidth:.0%}"
        for peer in self.peers:
            median = self.medians.get((str(result.case), peer, result.threads))
            ratio = result.ratios[self.regime].get(peer)
            if median is None or ratio is None:
                yield from ((f"{peer} ({self.unit})", "-"), ("ratio", "-"))
                continue
            yield f"{peer} ({self.unit})", self._time(median) + self._mark(result, peer)
            yield "ratio", "<0.01" if ratio < 0.01 else three_digits(ratio)

    def caption(self) -> str:
        """Return what the columns mean."""
        regimes = ""
        if "cold" in self.regimes:
            regimes = (
                ": cold and hot of the device, with the L2 cache emptied before a call or not; wall of CPU and device"
            )
        once = "One sample of each, which is no measurement. " * (self.first.timings[self.regime].samples == 1)
        return (
            f"{once}Times are medians{regimes}. The other columns belong to {self.regime}. IQR: the interquartile "
            "range. GB/s: the tensors' bytes, each read and written once, over the time. Of copy: the share of a "
            f"copy's bandwidth ({three_digits(self.copy_bandwidth / 1e9)} GB/s, measured on a tensor larger than the "
            "caches; a tensor that stays in a cache may reach more than 100 %). Ratio: the median of our time over the "
            "peer's, in samples taken one after the other; below 1 ours is faster. "
            f"{SLOWER_MARK} marks what is slower with more threads than with one."
        )

    def _mark(self, result: Result, by: str) -> str:
        return SLOWER_MARK if (str(result.case), by, result.threads) in self.slower else ""

    def _time(self, seconds: float) -> str:
        return three_digits(self.factor * seconds)


def slower(results: Sequence[Result]) -> dict[tuple[str, str, int | None], float]:
    """Find what takes longer with more threads than with one: by case, name and threads, how many times as long."""
    alone = {(str(r.case), r.by): r.best.median for r in results if r.threads == 1 and r.best}
    found = {}
    for r in results:
        one = alone.get((str(r.case), r.by))
        if r.best and one and (r.threads or 1) > 1 and r.best.median > SLOWER * one:
            found[str(r.case), r.by, r.threads] = r.best.median / one
    return found


def slower_with_threads(results: Sequence[Result]) -> list[str]:
    """Return a warning for each implementation that more threads have slowed down."""
    found, lines = slower(results), []
    for by in dict.fromkeys(by for _, by, _ in found):
        factors = {case: factor for (case, name, _), factor in found.items() if name == by}
        worst = max(factors, key=lambda case: factors[case])
        lines.append(
            f"UNSTEADY: {by} takes up to {three_digits(factors[worst])} times as long with more threads as with one "
            f"({worst}; {len(factors)} such case{'s' * (len(factors) > 1)}): its threads wait for a core. Compare the "
            "lines of one thread."
        )
    return lines


def refusals(results: Iterable[Result]) -> str:
    """Return a line for each result of ours that is wrong or failed, and one for all others with the same reason:
    what a peer was refused for, and what we do not serve.
    """
    lines, alike = [], dict[tuple[str, str], list[Result]]()
    for r in results:
        if r.refused and r.ours:
            lines.append(f"NOT TIMED {r.case} by {r.by}: {r.refused}")
        elif r.refused or (r.ours and r.not_served):
            alike.setdefault((r.by, r.refused or r.not_served), []).append(r)
    for (by, why), found in alike.items():
        others = f" and {len(found) - 1} more" if found[1:] else ""
        lines.append(f"NOT TIMED {found[0].case}{others} by {by}: {why}")
    return "\n".join(lines)


def layers_table(results: Sequence[Result]) -> list[Table]:
    """Return the table of all layers of a network together, for networks whose every shape was timed; or nothing."""
    medians: dict[tuple[str, str], dict[Shape, float]] = {}
    for result in results:
        if result.best is not None:
            medians.setdefault((result.case.kind, result.by), {})[result.case.shape] = result.best.median
    rows = []
    for network, layers in NETWORKS.items():
        number = sum(layer.layers for layer in layers)
        for (kind, by), times in medians.items():
            if number > len(layers) and all(layer.shape in times for layer in layers):
                total = sum(layer.layers * times[layer.shape] for layer in layers)
                rows.append([network, str(number), kind, by, milliseconds(total)])
    header = ["network", "layers", "operation", "by", "all layers (ms)"]
    return [Table("All layers of a network together", header, rows, "Sums of medians.", keys=4)] if rows else []


# ----------------------------------------------------------------------------------------------------- modelled
def model_tables(rows: Sequence[Modelled]) -> list[Table]:
    """Return the table of times on each device, and that of bytes by tier on one of them."""
    if not rows:
        return []
    devices = list(dict.fromkeys(row.device.name for row in rows))
    lines: list[list[str] | str] = []
    for tensor, of_tensor in groupby(rows, lambda row: row.case.tensor):
        lines.append(tensor)
        for operation, group in groupby(of_tensor, lambda row: row.case.operation):
            on = {row.device.name: row for row in group}
            every = [on[device] for device in devices]
            name = f"  {operation}"
            lines.append([name, "gpu_bn", *(f"{microseconds(row.plan.seconds)} {row.tier}" for row in every)])
            others = {
                "PyTorch native": [row.torch_seconds for row in every],
                "cuDNN": [row.cudnn_seconds for row in every],
            }
            for by, seconds in others.items():
                if times := [microseconds(one) for one in seconds if one is not None]:
                    lines.append([name, by, *times])
    header = ["operation", "by", *(f"{device} (us)" for device in devices)]
    table = Table("Model: times on GPUs that are not here", header, lines, MODEL_NOTE, keys=2)
    shown = devices[min(3, len(devices) - 1)]
    trained = [row for row in rows if row.device.name == shown and row.case.operation.training]
    return [table, *([_tiers_table(trained)] if trained else [])]


def _tiers_table(rows: Sequence[Modelled]) -> Table:
    lines = []
    for row in rows:
        chosen = {tier: "*" if tier == row.tier else "" for tier in TIERS}
        tiers = [_multiple(row.tiers.get(tier), row.floor_bytes) + chosen[tier] for tier in TIERS]
        others = [_multiple(moved, row.floor_bytes) for moved in (row.torch_bytes, row.cudnn_bytes)]
        lines.append([str(row.case), megabytes(row.floor_bytes), *tiers, *others])
    caption = (
        "As multiples of the floor (every tensor read and written once). By tier, what reaches the memory by the plan; "
        "* is chosen. Of the others, what their kernels ask for, whether or not the cache has it."
    )
    header = ["case", "floor (MB)", *TIERS, "PyTorch native", "cuDNN"]
    return Table(f"Model: bytes by tier on {rows[0].device.name}", header, lines, caption)


def _multiple(moved: int | None, floor: int) -> str:
    return "-" if moved is None else f"{moved / floor:.2f}"
