"""A small pool of threads that share a list of independent tasks with the caller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from gpu_bn.backends.cpu.threads import get_num_threads

__all__ = ["get_num_threads", "quiet", "run"]

T = TypeVar("T")

UFUNC_BUFFER = 512
"""Elements. NumPy's default of 8192 makes its iterator copy broadcast operands of inner length up to 4096."""
_pool: ThreadPoolExecutor | None = None


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
        _pool = ThreadPoolExecutor(63, thread_name_prefix="gpu_bn")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has none of its parent's threads
