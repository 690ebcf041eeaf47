"""The threads that torch computes with: a team of OpenMP's, which spins for a while before it sleeps.

Helpers of our own (:mod:`gpu_bn.backends.cpu.threads`) sleep between calls, and would ask for the team's cores.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_forked = False


def address() -> tuple[int, int] | None:
    """The addresses of ``GOMP_parallel`` and ``omp_get_thread_num``; ``None`` if there is no team to be had."""
    return None if _forked else _address()


@cache
def _address() -> tuple[int, int] | None:
    """They are those that torch itself is linked to: another library's team would be another one."""
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)  # a child has none of its parent's threads, but OpenMP would wait
