"""The report: tables for people, JSON for programs. What is measured and what is modelled never share a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_bn.bench.cases import NETWORKS, Shape
from gpu_bn.bench.measurement import Result
from gpu_bn.bench.model import Modelled
from gpu_bn.cli.console import Table
from gpu_bn.explanation import _size, _time
from gpu_bn.plan import TIERS

SCHEMA = 1
"""Version of the JSON's structure."""
MODEL_NOTE = (
    "A model, nothing here was measured: launches of 2.5 us, and bytes that reach the memory over 88 % of the data "
    "sheet's bandwidth. Ours by the plan, also what idle SMs and the exchange of sums cost (gpu_bn/gpu_model.py). Of "
    "the others, what their kernels read and write (gpu_bn/bench/model.py), less what of it the cache may hold."
)


@dataclass
class Report:
    """All that a run has found.

    Attributes:
        command: the command line that made it.
        machine: see :func:`gpu_bn.bench.machine.machine`.
        results: measured.
        modelled: not measured.
        left_out: peers and parts of the benchmark that are not here, and why.
        extra: by name, what further parts of the benchmark have found, ready for JSON.
        texts: their tables.
        raced: measured, of forced tiers.
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
    raced: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def with_all_threads(self) -> list[Result]:
        """The results without those of fewer threads than there are."""
        most = max((result.threads or 0 for result in self.results), default=0)
        return [result for result in self.results if (result.threads or 0) == most]

    @property
    def wrong(self) -> list[Result]:
        """Results of ours that were refused."""
        return [result for result in [*self.results, *self.raced] if result.ours and result.refused]

    def write(self, path: Path) -> None:
        """As JSON."""
        found = {
            "schema": SCHEMA, "command": self.command, "machine": self.machine,
            "measured": [result.as_json() for result in self.results],
            "model": [row.as_json() for row in self.modelled], "left_out": self.left_out,
            "failed": self.failed, "warnings": self.warnings,
            "raced": [result.as_json() for result in self.raced], **self.extra,
        }  # fmt: skip
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        part.replace(path)  # an earlier report is lost only to a whole one


def measured_table(results: Sequence[Result], copy_bandwidth: float) -> list[Table]:
    """Ours, a line each, with the ratio to each peer: one table, or none."""
    ours = [result for result in results if result.ours and result.timings]
    if not ours:
        return []
    regimes = list(ours[0].timings)
    columns = _Columns(
        results, regimes, list(dict.fromkeys(p for r in ours for p in r.ratios[regimes[0]])), copy_bandwidth
    )
    rows: list[list[str] | str] = []
    for tensor, group in groupby(ours, lambda result: result.case.tensor):
        rows += [tensor, *map(columns.row, group)]
    caption = (
        f"Times are medians{_regimes_explained(regimes)}. IQR is the interquartile range of {regimes[0]}, as are GB/s "
        f"(bytes if every tensor is read and written once), the share of a copy ({three(copy_bandwidth / 1e9)} GB/s, "
        "measured, of a tensor beyond the caches: what stays in a cache may have more than 100 %), the peers' times, "
        "and the ratios beside them: the median of our time over the peer's in samples taken one after the other, "
        f"below 1 ours is the faster. {SLOWER_MARK} marks what is slower with more threads than with one."
    )
    if ours[0].timings[regimes[0]].samples == 1:
        caption = f"One sample of each, which is no measurement. {caption}"
    return [Table("Measured", columns.header, rows, caption, keys=3 if columns.threads else 2)]


class _Columns:
    """The cells of a line of ours: its own times, each peer's time and the ratio to it, all in one unit."""

    def __init__(
        self, results: Sequence[Result], regimes: list[str], peers: list[str], copy_bandwidth: float
    ) -> None:  # fmt: skip
        self.regimes, self.peers, self.copy_bandwidth = regimes, peers, copy_bandwidth
        self.on_gpu = any(result.plan is not None for result in results)
        self.threads = any(result.threads is not None for result in results)
        self.timings = {(str(r.case), r.by, r.threads): r.best for r in results if r.timings}
        self.slower = slower(results)
        longest = max(timing.median for timing in self.timings.values() if timing)
        self.unit, self.factor = ("ms", 1e3) if longest >= 1e-3 else ("us", 1e6)

    @property
    def header(self) -> list[str]:
        facts = ["tier", "registers", "moved / floor"] if self.on_gpu else []
        peers = [name for peer in self.peers for name in (f"{peer} ({self.unit})", "ratio")]
        times = [f"{regime} ({self.unit})" for regime in self.regimes]
        return [
            "operation",
            "by",
            *(["threads"] if self.threads else []),
            *facts,
            *times,
            "IQR",
            "GB/s",
            "of copy",
            *peers,
        ]

    def row(self, result: Result) -> list[str]:
        first, bandwidth = result.timings[self.regimes[0]], result.bandwidth or 0.0
        facts = []
        if self.on_gpu:
            moved = "-" if result.plan is None else f"{result.plan.dram_bytes / result.floor_bytes:.2f}"
            facts = [result.tier, "-" if result.registers is None else str(result.registers), moved]
        times = [self.time(result.timings[r].median) if r in result.timings else "-" for r in self.regimes]
        times[0] += self.mark(result, result.by)
        return [
            f"  {result.case.operation}",
            result.by,
            *([str(result.threads or "-")] if self.threads else []),
            *facts,
            *times,
            self.time(first.high - first.low) if first.samples > 1 else "-",
            three(bandwidth / 1e9),
            f"{bandwidth / self.copy_bandwidth:.0%}",
            *(cell for peer in self.peers for cell in self.beside(result, peer)),
        ]

    def beside(self, result: Result, peer: str) -> tuple[str, str]:
        """A peer's time, and our time over it."""
        timing = self.timings.get((str(result.case), peer, result.threads))
        ratio = result.ratios[self.regimes[0]].get(peer)
        if timing is None or ratio is None:
            return "-", "-"
        return self.time(timing.median) + self.mark(result, peer), "<0.01" if ratio < 0.01 else three(ratio)

    def mark(self, result: Result, by: str) -> str:
        return SLOWER_MARK if (str(result.case), by, result.threads) in self.slower else ""

    def time(self, seconds: float) -> str:
        return three(self.factor * seconds)


def three(number: float) -> str:
    """Three digits, and as many more as a whole number has."""
    digits = 3 - math.ceil(math.log10(number) + 1e-9) if number > 0 else 0
    return f"{number:.{min(max(digits, 0), 9)}f}"


SLOWER, SLOWER_MARK = 1.5, "!"
"""So many times the time of one thread, with more of them, is no measurement of the implementation."""


def slower(results: Sequence[Result]) -> dict[tuple[str, str, int | None], float]:
    """What takes longer with more threads than with one: by case, name and threads, how many times as long."""
    alone = {(str(r.case), r.by): r.best.median for r in results if r.threads == 1 and r.best}
    found = {}
    for r in results:
        one = alone.get((str(r.case), r.by))
        if r.best and one and (r.threads or 1) > 1 and r.best.median > SLOWER * one:
            found[str(r.case), r.by, r.threads] = r.best.median / one
    return found


def slower_with_threads(results: Sequence[Result]) -> list[str]:
    """A line for each implementation that more threads have slowed down."""
    found, lines = slower(results), []
    for by in dict.fromkeys(by for _, by, _ in found):
        mine = {case: factor for (case, name, _), factor in found.items() if name == by}
        worst = max(mine, key=lambda case: mine[case])
        lines.append(
            f"UNSTEADY: {by} takes up to {three(mine[worst])} times as long with more threads as with one "
            f"({worst}; {len(mine)} such cases): its threads wait for a core. Compare the lines of one thread."
        )
    return lines


def _regimes_explained(regimes: Sequence[str]) -> str:
    if "cold" not in regimes:
        return ""
    return ": cold and hot of the device, with the L2 cache emptied before a call or not, wall of CPU and device"


def refusals(results: Iterable[Result]) -> str:
    """A line for each of our results that is wrong or failed; one for all that a peer was refused for the same reason,
    or that we do not serve, or whose launches are not known.
    """
    lines, alike = [], dict[tuple[str, str, str], list[Result]]()
    for r in results:
        if r.refused and r.ours:
            lines.append(f"NOT TIMED {r.case} by {r.by}: {r.refused}")
        elif r.refused or (r.ours and r.not_served):
            alike.setdefault(("NOT TIMED", r.by, r.refused or r.not_served), []).append(r)
        elif r.unseen:
            alike.setdefault(("NOT SEEN what is launched for", r.by, r.unseen), []).append(r)
    for (what, by, why), found in alike.items():
        others = f" and {len(found) - 1} more" if found[1:] else ""
        lines.append(f"{what} {found[0].case}{others} by {by}: {why}")
    return "\n".join(lines)


def layers_table(results: Sequence[Result]) -> list[Table]:
    """Times of all layers of a network together, of the networks of which every shape was timed: a table, or none."""
    seconds: dict[tuple[str, str, str, str], dict[Shape, float]] = {}
    for result in results:
        if result.best is not None:
            case = result.case
            kind = (str(case.operation), case.short_dtype, case.layout, result.by)
            seconds.setdefault(kind, {})[case.shape] = result.best.median
    rows = []
    for network, layers in NETWORKS.items():
        number = sum(layer.layers for layer in layers)
        for (operation, dtype, layout, by), times in seconds.items():
            if number > len(layers) and all(layer.shape in times for layer in layers):
                total = sum(layer.layers * times[layer.shape] for layer in layers)
                rows.append([network, str(number), f"{dtype} {layout} {operation}", by, _time(total)])
    header = ["network", "layers", "operation", "by", "all layers"]
    return [Table("All layers of a network together", header, rows, "Sums of medians.", keys=4)] if rows else []


def model_tables(modelled: Sequence[Modelled]) -> list[Table]:
    """Times on each device, and bytes by tier on one of them."""
    if not modelled:
        return []
    devices = list(dict.fromkeys(row.device.name for row in modelled))
    rows: list[list[str] | str] = []
    for _, group in groupby(modelled, lambda row: str(row.case)):
        on = {row.device.name: row for row in group}
        first = next(iter(on.values()))
        if first.case.tensor not in rows:
            rows.append(first.case.tensor)
        name = f"  {first.case.operation}"
        rows.append([name, "gpu_bn", *(f"{_time(on[d].plan.seconds)} {on[d].tier}" for d in devices)])
        for other in ("torch", "cudnn"):
            if getattr(first, f"{other}_bytes") is not None:
                times = [_time(getattr(on[device], f"{other}_seconds")) for device in devices]
                rows.append([name, {"torch": "PyTorch native", "cudnn": "cuDNN"}[other], *times])
    title, header = "Model: times on GPUs that are not here", ["operation", "by", *devices]
    shown = [row for row in modelled if row.device.name == devices[min(3, len(devices) - 1)]]
    trained = [row for row in shown if row.case.operation.training]
    return [Table(title, header, rows, MODEL_NOTE, keys=2), *([tiers_table(trained)] if trained else [])]


def tiers_table(rows: Sequence[Modelled]) -> Table:
    """Bytes by tier on one device, as multiples of the floor."""
    header = ["case", "floor", *TIERS, "PyTorch native", "cuDNN"]
    lines = []
    for row in rows:
        cells = [f"{row.tiers[tier] / row.floor_bytes:.2f}{'*' * (tier == row.tier)}" if tier in row.tiers else "-"
                 for tier in TIERS]  # fmt: skip
        others = [
            "-" if moved is None else f"{moved / row.floor_bytes:.2f}" for moved in (row.torch_bytes, row.cudnn_bytes)
        ]
        lines.append([str(row.case), _size(row.floor_bytes), *cells, *others])
    caption = (
        "As multiples of the floor (every tensor read and written once). By tier, what reaches the memory by the plan; "
        "* is chosen. Of the others, what their kernels ask for, whether or not the cache has it."
    )
    return Table(f"Model: bytes by tier on {rows[0].device.name}", header, lines, caption)
