"""A small pool of threads that share a list of independent tasks with the caller."""

from __future__ import annotations

import operator
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

T = TypeVar("T")

UFUNC_BUFFER = 512
"""Elements. NumPy's default of 8192 makes its iterator copy broadcast operands of inner length up to 4096."""
MOST_THREADS = 8
ENVIRONMENT = "GPU_BN_NUM_THREADS"

_threads = 0
_pool: ThreadPoolExecutor | None = None


def get_num_threads() -> int:
    """How many threads the NumPy backend may use.

    Unless set, the environment variable GPU_BN_NUM_THREADS, or else the cores this process may run on, at most 8.
    """
    global _threads
    if not _threads:
        _threads = int(os.environ.get(ENVIRONMENT, "0")) or min(_cores(), MOST_THREADS)
    return _threads


def set_num_threads(threads: int) -> None:
    """Set how many threads the NumPy backend may use. Results do not depend on it, to the last bit.

    Raises:
        TypeError: no integer.
        ValueError: fewer than one.
    """
    try:
        threads = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads should be an int, got {type(threads).__name__}") from None
    if threads < 1:
        raise ValueError(f"expected at least 1 thread, got {threads}")
    global _threads
    if threads != _threads:
        _forget_pool()
    _threads = threads


@contextmanager
def quiet() -> Iterator[None]:
    """In this thread: no floating-point warnings, and the ufunc buffer that suits tiles."""
    with np.errstate(all="ignore"):
        np.setbufsize(UFUNC_BUFFER)  # undone with the errstate
        yield


def run(task: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Call ``task`` on every item, on the caller's thread and up to ``threads - 1`` others, all of them quiet."""
    threads = min(threads, len(items))
    if threads <= 1:
        with quiet():
            for item in items:
                task(item)
        return
    queue = deque(items)

    def drain() -> None:
        with quiet():
            while queue:
                try:
                    item = queue.popleft()
                except IndexError:  # another thread took the last one
                    return
                task(item)

    futures = [_executor().submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        queue.clear()
        for future in futures:
            if not future.cancel():
                future.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(get_num_threads() - 1, 1), thread_name_prefix="gpu_bn")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has none of its parent's threads
