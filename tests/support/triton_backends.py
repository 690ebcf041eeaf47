"""Provide Triton backends for tests: one runs compiled kernels on the emulator, one only records its launches."""

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
"""A GPU to plan for, for each compute capability."""


class EmulatedBackend(TritonBackend):
    """A backend for CPU tensors that compiles kernels to PTX and launches them on the emulator.

    Args:
        device: the emulated device, which collects the reports of launches.
        compile_triton: the fixture of that name, or a replacement.
        arch: the compute capability to compile for.
        planned: the GPU to plan for; by default one of that compute capability.
        options: ``tier`` and ``wide``, as in TritonBackend.
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
        passed = [
            (name, self.memory_of(value))
            for name, value in zip(names, everything, strict=True)
            if name not in special.constants
        ]
        strips, blocks = step.grid
        self.steps.append(step)
        self.compiled.append(compiled)
        parameters = triton_arguments(compiled, [value for _, value in passed])
        called = [*[name for name, _ in passed], *["scratch"] * (len(parameters) - len(passed))]
        self.emulated.launch(
            compiled.kernel, (strips * step.num_ctas, blocks), compiled.threads, parameters,
            compiled.dynamic_shared_bytes, names=called,
        )  # fmt: skip

    def require_as_compiled(self, step: Step, special: Specialisation, arguments: dict[str, Any]) -> None:
        """Assert that arguments have the types and the alignment for which a step was compiled."""
        types = self.met.setdefault(step, special.signature)
        assert special.signature == types, f"{step.kernel.__name__} was compiled for {types}, got {special.signature}"
        for name in special.aligned:
            assert arguments[name].data_ptr() % VECTOR_BYTES == 0, f"{name} is not aligned as expected"

    def compile(self, step: Step, args: tuple[Any, ...]) -> Compiled:
        special = Specialisation.from_step(step, args)
        options = dict(special.options)
        options["fp_fusion"] = options.pop("enable_fp_fusion")
        return self.compile_triton(
            step.kernel, self.arch, special.signature, special.constants, aligned=special.aligned, **options
        )

    def memory_of(self, value: Any) -> Any:
        """Return an argument for the emulator; of a tensor its bytes, as a view of the memory of its storage."""
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
        """Return the report of the last launch of a kernel."""
        reports = [report for report in self.emulated.reports if report.kernel.name == kernel]
        assert reports, f"{kernel} was not launched, but {[report.kernel.name for report in self.emulated.reports]}"
        return reports[-1]


class RecordingBackend(TritonBackend):
    """A backend that records what each launch is compiled from, and computes nothing."""

    def __init__(self, planned: Planned, **options: Any) -> None:
        super().__init__(self.record, planned, **options)
        self.launches: list[tuple[Step, Specialisation]] = []

    def record(self, step: Step, args: tuple[Any, ...]) -> None:
        self.launches.append((step, Specialisation.from_step(step, args)))


def tensors(shape, dtype=torch.float32, channels_last=False, seed=0):
    """Return random tensors x, dy and residual, and a list of four random vectors of the channels."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if channels_last:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    vectors = [torch.rand(shape[1], generator=generator) + 0.5 for _ in range(4)]
    return x, dy, residual, vectors
