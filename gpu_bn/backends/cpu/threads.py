"""A pool of helper threads, one for the process.

The caller offers its work to sleeping helpers, works itself, and at the end cancels the tasks that no helper has begun.
So with busy cores a call takes no longer than on one thread, and it completes even if no helper can start.
"""

from __future__ import annotations

import operator
import os
import sys
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

__all__ = ["get_num_threads", "run", "set_num_threads", "threads_for"]

MAX_THREADS = 8
ENVIRONMENT = "GPU_BN_NUM_THREADS"
BYTES_PER_THREAD = 3 << 19
"""Bytes of input that justify one thread: waking it takes 6 us at best, and 50 if its core sleeps."""

_threads = 0


def get_num_threads() -> int:
    """Return how many threads a call on a CPU may use.

    Unless :func:`set_num_threads` has set it, this is the environment variable GPU_BN_NUM_THREADS. If that is absent or
    0, it is the number of cores that the process may run on (by its affinity and its control group's quota), at most 8.

    Returns:
        The number of threads, at least 1.

    Raises:
        ValueError: the environment variable is not a whole number.

    Examples:
        >>> import gpu_bn
        >>> gpu_bn.get_num_threads() >= 1
        True
    """
    global _threads
    if not _threads:
        text = os.environ.get(ENVIRONMENT, "0").strip()
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"the environment variable {ENVIRONMENT} should be a whole number, got {text!r}")
        _threads = int(text) or min(_cores(), MAX_THREADS)
    return _threads


def set_num_threads(threads: int) -> None:
    """Set how many threads a call of the ``cpu`` backend may use. Results do not depend on it, bit for bit.

    For torch tensors the limit is the smaller of this and ``torch.get_num_threads()``.

    Args:
        threads: a whole number, at least 1.

    Raises:
        TypeError: ``threads`` is not an integer.
        ValueError: ``threads`` is less than 1.

    Examples:
        >>> import gpu_bn
        >>> before = gpu_bn.get_num_threads()
        >>> gpu_bn.set_num_threads(1)
        >>> gpu_bn.get_num_threads()
        1
        >>> gpu_bn.set_num_threads(before)
    """
    try:
        threads = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads should be an int, got {type(threads).__name__}") from None
    if threads < 1:
        raise ValueError(f"expected at least 1 thread, got {threads}")
    global _threads
    _threads = threads


def threads_for(nbytes: int, bytes_per_thread: int) -> int:
    """Return how many threads to use for an input of ``nbytes``: one for each ``bytes_per_thread``, at least 1."""
    return min(_threads or get_num_threads(), max(nbytes // bytes_per_thread, 1))


def run(work: Callable[[], object], threads: int) -> None:
    """Call ``work`` on the caller's thread and on up to ``threads - 1`` helpers, and wait for all that have begun.

    ``work`` divides its parts among its callers, and does them all if only one thread calls it. It should not hold the
    interpreter's lock. When all threads have ended, an exception of any of them is raised, the caller's own first.
    """
    tasks = [_Task(work) for _ in range(threads - 1)]
    try:
        try:
            _offer(tasks)
            work()
        finally:
            _settle(tasks)
    finally:
        _settle(tasks)  # again: an interrupt may have ended the first
    for task in tasks:
        if task.error is not None:
            raise task.error


class _Task:
    """The work offered to one helper; ``work`` is ``None`` once it is done or cancelled."""

    __slots__ = ("done", "error", "owner", "work")

    def __init__(self, work: Callable[[], object]) -> None:
        self.work: Callable[[], object] | None = work
        self.owner: dict[str, str] = {}
        self.done = allocate_lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def claim(self, who: str) -> bool:
        """Claim the task, and tell whether it belongs to ``who``: the first to claim it. One atomic step."""
        return self.owner.setdefault("who", who) == who


def _settle(tasks: list[_Task]) -> None:
    """Cancel the tasks that have not begun, and wait for the others."""
    for task in tasks:
        if task.claim("caller"):
            task.work = None  # frees its arrays, although the task stays in the queue
        while task.work is not None:
            task.done.acquire()


# ----------------------------------------------------------------------------------------------------------- the pool
class _Pool:
    """A queue of tasks, and the number of helpers that serve it."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[_Task] = SimpleQueue()
        self.helpers = 0
        self.starting = allocate_lock()


_pool = _Pool()


def _offer(tasks: list[_Task]) -> None:
    pool = _pool
    if sys.is_finalizing():  # helpers no longer run
        return
    if pool.helpers < len(tasks):
        with pool.starting:
            try:
                while pool.helpers < len(tasks):
                    start_new_thread(_serve, (pool.queue,))
                    pool.helpers += 1
            except RuntimeError:  # no more threads can start: too many, or the process is ending
                tasks = tasks[: pool.helpers]
    for task in tasks:
        pool.queue.put(task)


def _serve(queue: SimpleQueue[_Task]) -> None:
    """Do tasks from the queue forever: the body of a helper thread."""
    while True:
        _help(queue.get())


def _help(task: _Task) -> None:
    if task.claim("helper"):
        try:
            assert task.work is not None
            task.work()
        except BaseException as error:
            task.error = error
        finally:
            task.work = None
            task.done.release()


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child process has no threads of its parent


# ---------------------------------------------------------------------------------------------------------- the cores
def _cores() -> int:
    """Return how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _quota(root: Path, own: Path) -> float:
    """Return the cores that the process's control groups (version 1 or 2) allow; 2**20 if they set no limit."""
    quota = float(1 << 20)
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return quota
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        own_folder = base / group.lstrip("/")
        for folder in [own_folder, *own_folder.parents]:  # a path of the host may not exist here: no limit
            if folder.is_relative_to(base):
                quota = min(quota, _quota_of(folder))
    return quota


def _quota_of(folder: Path) -> float:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            allowed, period = " ".join((folder / name).read_text() for name in names).split()
            if float(allowed) > 0:
                return float(allowed) / float(period)
        except (OSError, ValueError):  # no such file, "max", or the other version
            continue
    return float(1 << 20)
