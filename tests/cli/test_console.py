"""Test how tables are printed, and how they are split on a narrow terminal."""

import os
import sys

import pytest

from gpu_bn.cli import console
from gpu_bn.cli.console import Table

HEADER = ["operation", "by", "cold", "hot", "ratio"]
ROWS = ["4x8 f16", ["  forward", "cupy", "1 us", "2 us", "0.5"], ["  eval", "triton", "3 us", "4 us", "1.25"]]
TABLE = Table("Measured", HEADER, ROWS, "All of it.", keys=2)

WHOLE = """\
Measured
  operation  by      cold  hot   ratio
  ---------  ------  ----  ----  -----
  4x8 f16
    forward  cupy    1 us  2 us  0.5
    eval     triton  3 us  4 us  1.25
  All of it.
"""
PARTS = """\
Measured
  operation  by      cold
  ---------  ------  ----
  4x8 f16
    forward  cupy    1 us
    eval     triton  3 us

  operation  by      hot
  ---------  ------  ----
  4x8 f16
    forward  cupy    2 us
    eval     triton  4 us

  operation  by      ratio
  ---------  ------  -----
  4x8 f16
    forward  cupy    0.5
    eval     triton  1.25
  All of it.
"""


def test_a_table_is_whole_where_there_is_room():
    assert str(TABLE) == TABLE.text(38) == WHOLE
    assert str(Table("T", ["a"], [["b"]], "c")) == "T\n  a\n  -\n  b\n  c\n"


def test_a_table_too_wide_is_cut_into_parts_with_the_keys_in_each():
    assert TABLE.text(30) == PARTS
    assert TABLE.text(1) == PARTS  # one column at least
    assert max(map(len, TABLE.text(31).splitlines())) == 31


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_longer_than_the_terminal(width):
    wide = Table("W", [f"column {i}" for i in range(30)], [[str(10**i) for i in range(30)]], "word " * 50, keys=2)
    assert max(map(len, wide.text(width).splitlines())) <= width
    assert all(f"column {i}" in wide.text(width) for i in range(30))


def test_the_width_is_the_terminals_and_a_pipe_has_none(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert console.terminal_width() is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((93, 20)))
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.terminal_width() == 93
