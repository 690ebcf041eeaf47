"""What a call of the CuPy backend costs in Python, as the README says, with a launcher that does nothing."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "cupy_overhead.py"


def run(*options):
    done = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, [line.rsplit(maxsplit=4)[-4:] for line in done.stdout.splitlines()[1:]]


def test_a_call_costs_less_than_25_microseconds():
    code, rows = run("--seconds", "0.2", "--limit", "25")
    assert code == 0, rows
    assert len(rows) == 5
    assert all(float(microseconds) < 25 for microseconds, *_ in rows)


def test_a_call_allocates_few_arrays_makes_no_view_and_launches_once():
    code, rows = run("--seconds", "0", "--limit", "0.1")
    assert code == 1
    assert [tuple(map(int, counts)) for _, *counts in rows] == [
        (2, 0, 1), (2, 0, 1), (3, 0, 1), (1, 0, 1), (3, 0, 1)
    ]  # fmt: skip
