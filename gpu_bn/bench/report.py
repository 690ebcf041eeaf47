"""Write the report: tables, JSON and a page. A table has either measured or modelled numbers, never both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_bn.bench.cases import NETWORKS, Case, Operation, Shape, rows_by_tensor
from gpu_bn.bench.machine import clocks, device_and_packages
from gpu_bn.bench.measurement import Result
from gpu_bn.bench.model import Modelled, model_tables, traffic_table
from gpu_bn.cli.console import Table, milliseconds, terminal_width, three_digits

SCHEMA = 1
"""The version of the JSON's structure."""
SLOWER, SLOWER_MARK = 1.5, "!"
"""A time with several threads is marked if it exceeds the time with one by this factor: the threads wait for a core."""
PAGE_HEADER = (
    "Generated; do not edit. Every result was compared with a float64 oracle before it was timed. What was measured "
    "and what is a model stand in tables of their own."
)


@dataclass
class Report:
    """The results of a command on a machine, which :func:`gpu_bn.bench.machine.machine` describes.

    Attributes:
        left_out: peers and parts of the benchmark that did not run, and why.
        extra: the results of further parts for JSON, by name.
        texts: the tables of further parts.
        forced: the results with forced tiers.
        failed: failures of ours outside the results, and what ended the run.
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
    def threads(self) -> int:
        """The threads of the results that are shown: the most, or 1 if more slow a call down; 0 if nobody set them."""
        return 1 if slowdowns(self.results) else max((result.threads or 0 for result in self.results), default=0)

    @property
    def drawn(self) -> list[Result]:
        """The results with that number of threads, for pictures and sums."""
        return [result for result in self.results if (result.threads or 0) == self.threads]

    @property
    def caption(self) -> str:
        """The caption of the pictures: the device, the threads of a CPU, the version and the date."""
        facts = self.machine
        threads = self.threads or facts["threads"]["numpy backend"]
        cpu = f"{facts['processor']}, {threads} thread{'s' * (threads > 1)}"
        return f"{facts['gpu']['name'] if facts['gpu'] else cpu}, gpu_bn {facts['gpu_bn']}, {facts['date']}"

    def measured_texts(self) -> list[Table | str]:
        """Return the measured tables, and the list of calls that were not timed, which may be empty."""
        tables = measured_table(self.results, self.machine["copy_bandwidth"]) + layers_table(self.drawn)
        return [*tables, refusals([*self.results, *self.forced]), *self.texts]

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        content = {
            "schema": SCHEMA, "command": self.command, "machine": self.machine,
            "measured": [result.as_json() for result in self.results], "model": self.modelled,
            "left_out": self.left_out, "failed": self.failed, "warnings": self.warnings,
            "raced": [result.as_json() for result in self.forced], **self.extra,
        }  # fmt: skip
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1, allow_nan=False, default=as_json) + "\n")
        part.replace(path)  # only a complete report replaces an earlier one

    def show(self) -> None:
        """Print the report."""
        facts, width = self.machine, terminal_width()
        device, packages = device_and_packages(facts)
        print(f"gpu_bn {facts['gpu_bn']} ({facts['commit'] or 'no checkout'}), {device}\n{packages}")
        if facts["gpu"]:
            print(clocks(facts["gpu"]))
        notes = [*self.left_out, *self.warnings, *(f"FAILED {failure}" for failure in self.failed)]
        print(*notes, sep="\n", end="\n\n" if notes else "\n")
        for text in filter(None, [*self.measured_texts(), *model_tables(self.modelled)]):
            print(text.text(width) if isinstance(text, Table) else text)

    def page(self) -> str:
        """Return the report as Markdown, with its command."""
        facts, measured = self.machine, code_blocks(self.measured_texts())
        device, packages = device_and_packages(facts)
        threads = ", ".join(f"{name} {count}" for name, count in facts["threads"].items())
        parts = [
            f"# Benchmark results\n\n```sh\n{self.command}\n```\n\n{PAGE_HEADER}",
            f"{facts['date']}, {device}, {facts['system']}, Python {facts['python']}, gpu_bn {facts['gpu_bn']} "
            f"(commit {facts['commit'] or 'unknown'}), {packages}; threads: {threads}. "
            f"Load average before the start: {facts['load']}." + (f" {clocks(facts['gpu'])}." if facts["gpu"] else ""),
            *self.left_out,
            *self.warnings,
        ]
        if measured:
            parts += [f"## Measured on the {'GPU' if facts['gpu'] else 'CPU'}", measured]
        if not facts["gpu"]:
            parts.append("No GPU table: nobody has run this command on one yet.")
        if self.modelled:
            model = f"<!-- model -->\n{model_page(self.modelled)}\n<!-- /model -->"
            parts.append(f"## Modelled: GPUs that are not here\n\n{model}")
        return "\n\n".join(parts) + "\n"


def as_json(value: Any) -> Any:
    """Return a value that JSON can hold: the name of a case or an operation, the fields of any other object."""
    return str(value) if isinstance(value, Case | Operation) else vars(value)


def model_page(rows: Sequence[Modelled]) -> str:
    """Return the part of a page with the model; ``tests/pages.py`` renews it when the model has changed."""
    return code_blocks([*model_tables(rows), traffic_table()])


def code_blocks(texts: Iterable[Table | str]) -> str:
    """Return the texts that are not empty as code blocks of Markdown."""
    return "\n\n".join(f"```text\n{str(text).rstrip()}\n```" for text in texts if text)


# ----------------------------------------------------------------------------------------------------- measured
def measured_table(results: Sequence[Result], copy_bandwidth: float) -> list[Table]:
    """Return a table with our times and the ratios to each peer, a row for each result; no table if none was timed."""
    ours = [result for result in results if result.ours and result.timings]
    if not ours:
        return []
    on_gpu = any(result.plan is not None for result in results)
    threads = any(result.threads is not None for result in results)
    regime, *regimes = ours[0].timings
    peers = dict.fromkeys(peer for result in ours for peer in result.ratios[regime])
    medians = {(r.case, r.by, r.threads): r.median for r in results if r.median}
    unit, factor = ("ms", 1e3) if max(medians.values()) >= 1e-3 else ("us", 1e6)
    slow = slowdowns(results)

    def time_of(result: Result, by: str) -> str:
        key = (result.case, by, result.threads)
        return three_digits(medians[key], factor) + SLOWER_MARK * (key in slow)

    def columns(result: Result) -> Iterator[tuple[str, str]]:
        yield "operation", f"  {result.case.operation}"
        yield "by", result.by
        if threads:
            yield "threads", str(result.threads or "-")
        if on_gpu:
            yield "tier", result.tier
            yield "registers", "-" if result.registers is None else str(result.registers)
            yield "moved / floor", f"{result.plan.dram_bytes / result.floor_bytes:.2f}" if result.plan else "-"
        yield f"{regime} ({unit})", time_of(result, result.by)
        for other in regimes:
            timing = result.timings.get(other)
            yield f"{other} ({unit})", three_digits(timing.median if timing else None, factor)
        yield "IQR", three_digits(result.timings[regime].spread, factor)
        yield "GB/s", three_digits(result.bandwidth / 1e9)
        yield "of copy", f"{result.bandwidth / copy_bandwidth:.0%}"
        for peer in peers:
            ratio = result.ratios[regime].get(peer)
            yield f"{peer} ({unit})", "-" if ratio is None else time_of(result, peer)
            yield "ratio", "<0.01" if ratio is not None and ratio < 0.01 else three_digits(ratio)

    rows = rows_by_tensor(ours, lambda result: [cell for _, cell in columns(result)])
    header = [name for name, _ in columns(ours[0])]
    return [Table("Measured", header, rows, measured_caption(ours[0], copy_bandwidth), keys=3 if threads else 2)]


def measured_caption(first: Result, copy_bandwidth: float) -> str:
    """Return the caption that explains the columns; ``first`` is the first result of the table."""
    once = "One sample of each, which is no measurement. " * (first.timings[first.regime].samples == 1)
    regimes = ": cold and hot of the device, with the L2 cache emptied before a call or not; wall of CPU and device"
    return (
        f"{once}Times are medians{regimes * ('cold' in first.timings)}. The other columns belong to {first.regime}. "
        "IQR: the interquartile range. GB/s: the tensors' bytes, each read and written once, over the time. Of copy: "
        f"the share of a copy's bandwidth ({three_digits(copy_bandwidth / 1e9)} GB/s, measured on a tensor larger than "
        "the caches; a tensor that stays in a cache may reach more than 100 %). Ratio: the median of our time over the "
        "peer's, in samples taken one after the other; below 1 ours is faster. "
        f"{SLOWER_MARK} marks what is slower with more threads than with one."
    )


def slowdowns(results: Sequence[Result]) -> dict[tuple[Case, str, int | None], float]:
    """Return the time over the time with one thread by case, name and threads, where it is above :data:`SLOWER`."""
    alone = {(r.case, r.by): r.median for r in results if r.threads == 1}
    ratios = {}
    for r in results:
        one = alone.get((r.case, r.by))
        if r.median and one and r.median > SLOWER * one:
            ratios[r.case, r.by, r.threads] = r.median / one
    return ratios


def thread_warnings(results: Sequence[Result]) -> list[str]:
    """Return a warning for each implementation that more threads have slowed down."""
    ratios, lines = slowdowns(results), []
    for by in dict.fromkeys(by for _, by, _ in ratios):
        factors = {case: factor for (case, name, _), factor in ratios.items() if name == by}
        worst = max(factors, key=lambda case: factors[case])
        lines.append(
            f"UNSTEADY: {by} takes up to {three_digits(factors[worst])} times as long with more threads as with one "
            f"({worst}; {len(factors)} such case{'s' * (len(factors) > 1)}): its threads wait for a core. Compare the "
            "lines of one thread."
        )
    return lines


def refusals(results: Iterable[Result]) -> str:
    """Return a line for each failure of ours, and one for each reason why peers fail or why we do not serve cases."""
    lines, alike = [], dict[tuple[str, str], list[Result]]()
    for r in results:
        if r.refused and r.ours:
            lines.append(f"NOT TIMED {r.case} by {r.by}: {r.refused}")
        elif r.refused or (r.ours and r.not_served):
            alike.setdefault((r.by, r.refused or r.not_served), []).append(r)
    for (by, why), group in alike.items():
        others = f" and {len(group) - 1} more" if group[1:] else ""
        lines.append(f"NOT TIMED {group[0].case}{others} by {by}: {why}")
    return "\n".join(lines)


def layers_table(results: Sequence[Result]) -> list[Table]:
    """Return a table of the sums over all layers of networks whose shapes were all timed; no table without these."""
    medians: dict[tuple[str, str], dict[Shape, float]] = {}
    for result in results:
        if result.median:
            medians.setdefault((result.case.kind, result.by), {})[result.case.shape] = result.median
    rows = []
    for network, layers in NETWORKS.items():
        number = sum(layers.values())
        for (kind, by), times in medians.items():
            if number > len(layers) and layers.keys() <= times.keys():
                total = sum(count * times[shape] for shape, count in layers.items())
                rows.append([network, str(number), kind, by, milliseconds(total)])
    header = ["network", "layers", "operation", "by", "all layers (ms)"]
    return [Table("All layers of a network together", header, rows, "Sums of medians.", keys=4)] if rows else []
