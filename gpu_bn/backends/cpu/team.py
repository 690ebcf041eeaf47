"""The OpenMP team of threads that torch computes with. It spins for a while before it sleeps.

Calls through :mod:`gpu_bn.backends.cpu.doors` run on it. The threads of :mod:`gpu_bn.backends.cpu.threads`, which sleep
between calls, would compete with it for cores.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_forked = False


def address() -> tuple[int, int] | None:
    """Return the addresses of ``GOMP_parallel`` and ``omp_get_thread_num``; ``None`` if this process has no team."""
    return None if _forked else _address()


@cache
def _address() -> tuple[int, int] | None:
    """Look the functions up in torch's own library: another OpenMP library would have another team."""
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    start, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return start, number


def _forget_team() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # a child lacks its parent's threads, but OpenMP would wait for them
    os.register_at_fork(after_in_child=_forget_team)
