"""Print tables, and progress as a bar on a terminal or as lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

WIDTH = 100
"""The greatest width of captions, in characters."""
GAP = "  "


class Table(NamedTuple):
    """A table of plain text.

    Attributes:
        title: the line above the table.
        header: the name of each column.
        rows: the cells of each row. A row that is a single string is a heading for the rows after it.
        caption: the text below the table.
        keys: the number of leading columns that identify a row. They are repeated in each part of a split table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str] | str]
    caption: str = ""
    keys: int = 1

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return the table. If it is wider than ``width`` characters, split it into parts with some of the columns."""
        lines = [self.title]
        for number, columns in enumerate(self._parts(width)):
            lines += ["", *self._part(columns)] if number else self._part(columns)
        return "\n".join([*lines, *paragraph(self.caption, width)]) + "\n"

    @property
    def _widths(self) -> list[int]:
        cells = [self.header, *(row for row in self.rows if not isinstance(row, str))]
        return [max(len(line[column]) for line in cells) for column in range(len(self.header))]

    def _parts(self, width: int | None) -> list[list[int]]:
        """Return the columns of each part: the keys, and as many others as fit but at least one."""
        needed, keys = [len(GAP) + width for width in self._widths], list(range(self.keys))
        room = (sys.maxsize if width is None else width) - sum(needed[: self.keys])
        parts, left = [list(keys)], room
        for column in range(self.keys, len(needed)):
            if needed[column] > left and parts[-1] != keys:
                parts, left = [*parts, list(keys)], room
            parts[-1].append(column)
            left -= needed[column]
        return parts

    def _part(self, columns: Sequence[int]) -> list[str]:
        widths = self._widths

        def line(cells: Sequence[str]) -> str:
            return (GAP + GAP.join(cells[column].ljust(widths[column]) for column in columns)).rstrip()

        rows = [GAP + row if isinstance(row, str) else line(row) for row in self.rows]
        return [line(self.header), line(["-" * width for width in widths]), *rows]


def three_digits(number: float | None, factor: float = 1.0) -> str:
    """Return ``number * factor`` with three digits, from 1000 on as a whole number; ``-`` for ``None``."""
    if number is None:
        return "-"
    number *= factor
    digits = 3 - math.ceil(math.log10(number) + 1e-9) if number > 0 else 0
    return f"{number:.{min(max(digits, 0), 9)}f}"


milliseconds, microseconds = partial(three_digits, factor=1e3), partial(three_digits, factor=1e6)
"""Return a time in seconds as text in ms or in us."""
megabytes = partial(three_digits, factor=1e-6)
"""Return a number of bytes as text in MB."""


def paragraph(text: str, width: int | None = None) -> list[str]:
    """Wrap a text into indented lines of at most ``width`` and :data:`WIDTH` characters."""
    return textwrap.wrap(text, max(20, min(WIDTH, width or WIDTH)), initial_indent=GAP, subsequent_indent=GAP)


def terminal_width() -> int | None:
    """Return the width of the terminal, or ``None`` if standard output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


MIN_PAUSE = 10.0
"""The least number of seconds between two lines of progress."""


@contextmanager
def progress(what: str, total: int, least: float = 0.0) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error: a bar, or lines without a terminal or rich.

    Args:
        what: the text of the bar, or the first line.
        total: the number of steps.
        least: the least number of seconds that the work takes, for the text; 0 if unknown.

    Yields:
        A function that is called with the number of steps done since its last call.
    """
    what += f", {duration(least)} or more" if least else ""
    if sys.stderr is None or not sys.stderr.isatty() or find_spec("rich") is None:
        yield _Lines(what, total).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Progress in lines on standard error, at least :data:`MIN_PAUSE` apart."""

    def __init__(self, what: str, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.printed = self.start
        print(what, file=sys.stderr, flush=True)

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.printed < MIN_PAUSE or self.done >= self.total:
            return
        self.printed = now
        left = (now - self.start) * (self.total - self.done) / self.done
        print(f"  {self.done} of {self.total}, about {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time as text, rounded to seconds or to minutes."""
    return f"{max(round(seconds), 1)} s" if seconds < 100 else f"{round(seconds / 60)} minutes"
