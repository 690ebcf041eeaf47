"""Test ``bench/first_run.sh``, which users run on a rented GPU, without a GPU and with few packages."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

SCRIPT = ROOT / "bench" / "first_run.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def first_run(folder, *steps):
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(folder)}
    return subprocess.run([SCRIPT, *steps], env=environment, capture_output=True, text=True, check=False)


def test_a_step_leaves_its_results_as_json(tmp_path):
    done = first_run(tmp_path, "info")
    assert done.returncode == 0, done.stderr
    (step,) = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert (step["step"], step["exit"]) == ("info", 0)
    info = json.loads((tmp_path / "info.json").read_text())
    assert {"gpu-bn", "Python", "NumPy", "GPUs"} <= {name for name, _ in info["facts"]}
    assert any(row["name"] == "numpy" and row["available"].startswith("yes") for row in info["backends"])


def test_an_unknown_step_is_refused(tmp_path):
    done = first_run(tmp_path, "info", "fly")
    assert done.returncode == 2
    assert "unknown step fly" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_names_every_step():
    page = (ROOT / "docs" / "first-run-on-a-gpu.md").read_text()  # project/test_pages.py looks at the number of cases
    steps = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("all="))
    assert all(f"| `{step}` |" in page for step in steps.split('"')[1].split())


OPTIONAL, PLUGINS = ("rich", "matplotlib", "ml_dtypes", "threadpoolctl", "sklearn"), ("pytest_timeout", "xdist")
CONCEAL = """
import sys
from importlib.machinery import PathFinder

find_spec, find_distributions = PathFinder.find_spec, PathFinder.find_distributions
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {0} else find_spec(name, *rest)
PathFinder.find_distributions = lambda context: [] if context.name in {0} else find_distributions(context)
"""
"""Code that makes installed packages look as if they were not installed, for the rest of its process."""
BARE = f"""{CONCEAL.format(OPTIONAL + PLUGINS)}
from gpu_bn.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["check", "--quick", "--backend", "numpy"], 0, "the package ml_dtypes is not installed"),
        pytest.param(
            ["bench", "--device", "cpu", "--seconds", "0", "--shapes", "4x8"],
            0,
            "No pictures: matplotlib is not installed",
            marks=pytest.mark.slow,
        ),
        (["bench", "--device", "cpu", "--dtype", "bf16"], 1, "bf16 needs ml_dtypes"),
        (["demo"], 1, "scikit-learn, matplotlib, rich, threadpoolctl not installed"),
    ],
)
def test_optional_packages_that_are_missing_are_a_sentence(line, code, says, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, *line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # collects the whole suite
@pytest.mark.parametrize(
    "concealed",
    [
        ("torch",),
        ("triton",),
        ("numba",),
        ("cupy",),
        ("torch", "triton", "numba", "cupy", *OPTIONAL, "yaml", "scipy", "expecttest"),
    ],
    ids=lambda names: "everything" if len(names) > 1 else names[0],
)
def test_the_tests_are_collected_without_optional_packages_and_plugins(concealed):
    """Collect all test files while packages are concealed; ``-p no:`` turns off the plugins, which pytest has found."""
    code = f"""{CONCEAL.format(concealed)}
import pytest
without = [word for name in ("cacheprovider", "timeout", "xdist") for word in ("-p", f"no:{{name}}")]
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "--assert=plain", *without]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "tests/backends/cupy/test_gpu.py" in done.stdout
