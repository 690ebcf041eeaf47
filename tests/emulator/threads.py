"""The threads of the blocks that run together: their indices, registers, and access to operands.

Every array has one entry for each lane, block after block. Blocks are padded to whole warps, so that `reshape(-1, 32)`
gives warps. A value that is the same for all lanes may be a NumPy scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import formats
from .errors import EmulatorError
from .formats import RAW, VALUE, Array
from .parser import TYPE_BYTES, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol

Mask = Array | None  # None: every lane
WARP = 32
# Windows of the generic address space; global memory lies below both.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 44, 1 << 45
# A shared::cluster address has its block in the bits above the offset: rank + 1, or 0 for the thread's own block.
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
        """The number of lanes of a block: its threads, padded to whole warps."""
        return -(-self.threads // WARP) * WARP


class Threads:
    """The state of the lanes of a batch of resident blocks."""

    def __init__(self, kernel: Kernel, shape: Shape, blocks: Array, data_address: int) -> None:
        self.kernel, self.shape, self.blocks, self.data_address = kernel, shape, blocks, data_address
        self.count = len(blocks) * shape.lanes
        self.every = np.arange(self.count)
        self.slot, self.thread = np.divmod(self.every, shape.lanes)
        self.lane = self.every % WARP
        self.block = blocks[self.slot]
        self.exists = self.thread < shape.threads
        self.alive = self.exists.copy()
        self.registers: list[Array | None] = [None] * len(kernel.register_bytes)
        self.steps = 0
        self._special: dict[str, Array] = {}
        self.memo: dict[Any, Any] = {}  # results that instructions compute once

    def raw(self, index: int) -> Array:
        value = self.registers[index]
        if value is None:
            # Compilers may read undefined registers if the value does not matter; all ones are NaN.
            size = self.kernel.register_bytes[index]
            value = self.registers[index] = RAW[size](256**size - 1)
        return value

    def set_raw(self, index: int, value: Array, active: Mask) -> None:
        self.registers[index] = value if active is None else np.where(active, value, self.raw(index))

    def set_lanes(self, index: int, value: Array, lanes: Array) -> None:
        """Write values to a register of some lanes, one for each entry of `lanes`."""
        if len(lanes) == self.count:
            self.registers[index] = value
            return
        full = self.everywhere(self.raw(index)).copy()
        full[lanes] = value
        self.registers[index] = full

    def everywhere(self, value: Array) -> Array:
        return value if np.ndim(value) else np.full(self.count, value)

    def indices(self, active: Mask) -> Array:
        return self.every if active is None else np.flatnonzero(active)

    def per_block(self, values: Array) -> Array:
        """Return values of lanes as one row for each block."""
        return values.reshape(-1, self.shape.lanes)

    def per_lane(self, values: Array) -> Array:
        """Return values of blocks, repeated for their lanes."""
        return np.repeat(values, self.shape.lanes)

    def name(self, lane: int) -> str:
        return f"block {self.block[lane]}, thread {self.thread[lane]}"

    def special(self, name: str) -> Array:
        if name in _CLOCKS:
            return np.uint64(self.steps)
        if name not in self._special:
            self._special[name] = np.asarray(SPECIAL[name](self)).astype(np.uint32)
        return self._special[name]


Makers = dict[str, Callable[[Threads], Array]]


def _axes(name: str, count: str, linear: Callable[[Threads], Array], extents: Callable[[Shape], Any]) -> Makers:
    """Return the coordinates %name.x, .y and .z, and the extents %count.x, .y and .z."""

    def axis(i: int) -> Makers:
        return {
            f"%{name}.{'xyz'[i]}": lambda t: (
                linear(t) // np.prod(extents(t.shape)[:i], dtype=int) % extents(t.shape)[i]
            ),
            f"%{count}.{'xyz'[i]}": lambda t: extents(t.shape)[i],
        }

    return axis(0) | axis(1) | axis(2)


_CLOCKS = ("%clock", "%clock_hi", "%clock64", "%globaltimer")
# Clusters extend along x, as in the kernels here.
SPECIAL: Makers = {
    **_axes("tid", "ntid", lambda t: t.thread, lambda s: s.block),
    **_axes("ctaid", "nctaid", lambda t: t.block, lambda s: s.grid),
    **_axes("clusterid", "nclusterid", lambda t: t.block // t.shape.cluster,
            lambda s: (s.grid[0] // s.cluster, *s.grid[1:])),
    **_axes("cluster_ctaid", "cluster_nctaid", lambda t: t.block % t.shape.cluster, lambda s: (s.cluster, 1, 1)),
    "%cluster_ctarank": lambda t: t.block % t.shape.cluster,
    "%cluster_nctarank": lambda t: t.shape.cluster,
    "%laneid": lambda t: t.lane,
    "%warpid": lambda t: t.thread // WARP,
    "%nwarpid": lambda t: t.shape.lanes // WARP,
    "%smid": lambda t: t.block,
    "%dynamic_smem_size": lambda t: t.shape.shared_bytes - t.kernel.shared_bytes,
    "%total_smem_size": lambda t: t.shape.shared_bytes,
    "%lanemask_eq": lambda t: 1 << t.lane,
    "%lanemask_lt": lambda t: (1 << t.lane) - 1,
    "%lanemask_le": lambda t: (2 << t.lane) - 1,
    "%lanemask_gt": lambda t: ~((2 << t.lane) - 1),
    "%lanemask_ge": lambda t: ~((1 << t.lane) - 1),
}  # fmt: skip


# -------------------------------------------------------------------- operands

Reader = Callable[[Threads], Array]
Writer = Callable[[Threads, Array, Mask], None]


def bits_reader(ins: Instruction, operand: Operand, size: int) -> Reader:
    """Return a function of the threads that reads `operand` as unsigned integers of `size` bytes."""
    dtype = RAW[size]
    if isinstance(operand, Register):
        index = operand.index
        if operand.bytes == size:
            return lambda threads: threads.raw(index)
        return lambda threads: threads.raw(index).astype(dtype)
    if isinstance(operand, Special) and (operand.name in SPECIAL or operand.name in _CLOCKS):
        return lambda threads: threads.special(operand.name).astype(dtype)
    if isinstance(operand, Immediate) and isinstance(operand.value, int):
        constant = dtype(operand.value & (256**size - 1))
        return lambda _: constant
    if isinstance(operand, Symbol):
        if operand.name == "WARP_SZ":
            return lambda _: dtype(WARP)
        return lambda threads: dtype(symbol_address(threads, operand.name, ins))
    raise EmulatorError("unknown instruction", f"{operand} is not modelled here: {ins.where()}")


def symbol_address(threads: Threads, name: str, ins: Instruction) -> int:
    """Return the address of a variable within its state space."""
    kernel = threads.kernel
    for space, base in ((kernel.shared, 0), (kernel.local, 0), (kernel.data, threads.data_address)):
        if name in space:
            return base + space[name].offset
    raise EmulatorError("syntax", f"unknown name {name} in {ins.where()}")


def reader(ins: Instruction, operand: Operand, type_: str) -> Reader:
    """Return a function of the threads that reads the values of `operand`, of the PTX type."""
    if type_ == "pred":
        return predicate_reader(operand)
    if isinstance(operand, Immediate) and isinstance(operand.value, float) and type_ in formats.FLOATS:
        value = formats.decode(formats.encode(np.float64(operand.value), type_), type_)
        return lambda _: value
    bits = bits_reader(ins, operand, TYPE_BYTES[type_])
    if type_ in ("f16", "bf16"):
        return lambda threads: formats.decode(bits(threads), type_)
    value_type = VALUE[type_]
    return bits if value_type is RAW[TYPE_BYTES[type_]] else lambda threads: bits(threads).view(value_type)


def predicate_reader(operand: Operand) -> Reader:
    if isinstance(operand, Immediate):
        constant = np.bool_(operand.value)
        return lambda _: constant
    index = operand.index
    if operand.negated:
        return lambda threads: ~threads.raw(index).astype(np.bool_)
    return lambda threads: threads.raw(index).astype(np.bool_, copy=False)


def extend(bits: Array, type_: str, register: Register) -> Array:
    """Convert the bits of a type to the bits of a register, which may be wider."""
    if bits.dtype.itemsize == register.bytes:
        return bits
    if type_.startswith("s"):
        return bits.view(VALUE[type_]).astype(f"i{register.bytes}").view(RAW[register.bytes])
    return bits.astype(RAW[register.bytes])


def writer(ins: Instruction, operand: Operand, type_: str) -> Writer:
    """Return a function that writes values of the PTX type; they are extended to the width of the register."""
    if isinstance(operand, Sink):
        return lambda threads, values, active: None  # noqa: ARG005
    if not isinstance(operand, Register):
        raise EmulatorError("syntax", f"cannot write {operand} in {ins.where()}")
    index = operand.index
    if type_ == "pred":
        return lambda threads, values, active: threads.set_raw(index, np.asarray(values, np.bool_), active)
    return lambda threads, values, active: threads.set_raw(
        index, extend(formats.encode(values, type_), type_, operand), active
    )
