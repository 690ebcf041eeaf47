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
EXTRAS = {12: "cupy", 13: "cupy13"}
"""The extra that installs CuPy for a major version of CUDA."""
CUPY = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy")
"""The packages of CuPy. Only one can be installed: all contain the module ``cupy``. conda and a build from source
install ``cupy``, for any CUDA."""
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
        torch_for_cpu: whether an installed torch was built without CUDA.
    """

    driver: Version | None = None
    torch: Version | None = None
    cupy: Version | None = None
    nvrtc: Version | None = None
    packages: tuple[str, ...] = ()
    why_not: str = ""
    torch_for_cpu: bool = False

    @property
    def descriptions(self) -> dict[str, str]:
        """A description of each known version, by the name of the library."""
        cupy = f"{_text(self.cupy)}, NVRTC {_text(self.nvrtc)}" if self.cupy else self.why_not
        lines = {"driver": _text(self.driver), "torch": _text(self.torch), "CuPy": cupy}
        return {name: line for name, line in lines.items() if line}

    def problems(self) -> list[str]:
        """Return a line for each pair of versions that do not work together, with the remedy."""
        libraries = {"torch": self.torch, "CuPy": self.cupy, "NVRTC": self.nvrtc}
        found = {name: built for name, built in libraries.items() if built}
        lines = self._problems_of_cupy()
        if self.driver and self.driver[0] < min(OLDEST_DRIVERS):
            needed = max([min(OLDEST_DRIVERS), *(built[0] for built in found.values())])
            oldest = OLDEST_DRIVERS.get(needed, "a newer one")
            lines.append(
                f"a driver for CUDA {_text(self.driver)} is too old: update it to {oldest} or later, for CUDA {needed}"
            )
            return lines
        for name, built in found.items():
            if self.driver and built[0] > self.driver[0]:
                lines.append(
                    f"{name} of CUDA {_text(built)} with a driver for CUDA {_text(self.driver)}: update the driver to "
                    f"{OLDEST_DRIVERS.get(built[0], 'a newer one')} or later, or install {name} for CUDA "
                    + str(self.driver[0])
                    + (f": {_install(self.driver[0])}" if name != "torch" and self.driver[0] in EXTRAS else "")
                )
        if self.driver and self.torch_for_cpu:
            install = "pip install" if self.driver[0] >= 13 else "uv pip install --torch-backend auto"
            lines.append(
                f"torch was built without CUDA, with a driver for CUDA {_text(self.driver)}: pip uninstall torch, then "
                f"{install} -e '.[torch]'"
            )
        if self.torch and self.cupy and self.torch[0] != self.cupy[0] and not lines:
            lines.append(
                f"torch of CUDA {_text(self.torch)} beside CuPy of CUDA {_text(self.cupy)}: each works, but CuPy may "
                f"load torch's compiler; {_install(self.torch[0])} instead of {self._cupy_package}"
            )
        return lines

    def _problems_of_cupy(self) -> list[str]:
        """Return a line for each fault of the installed packages of CuPy, whatever the driver and torch."""
        if len(self.packages) > 1:
            every = " ".join(self.packages)
            return [f"{' and '.join(self.packages)} contain the same module: pip uninstall {every}, then install one"]
        built = _built_for(self.packages)
        lines = []
        if self.nvrtc and built and self.nvrtc[0] != built:
            lines.append(
                f"{self.packages[0]} with NVRTC {_text(self.nvrtc)}: {_install(self.nvrtc[0])} instead of it, or "
                f"install its own compiler: pip install {_nvrtc(built)}"
            )
        if self.cupy and self.cupy[0] < min(EXTRAS):
            major = self.driver[0] if self.driver else min(EXTRAS)
            lines.append(
                f"CuPy of CUDA {_text(self.cupy)}: CUDA {min(EXTRAS)} or later is needed: {_install(major)} instead of "
                f"{self._cupy_package}"
            )
        if re.search("nvrtc", self.why_not, re.IGNORECASE):
            major = built or (self.driver or self.torch or (min(EXTRAS), 0))[0]
            lines.append(
                f"CuPy finds no NVRTC, which compiles its kernels: pip install {_nvrtc(major)}, or {_install(major)}"
            )
        return lines

    @property
    def _cupy_package(self) -> str:
        return self.packages[0] if self.packages else "the installed CuPy"


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
    torch = torch_cuda()
    torch_version = None if torch in ("", "None") else _parse(torch)
    return CudaVersions(driver_version(), torch_version, cupy, nvrtc, packages, why_not, torch_for_cpu=torch == "None")


def driver_version() -> Version | None:
    """Return the newest CUDA that the driver runs; ``None`` without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else _decode(number.value)


def torch_cuda() -> str:
    """Return the CUDA that torch was built with, such as "13.0"; "None" for a build without CUDA, "" without torch.

    Read it from a file of torch, whose import takes seconds.
    """
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "version.py"
        text = file.read_text() if file.exists() else ""
        if match := re.search(r"^cuda\b.*=\s*['\"]?(\d+\.\d+|None)", text, re.MULTILINE):
            return match[1]
    return ""


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
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)  # further lines may follow
        lines = errors or done.stderr.strip().splitlines() or ["it says nothing"]
        return None, None, f"unknown: {lines[-1]}"


def _decode(number: int) -> Version:
    """Return the version that CUDA encodes as 1000 * major + 10 * minor."""
    return number // 1000, number % 1000 // 10


def _parse(text: str) -> Version:
    """Return the version that is written as "MAJOR.MINOR"."""
    major, minor = text.split(".")
    return int(major), int(minor)


def _built_for(packages: tuple[str, ...]) -> int | None:
    """Return the major version of CUDA in the name of the first package of CuPy; ``None`` if it has none."""
    match = re.fullmatch(r"cupy-cuda(\d+)x", packages[0]) if packages else None
    return int(match[1]) if match else None


def _install(major: int) -> str:
    """Return the command that installs CuPy for a major version of CUDA, or words if no extra of gpu_bn does."""
    return f"pip install -e '.[{EXTRAS[major]}]'" if major in EXTRAS else f"install CuPy for CUDA {major}"


def _nvrtc(major: int) -> str:
    """Return the requirement of the package of NVRTC for a major version of CUDA, as a shell reads it."""
    return f"nvidia-cuda-nvrtc-cu{major}" if major < 13 else f"'nvidia-cuda-nvrtc=={major}.*'"


def _text(version: Version | None) -> str:
    return f"{version[0]}.{version[1]}" if version else ""
