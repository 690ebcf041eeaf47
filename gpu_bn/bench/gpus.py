"""The GPU of this machine, through torch or CuPy: its events, its cache, its properties, the bandwidth of a copy.

The ``device`` of each has no bandwidth: that is measured. All work goes to the library's current stream.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from gpu_bn.bench.timing import GpuTimer, in_words
from gpu_bn.plan import Device

COPIED_BYTES = 512 << 20
"""Size of the tensor whose copy measures the bandwidth; at most an eighth of the free memory."""
SPIN = """extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) { }
}"""


class TorchGpu:
    """A GPU by torch; see :class:`gpu_bn.bench.timing.Gpu`."""

    def __init__(self) -> None:
        import torch

        self.torch: Any = torch
        found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        block = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        self.device = Device(
            found.name, 10 * found.major + found.minor, found.multi_processor_count,
            found.shared_memory_per_multiprocessor, block, found.L2_cache_size, 0.0,
        )  # fmt: skip
        self.smi_id = f"GPU-{found.uuid}" if hasattr(found, "uuid") else ""
        """nvidia-smi's name of the device, whichever ones this process sees; empty if torch does not know it."""
        self.cache = torch.ones(2 * self.device.l2_bytes // 4, device="cuda")
        self.synchronize = torch.cuda.synchronize
        self.wait: Callable[[int], None] = self.torch.cuda._sleep

    def record(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def done(self, event: Any) -> bool:
        return bool(event.query())

    def elapsed(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def flush(self) -> None:
        self.cache.sum()  # read, not written: a dirty cache would be written back in the call's time

    def free(self) -> None:
        """Give memory that is not used back to the driver: torch and CuPy keep it from each other."""
        self.torch.cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()

    def copy_bandwidth(self) -> float:
        """Measure a copy on the device: bytes per second, read and written."""
        free, _ = self.torch.cuda.mem_get_info()
        source = self.torch.ones(min(COPIED_BYTES, free // 8), dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        return _bandwidth(self, lambda: target.copy_(source), source.numel())

    def profiler(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return what starts the profiler, and what stops it."""
        runtime = self.torch.cuda.cudart()
        return runtime.cudaProfilerStart, runtime.cudaProfilerStop


class CupyGpu:
    """A GPU by CuPy, where torch is missing; see :class:`gpu_bn.bench.timing.Gpu`."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.runtime = runtime = self.cupy.cuda.runtime
        found = runtime.getDeviceProperties(runtime.getDevice())
        self.device = Device(
            found["name"].decode(), 10 * found["major"] + found["minor"], found["multiProcessorCount"],
            found["sharedMemPerMultiprocessor"], found["sharedMemPerBlockOptin"], found["l2CacheSize"], 0.0,
        )  # fmt: skip
        self.smi_id: str = runtime.deviceGetPCIBusId(runtime.getDevice())
        self.cache = self.cupy.ones(2 * self.device.l2_bytes // 4, "float32")
        self.spin = self.cupy.RawKernel(SPIN, "spin")
        self.synchronize: Callable[[], None] = runtime.deviceSynchronize

    def record(self) -> Any:
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def done(self, event: Any) -> bool:
        return bool(event.done)

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self.cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def wait(self, cycles: int) -> None:
        import numpy as np

        self.spin((1,), (1,), (np.int64(cycles),))

    def flush(self) -> None:
        self.cache.sum()

    def free(self) -> None:
        """Give memory that is not used back to the driver."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def copy_bandwidth(self) -> float:
        """Measure a copy on the device: bytes per second, read and written."""
        free, _ = self.runtime.memGetInfo()
        source = self.cupy.ones(min(COPIED_BYTES, free // 8), "uint8")
        target = self.cupy.empty_like(source)
        return _bandwidth(self, lambda: self.cupy.copyto(target, source), source.size)

    def profiler(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return what starts the profiler, and what stops it."""
        return self.runtime.profilerStart, self.runtime.profilerStop


AnyGpu = TorchGpu | CupyGpu


def find() -> tuple[AnyGpu | None, str]:
    """Find the GPU; return ``None`` and the reason if there is none."""
    reasons = []
    for library, kind in (("torch", TorchGpu), ("cupy", CupyGpu)):
        try:
            module: Any = importlib.import_module(library)
            if module.cuda.is_available():
                return kind(), ""
            reasons.append(f"{library} sees no CUDA device")
        except ModuleNotFoundError:
            reasons.append(f"{library} is not installed")
        except Exception as error:  # of a driver, a build without kernels for the GPU, a compiler that is missing
            reasons.append(f"{library}: {in_words(error)}")
    return None, ", ".join(reasons)


def _bandwidth(gpu: AnyGpu, copy: Callable[[], Any], size: int) -> float:
    timer = GpuTimer(gpu)
    copy()
    return 2 * size / statistics.median(timer.time(copy, "cold") for _ in range(21))
