"""Launch Triton kernels: one seam, ``launch(step, args)``, which tests replace by one on an emulated device.

A :class:`Step` is a kernel with its grid and constants. All calls of a step have arguments of the same types, so its
compiled kernel is kept with it: a launch costs no look-up of the arguments' types.
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
"""The most registers of a thread."""
FRACTIONS = frozenset({"momentum", "bessel", "eps", "parameter", "inverse_count"})
"""The parameters that are float64. Types follow from names: a whole number given for one makes no other kernel."""
WIDE_NUMBERS = ("magic",)
"""Whole numbers that may need 64 bits whatever the tensor's size."""


class Recent(dict[Any, Any]):
    """Keep the ``most`` things made last; what was made first goes first."""

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
"""Kernels that are on a device, by what they were compiled from: calls of many shapes share them."""


@dataclass(eq=False, slots=True)
class Step:
    """Describe one launch of a call, for all calls with arguments of the same types.

    Attributes:
        kernel: the function; its parameters are the arguments of a call, then ``tail``.
        grid: strips, blocks of each.
        tail: the geometry and the constants, in the order of the kernel's parameters.
        num_warps, num_ctas: of a program.
        most_registers: that a thread may have, if the compiler is not to choose.
        wide: whether whole numbers are of 64 bits.
        aligned: the parameters that are multiples of 16 bytes.
        device: the number of the CUDA device, -1 without one.
        leaves: the shape and the dtype of what its blocks leave for a later launch, if they do.
        run: launches the compiled kernel, once it is there; addresses serve for tensors.
        registers: of a thread, once the kernel is compiled.
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
    leaves: tuple[tuple[int, int, int], torch.dtype] | None = None
    run: Callable[..., None] | None = field(default=None, repr=False)
    registers: int | None = None


Launch = Callable[[Step, tuple[Any, ...]], None]


class Slot(int):
    """The place of a value among those of a call."""


class Launches:
    """The launches of a call, for all calls that differ in their values only.

    Args:
        values: the names of a call's tensors and numbers.
        run: makes a call by what launches; the values' slots are found by name, and are ``None`` of other names.

    Attributes:
        steps: what is launched, and what chooses its arguments of all values and constants.
        constants: what is the same in all calls.
        compiled: whether all steps have been launched; then addresses serve for tensors.
    """

    def __init__(self, values: Sequence[str], run: Callable[[Launch, Callable[[str], Slot | None]], None]) -> None:
        noted: list[tuple[Step, tuple[Any, ...]]] = []
        slots = {name: Slot(place) for place, name in enumerate(values)}
        run(lambda step, args: noted.append((step, args)), slots.get)
        self.constants = tuple(one for _, args in noted for one in args if not isinstance(one, Slot))
        places = iter(range(len(values), len(values) + len(self.constants)))
        self.steps: list[tuple[Any, Callable[[Any], tuple[Any, ...]]]] = [
            (step, itemgetter(*[one if isinstance(one, Slot) else next(places) for one in args]))
            for step, args in noted
        ]
        self.compiled = not noted

    def first(self, launch: Launch, values: tuple[Any, ...]) -> None:
        """Make a call by what launches."""
        for step, arguments in self.steps:
            launch(step, arguments((*values, *self.constants)))
        self.compiled = all(step.run is not None for step, _ in self.steps)


CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether Triton compiles kernels for clusters of blocks. 3.7 and 3.8 fail; 3.6 compiles some without an exchange
between the blocks, which is wrong."""


class ClusterError(RuntimeError):
    """A kernel for a cluster of blocks could not be compiled or was refused by the device. Nothing has run."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Hold what a step is compiled from: the arguments' types, the constants, the hints, and the compiler's options."""

    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is the same for specialisations alike."""
        return (*self.signature.items(), *self.constants.items(), self.aligned, *self.options.items())

    @staticmethod
    def of(step: Step, args: Sequence[Any]) -> Specialisation:
        """Return the specialisation for a step's first arguments; absent ones are constants."""
        signature, constants = {}, {}
        for parameter, value in zip(step.kernel.params, (*args, *step.tail), strict=True):
            if value is None or parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = _type(parameter.name, value, step.wide)
        aligned = tuple(name for name in signature if name in step.aligned and name not in constants)
        # Without fusion, what is a fused multiply-add is written as one: forward and backward round alike.
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
        run = _interpreted(step) if step.device < 0 else _compiled(step, args)
        run(*args)
    except Exception as error:
        if step.num_ctas > 1:
            raise ClusterError(f"{step.kernel.__name__} in a cluster of {step.num_ctas} blocks: {error}") from error
        raise
    if step.device >= 0:  # the interpreter takes no addresses
        step.run = run


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def _interpreted(step: Step) -> Callable[..., None]:
    def run(*args: Any) -> None:
        given = zip(step.kernel.arg_names, args, strict=False)
        numbers = [_double(value) if name in FRACTIONS and value is not None else value for name, value in given]
        step.kernel[step.grid](*numbers, *step.tail)

    return run


def _double(number: float) -> Any:
    """Return a number as compiled kernels take it; the interpreter itself would round some of its uses to float32."""
    return tl.tensor(TensorHandle(np.array([number], np.float64), tl.float64), tl.float64)


def _compiled(step: Step, args: tuple[Any, ...]) -> Callable[..., None]:
    if not isinstance(step.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET was set when the kernels were loaded: they cannot run on a GPU")
    special = Specialisation.of(step, args)
    key = step.kernel, step.device, special.key
    with torch.cuda.device(step.device):
        compiled = LOADED.get(key)
        if compiled is None:
            compiled = LOADED[key] = _loaded(step.kernel, special)
        start = starter(compiled, (*step.grid, 1))
    step.registers = compiled.n_regs
    return partial(_run, start, step.tail, step.device, driver.active.get_current_stream)


def starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """Return a function of a stream and a kernel's arguments that launches it.

    It calls the function in C that Triton's launcher calls, with what the launcher would find out in every call. Where
    someone watches launches, or a launcher is of another kind, Triton's own serves.
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
        elif types[1] is None:  # Triton 3.6, whose function knows the types
            in_c(*grid, stream, function, *options, None, None, *metadata, *args)
        else:
            in_c(*grid, stream, function, *options, *metadata, None, None, *types, args)

    return start


def _watched(hook: Any) -> bool:
    """Tell whether a hook of Triton's, a chain of functions or one, does anything."""
    return bool(getattr(hook, "calls", hook))


def _loaded(kernel: JITFunction[Any], special: Specialisation) -> Any:
    """Compile a kernel for the current device and load it: what it spills is known then."""
    names = list(special.signature)
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in special.aligned}
    source = ASTSource(kernel, special.signature, special.constants, hints)

    def build(**more: int) -> Any:
        compiled = triton.compile(source, target=driver.active.get_current_target(), options=special.options | more)
        compiled[(1, 1, 1)]
        return compiled

    compiled = build()
    more = free_registers(compiled.n_regs, special.options["num_warps"])
    return build(maxnreg=more) if compiled.n_spills and more > compiled.n_regs else compiled


def free_registers(registers: int, warps: int) -> int:
    """Return the most registers that a thread may have without a block less on an SM than with so many.

    The compiler may spill a few bytes to stay at a round number. With more registers it does not, but where a block
    less would run they cost more than they save.
    """
    threads = 32 * warps
    blocks = max(REGISTERS // (-(-registers // 8) * 8 * threads), 1)
    return min(MOST_REGISTERS, REGISTERS // (blocks * threads) // 8 * 8)


def _run(
    start: Callable[..., None], tail: tuple[Any, ...], device: int, stream_of: Callable[[int], int], *args: Any
) -> None:
    if torch.cuda.current_device() == device:
        start(stream_of(device), *args, *tail)
        return
    with torch.cuda.device(device):
        start(stream_of(device), *args, *tail)


def _type(name: str, value: Any, wide: bool) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if name in FRACTIONS:
        return "fp64"
    return "i64" if wide or name in WIDE_NUMBERS else "i32"
