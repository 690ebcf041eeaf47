"""The syntax of the command line's values, and checks of the places that its results go to."""

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
    """A command cannot run; the message is for its user, ``code`` is the exit code."""

    code = 1


class UsageError(CommandError):
    """The arguments are wrong."""

    code = 2


# ------------------------------------------------------------------------------------------------------- values
def shape(text: str) -> tuple[int, ...]:
    """Parse a shape: ``32x64x56x56`` or ``32,64,56,56``; spaces may stand around the numbers."""
    return tuple(positive(size.strip()) for size in text.lower().replace(",", "x").split("x"))


def shapes(text: str) -> list[str]:
    """Parse names and shapes between commas; numbers side by side are one shape: ``few,32,64,56,56,4x8``."""
    found = re.findall(r"\d+(?:,\d+)*(?![^,])|[^,]+", "".join(text.lower().split()))
    return [word.replace(",", "x") for word in found]


def one_of(what: str, names: Iterable[str], also: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a parser of one of some names in any case, and of other words for them."""
    known = {name: name for name in names} | dict(also or {})

    def parse(text: str) -> str:
        found = known.get(text.strip().lower())
        if found is None:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}, expected one of {', '.join(names)}")
        return found

    return parse


dtype = one_of("dtype", DTYPES, {long: short for short, long in DTYPES.items()})
"""Parses a dtype, such as ``f16`` or ``float16``, to its short name."""
layout = one_of("layout", LAYOUTS)
gpu = one_of("device", (*DEVICES, "all"))
"""Parses the name of a GPU that the planner knows."""
device = one_of("device", ("auto", "cpu", "cuda"), {"gpu": "cuda"})


def several(one: Callable[[str], str]) -> Callable[[str], list[str]]:
    """Return a parser of such values between commas."""
    return lambda text: [one(word) for word in words(text)]


def words(text: str) -> list[str]:
    """Split words at commas."""
    return [word.strip() for word in text.split(",")]


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def number(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a parser of a finite number that fits; ``expected`` says which do."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


above_zero = number("a number above 0", lambda value: value > 0)
not_negative = number("a number from 0", lambda value: value >= 0)


def check_environment() -> None:
    """Check the number of threads that the environment sets.

    Raises:
        CommandError: it is no whole number.
    """
    try:
        get_num_threads()
    except ValueError as error:
        raise CommandError(str(error)) from None


# ------------------------------------------------------------------------------------------------------- outputs
def check_file(path: Path | None, what: str) -> None:
    """Check that a file can be written, if there is one.

    Raises:
        UsageError: its folder is not there, or it is a folder, or writing is not allowed.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of a file for the {what}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for the {what}")
    with _allowed(path, what), path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def check_folder(path: Path, what: str) -> None:
    """Check that a folder is there, or can be made, and that files can be written in it.

    Raises:
        UsageError: something else has its name, or writing is not allowed.
    """
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"{there if there != path.absolute() else path} is not a folder, expected one for the {what}")
    with _allowed(path, what), tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def _allowed(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"the {what} cannot be written to {path}: {error.strerror}") from None


def check_picture(path: Path) -> None:
    """Check that a picture can be written, and that its name says a format that matplotlib has.

    Raises:
        UsageError: as :func:`check_file` does, or the format is not known.
    """
    figure: Any = import_module("matplotlib.figure")
    known = sorted(figure.Figure().canvas.get_supported_filetypes())
    check_file(path, "figure")
    if path.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"{path} names no picture format, expected one of .{', .'.join(known)} at its end")
