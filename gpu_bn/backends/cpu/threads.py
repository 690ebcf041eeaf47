"""Threads that help the caller's own: one pool for the process.

The caller offers its work to helpers that sleep, does it itself, and at the end calls off who has not begun: with busy
cores a call costs what it costs on one thread. Whatever keeps helpers from starting, the caller's thread is enough.
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

MOST_THREADS = 8
ENVIRONMENT = "GPU_BN_NUM_THREADS"
WORTH = 3 << 19
"""Bytes of input that pay for a thread: to wake one takes 6 us at best and 50 where its core sleeps."""

_threads = 0


def get_num_threads() -> int:
    """Return how many threads a call on a CPU may use.

    Unless set, it is the environment variable GPU_BN_NUM_THREADS. Without it, and where it is 0, it is the number of
    cores that this process may run on (its affinity and its control group's quota), at most 8.

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
        _threads = int(text) or min(_cores(), MOST_THREADS)
    return _threads


def set_num_threads(threads: int) -> None:
    """Set how many threads a call on a CPU may use. Results do not depend on it, to the last bit.

    Args:
        threads: a whole number, at least 1.

    Raises:
        TypeError: no integer.
        ValueError: fewer than one.

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


def threads_for(nbytes: int, worth: int = WORTH) -> int:
    """How many threads pay for an input of so many bytes, of which ``worth`` pay for one."""
    return min(_threads or get_num_threads(), max(nbytes // worth, 1))


def run(work: Callable[[], object], threads: int) -> None:
    """Call ``work`` on the caller's thread and on up to ``threads - 1`` others, and wait for all that have begun.

    ``work`` shares its parts out by itself, and does them all if only one thread calls it. It should not hold the
    interpreter's lock. An exception in any thread is raised here when all have ended; the caller's own comes first.
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
    """What one helper is asked to do; ``work`` is gone when nobody does it or will do it."""

    __slots__ = ("done", "error", "owner", "work")

    def __init__(self, work: Callable[[], object]) -> None:
        self.work: Callable[[], object] | None = work
        self.owner: dict[str, str] = {}
        self.done = allocate_lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def claimed_by(self, who: str) -> bool:
        """Whether the task is this one's, who may be its first; one step for the interpreter, whoever else asks."""
        return self.owner.setdefault("who", who) == who


def _settle(tasks: list[_Task]) -> None:
    """Call off the tasks that have not begun, and wait for the others."""
    for task in tasks:
        if task.claimed_by("caller"):
            task.work = None  # its arrays may go, though it waits in the queue
        while task.work is not None:
            task.done.acquire()


# ----------------------------------------------------------------------------------------------------------- the pool
class _Pool:
    """A queue, and how many helpers wait at it."""

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
            except RuntimeError:  # there can be no more threads, now or at this process's end
                tasks = tasks[: pool.helpers]
    for task in tasks:
        pool.queue.put(task)


def _serve(queue: SimpleQueue[_Task]) -> None:
    """A helper's life."""
    while True:
        _help(queue.get())


def _help(task: _Task) -> None:
    if task.claimed_by("helper"):
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
    os.register_at_fork(after_in_child=_forget_pool)  # a child has none of its parent's threads


# ---------------------------------------------------------------------------------------------------------- the cores
def _cores() -> int:
    """The cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _quota(root: Path, own: Path) -> float:
    """The cores that the process's control groups give it, in either version of the file system; or very many."""
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
        place = base / group.lstrip("/")
        for folder in [place, *place.parents]:  # the path may be the host's: what is not there sets no limit
            if folder.is_relative_to(base):
                quota = min(quota, _quota_of(folder))
    return quota


def _quota_of(folder: Path) -> float:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            allowed, period = " ".join((folder / name).read_text() for name in names).split()
            if float(allowed) > 0:
                return float(allowed) / float(period)
        except (OSError, ValueError):  # none, "max", or another version
            continue
    return float(1 << 20)
