"""The numbers of allocations, views and launches of a call of the CuPy backend; times are not tested."""

import subprocess
import sys

from support.paths import ROOT

BENCH = ROOT / "bench" / "cupy_overhead.py"


def run(*options):
    done = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[1:]]


def test_a_call_allocates_few_arrays_makes_no_view_and_launches_once():
    code, rows = run("--seconds", "0")
    assert code == 0
    assert {name: tuple(map(int, counts)) for name, _, *counts in rows} == {
        "forward, evaluation": (2, 0, 1),
        "forward, training": (2, 0, 1),
        "forward, training, relu and residual": (3, 0, 1),
        "forward, training, given an output": (1, 0, 1),
        "backward": (3, 0, 1),
    }


def test_a_limit_that_is_missed_is_an_error():
    code, rows = run("--seconds", "0", "--limit", "0")
    assert code == 1
    assert len(rows) == 5
