"""Launching Triton kernels: one seam, ``launch(step, args)``, which tests replace by one on an emulated device.

A :class:`Step` is a kernel with its grid and constants. All calls of a step have arguments of the same types, so its
compiled kernel is kept with it: a launch costs no look-up of the arguments' types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver
from triton.runtime.interpreter import TensorHandle

Array = Any
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
ALL_REGISTERS = {"maxnreg": 255}
"""What the compiler is told again where it has spilled: by itself it may, a few bytes, to stay at 128 registers."""
WIDE_NUMBERS = ("magic",)
"""Whole numbers that may need 64 bits whatever the tensor's size."""


@dataclass(eq=False, slots=True)
class Step:
    """One launch of a call, for all calls with arguments of the same types.

    Attributes:
        kernel: the function; its parameters are the arguments of a call, then ``tail``.
        grid: strips, blocks of each.
        tail: the geometry and the constants, in the order of the kernel's parameters.
        num_warps, num_ctas: of a program.
        wide: whether whole numbers are of 64 bits.
        aligned: the parameters that are multiples of 16 bytes.
        device: the number of the CUDA device, -1 without one.
        run: launches the compiled kernel, once it is there.
    """

    kernel: Any
    grid: tuple[int, int]
    tail: tuple[Any, ...]
    num_warps: int
    num_ctas: int = 1
    wide: bool = False
    aligned: frozenset[str] = frozenset()
    device: int = -1
    run: Callable[..., None] | None = field(default=None, repr=False)


Launch = Callable[[Step, tuple[Any, ...]], None]

CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether Triton compiles kernels for clusters of blocks. 3.7 and 3.8 fail; 3.6 compiles some without an exchange
between the blocks, which is wrong."""


class ClusterError(RuntimeError):
    """A kernel for a cluster of blocks could not be compiled or was refused by the device. Nothing has run."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What a step is compiled from: the arguments' types, the constants, the hints, and the compiler's options."""

    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @staticmethod
    def of(step: Step, args: Sequence[Any]) -> Specialisation:
        """The specialisation for a step's first arguments; absent ones are constants."""
        signature, constants = {}, {}
        for parameter, value in zip(step.kernel.params, (*args, *step.tail), strict=True):
            if value is None or parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = _type(parameter.name, value, step.wide)
        aligned = tuple(name for name in signature if name in step.aligned and name not in constants)
        # Without fusion, what is a fused multiply-add is written as one: forward and backward round alike.
        options = {"num_warps": step.num_warps, "num_ctas": step.num_ctas, "enable_fp_fusion": False}
        return Specialisation(signature, constants, aligned, options)


def launch(step: Step, args: tuple[Any, ...]) -> None:
    """Launch a step on its device and torch's current stream, or in Triton's interpreter.

    Raises:
        ClusterError: the first launch of a step in clusters failed.
    """
    if step.run is not None:
        step.run(*args)
        return
    try:
        run = _interpreted(step) if step.device < 0 else _compiled(step, args)
        run(*args)
    except Exception as error:
        if step.num_ctas > 1:
            raise ClusterError(f"{step.kernel.__name__} in a cluster of {step.num_ctas} blocks: {error}") from error
        raise
    step.run = run


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def _interpreted(step: Step) -> Callable[..., None]:
    def run(*args: Any) -> None:
        numbers = [_double(value) if isinstance(value, float) else value for value in args]
        step.kernel[step.grid](*numbers, *step.tail)

    return run


def _double(number: float) -> Any:
    """A number as compiled kernels take it; the interpreter by itself would round some of its uses to float32."""
    return tl.tensor(TensorHandle(np.array([number], np.float64), tl.float64), tl.float64)


def _compiled(step: Step, args: tuple[Any, ...]) -> Callable[..., None]:
    if not isinstance(step.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET was set when the kernels were loaded: they cannot run on a GPU")
    special = Specialisation.of(step, args)
    names = list(special.signature)
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in special.aligned}
    with torch.cuda.device(step.device):
        source = ASTSource(step.kernel, special.signature, special.constants, hints)
        target = driver.active.get_current_target()
        compiled = triton.compile(source, target=target, options=special.options)
        start = compiled[(*step.grid, 1)]  # which loads it: what it spills is known then
        if compiled.n_spills:
            start = triton.compile(source, target=target, options=special.options | ALL_REGISTERS)[(*step.grid, 1)]
    return partial(_run, start, step.tail, step.device, driver.active.get_current_stream)


def _run(
    start: Callable[..., None], tail: tuple[Any, ...], device: int, stream_of: Callable[[int], int], *args: Any
) -> None:
    if torch.cuda.current_device() == device:
        start(*args, *tail, stream=stream_of(device))
        return
    with torch.cuda.device(device):
        start(*args, *tail, stream=stream_of(device))


def _type(name: str, value: Any, wide: bool) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp64"
    return "i64" if wide or name in WIDE_NUMBERS else "i32"
