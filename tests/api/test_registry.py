"""Which backend serves a call, and why: one rule, which ``gpu-bn info`` prints."""

import subprocess
import sys

import numpy as np
import pytest

import gpu_bn
from gpu_bn import registry
from gpu_bn.cli import info
from gpu_bn.cli.cuda_versions import CudaVersions

X = np.ones((4, 3), np.float32)
NO_GPUS = info.Devices([], "none")


def forget():
    for cached in (registry.load, registry.unavailable_reason, registry._first):
        cached.cache_clear()


@pytest.fixture
def missing(monkeypatch):
    """Return a function that makes the import of packages fail, as if they were missing."""

    def make(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        forget()

    yield make
    monkeypatch.undo()
    forget()


def lines():
    return {(row.name, str(row)): info.available(row, NO_GPUS, CudaVersions()) for row in registry.ROWS}


def test_with_numba_arrays_go_to_compiled_kernels():
    pytest.importorskip("numba")
    assert registry.default_name(X) == "cpu"
    assert registry.select(None, input=X).name == "cpu"
    assert registry.select("numpy", input=X).name == "numpy"
    assert lines()["cpu", "numpy.ndarray"] == "yes, the default"
    assert lines()["numpy", "numpy.ndarray"] == "yes, by name"


def test_without_numba_numpy_serves_arrays_and_says_how_to_change_that(missing):
    missing("numba")
    assert registry.default_name(X) == "numpy"
    assert registry.select(None, input=X).name == "numpy"
    assert lines()["cpu", "numpy.ndarray"] == "no: not installed: numba"
    assert lines()["numpy", "numpy.ndarray"] == "yes, the default (pip install -e '.[cpu]' for cpu)"


def test_the_error_without_numba_names_the_extra():
    code = """
import sys; sys.modules["numba"] = None
import gpu_bn, numpy as np
x = np.ones((4, 3))
gpu_bn.batch_norm(x, training=True)
try: gpu_bn.batch_norm(x, training=True, backend="cpu")
except gpu_bn.BackendUnavailableError as error: print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("backend 'cpu' cannot be used: ")
    assert done.stdout.endswith("; install it with pip install -e '.[cpu]' in a clone\n")


@pytest.mark.parametrize("error", [ImportError, OSError, SystemError, AttributeError, ValueError])
def test_a_numba_that_cannot_be_imported_is_as_good_as_none(monkeypatch, missing, error):
    """NumPy serves arrays if importing Numba fails, as with a NumPy that is too new or with NUMBA_NUM_THREADS=0."""
    pytest.importorskip("numba")
    missing()
    true = registry.import_module

    def refuse(name):
        if name.startswith(("numba", "gpu_bn.backends.cpu.backend")):
            raise error("Numba needs NumPy 2.4 or less. Got NumPy 2.9.")
        return true(name)

    monkeypatch.setattr(registry, "import_module", refuse)
    assert registry.default_name(X) == "numpy"
    assert (
        lines()["cpu", "numpy.ndarray"] == "no: Numba cannot be imported: Numba needs NumPy 2.4 or less. Got NumPy 2.9."
    )
    with pytest.raises(gpu_bn.BackendUnavailableError, match="Numba needs NumPy"):
        registry.load("cpu")


@pytest.mark.parametrize("numba", [True, False])
def test_torchs_tensors_on_the_cpu_follow_the_same_rule(numba, missing):
    torch = pytest.importorskip("torch")
    if not numba:
        missing("numba")
    x = torch.ones(4, 3)
    serves = "cpu" if numba else "numpy"
    assert registry.default_name(x) == serves
    for name in (None, "torch", serves):
        assert registry.select(name, input=x).name == serves
    assert registry.backend_for(x) is registry.select(serves, input=x)
    assert registry.load("torch") is registry.backend_for(x)
    assert registry.select("numpy", input=x).name == "numpy"


def test_each_backend_by_name_gives_the_same_for_arrays_and_tensors():
    torch = pytest.importorskip("torch")
    pytest.importorskip("numba")
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(np.float32)
    for name in ("cpu", "numpy"):
        array = gpu_bn.batch_norm(x, training=True, activation="relu", backend=name)
        leaf = torch.from_numpy(x).requires_grad_()
        tensor = gpu_bn.batch_norm(leaf, training=True, activation="relu", backend=name)
        assert (array == tensor.detach().numpy()).all()
        tensor.sum().backward()
        assert leaf.grad.isfinite().all()


def test_the_name_torch_is_of_tensors_on_the_cpu_only():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"'torch' serves arrays of type torch.Tensor on cpu, got numpy.ndarray"):
        registry.select("torch", input=X)
    assert "torch" in registry.NAMES


def test_numba_is_imported_at_the_first_call_that_needs_it():
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    code = """
import sys, numpy as np
import gpu_bn, gpu_bn.nn, gpu_bn.cli.commands, gpu_bn.backends.cpu; gpu_bn.get_num_threads()
print("numba" in sys.modules)
gpu_bn.batch_norm(np.ones((4, 3)), training=True, backend="numpy")
print("numba" in sys.modules)
gpu_bn.batch_norm(np.ones((4, 3)), training=True)
print("numba" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
