"""What is installed: from the wheel, the sdist, and the working tree alike ``kernels/`` is ``gpu_bn.kernels``."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ("pyproject.toml", "LICENSE", "README.md", "gpu_bn", "kernels")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist of this tree and the wheel made from that sdist."""
    pytest.importorskip("build", reason="needs the package build")
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


def wheel_names(built):
    (wheel,) = built.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def sdist_names(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def modules():
    """Every module of the tree, by its place in an installation."""
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gpu_bn").rglob("*.py")
        if not path.is_relative_to(ROOT / "gpu_bn" / "kernels")
    }
    return own | {
        f"gpu_bn/kernels/{path.relative_to(ROOT / 'kernels').as_posix()}" for path in (ROOT / "kernels").rglob("*.py")
    }


def test_the_wheel_installs_gpu_bn_and_nothing_else(built):
    top = {name.split("/")[0] for name in wheel_names(built)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"gpu_bn"}


def test_the_wheel_has_every_module(built):
    names = set(wheel_names(built))
    assert modules() <= names
    assert {"gpu_bn/py.typed", "gpu_bn/kernels/__init__.py"} <= names


def test_the_sdist_has_the_kernels(built):
    names = sdist_names(built)
    assert "kernels/__init__.py" in names or "gpu_bn/kernels/__init__.py" in names
    assert "LICENSE" in names
    assert "pyproject.toml" in names


def test_the_wheel_runs_from_another_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import gpu_bn, gpu_bn.kernels, gpu_bn.testing, importlib.util as u; "
        "assert u.find_spec('kernels') is None; "
        "print(gpu_bn.kernels.__file__, max(gpu_bn.testing.check(gpu_bn.testing.cases()[0]).values()) <= 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file, right = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert right == "True"


def test_as_installed_here_kernels_is_part_of_the_package(tmp_path):
    code = "import gpu_bn.kernels, importlib.util as u; print(u.find_spec('kernels') is None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr
    assert importlib.util.find_spec("gpu_bn.kernels") is not None


def test_the_command_and_the_extras_are_declared(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    texts = {name.split("/")[1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "gpu-bn = gpu_bn.cli:main" in texts["entry_points.txt"]
    required = [line for line in texts["METADATA"].splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: numpy>=2.1"]
    extras = {line.split()[1] for line in texts["METADATA"].splitlines() if line.startswith("Provides-Extra:")}
    assert {"cupy", "torch", "gpu", "demo", "bench", "test", "dev"} <= extras
