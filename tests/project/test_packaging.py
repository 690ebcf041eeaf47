"""Test the wheel, the sdist and an editable install: in each of them ``kernels/`` is ``gpu_bn.kernels``."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

import gpu_bn

TREE = (
    "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "mkdocs.yml", "src", "gpu_bn", "kernels", "tests", "bench", "docker", "docs", ".ci",
)  # fmt: skip


def copy_tree(tree):
    """Copy the files of the repository to a folder, as a clone would have them."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with the sdist of this tree and the wheel that is built from that sdist."""
    pytest.importorskip("build", reason="needs the package build")
    tree = tmp_path_factory.mktemp("tree")
    copy_tree(tree)
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
    """Return the paths that the modules of the tree have in an installation."""
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
    assert {"cupy", "cupy13", "torch", "gpu", "gpu13", "demo", "bench", "test", "dev"} <= extras
    for extra in extras:  # the two wheels of CuPy contain the same files
        names = {re.split(r"[ ;>=\[]", line)[1] for line in required if f"extra == '{extra}'" in line.replace('"', "'")}
        assert len(names & {"cupy-cuda12x", "cupy-cuda13x"}) < 2


def links(text):
    """Return the targets of a page's links and pictures, without those inside the page."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("#")]


def package_page():
    spec = importlib.util.spec_from_file_location("package_page", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_of_the_package_page_works_without_a_clone(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    head, _, shown = archive.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert "# gpu_bn" in shown
    assert all(target.startswith("https://") for target in links(shown))
    assert "(docs/install.md)" in shown  # without an address the file's name follows the text


def test_with_an_address_the_package_page_links_there():
    readme = (ROOT / "README.md").read_text()
    shown = package_page().description(readme, "https://host.example/bn/")
    assert len(links(shown)) == len(links(readme))
    assert all(target.startswith("https://") for target in links(shown))
    assert "[Install](https://host.example/bn/blob/main/docs/install.md)" in shown
    assert "(https://host.example/bn/raw/main/docs/images/demo.png)" in shown
    assert "([other choices](#install))" in shown


def test_a_script_beside_a_clone_finds_the_package(tmp_path):
    """An editable install works even if the clone has the package's name and lies beside the script."""
    pytest.importorskip("setuptools", reason="needs setuptools")
    clone, site = tmp_path / "gpu_bn", tmp_path / "site"
    clone.mkdir()
    copy_tree(clone)
    code = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    script = tmp_path / "script.py"
    script.write_text(
        f"import site; site.addsitedir({str(site)!r})\nimport gpu_bn, gpu_bn.kernels, importlib.util as u\n"
        "print(gpu_bn.__version__, gpu_bn.kernels.__name__, *map(u.find_spec, ('kernels', 'tests', 'bench')))"
    )
    # -S hides all installed packages except those in the folder that the script adds.
    done = subprocess.run([sys.executable, "-S", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [gpu_bn.__version__, "gpu_bn.kernels", "None", "None", "None"], done.stderr


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)  # the archive is our own; Python 3.11.2 has no filters
    (tree,) = tmp_path.iterdir()
    some = ["tests/api/test_merge.py", "tests/project/test_collection.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_python_m_gpu_bn_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gpu_bn", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"gpu-bn {gpu_bn.__version__}\n"), done.stderr


def test_the_hints_name_one_way_to_install():
    """No index has the package yet, so each hint must be a command that works in a clone."""
    folders = ("gpu_bn", "kernels", "tests", "bench", "docker")
    texts = [path.read_text() for name in folders for path in (ROOT / name).rglob("*.py")]
    hints = [
        hint
        for text in [*texts, (ROOT / "README.md").read_text()]
        for hint in re.findall(r"pip install [^\n]{30}", text)
    ]
    wrong = [hint for hint in hints if re.match(r"pip install '?gpu[-_]bn", hint)]
    assert not wrong
