"""Describe what the numbers depend on: processor, GPU, driver, clocks, versions, commit; no host name and no path."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bn import __version__, get_num_threads
from gpu_bn.bench.timing import CpuTimer, Gpu, describe_error
from gpu_bn.cli.cuda_versions import installed
from gpu_bn.cli.info import blas

PACKAGES = (
    "numpy", "numba", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cudnn-frontend", "apex", "ml_dtypes",
)  # fmt: skip
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
"""The properties requested from nvidia-smi, in MHz, W and degrees Celsius."""


def machine(gpu: Gpu | None, copy_bandwidth: float) -> dict[str, Any]:
    """Return the facts for JSON; ``copy_bandwidth`` is measured on the timed device, in bytes per second."""
    facts: dict[str, Any] = {
        "gpu_bn": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": {"numpy backend": get_num_threads(), "BLAS": blas()},
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "copy_bandwidth": copy_bandwidth,
        "gpu": None,
    }
    if facts["packages"].get("torch"):
        try:
            torch: Any = import_module("torch")
            facts["threads"]["torch"] = torch.get_num_threads()
            cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
            facts |= {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else int(cudnn)}
        except Exception as error:  # such as a missing library that torch loads
            facts |= {"cuda": None, "cudnn": None, "torch": describe_error(error)}
    if gpu is not None:
        names = ("name", "arch", "sms", "l2_bytes", "shared_per_block")
        facts["gpu"] = {name: getattr(gpu.device, name) for name in names} | smi(gpu.smi_id)
    return facts


def smi(gpu_id: str) -> dict[str, str]:
    """Return the driver and the clocks of a GPU by :data:`SMI`; if nvidia-smi fails, ``unknown`` has the reason."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits", f"--id={gpu_id}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unknown": f"nvidia-smi cannot be run ({type(error).__name__})"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"unknown": f"nvidia-smi: {lines[-1] if lines else f'exit code {done.returncode}'}"}
    return dict(zip(SMI, map(str.strip, lines[0].split(",")), strict=False))


def clocks(facts: dict[str, str]) -> str:
    """Describe the result of :func:`smi` in words: the driver, and the clocks beside the highest possible ones."""
    if "unknown" in facts:
        return f"driver and clocks are not known: {facts['unknown']}"
    driver, sm, memory, most_sm, most_memory, watts, celsius = (facts.get(name, "?") for name in SMI)
    return (
        f"driver {driver}, SM clock {sm} of {most_sm} MHz, memory {memory} of {most_memory} MHz, {watts} W, {celsius} C"
    )


def device_and_packages(facts: dict[str, Any]) -> tuple[str, str]:
    """Return the timed device in words, and the packages with their versions."""
    device = facts["gpu"]["name"] if facts["gpu"] else f"{facts['processor']}, {facts['cores']} cores"
    return device, ", ".join(f"{name} {version}" for name, version in facts["packages"].items())


def commit() -> str | None:
    """Return the commit of the clone, marked if files differ from it; ``None`` for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """Return the model of the CPU from ``/proc/cpuinfo``, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cpu_copy_bandwidth(size: int) -> float:
    """Measure a copy of ``size`` bytes by NumPy: bytes read and written per second, the median of seven samples."""
    copy, timer = partial(np.copyto, np.ones(size, np.uint8), np.ones(size, np.uint8)), CpuTimer(pause=0)
    return 2 * size / statistics.median(timer.time(copy) for _ in range(7))
