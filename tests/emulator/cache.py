"""Keep compiled kernels on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GPU_BN_COMPILE_CACHE", Path(base) / "gpu_bn" / "compile"))


def cached_path(key: object) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache_directory() / f"{digest[:32]}.json"


def write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)  # atomic: several test processes may write
