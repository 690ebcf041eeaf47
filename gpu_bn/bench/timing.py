"""Timing: what a sample is on a CPU and on a GPU, and samples of several calls side by side.

The seam is a :class:`Timer`: an object with ``time(call, regime)``, the seconds of one sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

Call = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 7, 301
WARM_UP = 3
"""Calls before the first sample."""
FIRST_CYCLES = 200_000
"""That a GPU is kept busy, at first: about a tenth of a millisecond."""
SHORTEST = 1e-7
"""Seconds; events may be too coarse to tell a shorter time from none, by which nothing could be divided."""


class Timer(Protocol):
    """What times a call.

    Attributes:
        regimes: what it can measure; ``cold`` and ``hot`` are a GPU's time with the call's tensors out of the L2 cache
            and as the call before has left it, ``wall`` is a call's share of many in a row, the CPU's work included.
    """

    regimes: tuple[str, ...]

    def time(self, call: Call, regime: str) -> float:
        """Seconds of one sample."""


class Timing(NamedTuple):
    """Samples in seconds: the median, the quartiles, and how many there were."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Of some samples, one at least."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
        return Timing(median, low, high, len(samples))


@dataclass(frozen=True)
class Samples:
    """The samples of calls that were timed in turn, by name; what went wrong with the others."""

    seconds: dict[str, list[float]]
    errors: dict[str, str]

    def ratio(self, name: str, other: str) -> float:
        """The median ratio of neighbouring samples: below 1, ``name`` is faster than ``other``."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=False)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def measure(calls: Mapping[str, Call], timer: Timer, regime: str, seconds: float) -> Samples:
    """Time calls in turn, the order changing from round to round, for ``seconds`` a call; 0 means each once."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    for name, call in calls.items():
        _guarded(errors, name, partial(_warm_up, call, WARM_UP if seconds else 0))
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(MOST_ROUNDS if seconds else 1):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            if name not in errors:
                _guarded(errors, name, partial(_sample, samples[name], calls[name], timer, regime))
    return Samples({name: found for name, found in samples.items() if name not in errors}, errors)


def _warm_up(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _sample(samples: list[float], call: Call, timer: Timer, regime: str) -> None:
    samples.append(timer.time(call, regime))


def _guarded(errors: dict[str, str], name: str, step: Call) -> None:
    try:
        step()
    except Exception as error:  # of any library, such as out of memory: the others are timed all the same
        errors[name] = said(error)


def said(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@dataclass
class CpuTimer:
    """Calls in a row for ``batch`` seconds, one at least.

    Before, the process waits without sleeping (a core that wakes up is slow at first), because the threads of OpenMP go
    on spinning for some milliseconds after their work, and would compete with the next call.
    """

    batch: float = 0.02
    pause: float = 0.005
    regimes: tuple[str, ...] = ("wall",)

    def time(self, call: Call, regime: str = "wall") -> float:
        """Seconds of a call."""
        del regime
        start = time.perf_counter()
        while time.perf_counter() < start + self.pause:
            pass
        calls, start = 0, time.perf_counter()
        while True:
            call()
            calls += 1
            taken = time.perf_counter() - start
            if taken >= self.batch:
                return taken / calls


class Gpu(Protocol):
    """What a :class:`GpuTimer` needs of a device; everything is queued but ``synchronize``."""

    def record(self) -> Any:
        """An event at this place in the queue."""

    def done(self, event: Any) -> bool:
        """Whether the device has come to the event."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events."""

    def wait(self, cycles: int) -> None:
        """Keep the device busy."""

    def flush(self) -> None:
        """Fill the L2 cache with something else."""

    def synchronize(self) -> None:
        """Wait for the device."""


@dataclass
class GpuTimer:
    """Device events around a call.

    A device that has nothing else to do would wait for the CPU between the call's launches, and that is not the
    kernels' time. So it is kept busy while the CPU queues the call: if the first event has passed when the CPU is
    ready, the wait was too short, and the sample is taken again after one twice as long.
    """

    gpu: Gpu
    cycles: int = FIRST_CYCLES
    most_cycles: int = 100_000_000
    row: int = 20
    """Calls in a row, of which ``wall`` is the mean."""
    regimes: tuple[str, ...] = ("cold", "hot", "wall")

    def time(self, call: Call, regime: str) -> float:
        """Seconds of a call."""
        return self._wall(call) if regime == "wall" else self._events(call, cold=regime == "cold")

    def _events(self, call: Call, cold: bool) -> float:
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
            if late:  # a call that waits for the device always is: the others need not wait so long
                self.cycles = FIRST_CYCLES
            return max(self.gpu.elapsed(start, end), SHORTEST)

    def _wall(self, call: Call) -> float:
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(self.row):
            call()
        self.gpu.synchronize()
        return (time.perf_counter() - start) / self.row
