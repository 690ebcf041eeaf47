"""The device: it owns memory, takes launches, and runs them block batch by block batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import accesses, arithmetic, atomics, bits, conversions, copies, warp
from .barriers import Barriers
from .copies import AsyncCopies
from .counters import L2, Counters, Report
from .errors import EmulatorError
from .formats import VALUE
from .memory import POISON, UNWRITTEN, GlobalMemory
from .parser import TYPE_BYTES, Instruction, Kernel
from .races import RaceDetector
from .scheduler import CONTROL, Scheduler
from .threads import Mask, Shape, Threads

Array = np.ndarray
Scalar = int | float | bool | np.generic
Argument = np.ndarray | Scalar | None
Runner = Callable[["Launch", Mask], None]
# Importing these fills the tables of arithmetic (bits, conversions) and of accesses (atomics, copies).
_EXTENSIONS = (atomics, bits, conversions, copies)


@dataclass(frozen=True)
class Checks:
    """Which of the costly checks run; bounds, barriers, shuffles and conflicting stores always do."""

    races: bool = True
    initialised: bool = True


@dataclass(frozen=True)
class Program:
    """A kernel whose instructions have been looked up."""

    runners: list[Runner]
    synchronous: list[bool]  # which instructions wait for the lanes of their warp


@dataclass
class Device:
    """A GPU to launch kernels on.

    `resident_threads` bounds how many threads run together, in whole blocks; a cooperative launch needs room
    for its whole grid if `cooperative_blocks` is given. `seed` runs warps and blocks in a random order.
    `l2_bytes` switches the DRAM model on; the cache stays warm between launches.
    """

    checks: Checks = field(default_factory=Checks)
    seed: int | None = None
    resident_threads: int = 16384
    cooperative_blocks: int | None = None
    l2_bytes: int | None = None
    sector_bytes: int = 32
    shared_limit: int = 227 * 1024
    max_steps: int = 3_000_000
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = GlobalMemory()
        self.l2 = L2(self.l2_bytes, self.sector_bytes) if self.l2_bytes else None

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> Array:
        """Uninitialised device memory: full of NaN, and reading it before it is written is an error."""
        return self.memory.empty(shape, dtype)

    def require_written(self, array: Array, name: str = "the array") -> None:
        """Fail if an element of an array made by `empty` was never written."""
        if missing := self.memory.unwritten(array):
            raise EmulatorError("unwritten output", f"{missing} of {array.size} elements of {name} were never written")

    def launch(
        self,
        kernel: Kernel,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Argument],
        shared_bytes: int = 0,
        *,
        cooperative: bool = False,
        cluster: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Report:
        """Run a kernel to its end. Arrays are device memory, changed in place; scalars are cast.

        `names` gives the arguments the names that errors and `Report.buffer` use; by default arg0, arg1, ...
        """
        shape = Shape(_extents(grid), _extents(block), cluster or kernel.cluster, kernel.shared_bytes + shared_bytes)
        self._check_launch(kernel, shape, len(args), cooperative)
        with np.errstate(all="ignore"):
            report = Launch(self, kernel, shape, args, names, cooperative).run()
        self.reports.append(report)
        return report

    def _check_launch(self, kernel: Kernel, shape: Shape, arguments: int, cooperative: bool) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise EmulatorError("launch", f"{kernel.name}: {message}")

        require(arguments == len(kernel.parameters), f"{len(kernel.parameters)} parameters, {arguments} arguments")
        require(min(*shape.grid, *shape.block) > 0, f"empty grid {shape.grid} or block {shape.block}")
        require(shape.threads <= 1024, f"{shape.threads} threads per block, the limit is 1024")
        limit = int(np.prod(kernel.threads_limit or (1024,)))
        require(shape.threads <= limit, f"{shape.threads} threads per block, compiled for at most {limit}")
        required = int(np.prod(kernel.threads_required or (shape.threads,)))
        require(shape.threads == required, f"{shape.threads} threads per block, compiled for {required}")
        require(shape.grid[0] % shape.cluster == 0, f"grid {shape.grid} is not whole clusters of {shape.cluster}")
        require(
            shape.shared_bytes <= self.shared_limit,
            f"{shape.shared_bytes} bytes of shared memory are too many",
        )
        if cooperative and self.cooperative_blocks is not None:
            room = f"{shape.blocks} blocks cannot all be resident, there is room for {self.cooperative_blocks}"
            require(shape.blocks <= self.cooperative_blocks, f"cooperative launch: {room}")


class Launch:
    """One launch in progress: what the instructions see."""

    def __init__(
        self, device: Device, kernel: Kernel, shape: Shape, args: Sequence[Argument],
        names: Sequence[str] | None, cooperative: bool,
    ) -> None:  # fmt: skip
        self.device, self.kernel, self.shape, self.checks = device, kernel, shape, device.checks
        self.memory, self.cooperative = device.memory, cooperative
        self.program = load(kernel)
        self.counters = Counters(kernel, device.l2)
        self.rng = None if device.seed is None else np.random.default_rng(device.seed)
        self.memory.begin()
        self._kept: list[Array] = []
        self.parameters = self._marshal(args, names or [f"arg{i}" for i in range(len(args))])
        self.data_address = self._attach_data()
        self.races = RaceDetector(self) if device.checks.races else None
        self.shared_stride = -(-shape.shared_bytes // 128) * 128 + 128
        self.progress = 0  # counts changes of memory, barriers passed, threads exited
        self.polls = 0  # counts reads that may wait for another thread

    def run(self) -> Report:
        for blocks in self._batches():
            self.threads = Threads(self.kernel, self.shape, blocks)
            self.threads.data_address = self.data_address
            size = len(blocks) * self.shared_stride
            self.shared = np.full(size, POISON, np.uint8)
            self.shared_state = np.full(size, UNWRITTEN, np.uint8)
            self.copies = AsyncCopies(self.threads.count)
            self.barriers = Barriers(self)
            if self.races:
                self.races.begin_batch()
            Scheduler(self, self.rng).run()
        return self.counters.finish()

    def step(self, ins: Instruction) -> None:
        self.threads.steps += 1
        if self.threads.steps > self.device.max_steps:
            self.fail("endless loop", f"still running after {self.device.max_steps} steps", ins)

    def fail(self, check: str, message: str, ins: Instruction | None = None, lane: int | None = None) -> None:
        where = "" if lane is None else f", {self.threads.name(lane)}"
        raise EmulatorError(check, message + where + (f", {ins.where()}" if ins else ""))

    def lane_order(self, count: int) -> Sequence[int]:
        """The order in which lanes of one instruction reach memory."""
        return range(count) if self.rng is None else self.rng.permutation(count).tolist()

    def parameter_offset(self, name: str, ins: Instruction) -> int:
        for parameter in self.kernel.parameters:
            if parameter.name == name:
                return parameter.offset
        raise EmulatorError("syntax", f"no parameter {name}: {ins.where()}")

    def _batches(self) -> list[Array]:
        shape = self.shape
        clusters = np.arange(shape.blocks // shape.cluster)
        if self.rng is not None:
            clusters = self.rng.permutation(clusters)
        size = max(1, self.device.resident_threads // (shape.lanes * shape.cluster))
        if self.cooperative:
            size = len(clusters)
        members = np.arange(shape.cluster)
        return [
            (clusters[start : start + size, None] * shape.cluster + members).reshape(-1)
            for start in range(0, len(clusters), size)
        ]

    def _marshal(self, args: Sequence[Argument], names: Sequence[str]) -> Array:
        """Lay the arguments out as the kernel's parameter block."""
        last = self.kernel.parameters[-1] if self.kernel.parameters else None
        block = np.zeros(last.offset + last.bytes if last else 0, np.uint8)
        for parameter, value, name in zip(self.kernel.parameters, args, names, strict=True):
            end = parameter.offset + parameter.bytes
            block[parameter.offset : end] = np.frombuffer(self._encode(value, parameter.type, name), np.uint8)
        return block

    def _encode(self, value: Argument, type_: str, name: str) -> bytes:
        if value is None:
            return np.uint64(0).tobytes()
        if isinstance(value, np.ndarray):
            if TYPE_BYTES[type_] != 8:
                raise EmulatorError("launch", f"{name} is an array, the kernel expects a .{type_}")
            return np.uint64(self.memory.attach(value, name)).tobytes()
        if isinstance(value, np.void):  # a struct passed by value
            return value.tobytes()
        scalar = np.asarray(value)
        if scalar.dtype.kind == "f" and type_ in ("b32", "b64"):  # so Triton declares float parameters
            type_ = f"f{type_[1:]}"
        if isinstance(value, np.generic) and scalar.itemsize != TYPE_BYTES[type_]:
            raise EmulatorError("launch", f"{name} is a {scalar.dtype}, the kernel expects a .{type_}")
        return scalar.astype(VALUE[type_]).tobytes()

    def _attach_data(self) -> int:
        """Module variables live in global memory."""
        if not self.kernel.data:
            return 0
        image = np.zeros(self.kernel.data_bytes, np.uint8)
        for variable in self.kernel.data.values():
            initial = np.frombuffer(variable.initial, np.uint8)
            image[variable.offset : variable.offset + len(initial)] = initial
        self._kept.append(image)
        return self.memory.attach(image, "module variables")


def load(kernel: Kernel) -> Program:
    """Look every instruction up; one that is unknown is an error here, whether or not it would run."""
    if kernel.program is None:
        kernel.program = Program(
            [_runner(ins) for ins in kernel.code], [warp.is_warp_synchronous(ins) for ins in kernel.code]
        )
    return kernel.program


def _runner(ins: Instruction) -> Runner:
    try:
        if builder := accesses.BUILDERS.get(ins.opcode) or warp.BUILDERS.get(ins.opcode):
            return builder(ins)
        if ins.opcode in CONTROL:
            return _nothing
        if builder := arithmetic.BUILDERS.get(ins.opcode):
            compute = builder(ins)
            return lambda launch, active: compute(launch.threads, active)
    except (AttributeError, IndexError, KeyError, StopIteration, ValueError) as error:
        # An operand or a modifier that the builder did not expect: a form it does not know.
        raise arithmetic.unsupported(ins, f"this form of {ins.opcode}") from error
    raise arithmetic.unsupported(ins)


def _nothing(launch: Launch, active: Mask) -> None:
    del launch, active


def _extents(value: int | Sequence[int]) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int | np.integer) else tuple(value)
    return (*(int(v) for v in given), 1, 1, 1)[:3]
