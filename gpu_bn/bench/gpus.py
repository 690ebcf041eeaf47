"""The GPU of this machine, through torch or CuPy: its events, its cache, its copy, its properties.

``device`` has no bandwidth: that is measured.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from gpu_bn.bench.timing import GpuTimer, said
from gpu_bn.plan import Device

COPIED_BYTES = 512 << 20
"""Of the tensor whose copy is the measure of bandwidth, or an eighth of the free memory."""
SPIN = """extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) { }
}"""


class TorchGpu:
    """See :class:`gpu_bn.bench.timing.Gpu`; on torch's current stream."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = self._properties()
        self.smi_id = self._smi_id()
        self.cache = torch.ones(2 * self.device.l2_bytes // 4, device="cuda")

    def _properties(self) -> Device:
        of: Any = self.torch.cuda.get_device_properties(self.torch.cuda.current_device())
        block = getattr(of, "shared_memory_per_block_optin", of.shared_memory_per_block)
        return Device(
            of.name, 10 * of.major + of.minor, of.multi_processor_count, of.shared_memory_per_multiprocessor, block,
            of.L2_cache_size, 0.0,
        )  # fmt: skip

    def _smi_id(self) -> str:
        """What nvidia-smi calls the device, whichever of them this process sees; empty if torch does not tell."""
        of: Any = self.torch.cuda.get_device_properties(self.torch.cuda.current_device())
        return f"GPU-{of.uuid}" if hasattr(of, "uuid") else ""

    def record(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def done(self, event: Any) -> bool:
        return bool(event.query())

    def elapsed(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def wait(self, cycles: int) -> None:
        self.torch.cuda._sleep(cycles)

    def flush(self) -> None:
        self.cache.sum()  # read, not written: a dirty cache would be written back in the call's time

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that is not used back to the driver: torch and CuPy keep it from each other."""
        self.torch.cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy on the device."""
        free, _ = self.torch.cuda.mem_get_info()
        source = self.torch.ones(min(COPIED_BYTES, free // 8), dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        return _bandwidth(self, lambda: target.copy_(source), 2 * source.numel())


class CupyGpu:
    """See :class:`gpu_bn.bench.timing.Gpu`; on CuPy's current stream, where there is no torch."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.device = self._properties()
        runtime = self.cupy.cuda.runtime
        self.smi_id: str = runtime.deviceGetPCIBusId(runtime.getDevice())
        self.cache = self.cupy.ones(2 * self.device.l2_bytes // 4, "float32")
        self.spin = self.cupy.RawKernel(SPIN, "spin")

    def _properties(self) -> Device:
        runtime = self.cupy.cuda.runtime
        of = runtime.getDeviceProperties(runtime.getDevice())
        return Device(
            of["name"].decode(), 10 * of["major"] + of["minor"], of["multiProcessorCount"],
            of["sharedMemPerMultiprocessor"], of["sharedMemPerBlockOptin"], of["l2CacheSize"], 0.0,
        )  # fmt: skip

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

    def synchronize(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()

    def free(self) -> None:
        """Give memory that is not used back to the driver."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy on the device."""
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        source = self.cupy.ones(min(COPIED_BYTES, free // 8), "uint8")
        target = self.cupy.empty_like(source)
        return _bandwidth(self, lambda: self.cupy.copyto(target, source), 2 * source.size)


AnyGpu = TorchGpu | CupyGpu


def find() -> tuple[AnyGpu | None, str]:
    """The GPU; or ``None``, and why there is none."""
    reasons = []
    for library, kind in (("torch", TorchGpu), ("cupy", CupyGpu)):
        try:
            module: Any = importlib.import_module(library)
            there = module.cuda.is_available()
            if there:
                return kind(), ""
        except ModuleNotFoundError:
            reasons.append(f"{library} is not installed")
        except Exception as error:  # of a driver, a build without kernels for the GPU, a compiler that is missing
            reasons.append(f"{library}: {said(error)}")
        else:
            reasons.append(f"{library} sees no CUDA device")
    return None, ", ".join(reasons)


def _bandwidth(gpu: AnyGpu, copy: Any, moved: int) -> float:
    timer = GpuTimer(gpu)
    copy()
    return moved / sorted(timer.time(copy, "cold") for _ in range(21))[10]
