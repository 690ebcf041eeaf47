"""Find the CUDA versions of the driver, torch and CuPy, and those that do not work together."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

Version = tuple[int, int]
DRIVER = "libcuda.so.1"
OLDEST_DRIVERS = {12: 525, 13: 580}
"""The oldest driver that runs each major version of CUDA."""
CUPY = ("cupy-cuda12x", "cupy-cuda13x")
"""The packages of CuPy. Only one can be installed: both contain the module ``cupy``."""
ASK_CUPY = """
import json, cupy
from cupy_backends.cuda.libs import nvrtc
print(json.dumps([cupy.cuda.runtime.runtimeGetVersion(), list(nvrtc.getVersion())]))
"""


@dataclass(frozen=True)
class CudaVersions:
    """The versions of CUDA on this machine; ``None`` for a library that is not installed or has no CUDA.

    Attributes:
        driver: the newest CUDA that the driver runs.
        torch: the CUDA that torch was built with.
        cupy: the CUDA runtime that CuPy loads.
        nvrtc: the compiler NVRTC that CuPy loads.
        packages: the installed packages of CuPy.
        why_not: the reason why the versions of an installed CuPy are unknown.
    """

    driver: Version | None = None
    torch: Version | None = None
    cupy: Version | None = None
    nvrtc: Version | None = None
    packages: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def descriptions(self) -> dict[str, str]:
        """A description of each known version, by the name of the library."""
        cupy = f"{_text(self.cupy)}, NVRTC {_text(self.nvrtc)}" if self.cupy else self.why_not
        lines = {"driver": _text(self.driver), "torch": _text(self.torch), "CuPy": cupy}
        return {name: line for name, line in lines.items() if line}

    def problems(self) -> list[str]:
        """Return a line for each pair of versions that do not work together, with the remedy."""
        lines = []
        if len(self.packages) > 1:
            names, all_names = " and ".join(self.packages), " ".join(self.packages)
            lines.append(f"{names} contain the same module: pip uninstall {all_names}, then install one")
        built = _built_for(self.packages)
        if self.nvrtc and built and self.nvrtc[0] != built and len(self.packages) == 1:
            lines.append(
                f"{self.packages[0]} with NVRTC {_text(self.nvrtc)}: {_install(self.nvrtc[0])} instead of it, or "
                f"install its own compiler: pip install nvidia-cuda-nvrtc{'-cu12' if built == 12 else ''}"
            )
        for name, other in (("torch", self.torch), ("CuPy", self.cupy), ("NVRTC", self.nvrtc)):
            if self.driver and other and other[0] > self.driver[0]:
                lines.append(
                    f"{name} of CUDA {_text(other)} with a driver for CUDA {_text(self.driver)}: update the driver to "
                    f"{OLDEST_DRIVERS.get(other[0], 'a newer one')} or later, or install {name} for CUDA "
                    + (f"{self.driver[0]}: {_install(self.driver[0])}" if name != "torch" else str(self.driver[0]))
                )
        if self.torch and self.cupy and self.torch[0] != self.cupy[0] and not lines:
            lines.append(
                f"torch of CUDA {_text(self.torch)} beside CuPy of CUDA {_text(self.cupy)}: each works, but CuPy may "
                f"load torch's compiler; {_install(self.torch[0])} instead of {self.packages[0]}"
            )
        return lines


def installed(package: str) -> str | None:
    """Return the version of a package, or ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_versions() -> CudaVersions:
    """Find the versions without importing anything into this process."""
    packages = tuple(name for name in CUPY if installed(name))
    cupy = nvrtc = None
    why_not = ""
    if "cupy" in sys.modules or find_spec("cupy") is not None:
        cupy, nvrtc, why_not = ask_cupy()
    return CudaVersions(driver_version(), torch_version(), cupy, nvrtc, packages, why_not)


def driver_version() -> Version | None:
    """Return the newest CUDA that the driver runs; ``None`` without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else _decode(number.value)


def torch_version() -> Version | None:
    """Return the CUDA that torch was built with. Read it from a file of torch, whose import takes seconds."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "version.py"
        text = file.read_text() if file.exists() else ""
        if match := re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE):
            return int(match[1]), int(match[2])
    return None


def ask_cupy() -> tuple[Version | None, Version | None, str]:
    """Import CuPy in another process. Return the CUDA of its runtime, of its NVRTC, and why these are unknown if so."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_CUPY], capture_output=True, text=True, check=False, timeout=120
        )
        runtime, nvrtc = json.loads(done.stdout)
        return _decode(runtime), (nvrtc[0], nvrtc[1]), ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, None, type(error).__name__
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return None, None, f"unknown: {lines[-1] if lines else 'it says nothing'}"


def _decode(number: int) -> Version:
    """Return the version that CUDA encodes as 1000 * major + 10 * minor."""
    return number // 1000, number % 1000 // 10


def _built_for(packages: tuple[str, ...]) -> int | None:
    """Return the major version of CUDA in the name of the first package of CuPy, if one is installed."""
    return int(packages[0].removeprefix("cupy-cuda").removesuffix("x")) if packages else None


def _install(major: int) -> str:
    """Return the command that installs CuPy for a major version of CUDA."""
    return f"pip install -e '.[{'cupy' if major == 12 else f'cupy{major}'}]'"


def _text(version: Version | None) -> str:
    return f"{version[0]}.{version[1]}" if version else ""
