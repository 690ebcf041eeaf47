"""``--page``: the report as Markdown, with the command that made it."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_bn.bench.machine import clocks
from gpu_bn.bench.model import TRAFFIC, Modelled
from gpu_bn.bench.report import Report, layers_table, measured_table, model_tables, refusals
from gpu_bn.cli.console import Table

HOW = (
    "Generated; do not edit. Every result was compared with a float64 oracle before it was timed. What was measured "
    "and what is a model stand in tables of their own."
)


def page(report: Report) -> str:
    """The text."""
    facts = report.machine
    where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['processor']}, {facts['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    parts = [
        "# Benchmark results",
        f"```sh\n{report.command}\n```",
        HOW,
        f"{facts['date']}, {where}, {facts['system']}, Python {facts['python']}, gpu_bn {facts['gpu_bn']} "
        f"(commit {facts['commit'] or 'unknown'}), {packages}; threads: "
        + ", ".join(f"{name} {count}" for name, count in facts["threads"].items())
        + f". Load average before the start: {facts['load']}."
        + (f" {clocks(facts['gpu'])}." if facts["gpu"] else ""),
        *report.left_out,
        *report.warnings,
        *_section(
            f"Measured on the {'GPU' if facts['gpu'] else 'CPU'}",
            [*measured_table(report.results, facts["copy_bandwidth"]), *layers_table(report.with_all_threads),
             refusals([*report.results, *report.raced]), *report.texts],
        ),
    ]  # fmt: skip
    if facts["gpu"] is None:
        parts.append("No GPU table: nobody has run this command on one yet.")
    if report.modelled:
        parts.append(
            f"## Modelled: GPUs that are not here\n\n<!-- model -->\n{modelled(report.modelled)}\n<!-- /model -->"
        )
    return "\n\n".join(parts) + "\n"


def modelled(rows: Sequence[Modelled]) -> str:
    """The tables of the model; ``tests/pages.py`` makes them anew where the model has changed."""
    return "\n\n".join(_blocks([*model_tables(rows), _traffic()]))


def _section(title: str, texts: Sequence[Table | str]) -> list[str]:
    found = _blocks(texts)
    return [f"## {title}", *found] if found else []


def _blocks(texts: Sequence[Table | str]) -> list[str]:
    return [f"```text\n{text.rstrip()}\n```" for text in map(str, texts) if text]


def _traffic() -> str:
    lines = [
        "What kernels read and write, in passes over a tensor (m: a bit mask), forward / backward; caches not counted"
    ]
    for row in TRAFFIC.values():
        cells = [f"{_passes(*row.forward[name])} / {_passes(*row.backward[name])}" for name in row.forward]
        lines.append(f"  {row.name:46}" + "".join(f"{cell:>14}" for cell in cells))
    lines.insert(1, f"  {'':46}{'BN':>14}{'+ReLU':>14}{'+add+ReLU':>14}")
    return "\n".join(lines)


def _passes(tensors: int, masks: int) -> str:
    return f"{tensors}" + ("" if not masks else "+m" if masks == 1 else f"+{masks}m")
