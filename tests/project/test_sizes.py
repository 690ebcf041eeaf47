"""Test that no file and no function is too long to be read in one go."""

import ast
import subprocess

import pytest
from support.paths import ROOT

LINES = 400
"""The most lines of a Python file."""
SCREEN = 70
"""The most lines of a function without its docstring."""


def sources():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone: git lists no files")
    return [ROOT / name for name in listed.stdout.split()]


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert not {name: count for name, count in long.items() if count > LINES}


def test_functions_fit_a_screen():
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                described = ast.get_docstring(node, clean=False) is not None
                begin = node.body[0].end_lineno if described else node.body[0].lineno - 1
                head = node.body[0].lineno - node.lineno
                if head + node.end_lineno - begin > SCREEN:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = head + node.end_lineno - begin
    assert not long
