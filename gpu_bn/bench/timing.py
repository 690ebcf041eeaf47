"""Timing: what a sample is on a CPU and on a GPU, and samples of several calls side by side.

Everything else sees a :class:`Timer`: an object with ``time(call, regime)``, the seconds of one sample.
"""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

TimedCall = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 7, 301
WARM_UP = 3
"""Calls before the first sample."""
FIRST_CYCLES = 200_000
"""Cycles for which a GPU is kept busy at first: about a tenth of a millisecond."""
SHORTEST = 1e-7
"""The shortest time reported, in seconds: coarse events may measure 0, and ratios divide by times."""


class Timer(Protocol):
    """What times a call.

    Attributes:
        regimes: what it can measure. ``cold`` and ``hot`` are a GPU's time, with the call's tensors out of the L2 cache
            and as the call before has left it. ``wall`` is the mean of many calls in a row, the CPU's work included.
    """

    regimes: tuple[str, ...]

    def time(self, call: TimedCall, regime: str) -> float:
        """Return the seconds of one sample."""


class Timing(NamedTuple):
    """Samples in seconds: the median, the quartiles, and how many there were."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Summarise some samples, at least one."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
        return Timing(median, low, high, len(samples))

    @property
    def spread(self) -> float | None:
        """The interquartile range; ``None`` for a single sample."""
        return self.high - self.low if self.samples > 1 else None


@dataclass(frozen=True)
class Samples:
    """The samples of calls that were timed in turn, by name; and what went wrong with the others."""

    seconds: dict[str, list[float]]
    errors: dict[str, str]

    def of(self, name: str) -> list[float]:
        """Return the samples of a call.

        Raises:
            RuntimeError: it failed.
        """
        if name in self.errors:
            raise RuntimeError(f"{name}: {self.errors[name]}")
        return self.seconds[name]

    def median(self, name: str) -> float:
        """Return the median of a call's samples, in seconds."""
        return statistics.median(self.of(name))

    def ratio(self, name: str, other: str) -> float:
        """Return the median ratio of neighbouring samples: below 1, ``name`` is faster than ``other``."""
        return statistics.median(a / b for a, b in zip(self.of(name), self.of(other), strict=False))


def take_samples(
    calls: Mapping[str, TimedCall],
    timer: Timer,
    regime: str,
    seconds: float,
    rounds: tuple[int, int] = (LEAST_ROUNDS, MOST_ROUNDS),
) -> Samples:
    """Time calls in turn, for ``seconds`` a call; 0 means once each. The order changes from round to round.

    ``rounds`` are the least and the most, whatever time they take.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}

    def guarded(name: str, step: Callable[[str], None]) -> None:
        try:
            if name not in errors:
                step(name)
        except Exception as error:  # of any library, such as out of memory: the others are timed all the same
            errors[name] = in_words(error)

    def warm_up(name: str) -> None:
        for _ in range(WARM_UP if seconds else 0):
            calls[name]()

    def sample(name: str) -> None:
        samples[name].append(timer.time(calls[name], regime))

    for name in calls:
        guarded(name, warm_up)
    end = time.perf_counter() + seconds * len(calls)
    least, most = rounds if seconds else (1, 1)
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            guarded(name, sample)
    return Samples({name: found for name, found in samples.items() if name not in errors}, errors)


def in_words(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@dataclass
class CpuTimer:
    """Makes calls in a row for about ``batch`` seconds, after one that is not timed; 0 is a single call.

    Before that it waits for ``pause`` seconds, because OpenMP's threads go on spinning for some milliseconds after
    their work and would compete with the next call. It does not sleep: a core that wakes up is slow at first.
    """

    batch: float = 0.02
    pause: float = 0.005
    clock: Callable[[], float] = time.perf_counter
    """Such as that of the process, where waiting for other processes should not count."""
    regimes: tuple[str, ...] = ("wall",)

    def time(self, call: TimedCall, regime: str = "wall") -> float:
        """Return the seconds of a call."""
        del regime
        start = time.perf_counter()
        while time.perf_counter() < start + self.pause:
            pass
        calls, timer = 1, timeit.Timer(call, timer=self.clock)
        if self.batch:
            call()  # threads that have gone to sleep wake up
        while (taken := timer.timeit(calls)) < self.batch:
            calls = math.ceil(1.2 * calls * self.batch / max(taken, SHORTEST))
        return taken / calls


class Gpu(Protocol):
    """What a :class:`GpuTimer` needs of a device; all methods but ``synchronize`` only queue work."""

    def record(self) -> Any:
        """Put an event into the queue and return it."""

    def done(self, event: Any) -> bool:
        """Whether the device has reached the event."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two events."""

    def wait(self, cycles: int) -> None:
        """Keep the device busy."""

    def flush(self) -> None:
        """Fill the L2 cache with something else."""

    def synchronize(self) -> None:
        """Wait for the device."""


@dataclass
class GpuTimer:
    """Times a call by device events around it.

    An idle device would wait for the CPU between the call's launches, and that time is not the kernels'. So the device
    is kept busy while the CPU queues the call. If it has passed the first event when the CPU is ready, the wait was too
    short; the sample is taken again after a wait twice as long.
    """

    gpu: Gpu
    cycles: int = FIRST_CYCLES
    most_cycles: int = 100_000_000
    row: int = 20
    """Calls in a row, of which ``wall`` is the mean."""
    regimes: tuple[str, ...] = ("cold", "hot", "wall")

    def time(self, call: TimedCall, regime: str) -> float:
        """Return the seconds of a call."""
        return self._wall(call) if regime == "wall" else self._events(call, cold=regime == "cold")

    def _events(self, call: TimedCall, cold: bool) -> float:
        while True:
            self.gpu.synchronize()
            if cold:
                self.gpu.flush()
            self.gpu.wait(self.cycles)
            start = self.gpu.record()
            call()
            end = self.gpu.record()
            late = self.gpu.done(start)
            self.gpu.synchronize()
            if late and self.cycles < self.most_cycles:
                self.cycles *= 2
                continue
            if late:  # a call that waits for the device is always late: the others need not wait so long
                self.cycles = FIRST_CYCLES
            return max(self.gpu.elapsed(start, end), SHORTEST)

    def _wall(self, call: TimedCall) -> float:
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(self.row):
            call()
        self.gpu.synchronize()
        return (time.perf_counter() - start) / self.row
