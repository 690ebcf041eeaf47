"""``--page``: the report as Markdown, with the command that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpu_bn.bench.machine import clocks, describe
from gpu_bn.bench.model import TRAFFIC, Modelled
from gpu_bn.bench.report import Report, model_tables
from gpu_bn.cli.console import Table

HEADER = (
    "Generated; do not edit. Every result was compared with a float64 oracle before it was timed. What was measured "
    "and what is a model stand in tables of their own."
)


def page(report: Report) -> str:
    """Return the page."""
    facts = report.machine
    device, packages = describe(facts)
    threads = ", ".join(f"{name} {count}" for name, count in facts["threads"].items())
    measured = _blocks(report.measured_texts())
    parts = [
        "# Benchmark results",
        f"```sh\n{report.command}\n```",
        HEADER,
        f"{facts['date']}, {device}, {facts['system']}, Python {facts['python']}, gpu_bn {facts['gpu_bn']} "
        f"(commit {facts['commit'] or 'unknown'}), {packages}; threads: {threads}. "
        f"Load average before the start: {facts['load']}." + (f" {clocks(facts['gpu'])}." if facts["gpu"] else ""),
        *report.left_out,
        *report.warnings,
        *([f"## Measured on the {'GPU' if facts['gpu'] else 'CPU'}", *measured] if measured else []),
        *([] if facts["gpu"] else ["No GPU table: nobody has run this command on one yet."]),
    ]
    if report.modelled:
        parts.append(
            f"## Modelled: GPUs that are not here\n\n<!-- model -->\n{modelled(report.modelled)}\n<!-- /model -->"
        )
    return "\n\n".join(parts) + "\n"


def modelled(rows: Sequence[Modelled]) -> str:
    """Return the model's tables; ``tests/pages.py`` makes them again when the model has changed."""
    return "\n\n".join(_blocks([*model_tables(rows), _traffic()]))


def _blocks(texts: Iterable[Table | str]) -> list[str]:
    return [f"```text\n{str(text).rstrip()}\n```" for text in texts if text]


def _traffic() -> Table:
    rows = [
        [name, *(f"{_passes(*there)} / {_passes(*back)}" for there, back in zip(forward, backward, strict=True))]
        for name, forward, backward in TRAFFIC.values()
    ]
    title = "What kernels read and write: passes over a tensor, forward / backward"
    return Table(title, ["by", "BN", "+ReLU", "+add+ReLU"], rows, "m: a bit mask. Caches are not counted.")


def _passes(tensors: int, masks: int) -> str:
    return f"{tensors}" + ("" if not masks else "+m" if masks == 1 else f"+{masks}m")
