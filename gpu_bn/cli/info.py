"""``gpu-bn info``: find the versions, the processor, the GPUs and the backends of this machine.

No array library is imported to find its version.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from gpu_bn import __version__, get_num_threads, registry
from gpu_bn.cli.console import Table
from gpu_bn.cli.cuda_versions import CUPY, DRIVER, CudaVersions, cuda_versions, installed

PACKAGES = (
    "numba", "torch", "triton", *CUPY, "ml_dtypes", "scikit-learn", "matplotlib", "rich",
)  # fmt: skip
COLUMNS = ("name", "serves", "available")
"""The columns of the table of backends."""


class Devices(NamedTuple):
    """The names of the NVIDIA GPUs; if there are none, the reason."""

    names: list[str]
    why_not: str = ""


class Facts:
    """The versions, the processor, the GPUs and the backends of this machine."""

    def __init__(self) -> None:
        gpus, cuda = devices(), cuda_versions()
        self.lines = [
            ("gpu-bn", __version__),
            ("Python", f"{platform.python_version()} on {platform.platform()}"),
            ("NumPy", f"{np.__version__}, BLAS: {blas()}"),
            ("packages", ", ".join(packages()) or "none of " + ", ".join(PACKAGES)),
            ("processor", f"{platform.machine()}, {os.cpu_count()} cores, {cores()} for this process"),
            ("threads", f"{get_num_threads()} for a call on the CPU (GPU_BN_NUM_THREADS sets it)"),
            ("GPUs", "; ".join(gpus.names) or f"none: {gpus.why_not}"),
            *((f"CUDA {name}", text) for name, text in cuda.descriptions.items()),
            *(("does not fit", problem) for problem in cuda.problems()),
        ]
        self.backends = [[row.name, str(row), available(row, gpus, cuda)] for row in registry.ROWS]

    def __str__(self) -> str:
        lines = [f"{name:12} {value}" for name, value in self.lines]
        return "\n".join([*lines, "", str(Table("Backends", COLUMNS, self.backends))]).rstrip()

    def as_json(self) -> str:
        """Return the facts as JSON."""
        backends = [dict(zip(COLUMNS, row, strict=True)) for row in self.backends]
        return json.dumps({"facts": self.lines, "backends": backends}, indent=1) + "\n"


def environment_facts() -> list[str]:
    """Return short descriptions of the GPUs and the versions that results on a GPU depend on."""
    gpus, cuda = devices(), cuda_versions()
    return [
        "; ".join(gpus.names) or f"no GPU: {gpus.why_not}",
        *(f"CUDA of {name}: {text}" for name, text in cuda.descriptions.items()),
        ", ".join([f"Python {platform.python_version()}", f"NumPy {np.__version__}", *packages()]),
        *(f"does not fit: {problem}" for problem in cuda.problems()),
    ]


def packages() -> list[str]:
    """Return the installed packages of :data:`PACKAGES`, with their versions."""
    return [f"{name} {version}" for name in PACKAGES if (version := installed(name))]


def cores() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas() -> str:
    """Return the name and version of the BLAS that NumPy was built with."""
    show_config: Any = np.show_config
    library = show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{library.get('name', 'unknown')} {library.get('version', '')}".strip()


def available(row: registry.Row, gpus: Devices, cuda: CudaVersions) -> str:
    """Describe whether a backend is available and whether it is the default, without importing its library."""
    if why_not := registry.unavailable_reason(row):
        return f"no: {why_not}"
    if not gpus.names and (row.library == "cupy" or row.device == "cuda"):
        return "no: no NVIDIA GPU"
    if row.device == "cuda" and cuda.torch_for_cpu:
        return "no: torch was built without CUDA"
    if row.name == "cupy" and cuda.why_not:
        return f"no: {cuda.why_not}"
    same_arrays = [other for other in registry.ROWS if str(other) == str(row)]
    preferred = same_arrays[: same_arrays.index(row)]
    if all(map(registry.unavailable_reason, preferred)):
        return "yes, the default" + "".join(f" ({registry.install(other)} for {other.name})" for other in preferred)
    return "yes, by name"


def unavailable(backend: str) -> str:
    """Return the reason why a backend is unavailable; empty if it is available."""
    library = "torch" if backend == registry.TORCH else next(r.library for r in registry.ROWS if r.name == backend)
    if find_spec(library) is None:
        return f"the package {library} is not installed"
    try:
        registry.load(backend)
    except registry.BackendUnavailableError as error:
        return str(error).removeprefix(f"backend {backend!r} cannot be used: ")
    except OSError as error:  # a library that the package loads is missing
        return f"{type(error).__name__}: {error}"
    return ""


def devices() -> Devices:
    """Return the GPUs that the driver reports. No library but that of the driver is needed."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError as error:
        return Devices([], f"the NVIDIA driver cannot be loaded ({error})")
    if code := cuda.cuInit(0):
        return Devices([], f"cuInit failed with {error_name(cuda, code)}")
    count = ctypes.c_int()
    if code := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return Devices([], f"cuDeviceGetCount failed with {error_name(cuda, code)}")
    names = [device_name(cuda, index) for index in range(count.value)]
    return Devices(names, "" if names else "the driver sees no device")


def device_name(cuda: ctypes.CDLL, index: int) -> str:
    """Return the name and the compute capability of a device, or the error that the driver reports for it."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuDeviceGet(ctypes.byref(device), index),
        lambda: cuda.cuDeviceGetName(name, len(name), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),  # COMPUTE_CAPABILITY_MINOR
    )
    for call in calls:
        if code := call():
            return f"device {index} ({error_name(cuda, code)})"
    return f"{name.value.decode()} (sm_{major.value}{minor.value})"


def error_name(cuda: ctypes.CDLL, code: int) -> str:
    """Return the name of a CUDA error code, such as CUDA_ERROR_NO_DEVICE."""
    text = ctypes.c_char_p()
    if cuda.cuGetErrorName(code, ctypes.byref(text)) or text.value is None:
        return f"error {code}"
    return text.value.decode()
