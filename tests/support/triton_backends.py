"""Run the Triton backend in tests: its compiled kernels on an emulated device, or its steps recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from emulator import Device
from emulator.compile import Compiled, triton_arguments
from emulator.counters import Report

from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.backends.triton.launch import Specialisation, Step
from gpu_bn.plan import DEVICES, VECTOR_BYTES
from gpu_bn.plan import Device as Planned

ARCHITECTURES = {75: "t4", 80: "a100", 89: "4090", 90: "h100", 100: "b200"}
"""The compute capabilities that there is a device to plan for."""


class EmulatedBackend(TritonBackend):
    """Run the backend on CPU tensors, whose memory is the emulated device's; every launch is one of compiled PTX.

    Args:
        device: the emulated device; it keeps the launches' reports.
        compile_triton: the fixture, or what stands for it.
        arch: the compute capability that is compiled for.
        planned: what to plan for; by default a device of that compute capability.
        tier, wide: as in TritonBackend.
    """

    forward_at_once = TritonBackend.forward_at_once

    def __init__(
        self, device: Device, compile_triton: Callable[..., Compiled], arch: int = 80, planned: Planned | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(self.launch_on_emulator, planned or DEVICES[ARCHITECTURES[arch]], **options)
        self.emulated = device
        self.compile_triton = compile_triton
        self.arch = arch
        self.owners: dict[int, np.ndarray] = {}
        self.steps: list[Step] = []
        self.compiled: list[Compiled] = []
        self.met: dict[Step, dict[str, str]] = {}

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: Any) -> torch.Tensor:
        del device
        size = int(np.prod(shape)) * dtype.itemsize
        memory = self.emulated.empty(max(size, 1), np.uint8)
        owner = memory if memory.base is None else memory.base
        self.owners[owner.ctypes.data] = owner
        flat = torch.from_numpy(owner[:size]).view(dtype)
        return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

    def allocator(self, device: torch.device) -> Callable[..., torch.Tensor]:
        return lambda *layout: self.new(*layout, device)

    def launch_on_emulator(self, step: Step, args: tuple[Any, ...]) -> None:
        compiled = self.compile(step, args)
        everything = (*args, *step.tail)
        names = [parameter.name for parameter in step.kernel.params]
        special = Specialisation.from_step(step, args)
        self.require_as_compiled(step, special, dict(zip(names, everything, strict=True)))
        given = [
            (name, self.memory_of(value))
            for name, value in zip(names, everything, strict=True)
            if name not in special.constants
        ]
        strips, blocks = step.grid
        self.steps.append(step)
        self.compiled.append(compiled)
        parameters = triton_arguments(compiled, [value for _, value in given])
        called = [*[name for name, _ in given], *["scratch"] * (len(parameters) - len(given))]
        self.emulated.launch(
            compiled.kernel, (strips * step.num_ctas, blocks), compiled.threads, parameters,
            compiled.dynamic_shared_bytes, names=called,
        )  # fmt: skip

    def require_as_compiled(self, step: Step, special: Specialisation, arguments: dict[str, Any]) -> None:
        """Assert that later arguments have the types and the alignment of the first, for which a step is compiled."""
        types = self.met.setdefault(step, special.signature)
        assert special.signature == types, f"{step.kernel.__name__} was compiled for {types}, got {special.signature}"
        for name in special.aligned:
            assert arguments[name].data_ptr() % VECTOR_BYTES == 0, f"{name} is not aligned, as was promised"

    def compile(self, step: Step, args: tuple[Any, ...]) -> Compiled:
        special = Specialisation.from_step(step, args)
        options = dict(special.options)
        options["fp_fusion"] = options.pop("enable_fp_fusion")
        return self.compile_triton(
            step.kernel, self.arch, special.signature, special.constants, aligned=special.aligned, **options
        )

    def memory_of(self, value: Any) -> Any:
        """Return an argument as the emulator takes it: of a tensor, its bytes in the memory it is a view of."""
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        owner = self.owners.get(storage.data_ptr())
        if owner is None:
            owner = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
            self.owners[storage.data_ptr()] = owner
        start = value.data_ptr() - storage.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        return owner[start : start + reach * value.element_size()]

    def report(self, kernel: str) -> Report:
        """Return the last launch's report of a kernel."""
        found = [report for report in self.emulated.reports if report.kernel.name == kernel]
        assert found, f"{kernel} was not launched, but {[report.kernel.name for report in self.emulated.reports]}"
        return found[-1]


class RecordingBackend(TritonBackend):
    """Note of each launch what it is compiled from, and compute nothing."""

    def __init__(self, planned: Planned, **options: Any) -> None:
        super().__init__(self.note, planned, **options)
        self.launches: list[tuple[Step, Specialisation]] = []

    def note(self, step: Step, args: tuple[Any, ...]) -> None:
        self.launches.append((step, Specialisation.from_step(step, args)))


def tensors(shape, dtype=torch.float32, channels_last=False, seed=0):
    """Return x, dy, a residual and four vectors of channels, random."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if channels_last:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    vectors = [torch.rand(shape[1], generator=generator) + 0.5 for _ in range(4)]
    return x, dy, residual, vectors
