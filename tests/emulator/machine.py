"""The device, which owns memory, and its launches, which run one batch of blocks after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from . import arithmetic, atomics, bits, conversions, copies, matrices  # noqa: F401
from .barriers import Barriers
from .copies import AsyncCopies
from .counters import L2, Counters, Report
from .errors import EmulatorError
from .formats import VALUE
from .instructions import Runner, build
from .memory import POISON, UNWRITTEN, GlobalMemory, Region
from .parser import Instruction, Kernel
from .races import RaceDetector
from .scheduler import Scheduler
from .threads import Array, Shape, Threads

Argument = np.ndarray | np.generic | int | float | bool | None
SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a block may have, by architecture."""


@dataclass(frozen=True)
class Checks:
    """The costly checks that run. Bounds, barriers, shuffles and conflicting stores are always checked."""

    races: bool = True
    initialised: bool = True


@dataclass
class Device:
    """A GPU to launch kernels on.

    `resident_threads` is the largest number of threads of a batch of blocks. `cooperative_blocks` is the largest grid
    of a cooperative launch; ``None`` is no limit. With a `seed`, warps and blocks run in a random order. `l2_bytes`,
    the size of the L2 cache, turns on the model of DRAM traffic; the cache keeps its contents between launches.
    """

    checks: Checks = field(default_factory=Checks)
    seed: int | None = None
    resident_threads: int = 16384
    cooperative_blocks: int | None = None
    l2_bytes: int | None = None
    sector_bytes: int = 32
    shared_limit: int | None = None  # bytes; by default what the kernel's architecture has
    max_steps: int = 3_000_000
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = GlobalMemory()
        self.l2 = L2(self.l2_bytes, self.sector_bytes) if self.l2_bytes else None

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> Array:
        """Return uninitialised device memory: full of NaN, and a read before a write is an error."""
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
        """Run a kernel to its end. Arrays are device memory, which changes in place; Python numbers are cast.

        `names` are the names of the arguments in errors and in `Report.buffer`; by default arg0, arg1, ...
        """
        shape = Shape(_extents(grid), _extents(block), cluster or kernel.cluster, kernel.shared_bytes + shared_bytes)
        names = [f"arg{i}" for i in range(len(args))] if names is None else names
        self._check_launch(kernel, shape, len(args), len(names), cooperative)
        with np.errstate(all="ignore"):
            report = Launch(self, kernel, shape, args, names, cooperative).run()
        self.reports.append(report)
        return report

    def _check_launch(self, kernel: Kernel, shape: Shape, arguments: int, names: int, cooperative: bool) -> None:
        threads, wanted = shape.threads, len(kernel.parameters)
        limit, required = (int(np.prod(bounds)) for bounds in (kernel.threads_limit or 1024, kernel.threads_required))
        shared_limit = self.shared_limit or 1024 * SHARED_LIMITS.get(kernel.arch, 227)
        room = shape.blocks if self.cooperative_blocks is None or not cooperative else self.cooperative_blocks
        for fine, message in (
            (arguments == wanted, f"{wanted} parameters, {arguments} arguments"),
            (names == wanted, f"{wanted} parameters, {names} names"),
            (min(*shape.grid, *shape.block) > 0, f"empty grid {shape.grid} or block {shape.block}"),
            (threads <= 1024, f"{threads} threads per block, the limit is 1024"),
            (threads <= limit, f"{threads} threads per block, compiled for at most {limit}"),
            (
                not kernel.threads_required or threads == required,
                f"{threads} threads per block, compiled for {required}",
            ),
            (kernel.cluster in (1, shape.cluster), f"clusters of {shape.cluster}, compiled for {kernel.cluster}"),
            (shape.cluster <= 16, f"clusters of {shape.cluster}, the limit is 16"),
            (shape.grid[0] % shape.cluster == 0, f"grid {shape.grid} is not whole clusters of {shape.cluster}"),
            (shape.shared_bytes <= shared_limit, f"{shape.shared_bytes} bytes of shared memory, limit {shared_limit}"),
            (shape.blocks <= room, f"cooperative launch of {shape.blocks} blocks, there is room for {room}"),
        ):
            if not fine:
                raise EmulatorError("launch", f"{kernel.name}: {message}")


class Launch:
    """The state of a launch in progress, which the instructions read and change."""

    threads: Threads  # of the present batch of blocks
    shared: Region
    local: Region
    copies: AsyncCopies
    barriers: Barriers

    def __init__(
        self, device: Device, kernel: Kernel, shape: Shape, args: Sequence[Argument], names: Sequence[str],
        cooperative: bool,
    ) -> None:  # fmt: skip
        self.device, self.kernel, self.shape, self.checks = device, kernel, shape, device.checks
        self.memory, self.cooperative = device.memory, cooperative
        self.runners = load(kernel)
        self.counters = Counters(kernel, device.l2)
        self.rng = None if device.seed is None else np.random.default_rng(device.seed)
        self.memory.begin()
        self.parameters = self._marshal(args, names)
        self.data = self._module_variables()
        self.data_address = self.memory.attach(self.data, "module variables") if kernel.data else 0
        self.shared_stride = -(-shape.shared_bytes // 128) * 128 + 128
        self.local_stride = -(-kernel.local_bytes // 16) * 16
        self.races = RaceDetector(self) if device.checks.races else None
        self.progress = 0  # the number of changes of memory, completed barriers and exits
        self.polls = 0  # the number of reads that may wait for another thread

    def run(self) -> Report:
        for blocks in self._batches():
            self.threads = Threads(self.kernel, self.shape, blocks, self.data_address)
            size = len(blocks) * self.shared_stride
            shared, state = np.full(size, POISON, np.uint8), np.full(size, UNWRITTEN, np.uint8)
            self.shared = Region("shared memory", "shared", shared, state, -1)
            self.local = Region("local memory", "local", np.zeros(self.threads.count * self.local_stride, np.uint8))
            self.copies = AsyncCopies(self.threads.count)
            self.barriers = Barriers(self)
            if self.races:
                self.races.begin_batch()
            Scheduler(self, self.runners, self.rng).run()
        return self.counters.finish()

    def step(self, ins: Instruction) -> None:
        self.threads.steps += 1
        if self.threads.steps > self.device.max_steps:
            self.fail("endless loop", f"still running after {self.device.max_steps} steps", ins)

    def fail(self, check: str, message: str, ins: Instruction | None = None, lane: int | None = None) -> NoReturn:
        where = "" if lane is None else f", {self.threads.name(lane)}"
        raise EmulatorError(check, message + where + (f", {ins.where()}" if ins else ""))

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
        blocks = clusters[:, None] * shape.cluster + np.arange(shape.cluster)
        return [blocks[start : start + size].reshape(-1) for start in range(0, len(clusters), size)]

    def _marshal(self, args: Sequence[Argument], names: Sequence[str]) -> Array:
        """Return the arguments as the bytes of the kernel's parameter space."""
        last = self.kernel.parameters[-1] if self.kernel.parameters else None
        block = np.zeros(last.offset + last.bytes if last else 0, np.uint8)
        for parameter, value, name in zip(self.kernel.parameters, args, names, strict=True):
            data = np.frombuffer(self._encode(value, parameter.type, parameter.bytes, name), np.uint8)
            block[parameter.offset : parameter.offset + len(data)] = data
        return block

    def _encode(self, value: Argument, type_: str, size: int, name: str) -> bytes:
        if value is None:
            return bytes(8)
        if isinstance(value, np.ndarray):
            if size != 8 or type_[0] == "f":
                raise EmulatorError("launch", f"{name} is an array, the kernel expects a .{type_}")
            return np.uint64(self.memory.attach(value, name)).tobytes()
        if isinstance(value, np.generic):  # passed as its bits; a struct is an np.void
            mixed = value.dtype.kind != "V" and type_[0] != "b" and (value.dtype.kind == "f") != (type_[0] == "f")
            if value.nbytes != size or mixed:
                raise EmulatorError("launch", f"{name} is a {value.dtype}, the kernel expects a .{type_}")
            return value.tobytes()
        if isinstance(value, float) and type_[0] == "b":  # Triton declares float parameters as bits
            type_ = f"f{type_[1:]}"
        return np.asarray(value).astype(VALUE[type_]).tobytes()

    def _module_variables(self) -> Array:
        """Return the initial bytes of the module's variables, which lie in global memory."""
        image = np.zeros(self.kernel.data_bytes, np.uint8)
        for variable in self.kernel.data.values():
            initial = np.frombuffer(variable.initial, np.uint8)
            image[variable.offset : variable.offset + len(initial)] = initial
        return image


def load(kernel: Kernel) -> list[Runner]:
    """Return the functions that execute a kernel's instructions; they are built once."""
    if kernel.program is None:
        kernel.program = [build(ins) for ins in kernel.code]
    return kernel.program


def _extents(value: int | Sequence[int]) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int | np.integer) else tuple(value)
    x, y, z = (*(int(v) for v in given), 1, 1, 1)[:3]
    return x, y, z
