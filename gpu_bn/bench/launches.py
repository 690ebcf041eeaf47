"""What a GPU backend has planned and compiled for a call: its tier, the bytes by the model, registers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpu_bn.bench.timing import Call
from gpu_bn.plan import LaunchPlan

MODULES = {"cupy": "gpu_bn.backends.cupy.builder", "triton": "gpu_bn.backends.triton.programs"}


@dataclass
class Launches:
    """Of one call.

    Attributes:
        plans: in the order in which they were made; the last one was carried out.
        registers: of each kernel, a thread.
    """

    plans: list[LaunchPlan] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)

    @property
    def plan(self) -> LaunchPlan | None:
        """The one that was carried out."""
        return self.plans[-1] if self.plans else None


def launches_of(adapter: str, make: Callable[[], Call]) -> Launches:
    """Make a call with a backend of its own, so that it has to plan, and carry it out once.

    Only what is called last is found: for a backward call not the forward call before it.
    """
    found = Launches()
    if adapter not in MODULES:
        return found
    module = importlib.import_module(MODULES[adapter])
    call = make()
    with _noting(module, "plan", found.plans.append), _noting(module, "plan_once", found.plans.append):
        if adapter == "cupy":
            with _noting(module, "compiled", lambda kernel: _registers(found, kernel)):
                call()
        else:
            with _triton_kernels(found):
                call()
    return found


@contextmanager
def _noting(module: Any, name: str, note: Callable[[Any], None]) -> Iterator[None]:
    """A function of a module tells what it returns; one that is not there tells nothing."""
    function = getattr(module, name, None)
    if function is None:
        yield
        return

    def noting(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        note(result)
        return result

    setattr(module, name, noting)
    try:
        yield
    finally:
        setattr(module, name, function)


@contextmanager
def _triton_kernels(found: Launches) -> Iterator[None]:
    """Kernels that Triton compiles meanwhile."""
    compiler: Any = importlib.import_module("gpu_bn.backends.triton.launch").triton
    with _noting(compiler, "compile", lambda kernel: _registers(found, kernel)):
        yield


def _registers(found: Launches, kernel: Any) -> None:
    if hasattr(kernel, "_init_handles"):
        kernel._init_handles()  # Triton knows them when the kernel is loaded
    registers = getattr(kernel, "num_regs", getattr(kernel, "n_regs", None))
    if isinstance(registers, int):
        found.registers.append(registers)
