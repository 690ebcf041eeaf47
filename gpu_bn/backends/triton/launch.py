"""Launch Triton kernels by ``launch(step, args)``, which tests replace by a function for an emulated device.

A :class:`Step` is a kernel with its grid and constants. All calls of a step have arguments of the same types. The step
therefore keeps the compiled kernel, and later launches do not look at the types of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from threading import Lock
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
    torch.int64: "*i64",
}
REGISTERS = 64 << 10
"""Registers of an SM, on every GPU."""
MOST_REGISTERS = 255
"""The largest number of registers that a thread can have."""
FRACTIONS = frozenset({"momentum", "bessel", "eps", "parameter", "inverse_count"})
"""Names of float64 parameters. Types follow from names, so that an ``int`` given for one compiles no other kernel."""
WIDE_NUMBERS = ("magic",)
"""Names of integer parameters that may need 64 bits whatever the size of the tensor."""


class Recent(dict[Any, Any]):
    """A dictionary that keeps the ``most`` entries added last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.lock = Lock()

    def __setitem__(self, key: Any, value: Any) -> None:
        with self.lock:
            super().__setitem__(key, value)
            while len(self) > self.most:
                del self[next(iter(self))]

    def clear(self) -> None:
        with self.lock:
            super().clear()


LOADED = Recent(1024)
"""Kernels loaded on a device, by all that they were compiled from. Calls of many shapes share them."""


@dataclass(eq=False, slots=True)
class Step:
    """One launch of a call, for all calls with arguments of the same types.

    Attributes:
        kernel: the kernel; its parameters are the arguments of a call, followed by ``tail``.
        grid: the number of strips, and of blocks for each strip.
        tail: the geometry and the constants, in the order of the kernel's parameters.
        num_warps, num_ctas: warps and blocks of a program.
        most_registers: the limit of a thread's registers; ``None`` lets the compiler choose.
        wide: whether integer arguments have 64 bits.
        aligned: names of the parameters whose addresses are multiples of 16 bytes.
        device: the index of the CUDA device; -1 without one.
        partials: shape and dtype of the partial results that blocks write for a later launch, or ``None``.
        run: launches the compiled kernel, once there is one; tensors may be given as addresses.
        registers: the registers of a thread, once the kernel is compiled.
    """

    kernel: Any
    grid: tuple[int, int]
    tail: tuple[Any, ...]
    num_warps: int
    num_ctas: int = 1
    most_registers: int | None = None
    wide: bool = False
    aligned: frozenset[str] = frozenset()
    device: int = -1
    partials: tuple[tuple[int, int, int], torch.dtype] | None = None
    run: Callable[..., None] | None = field(default=None, repr=False)
    registers: int | None = None


Launch = Callable[[Step, tuple[Any, ...]], None]


class Slot(int):
    """The index of a value among those of a call."""


class Launches:
    """The launches of a call, recorded once for all calls that differ only in their values.

    Args:
        values: the names of a call's tensors and numbers.
        run: makes the call, with two arguments: a function that launches a step, and one that returns the slot of a
            name, or ``None`` if the call has no such value.

    Attributes:
        steps: the launched steps, each with a function that selects its arguments from the values and the constants.
        constants: arguments that are the same in all calls; they follow the values.
        compiled: whether all steps have been launched; then tensors may be given as addresses.
    """

    def __init__(self, values: Sequence[str], run: Callable[[Launch, Callable[[str], Slot | None]], None]) -> None:
        recorded: list[tuple[Step, tuple[Any, ...]]] = []
        slots = {name: Slot(index) for index, name in enumerate(values)}
        run(lambda step, args: recorded.append((step, args)), slots.get)
        self.constants = tuple(arg for _, args in recorded for arg in args if not isinstance(arg, Slot))
        indices = iter(range(len(values), len(values) + len(self.constants)))
        self.steps: list[tuple[Any, Callable[[Any], tuple[Any, ...]]]] = [
            (step, itemgetter(*[arg if isinstance(arg, Slot) else next(indices) for arg in args]))
            for step, args in recorded
        ]
        self.compiled = not recorded

    def launch_all(self, launch: Launch, values: tuple[Any, ...]) -> None:
        """Launch all steps with ``launch``, which compiles their kernels if necessary."""
        for step, arguments in self.steps:
            launch(step, arguments((*values, *self.constants)))
        self.compiled = all(step.run is not None for step, _ in self.steps)


CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether Triton compiles kernels for clusters of blocks. 3.7 and 3.8 fail; 3.6 compiles some without an exchange
between the blocks, so that results are wrong."""


class ClusterError(RuntimeError):
    """A kernel for a cluster of blocks could not be compiled or was refused by the device. Nothing has run."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """All that a kernel is compiled from: the arguments' types, constants, aligned arguments and compiler options."""

    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for equal specialisations."""
        return (*self.signature.items(), *self.constants.items(), self.aligned, *self.options.items())

    @staticmethod
    def from_step(step: Step, args: Sequence[Any]) -> Specialisation:
        """Return the specialisation of a step for the arguments of its first call; ``None`` becomes a constant."""
        signature, constants = {}, {}
        for parameter, value in zip(step.kernel.params, (*args, *step.tail), strict=True):
            if value is None or parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = _type(parameter.name, value, step.wide)
        aligned = tuple(name for name in signature if name in step.aligned and name not in constants)
        # Without fusion, only explicit fused multiply-adds are fused, so that forward and backward round alike.
        options = {"num_warps": step.num_warps, "num_ctas": step.num_ctas, "enable_fp_fusion": False}
        if step.most_registers is not None:
            options["maxnreg"] = step.most_registers
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
        run = _interpreted_run(step) if step.device < 0 else _compiled_run(step, args)
        run(*args)
    except Exception as error:
        if step.num_ctas > 1:
            raise ClusterError(f"{step.kernel.__name__} in a cluster of {step.num_ctas} blocks: {error}") from error
        raise
    if step.device >= 0:  # the interpreter does not accept addresses
        step.run = run


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def _interpreted_run(step: Step) -> Callable[..., None]:
    """Return a function that runs a step in Triton's interpreter."""

    def run(*args: Any) -> None:
        named = zip(step.kernel.arg_names, args, strict=False)
        converted = [_double(value) if name in FRACTIONS and value is not None else value for name, value in named]
        step.kernel[step.grid](*converted, *step.tail)

    return run


def _double(number: float) -> Any:
    """Return a number as a float64 tensor; the interpreter would round a Python number to float32 in some places."""
    return tl.tensor(TensorHandle(np.array([number], np.float64), tl.float64), tl.float64)


def _compiled_run(step: Step, args: tuple[Any, ...]) -> Callable[..., None]:
    """Return a function that launches a step, compiled for these arguments, on its device."""
    if not isinstance(step.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET was set when the kernels were loaded: they cannot run on a GPU")
    special = Specialisation.from_step(step, args)
    key = step.kernel, step.device, special.key
    with torch.cuda.device(step.device):
        compiled = LOADED.get(key)
        if compiled is None:
            compiled = LOADED[key] = _load(step.kernel, special)
        start = starter(compiled, (*step.grid, 1))
    step.registers = compiled.n_regs
    return partial(_run, start, step.tail, step.device, driver.active.get_current_stream)


def starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """Return a function of a stream and a kernel's arguments that launches the kernel.

    It calls the same C function as Triton's launcher, with values that the launcher would look up in every call. If a
    launch hook is set, or the launcher is of an unknown kind, Triton's launcher is called.
    """
    usual, launcher = compiled[grid], getattr(compiled, "run", None)
    in_c = getattr(launcher, "launch", None)
    scratch = [getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if in_c is None or scratch != [0, 0] or getattr(launcher, "gsan_enabled", False):
        return lambda stream, *args: usual(*args, stream=stream)
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl)  # type: ignore[union-attr]
    function, metadata, hooks = compiled.function, (compiled.packed_metadata, None, None, None), triton.knobs.runtime
    types = [getattr(launcher, name, None) for name in ("arg_annotations", "kernel_signature")]

    def start(stream: int, *args: Any) -> None:
        if _watched(hooks.launch_enter_hook) or _watched(hooks.launch_exit_hook):
            usual(*args, stream=stream)
        elif types[1] is None:  # Triton 3.6: the C function knows the types
            in_c(*grid, stream, function, *options, None, None, *metadata, *args)
        else:
            in_c(*grid, stream, function, *options, *metadata, None, None, *types, args)

    return start


def _watched(hook: Any) -> bool:
    """Tell whether a Triton launch hook is set; it is one function or a chain of functions."""
    return bool(getattr(hook, "calls", hook))


def _load(kernel: JITFunction[Any], special: Specialisation) -> Any:
    """Compile a kernel for the current device and load it; compile it again with more registers if it spills."""
    names = list(special.signature)
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in special.aligned}
    source = ASTSource(kernel, special.signature, special.constants, hints)

    def build(**more: int) -> Any:
        compiled = triton.compile(source, target=driver.active.get_current_target(), options=special.options | more)
        compiled[(1, 1, 1)]  # load it, which sets n_spills
        return compiled

    compiled = build()
    more = free_registers(compiled.n_regs, special.options["num_warps"])
    return build(maxnreg=more) if compiled.n_spills and more > compiled.n_regs else compiled


def free_registers(registers: int, warps: int) -> int:
    """Return the most registers of a thread with which an SM holds as many blocks as with ``registers``.

    The compiler may spill a few bytes to keep to a round number of registers. More registers avoid that, but cost more
    than they save if fewer blocks fit on an SM.
    """
    threads = 32 * warps
    blocks = max(REGISTERS // (-(-registers // 8) * 8 * threads), 1)
    return min(MOST_REGISTERS, REGISTERS // (blocks * threads) // 8 * 8)


def _run(
    start: Callable[..., None], tail: tuple[Any, ...], device: int, stream_of: Callable[[int], int], *args: Any
) -> None:
    """Launch a kernel on torch's current stream of a device."""
    if torch.cuda.current_device() == device:
        start(stream_of(device), *args, *tail)
        return
    with torch.cuda.device(device):
        start(stream_of(device), *args, *tail)


def _type(name: str, value: Any, wide: bool) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if name in FRACTIONS:
        return "fp64"
    return "i64" if wide or name in WIDE_NUMBERS else "i32"
