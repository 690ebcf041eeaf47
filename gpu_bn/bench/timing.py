"""Timing: samples of several calls, taken in turn, on the CPU or on the GPU that torch or CuPy sees.

A timer has ``regimes``, the kinds of time that it measures, and ``time(call, regime)``, which returns one sample in
seconds. ``cold`` and ``hot`` are the GPU's time with the call's tensors out of the L2 cache, and with the cache as the
previous call left it. ``wall`` is the mean time of several calls in a row, the CPU's work included.
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
"""The number of calls before the first sample."""
SHORTEST = 1e-7
"""The shortest time reported, in seconds: coarse events may measure 0, and ratios divide by times."""
COPIED_BYTES = 512 << 20
"""Bytes of the tensor whose copy measures a GPU's bandwidth; at most an eighth of the free memory."""
FIRST_CYCLES = 200_000
"""Cycles for which a GPU is kept busy at first: about a tenth of a millisecond."""
SPIN = """extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) { }
}"""


@dataclass(frozen=True)
class Timing:
    """The median and the quartiles of samples in seconds, and the number of samples."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def from_samples(samples: list[float]) -> Timing:
        """Summarise one or more samples."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
        return Timing(median, low, high, len(samples))

    @property
    def spread(self) -> float | None:
        """The interquartile range; ``None`` for a single sample."""
        return self.high - self.low if self.samples > 1 else None


@dataclass(frozen=True)
class Samples:
    """The samples in seconds of each call, by the call's name, and the errors of the calls that failed."""

    seconds: dict[str, list[float]]
    errors: dict[str, str]

    def times(self, name: str) -> list[float]:
        """Return the samples of a call; raise ``RuntimeError`` if it failed."""
        if name in self.errors:
            raise RuntimeError(f"{name}: {self.errors[name]}")
        return self.seconds[name]

    def median(self, name: str) -> float:
        """Return the median of a call's samples."""
        return statistics.median(self.times(name))

    def ratio(self, name: str, other: str) -> float:
        """Return the median ratio of samples of one round; if it is below 1, ``name`` is faster than ``other``."""
        return statistics.median(a / b for a, b in zip(self.times(name), self.times(other), strict=False))


def take_samples(
    calls: Mapping[str, TimedCall],
    timer: Timer,
    regime: str,
    seconds: float,
    rounds: tuple[int, int] = (LEAST_ROUNDS, MOST_ROUNDS),
) -> Samples:
    """Time calls in turn, each for ``seconds``; with 0, once. The order changes from round to round.

    ``rounds`` are the fewest and the most rounds, whatever time they take.
    """
    order, errors = deque(calls), dict[str, str]()
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def for_each_call(step: Callable[[str], Any]) -> None:
        for name in order:
            try:
                if name not in errors:
                    step(name)
            except Exception as error:  # any library may raise, such as out of memory; the other calls are still timed
                errors[name] = describe_error(error)

    for_each_call(lambda name: [calls[name]() for _ in range(WARM_UP if seconds else 0)])
    end = time.perf_counter() + seconds * len(calls)
    least, most = rounds if seconds else (1, 1)
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for_each_call(lambda name: samples[name].append(timer.time(calls[name], regime)))
        order.rotate(-1)  # with three calls or more, none follows itself, which would find its data in the caches
    return Samples({name: times for name, times in samples.items() if name not in errors}, errors)


def describe_error(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@dataclass
class CpuTimer:
    """A timer that makes calls in a row for about ``batch`` seconds, after one untimed call; 0 is a single call.

    Before that it waits for ``pause`` seconds, because the threads of OpenMP spin for some milliseconds after their
    work and would compete with the next call. It does not sleep: a core that wakes up is slow at first. With
    ``clock=time.process_time``, time in which other processes run does not count.
    """

    batch: float = 0.02
    pause: float = 0.005
    clock: Callable[[], float] = time.perf_counter
    regimes: tuple[str, ...] = ("wall",)

    def time(self, call: TimedCall, _: str = "wall") -> float:
        """Return the mean seconds of a call."""
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
    """This machine's GPU by the functions of ``library``, on its current stream.

    Attributes:
        device: the planner's description, without a bandwidth, which is measured.
        smi_id: the GPU's identifier for nvidia-smi, whichever GPUs this process sees.
        ones: allocates that many float32 ones on the device.
        copy_to: copies the second array to the first.
        event: makes an event; ``done`` tells whether the device has reached it, ``elapsed`` returns the seconds
            between two.
        wait: keeps the device busy for that many cycles, without waiting for it.
        free: returns unused memory to the driver: torch and CuPy cannot use what the other has cached.
        profiler: returns two functions, which start and stop the profiler.
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
        """Put an event into the stream and return it."""
        event = self.event()
        event.record()
        return event

    def flush(self) -> None:
        """Fill the L2 cache by reading other memory. Written memory would be written back during the timed call."""
        self.cache.sum()

    def copy_bandwidth(self) -> float:
        """Measure a copy on the device: bytes read and written per second."""
        size = min(COPIED_BYTES, self.free_bytes() // 8)
        target, source = self.ones(size // 4), self.ones(size // 4)
        copy, timer = partial(self.copy_to, target, source), GpuTimer(self)
        copy()
        return 2 * size / statistics.median(timer.time(copy, "cold") for _ in range(21))


def torch_gpu(torch: Any) -> Gpu:
    """Return the GPU by the functions of torch."""
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


def cupy_gpu(cupy: Any) -> Gpu:
    """Return the GPU by the functions of CuPy, for machines without torch."""
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
    """Return the GPU and an empty text, or ``None`` and why there is no GPU."""
    reasons = []
    for library, make_gpu in (("torch", torch_gpu), ("cupy", cupy_gpu)):
        try:
            module: Any = importlib.import_module(library)
            if module.cuda.is_available():
                return make_gpu(module), ""
            reasons.append(f"{library} sees no CUDA device")
        except ModuleNotFoundError:
            reasons.append(f"{library} is not installed")
        except Exception as error:  # the driver, a build without kernels for the GPU, or no compiler
            reasons.append(f"{library}: {describe_error(error)}")
    return None, ", ".join(reasons)


@dataclass
class GpuTimer:
    """A timer with device events around a call; ``wall`` is the mean of ``row`` calls by the CPU's clock.

    An idle device would wait for the CPU between the launches of a call, and that time does not belong to the kernels.
    So the device is kept busy while the CPU queues the call. If it has passed the first event when the CPU has queued
    all, the wait was too short: the sample is taken again after a wait twice as long.
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
            if not late or self.cycles >= self.most_cycles:
                break
            self.cycles *= 2
        if late:  # a call that waits for the device is always late; the next call may need no such wait
            self.cycles = FIRST_CYCLES
        return max(self.gpu.elapsed(start, end), SHORTEST)


Timer = CpuTimer | GpuTimer
