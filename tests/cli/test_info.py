"""Test ``gpu-bn info``: installed packages, CUDA versions that fit together, and why there is no device."""

import ctypes
import re
import subprocess
import sys

import pytest

import gpu_bn
from gpu_bn.cli import cuda_versions, info
from gpu_bn.cli.cuda_versions import CudaVersions


def test_info_names_what_is_there_and_imports_no_array_library():
    code = (
        "import sys; from gpu_bn.cli import main; assert main(['info']) == 0; "
        "found = {'torch', 'cupy', 'triton', 'sklearn', 'matplotlib'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("gpu-bn", "Python", "NumPy", "processor", "threads", "GPUs"):
        assert any(line.startswith(name + " ") for line in lines), name
    for row in gpu_bn.registry.ROWS:
        assert any(line.split()[:2] == [row.name, row.array] for line in lines), row.name


class Driver:
    """A CUDA driver with two devices, of which one function fails."""

    def __init__(self, failing=""):
        self.failing = failing

    def __getattr__(self, name):
        return lambda *arguments: 100 if name == self.failing else self.answer(name, *arguments)

    def answer(self, name, target, *rest):
        values = {"cuDeviceGetCount": 2, "cuDeviceGet": rest[0] if rest else 0, "cuDeviceGetName": b"GPU X"}
        if name == "cuGetErrorName":
            rest[0]._obj.value = b"CUDA_ERROR_NO_DEVICE"
        elif name == "cuDeviceGetAttribute":
            target._obj.value = {75: 9, 76: 0}[rest[0]]
        elif name == "cuDeviceGetName":
            target.value = values[name]
        elif name in values:
            target._obj.value = values[name]
        return 0


TWELVE = {"cupy": (12, 9), "nvrtc": (12, 9), "packages": ("cupy-cuda12x",)}
THIRTEEN = {"cupy": (13, 0), "nvrtc": (13, 0), "packages": ("cupy-cuda13x",)}
NO_NVRTC = 'unknown: cuda.pathfinder.DynamicLibNotFoundError: Failure finding "libnvrtc.so"'


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"driver": (13, 0), "torch": (13, 0), **THIRTEEN}, []),
        ({"driver": (13, 0), "torch": (12, 6), **TWELVE}, []),
        ({"driver": (12, 4), "torch": (12, 8), **TWELVE}, []),  # within a CUDA's major version
        (
            {"driver": (12, 8), "torch": (13, 0)},
            ["torch of CUDA 13.0 with a driver for CUDA 12.8: update the driver to 580"],
        ),
        (
            {"driver": (12, 8), **THIRTEEN},
            [
                "CuPy of CUDA 13.0 with a driver for CUDA 12.8.*pip install -e '.\\[cupy\\]'",
                "NVRTC of CUDA 13.0 with a driver for CUDA 12.8",
            ],
        ),
        (
            {"driver": (13, 0), **TWELVE, "nvrtc": (13, 0)},
            ["cupy-cuda12x with NVRTC 13.0: pip install -e '.\\[cupy13\\]' instead of it, or .*-cuda-nvrtc-cu12"],
        ),
        (
            {"driver": (13, 0), **THIRTEEN, "packages": ("cupy-cuda12x", "cupy-cuda13x")},
            ["contain the same module: pip uninstall cupy-cuda12x cupy-cuda13x, then install one"],
        ),
        (
            {"driver": (13, 0), "torch": (13, 0), **TWELVE},
            ["torch of CUDA 13.0 beside CuPy of CUDA 12.9: each works, but .* '.\\[cupy13\\]' instead of cupy-cuda12x"],
        ),
        (  # a build from source, or conda's package
            {"driver": (13, 0), "torch": (12, 8), "cupy": (13, 0), "nvrtc": (13, 0)},
            ["torch of CUDA 12.8 beside CuPy of CUDA 13.0: .* '.\\[cupy\\]' instead of the installed CuPy$"],
        ),
        (
            {"driver": (13, 0), "torch": (12, 8), **THIRTEEN, "packages": ("cupy",)},
            ["torch of CUDA 12.8 beside CuPy of CUDA 13.0: .* '.\\[cupy\\]' instead of cupy$"],
        ),
        (
            {"driver": (13, 0), **THIRTEEN, "packages": ("cupy-cuda13x", "cupy")},
            ["cupy-cuda13x and cupy contain the same module: pip uninstall cupy-cuda13x cupy, then install one"],
        ),
        (
            {"driver": (14, 0), "torch": (14, 0), **THIRTEEN},  # for which there is no extra
            ["beside CuPy of CUDA 13.0: .*; install CuPy for CUDA 14 instead of cupy-cuda13x$"],
        ),
        (
            {"driver": (13, 0), "torch_for_cpu": True},
            ["torch was built without CUDA.*: pip uninstall torch, then pip install -e '.\\[torch\\]'$"],
        ),
        (
            {"driver": (12, 8), "torch_for_cpu": True},
            ["torch was built without CUDA.*, then uv pip install --torch-backend auto -e '.\\[torch\\]'$"],
        ),
        ({"torch_for_cpu": True}, []),  # without a driver it is the right build
        ({"driver": (11, 4)}, ["a driver for CUDA 11.4 is too old: update it to 525 or later, for CUDA 12$"]),
        ({"driver": (11, 4), "torch_for_cpu": True}, ["update it to 525 or later, for CUDA 12$"]),
        ({"driver": (11, 4), **TWELVE}, ["update it to 525 or later, for CUDA 12$"]),
        ({"driver": (11, 4), "torch": (13, 0), **TWELVE}, ["update it to 580 or later, for CUDA 13$"]),
        (
            {"driver": (12, 8), "cupy": (11, 8), "nvrtc": (11, 8), "packages": ("cupy-cuda11x",)},
            ["CuPy of CUDA 11.8: CUDA 12 or later is needed: .* '.\\[cupy\\]' instead of cupy-cuda11x$"],
        ),
        (
            {"driver": (13, 0), "packages": ("cupy-cuda13x",), "why_not": NO_NVRTC},
            ["CuPy finds no NVRTC.*: pip install 'nvidia-cuda-nvrtc==13.\\*', or pip install -e '.\\[cupy13\\]'$"],
        ),
        (
            {"driver": (13, 0), "packages": ("cupy-cuda12x",), "why_not": NO_NVRTC},
            ["CuPy finds no NVRTC.*: pip install nvidia-cuda-nvrtc-cu12, or pip install -e '.\\[cupy\\]'$"],
        ),
        ({"packages": ("cupy",), "why_not": NO_NVRTC}, ["pip install nvidia-cuda-nvrtc-cu12"]),
        ({"packages": ("cupy-cuda13x",), "why_not": "unknown: ImportError: libcuda.so.1: cannot open"}, []),
        ({}, []),
    ],
)
def test_which_cuda_versions_fit(found, says):
    problems = CudaVersions(**found).problems()
    assert len(problems) == len(says), problems
    for problem, text in zip(problems, says, strict=True):
        assert re.search(text, problem), problem


def test_cuda_versions_are_read_without_importing_anything(tmp_path, monkeypatch):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise RuntimeError('imported')")
    (torch / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    (tmp_path / "cupy.py").write_text("raise OSError('libnvrtc.so.13: cannot open\\n  in /usr/lib')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert cuda_versions.torch_cuda() == "13.0"
    assert cuda_versions.ask_cupy() == (None, None, "unknown: OSError: libnvrtc.so.13: cannot open")
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: (13, 0))
    assert cuda_versions.cuda_versions().torch == (13, 0)
    (torch / "version.py").write_text("__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\nhip = None\n")
    assert cuda_versions.cuda_versions().torch_for_cpu


@pytest.mark.parametrize(("torch_for_cpu", "says"), [(True, "no: torch was built without CUDA"), (False, "yes")])
def test_a_torch_for_cpus_serves_no_cuda_tensors(torch_for_cpu, says, monkeypatch):
    monkeypatch.setattr(info.registry, "unavailable_reason", lambda _: "")
    cuda = CudaVersions(driver=(13, 0), torch_for_cpu=torch_for_cpu)
    for row in gpu_bn.registry.ROWS:
        found = info.available(row, info.Devices(["GPU X"]), cuda)
        assert found.startswith(says if row.device == "cuda" else "yes"), row


def test_cupy_without_its_compiler_is_unavailable(monkeypatch):
    monkeypatch.setattr(info.registry, "unavailable_reason", lambda _: "")
    cuda = CudaVersions(driver=(13, 0), packages=("cupy-cuda13x",), why_not=NO_NVRTC)
    rows = [row for row in gpu_bn.registry.ROWS if row.name == "cupy"]
    assert len(rows) == 2
    assert {info.available(row, info.Devices(["GPU X"]), cuda) for row in rows} == {f"no: {NO_NVRTC}"}


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("", info.Devices(["GPU X (sm_90)"] * 2)),
        ("cuInit", info.Devices([], "cuInit failed with CUDA_ERROR_NO_DEVICE")),
        ("cuDeviceGetCount", info.Devices([], "cuDeviceGetCount failed with CUDA_ERROR_NO_DEVICE")),
        ("cuDeviceGetName", info.Devices([f"device {i} (CUDA_ERROR_NO_DEVICE)" for i in range(2)])),
    ],
)
def test_devices(failing, expected, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(failing))
    assert info.devices() == expected


def test_no_driver_is_a_reason(monkeypatch):
    def refuse(name):
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "libcuda.so.1: cannot open" in info.devices().why_not
