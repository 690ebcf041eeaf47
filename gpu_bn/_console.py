"""Text output: a table, and a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

WIDTH = 100


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of plain text, its caption below."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    text = [title, *("  " + line.rstrip() for line in lines)]
    return "\n".join([*text, *paragraph(caption)]) + "\n"


def paragraph(text: str) -> list[str]:
    """Lines of at most :data:`WIDTH` characters, indented by two."""
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields what advances it. Without a terminal, or without rich, one line."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        print(what, file=sys.stderr, flush=True)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
