"""What the numbers depend on: processor, GPU, driver, clocks, versions, commit. No host name, no path."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bn import __version__, get_num_threads
from gpu_bn._info import blas, installed
from gpu_bn.bench.gpus import AnyGpu

PACKAGES = ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cudnn-frontend", "apex", "ml_dtypes")
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
"""What nvidia-smi is asked for: MHz, W, degrees Celsius."""


def machine(gpu: AnyGpu | None, copy_bandwidth: float) -> dict[str, Any]:
    """The facts, ready for JSON; ``copy_bandwidth`` in bytes per second, of the device that is timed."""
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
    torch_version = facts["packages"].get("torch")
    if torch_version:
        torch: Any = import_module("torch")
        facts["threads"]["torch"] = torch.get_num_threads()
        facts["cuda"], facts["cudnn"] = torch.version.cuda, _cudnn(torch)
    if gpu is not None:
        device = gpu.device
        facts["gpu"] = {
            "name": device.name, "arch": device.arch, "sms": device.sms, "l2_bytes": device.l2_bytes,
            "shared_per_block": device.shared_per_block, **smi(),
        }  # fmt: skip
    return facts


def smi() -> dict[str, str]:
    """Driver and clocks by nvidia-smi; empty without it. Asked again at the end, it shows a GPU that slowed down."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return dict(zip(SMI, map(str.strip, lines[0].split(",")), strict=False)) if done.returncode == 0 and lines else {}


def commit() -> str | None:
    """The commit of a checkout, marked if files have changed since; ``None`` for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The CPU's model, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_copy_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of NumPy's copy of ``size`` bytes; the median of some."""
    source = np.ones(size, np.uint8)
    target = np.ones_like(source)
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - start)
    return 2 * size / sorted(taken)[3]


def _cudnn(torch: Any) -> int | None:
    found = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if found is None else int(found)
