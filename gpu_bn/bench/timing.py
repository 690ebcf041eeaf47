"""Timing: samples of several calls, taken in turn, of the CPU or of the GPU that torch or CuPy serves.

A timer has ``regimes``, what it can measure, and ``time(call, regime)``, the seconds of one sample. ``cold`` and
``hot`` are a GPU's time, with the call's tensors out of the L2 cache and as the call before has left it. ``wall`` is
the mean of many calls in a row, the CPU's work included.
"""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
import timeit
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpu_bn.plan import Device

TimedCall = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 7, 301
WARM_UP = 3
"""Calls before the first sample."""
SHORTEST = 1e-7
"""The shortest time reported, in seconds: coarse events may measure 0, and ratios divide by times."""
COPIED_BYTES = 512 << 20
"""Size of the tensor whose copy measures a GPU's bandwidth; at most an eighth of the free memory."""
FIRST_CYCLES = 200_000
"""Cycles for which a GPU is kept busy at first: about a tenth of a millisecond."""
SPIN = """extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) { }
}"""


@dataclass(frozen=True)
class Timing:
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
        """Return the samples of a call; raise ``RuntimeError`` if it failed."""
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
    names, errors = list(calls), dict[str, str]()
    samples: dict[str, list[float]] = {name: [] for name in names}

    def each(names: list[str], step: Callable[[str], Any]) -> None:
        for name in names:
            try:
                if name not in errors:
                    step(name)
            except Exception as error:  # any library may raise, as out of memory; the others are timed all the same
                errors[name] = in_words(error)

    each(names, lambda name: [calls[name]() for _ in range(WARM_UP if seconds else 0)])
    end = time.perf_counter() + seconds * len(calls)
    least, most = rounds if seconds else (1, 1)
    order = deque(names)
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        each([*order], lambda name: samples[name].append(timer.time(calls[name], regime)))
        order.rotate(-1)  # so that none of three follows itself, in caches of its own, more often than others
    return Samples({name: found for name, found in samples.items() if name not in errors}, errors)


def in_words(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@dataclass
class CpuTimer:
    """Make calls in a row for about ``batch`` seconds, after one that is not timed; 0 is a single call.

    Before that, wait for ``pause`` seconds, because OpenMP's threads go on spinning for some milliseconds after
    their work and would compete with the next call. The wait is no sleep: a core that wakes up is slow at first.
    ``clock`` may be that of the process, where waiting for other processes should not count.
    """

    batch: float = 0.02
    pause: float = 0.005
    clock: Callable[[], float] = time.perf_counter
    regimes: tuple[str, ...] = ("wall",)

    def time(self, call: TimedCall, _: str = "wall") -> float:
        """Return the seconds of a call."""
        start = time.perf_counter()
        while time.perf_counter() < start + self.pause:
            pass
        calls, timer = 1, timeit.Timer(call, timer=self.clock)
        if self.batch:
            call()  # threads that have gone to sleep wake up
        while (taken := timer.timeit(calls)) < self.batch:
            calls = math.ceil(1.2 * calls * self.batch / max(taken, SHORTEST))
        return taken / calls


# ------------------------------------------------------------------------------------------------------ the GPU
@dataclass
class Gpu:
    """This machine's GPU as a ``library`` serves it, on its current stream. Only ``synchronize`` waits for the device.

    Attributes:
        device: as the planner knows it, without a bandwidth: that is measured.
        smi_id: nvidia-smi's name of it, whichever GPUs this process sees.
        ones: makes an array of so many float32 numbers on the device.
        copy_to: copies the second array to the first.
        event: makes an event; ``done`` says whether the device has reached it, ``elapsed`` the seconds between two.
        wait: keeps the device busy for so many cycles.
        free: gives memory that is not used back to the driver: torch and CuPy keep it from each other.
        profiler: returns what starts the profiler, and what stops it.
    """

    library: str
    device: Device
    smi_id: str
    ones: Callable[[int], Any]
    copy_to: Callable[[Any, Any], Any]
    event: Callable[[], Any]
    done: Callable[[Any], Any]
    elapsed: Callable[[Any, Any], float]
    wait: Callable[[int], Any]
    synchronize: Callable[[], Any]
    free_bytes: Callable[[], int]
    free: Callable[[], Any]
    profiler: Callable[[], tuple[TimedCall, TimedCall]]

    def __post_init__(self) -> None:
        self.cache = self.ones(2 * self.device.l2_bytes // 4)

    def record(self) -> Any:
        """Put an event into the queue and return it."""
        event = self.event()
        event.record()
        return event

    def flush(self) -> None:
        """Fill the L2 cache with something else. It is read: what is written is written back in the call's time."""
        self.cache.sum()

    def copy_bandwidth(self) -> float:
        """Measure a copy on the device: bytes per second, read and written."""
        size = min(COPIED_BYTES, self.free_bytes() // 8)
        target, source = self.ones(size // 4), self.ones(size // 4)
        copy, timer = partial(self.copy_to, target, source), GpuTimer(self)
        copy()
        return 2 * size / statistics.median(timer.time(copy, "cold") for _ in range(21))


def by_torch(torch: Any) -> Gpu:
    """Return the GPU by torch."""
    cuda = torch.cuda
    found = cuda.get_device_properties(cuda.current_device())
    device = Device(
        found.name, 10 * found.major + found.minor, found.multi_processor_count,
        found.shared_memory_per_multiprocessor, found.shared_memory_per_block_optin, found.L2_cache_size, 0.0,
    )  # fmt: skip

    def free() -> None:
        cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()

    return Gpu(
        "torch", device, f"GPU-{found.uuid}",
        ones=lambda count: torch.ones(count, device="cuda"), copy_to=lambda target, source: target.copy_(source),
        event=lambda: cuda.Event(enable_timing=True), done=lambda event: event.query(),
        elapsed=lambda start, end: start.elapsed_time(end) / 1e3,
        wait=cuda._sleep, synchronize=cuda.synchronize, free_bytes=lambda: cuda.mem_get_info()[0], free=free,
        profiler=lambda: (cuda.cudart().cudaProfilerStart, cuda.cudart().cudaProfilerStop),
    )  # fmt: skip


def by_cupy(cupy: Any) -> Gpu:
    """Return the GPU by CuPy, where torch is missing."""
    runtime, spin = cupy.cuda.runtime, cupy.RawKernel(SPIN, "spin")
    found = runtime.getDeviceProperties(runtime.getDevice())
    device = Device(
        found["name"].decode(), 10 * found["major"] + found["minor"], found["multiProcessorCount"],
        found["sharedMemPerMultiprocessor"], found["sharedMemPerBlockOptin"], found["l2CacheSize"], 0.0,
    )  # fmt: skip

    return Gpu(
        "cupy", device, runtime.deviceGetPCIBusId(runtime.getDevice()),
        ones=lambda count: cupy.ones(count, "float32"), copy_to=cupy.copyto,
        event=cupy.cuda.Event, done=lambda event: event.done,
        elapsed=lambda start, end: cupy.cuda.get_elapsed_time(start, end) / 1e3,
        wait=lambda cycles: spin((1,), (1,), (np.int64(cycles),)), synchronize=runtime.deviceSynchronize,
        free_bytes=lambda: runtime.memGetInfo()[0], free=cupy.get_default_memory_pool().free_all_blocks,
        profiler=lambda: (runtime.profilerStart, runtime.profilerStop),
    )  # fmt: skip


def find_gpu() -> tuple[Gpu | None, str]:
    """Find the GPU; return ``None`` and the reason if there is none."""
    reasons = []
    for library, gpu_of in (("torch", by_torch), ("cupy", by_cupy)):
        try:
            module: Any = importlib.import_module(library)
            if module.cuda.is_available():
                return gpu_of(module), ""
            reasons.append(f"{library} sees no CUDA device")
        except ModuleNotFoundError:
            reasons.append(f"{library} is not installed")
        except Exception as error:  # the driver, a build without kernels for the GPU, or no compiler
            reasons.append(f"{library}: {in_words(error)}")
    return None, ", ".join(reasons)


@dataclass
class GpuTimer:
    """Time a call by device events around it; ``wall`` is the mean of a ``row`` of calls.

    An idle device would wait for the CPU between the call's launches, and that time is not the kernels'. So the device
    is kept busy while the CPU queues the call. If it has passed the first event when the CPU is ready, the wait was too
    short; the sample is taken again after a wait twice as long.
    """

    gpu: Gpu
    cycles: int = FIRST_CYCLES
    most_cycles: int = 100_000_000
    row: int = 20
    regimes: tuple[str, ...] = ("cold", "hot", "wall")

    def time(self, call: TimedCall, regime: str) -> float:
        """Return the seconds of a call."""
        self.gpu.synchronize()
        if regime == "wall":
            begin = time.perf_counter()
            for _ in range(self.row):
                call()
            self.gpu.synchronize()
            return (time.perf_counter() - begin) / self.row
        while True:
            if regime == "cold":
                self.gpu.flush()
            self.gpu.wait(self.cycles)
            start = self.gpu.record()
            call()
            end = self.gpu.record()
            late = self.gpu.done(start)
            self.gpu.synchronize()
            if not late:
                break
            if self.cycles >= self.most_cycles:  # a call that waits for the device is always late
                self.cycles = FIRST_CYCLES  # other calls need no such wait
                break
            self.cycles *= 2
        return max(self.gpu.elapsed(start, end), SHORTEST)


Timer = CpuTimer | GpuTimer
