"""The cache of compiled kernels on disk: found again, never stale, never mixed up; and calls without a cache."""

import ast
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import gpu_bn

compiler = pytest.importorskip("gpu_bn.kernels.cpu.compiler", reason="needs Numba, which compiles kernels for CPUs")
from gpu_bn.backends.cpu.entries import entry
from gpu_bn.kernels.cpu import calls_channels

HELPER = """
from gpu_bn.kernels.cpu.compiler import inlined

@inlined
def times(x, n):
    return x * n
"""
KERNELS = """
from gpu_bn.kernels.cpu.compiler import cold, inlined, kernel
from gpu_bn.kernels.cpu.probe_helper import times

@cold
def plus_one(x):
    return x + 1

@kernel
def thrice(x):
    return times(x, 3)

def power(n):
    @kernel
    def powered(x):
        found = 1
        for _ in range(n):
            found = found * x
        return found
    return powered

def after(function):
    @kernel
    def called(x):
        return function(x) * 10
    return called
"""
CALLS = """
import ctypes, sys
from gpu_bn.kernels.cpu import probe
hits = misses = 0
def call(kernel, x):
    global hits, misses
    found = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(kernel.address())(x)
    hits, misses = hits + (not kernel.misses), misses + kernel.misses
    return found
"""


@pytest.fixture
def tree(tmp_path):
    """Return a folder with a copy of the package and additional kernels."""
    for name in ("gpu_bn", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels/cpu/probe.py").write_text(KERNELS)
    (tmp_path / "kernels/cpu/probe_helper.py").write_text(HELPER)
    return tmp_path


def start(tree, code, **environment):
    environment = os.environ | {"PYTHONPATH": str(tree), "GPU_BN_CACHE_DIR": str(tree / "cache")} | environment
    command = [sys.executable, "-B", "-c", CALLS + code]
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split()


def run(tree, code, **environment):
    return finish(start(tree, code, **environment))


def cached_files(tree):
    return [path for path in (tree / "cache").rglob("*") if path.is_file()]


def test_a_second_process_finds_what_the_first_has_compiled(tree):
    code = (
        "print(call(probe.thrice, 5), call(probe.power(2), 3), call(probe.power(3), 3), "
        "call(probe.after(probe.plus_one), 1), hits, misses, 'numba.np.linalg' in sys.modules)"
    )
    assert run(tree, code) == ["15", "9", "27", "20", "0", "4", "False"]  # Numba's compiler is not loaded
    assert run(tree, code) == ["15", "9", "27", "20", "4", "0", "False"]
    assert len(cached_files(tree)) == 4


def test_a_helper_changed_in_another_file_is_noticed(tree):
    code = "print(call(probe.thrice, 5), hits)"
    assert run(tree, code) == ["15", "0"]
    (tree / "kernels/cpu/probe_helper.py").write_text(HELPER.replace("x * n", "x - n"))
    assert run(tree, code) == ["2", "0"]


@pytest.mark.parametrize(
    "file", ["gpu_bn/activations.py", "gpu_bn/spec.py", "kernels/cpu/compiler.py", "kernels/cpu/probe_helper.py"]
)
def test_each_source_has_its_part_in_the_stamp(tree, file, monkeypatch):
    monkeypatch.setattr(compiler, "files", lambda name: tree / name)
    before = compiler._stamp()
    assert compiler._stamp() == before
    (tree / file).write_text((tree / file).read_text() + "#")
    assert compiler._stamp() != before


@pytest.mark.parametrize("package", [gpu_bn, compiler.numba, compiler.llvmlite])
def test_versions_have_their_part_in_the_stamp(package, monkeypatch):
    before = compiler._stamp()
    monkeypatch.setattr(package, "__version__", "9.9")
    assert compiler._stamp() != before


def test_the_stamp_covers_every_module_that_kernels_import():
    known = {"gpu_bn.activation_values", "gpu_bn.activations", "gpu_bn.spec"}
    for path in (ROOT / "kernels/cpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("gpu_bn"):
                assert node.module in known or node.module.startswith("gpu_bn.kernels.cpu"), f"{path}: {node.module}"


@pytest.mark.slow
def test_four_processes_at_once_get_their_own_code(tree):
    """Processes that compile kernels of equal names and signatures, in different orders, keep them apart."""
    code = (
        "order = [(i + {}) % 4 for i in range(4)]\nprint(*(call(probe.power(2 + n), 3) == 3 ** (2 + n) for n in order))"
    )
    processes = [start(tree, code.format(first)) for first in range(4)]
    assert [finish(process) for process in processes] == [["True"] * 4] * 4
    assert run(tree, code.format(0) + "\nprint(hits, misses)") == [*["True"] * 4, "4", "0"]
    assert len(cached_files(tree)) == 4, "temporary files were left"


def is_cached(function):
    """Call a new kernel of the function, as another process would, and tell whether its code was in the cache."""
    compiled = compiler.kernel(function)
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(compiled.address())(5) == 15
    assert compiled.misses in (0, 1)
    return not compiled.misses


def thrice(x):
    return x * 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_BN_CACHE_DIR", str(tmp_path))
    return tmp_path / compiler.STAMP


@pytest.mark.usefixtures("folder")
def test_a_cached_kernel_needs_no_source():
    for found in (False, True):
        made = compiler.kernel(calls_channels.forward.py_func)
        entry(made)
        assert made.misses == (not found)
        assert ("tree" in vars(made)) == (not found)


def test_kernels_are_called_with_as_many_numbers_as_they_take():
    @compiler.kernel
    def nothing(a, p):
        pass

    call = entry(nothing)
    assert call(1, 2.0) == call(True, 2) == 0
    for wrong in ((1,), (1, 2.0, 3), ("1", 2.0), (1, "2"), (1.5, 2.0), (2**64, 2.0)):
        with pytest.raises((TypeError, OverflowError)):
            call(*wrong)


def test_a_folder_that_can_only_be_read_is_read(folder):
    assert not is_cached(thrice)
    folder.chmod(0o555)
    assert is_cached(thrice)
    folder.chmod(0o755)


@pytest.mark.parametrize("place", ["a file", "no home", "/proc"])
def test_without_a_place_each_process_compiles(tmp_path, monkeypatch, place):
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    if place == "no home":
        monkeypatch.delenv("GPU_BN_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert compiler.cache_folder() is None
    else:
        monkeypatch.setenv("GPU_BN_CACHE_DIR", place)
    assert not is_cached(thrice)
    assert not is_cached(thrice)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_full_disk_leaves_no_file(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not is_cached(thrice)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"short", lambda data: data[:-1], lambda data: data[:50] + b"?" + data[51:]])
def test_a_damaged_file_counts_as_absent(folder, damage):
    assert not is_cached(thrice)
    (file,) = folder.iterdir()
    file.write_bytes(damage if isinstance(damage, bytes) else damage(file.read_bytes()))
    assert not is_cached(thrice)
    assert is_cached(thrice)  # the damaged file was replaced


def test_the_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GPU_BN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder().parent == tmp_path / "gpu_bn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder().parent == tmp_path / ".cache" / "gpu_bn"
    monkeypatch.setenv("GPU_BN_CACHE_DIR", "~/kernels")  # a shell would have expanded ~
    assert compiler.cache_folder().parent == tmp_path / "kernels"


def test_another_cpu_has_code_of_its_own(tree):
    code = "print(call(probe.thrice, 5), hits)"
    assert run(tree, code) == ["15", "0"]
    assert run(tree, code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == ["15", "0"]
    assert len(cached_files(tree)) == 2


def test_a_kernel_may_not_close_over_an_object_without_a_lasting_name():
    thing = object()
    with pytest.raises(TypeError, match="close over numbers, strings and functions, got object"):
        compiler.kernel(lambda: thing)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
@pytest.mark.parametrize(("features", "converts"), [("", False), ("+f16c", True), ("+f16c,+avx512f", True)])
def test_float16_is_refused_where_the_cpu_cannot_convert(features, converts, monkeypatch):
    codegen = compiler.codegen()
    monkeypatch.setattr(codegen, "_tm_features", features)
    monkeypatch.setattr(codegen, "_get_host_cpu_name", lambda: "x86-64")
    assert compiler.supports_float16.__wrapped__() is converts
