"""Test ``bench/first_run.sh``, which users run on a rented GPU, without a GPU and with few packages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from emulator.compile import ARCHITECTURES
from support.paths import ROOT

SCRIPT = ROOT / "bench" / "first_run.sh"
PAGE = (ROOT / "docs" / "first-run-on-a-gpu.md").read_text()  # project/test_pages.py checks the numbers in it
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def first_run(folder, *steps, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(folder), **variables}
    return subprocess.run([SCRIPT, *steps], env=environment, capture_output=True, text=True, check=False)


def test_a_step_leaves_its_results_as_json(tmp_path):
    done = first_run(tmp_path, "info")
    assert done.returncode == 0, done.stderr
    (step,) = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert (step["step"], step["exit"]) == ("info", 0)
    info = json.loads((tmp_path / "info.json").read_text())
    assert {"gpu-bn", "Python", "NumPy", "GPUs"} <= {name for name, _ in info["facts"]}
    assert any(row["name"] == "numpy" and row["available"].startswith("yes") for row in info["backends"])


TESTS = """
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("number", [1, 2, 3])
def test_odd(number):
    assert number % 2, f"{number} is even"

@pytest.mark.skip
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise OSError("no device")

def test_error(broken):
    pass
"""


def test_the_tests_step_leaves_the_failures_as_json(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    done = first_run(tmp_path, "tests", PYTEST_ADDOPTS=str(file))
    found = json.loads((tmp_path / "tests.json").read_text())
    assert [found[name] for name in ("passed", "failed", "skipped")] == [2, 2, 1], done.stdout
    even, error = found["failures"]
    assert even["test"].endswith("test_some.py::test_odd[2]")
    assert "2 is even" in even["message"]
    assert error["test"].endswith("test_some.py::test_error")
    assert "no device" in error["message"]


def test_an_unknown_step_is_refused(tmp_path):
    done = first_run(tmp_path, "info", "fly")
    assert done.returncode == 2
    assert "unknown step fly" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_names_every_step():
    steps = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("all="))
    assert all(f"| `{step}` |" in PAGE for step in steps.split('"')[1].split())


def test_the_page_installs_what_the_extras_allow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [
        line for line in extras["torch"] + extras["test"][1:] if line.startswith(("triton", "pytest>", "hypothesis"))
    ]
    (torch,) = (line for line in extras["torch"] if line.startswith("torch"))
    allowed = {line.partition(";")[0] for line in [*project["dependencies"], *extras["cupy13"], torch, *named]}
    (command,) = re.findall(r"^python3 -m pip install (.*?[^\\\n])$", PAGE, re.MULTILINE | re.DOTALL)
    assert {word for word in shlex.split(command) if word.strip()} == allowed


def test_the_page_names_the_oldest_architecture_of_the_compiled_kernels():
    assert f"compute capability {min(ARCHITECTURES) / 10} or newer" in PAGE


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
