"""The threads of the blocks that run together: who they are, their registers, how operands are accessed.

Every array has one entry per lane: block after block, each padded to whole warps, so that
`reshape(-1, 32)` always yields warps. A value that is the same for all lanes may be kept as a NumPy scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import formats
from .errors import EmulatorError
from .formats import RAW
from .parser import TYPE_BYTES, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol

Array = np.ndarray
Mask = np.ndarray | None  # None: every lane
WARP = 32
# Windows of the generic address space; global memory lies below both.
SHARED_WINDOW = 1 << 44
LOCAL_WINDOW = 1 << 45
# A shared::cluster address names its block in the bits above the offset: rank + 1, or 0 for one's own.
RANK_SHIFT = 24


@dataclass(frozen=True)
class Shape:
    """The extents of a launch."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int
    shared_bytes: int

    @property
    def blocks(self) -> int:
        return int(np.prod(self.grid))

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))

    @property
    def lanes(self) -> int:
        """Lanes per block, whole warps."""
        return -(-self.threads // WARP) * WARP


class Threads:
    """State of the lanes of a batch of co-resident blocks."""

    def __init__(self, kernel: Kernel, shape: Shape, blocks: Array) -> None:
        self.kernel, self.shape, self.blocks = kernel, shape, blocks
        self.count = len(blocks) * shape.lanes
        index = np.arange(self.count)
        self.slot = index // shape.lanes
        self.thread = index % shape.lanes
        self.lane = index % WARP
        self.block = blocks[self.slot]
        self.exists = self.thread < shape.threads
        self.alive = self.exists.copy()
        self.registers: list[Array | None] = [None] * len(kernel.register_bytes)
        self.local = np.zeros((self.count, max(kernel.local_bytes, 1)), np.uint8)
        self.steps = 0
        self.data_address = 0
        self._special: dict[str, Array] = {}

    def raw(self, index: int) -> Array:
        value = self.registers[index]
        if value is None:
            # Compilers read registers they left undefined where the value does not matter; ones make NaN.
            size = self.kernel.register_bytes[index]
            value = self.registers[index] = RAW[size](256**size - 1)
        return value

    def set_raw(self, index: int, value: Array, active: Mask) -> None:
        self.registers[index] = value if active is None else np.where(active, value, self.raw(index))

    def set_lanes(self, index: int, value: Array, lanes: Array) -> None:
        """Write compact values, one for each entry of `lanes`."""
        full = np.array(np.broadcast_to(self.raw(index), (self.count,)))
        full[lanes] = value
        self.registers[index] = full

    def everywhere(self, value: Array) -> Array:
        return np.broadcast_to(value, (self.count,))

    def indices(self, active: Mask) -> Array:
        return np.arange(self.count) if active is None else np.flatnonzero(active)

    def name(self, lane: int) -> str:
        return f"block {self.block[lane]}, thread {self.thread[lane]}"

    def special(self, name: str) -> Array:
        if name in ("%clock", "%clock_hi", "%clock64", "%globaltimer"):
            return np.uint64(self.steps) if name.endswith(("64", "timer")) else np.uint32(self.steps)
        if name not in self._special:
            self._special[name] = self._make_special(name)
        return self._special[name]

    def _make_special(self, name: str) -> Array:
        shape, axis = self.shape, "xyz".find(name[-1])

        def coordinate(linear: Array, extents: tuple[int, ...]) -> Array:
            return (linear // int(np.prod(extents[:axis])) % extents[axis]).astype(np.uint32)

        # Clusters extend along x, as CUDA and Triton lay them out here.
        per_cluster = (shape.cluster, 1, 1)
        clusters = (shape.grid[0] // shape.cluster, shape.grid[1], shape.grid[2])
        rank = self.block % shape.cluster
        one_bit = np.uint32(1) << self.lane.astype(np.uint32)
        makers: dict[str, Callable[[], Array]] = {
            "%tid": lambda: coordinate(self.thread, shape.block),
            "%ntid": lambda: np.uint32(shape.block[axis]),
            "%ctaid": lambda: coordinate(self.block, shape.grid),
            "%nctaid": lambda: np.uint32(shape.grid[axis]),
            "%clusterid": lambda: coordinate(self.block // shape.cluster, clusters),
            "%nclusterid": lambda: np.uint32(clusters[axis]),
            "%cluster_ctaid": lambda: coordinate(rank, per_cluster),
            "%cluster_nctaid": lambda: np.uint32(per_cluster[axis]),
            "%cluster_ctarank": lambda: rank.astype(np.uint32),
            "%cluster_nctarank": lambda: np.uint32(shape.cluster),
            "%laneid": lambda: self.lane.astype(np.uint32),
            "%warpid": lambda: (self.thread // WARP).astype(np.uint32),
            "%nwarpid": lambda: np.uint32(shape.lanes // WARP),
            "%smid": lambda: self.block.astype(np.uint32),
            "%dynamic_smem_size": lambda: np.uint32(shape.shared_bytes - self.kernel.shared_bytes),
            "%total_smem_size": lambda: np.uint32(shape.shared_bytes),
            "%lanemask_eq": lambda: one_bit,
            "%lanemask_lt": lambda: one_bit - np.uint32(1),
            "%lanemask_le": lambda: one_bit | (one_bit - np.uint32(1)),
            "%lanemask_gt": lambda: ~(one_bit | (one_bit - np.uint32(1))),
            "%lanemask_ge": lambda: ~(one_bit - np.uint32(1)),
        }
        base = name[:-2] if name[-2:] in (".x", ".y", ".z") else name
        return makers[base]()


Reader = Callable[[Threads], Array]
Writer = Callable[[Threads, Array, Mask], None]
_BY_AXIS = (
    "tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid",
)  # fmt: skip
_SINGLE = (
    "cluster_ctarank", "cluster_nctarank", "laneid", "warpid", "nwarpid", "smid",
    "clock", "clock_hi", "clock64", "globaltimer", "dynamic_smem_size", "total_smem_size",
    "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge",
)  # fmt: skip
_SPECIAL_NAMES = {f"%{name}" for name in _SINGLE}.union(f"%{name}.{axis}" for name in _BY_AXIS for axis in "xyz")


def bits_reader(instruction: Instruction, operand: Operand, size: int) -> Reader:
    """A function of the threads that yields `operand` as unsigned integers of `size` bytes."""
    dtype = RAW[size]
    if isinstance(operand, Register):
        index = operand.index
        if operand.bytes == size:
            return lambda threads: threads.raw(index)
        return lambda threads: threads.raw(index).astype(dtype)
    if isinstance(operand, Special) and operand.name in _SPECIAL_NAMES:
        return lambda threads: threads.special(operand.name).astype(dtype)
    if isinstance(operand, Immediate):
        constant = dtype(int(operand.value) & (256**size - 1))
        return lambda _: constant
    if isinstance(operand, Symbol):
        if operand.name == "WARP_SZ":
            return lambda _: dtype(WARP)
        return lambda threads: dtype(symbol_address(threads, operand.name, instruction))
    raise EmulatorError("syntax", f"cannot read {operand} in {instruction.where()}")


def symbol_address(threads: Threads, name: str, instruction: Instruction) -> int:
    """The address of a variable within its state space."""
    kernel = threads.kernel
    for space, base in ((kernel.shared, 0), (kernel.local, 0), (kernel.data, threads.data_address)):
        if name in space:
            return base + space[name].offset
    raise EmulatorError("syntax", f"unknown name {name} in {instruction.where()}")


def reader(instruction: Instruction, operand: Operand, type_: str) -> Reader:
    """A function of the threads that yields the values of `operand`, of the PTX type."""
    if type_ == "pred":
        return predicate_reader(operand)
    if isinstance(operand, Immediate) and isinstance(operand.value, float):
        value = formats.decode(formats.encode(np.float64(operand.value), type_), type_)
        return lambda _: value
    bits = bits_reader(instruction, operand, TYPE_BYTES[type_])
    value_type = formats.VALUE[type_]
    if type_ in ("f16", "bf16"):
        return lambda threads: formats.decode(bits(threads), type_)
    return lambda threads: bits(threads).view(value_type)


def predicate_reader(operand: Operand) -> Reader:
    if isinstance(operand, Immediate):
        constant = np.bool_(operand.value)
        return lambda _: constant
    index = operand.index
    if operand.negated:
        return lambda threads: ~threads.raw(index).astype(np.bool_)
    return lambda threads: threads.raw(index).astype(np.bool_, copy=False)


def _discard(threads: Threads, values: Array, active: Mask) -> None:
    del threads, values, active


def writer(instruction: Instruction, operand: Operand, type_: str) -> Writer:
    """A function that stores values of the PTX type; a wider register is sign- or zero-extended."""
    if isinstance(operand, Sink):
        return _discard
    if not isinstance(operand, Register):
        raise EmulatorError("syntax", f"cannot write {operand} in {instruction.where()}")
    index, size = operand.index, operand.bytes
    if type_ == "pred":
        return lambda threads, values, active: threads.set_raw(index, np.asarray(values, np.bool_), active)
    signed = type_.startswith("s")
    widened = np.dtype(f"i{size}")

    def write(threads: Threads, values: Array, active: Mask) -> None:
        bits = formats.encode(values, type_)
        if bits.dtype.itemsize != size:
            bits = bits.view(formats.VALUE[type_]).astype(widened).view(RAW[size]) if signed else bits.astype(RAW[size])
        threads.set_raw(index, bits, active)

    return write
