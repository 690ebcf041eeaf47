"""Parse the values of command line options, and check that output files can be written."""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_bn import get_num_threads
from gpu_bn.explanation import DTYPES, LAYOUTS
from gpu_bn.plan import DEVICES


class CommandError(Exception):
    """Raised if a command cannot run. The message is printed, and ``code`` is the exit code."""

    code = 1


class UsageError(CommandError):
    """Raised if the arguments are wrong."""

    code = 2


# ------------------------------------------------------------------------------------------------------- values
def shape(text: str) -> tuple[int, ...]:
    """Parse a shape, such as ``32x64x56x56`` or ``32, 64, 56, 56``."""
    return tuple(positive(size.strip()) for size in text.lower().replace(",", "x").split("x"))


def shapes(text: str) -> list[str]:
    """Split names and shapes at commas. Adjacent numbers form one shape, as in ``few,32,64,56,56,4x8``."""
    items = re.findall(r"\d+(?:,\d+)*(?![^,])|[^,]+", "".join(text.lower().split()))
    return [item.replace(",", "x") for item in items]


def one_of(what: str, names: Iterable[str], synonyms: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a parser that accepts one of some names or a synonym of one, in any case, and returns the name."""
    known = {name: name for name in names} | dict(synonyms or {})

    def parse(text: str) -> str:
        name = known.get(text.strip().lower())
        if name is None:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}, expected one of {', '.join(names)}")
        return name

    return parse


dtype = one_of("dtype", DTYPES, {long: short for short, long in DTYPES.items()})
"""Parse a dtype, such as ``f16`` or ``float16``, and return its short name."""
layout = one_of("layout", LAYOUTS)
gpu = one_of("device", (*DEVICES, "all"))
"""Parse the name of a GPU that the planner knows, or ``all``."""
device = one_of("device", ("auto", "cpu", "cuda"), {"gpu": "cuda"})


def several(parse: Callable[[str], str]) -> Callable[[str], list[str]]:
    """Return a parser of values that are separated by commas; ``parse`` parses one."""
    return lambda text: [parse(word) for word in words(text)]


def words(text: str) -> list[str]:
    """Split a text at commas."""
    return [word.strip() for word in text.split(",")]


def positive(text: str) -> int:
    """Parse a whole number greater than 0."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def number(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a parser of a finite number for which ``fits`` is true. ``expected`` describes these for the message."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


above_zero = number("a number greater than 0", lambda value: value > 0)
not_negative = number("a number of at least 0", lambda value: value >= 0)


def check_environment() -> None:
    """Check the number of threads in the environment variable GPU_BN_NUM_THREADS.

    Raises:
        CommandError: it is not a whole number.
    """
    try:
        get_num_threads()
    except ValueError as error:
        raise CommandError(str(error)) from None


# ------------------------------------------------------------------------------------------------------- outputs
def check_file(path: Path | None, what: str) -> None:
    """Check that a file can be written; ``what`` names its contents in messages. ``None`` passes.

    Raises:
        UsageError: its folder does not exist, or it is a folder, or writing is not allowed.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of a file for the {what}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for the {what}")
    with _usage_errors(path, what), path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def check_folder(path: Path, what: str) -> None:
    """Check that a folder exists or can be created, and that files can be written in it.

    Raises:
        UsageError: the path or one above it is a file, or writing is not allowed.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        name = path if existing == path.absolute() else existing
        raise UsageError(f"{name} is not a folder, expected one for the {what}")
    with _usage_errors(path, what), tempfile.TemporaryFile(dir=existing):
        pass


@contextmanager
def _usage_errors(path: Path, what: str) -> Iterator[None]:
    """Turn an operating system's error within this context into a :class:`UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"the {what} cannot be written to {path}: {error.strerror}") from None


def check_picture(path: Path) -> None:
    """Check that a picture can be written, and that matplotlib knows the format that its suffix names.

    Raises:
        UsageError: :func:`check_file` refuses the path, or the format is unknown.
    """
    figure: Any = import_module("matplotlib.figure")
    known = sorted(figure.Figure().canvas.get_supported_filetypes())
    check_file(path, "figure")
    if path.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"{path} names no picture format, expected one of .{', .'.join(known)} at its end")
