"""Device memory: NumPy arrays with device addresses, and the state of each byte.

An array that is passed to a launch is device memory. Its device address keeps the array's offset within the allocation
that it is a view of: overlapping arguments overlap on the device, and a misaligned view is misaligned there. A kernel
may access the bytes of its arguments only.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from .errors import EmulatorError
from .formats import RAW, Array

GLOBAL_BASE = 1 << 33
ALIGNMENT = 512  # of CUDA's allocators
GAP = 4096  # bytes between allocations, so that an access past the end of one does not reach the next
POISON = 0xFF  # NaN in every float format
UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2


def rows(memory: Array, size: int) -> Array:
    """Return a view of memory as rows of `size` bytes, in elements of up to 8 bytes."""
    element = min(size, 8)
    whole = memory[: len(memory) // size * size]
    return whole.view(RAW[element]).reshape(-1, size // element)


def gather(memory: Array, offsets: Array, size: int) -> Array:
    """Load `size` bytes for each lane, at aligned offsets; return them as (lanes, size)."""
    taken = rows(memory, size).take(offsets // size, axis=0)
    return taken.view(np.uint8).reshape(-1, size)


def scatter(memory: Array, offsets: Array, data: Array) -> None:
    """Store (lanes, size) bytes at aligned offsets; if several lanes have one offset, the last one wins."""
    size = data.shape[1]
    element = min(size, 8)
    rows(memory, size)[offsets // size] = np.ascontiguousarray(data).view(RAW[element]).reshape(len(data), -1)


@dataclass
class Region:
    """Memory that instructions access: an allocation, or one state space of all resident blocks."""

    name: str
    space: str
    memory: Array
    state: Array | None = None  # UNWRITTEN, WRITTEN or IN_FLIGHT for each byte; None: all are written
    address: int = 0  # identifies the region in its space


@dataclass
class Allocation(Region):
    """A piece of host memory that serves as device memory."""

    extents: list[tuple[int, int]] = field(default_factory=list)  # the byte ranges of the arguments, merged

    def allow(self, low: int, high: int, name: str) -> None:
        self.name = f"{self.name}/{name}" if self.name else name
        merged = [(low, high)]
        for extent in self.extents:
            if extent[0] <= merged[0][1] and merged[0][0] <= extent[1]:
                merged[0] = (min(extent[0], merged[0][0]), max(extent[1], merged[0][1]))
            else:
                merged.append(extent)
        self.extents = sorted(merged)


def owner_of(array: Array) -> Array:
    """Return the array that owns the memory of `array`."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class GlobalMemory:
    """The arrays on a device and their addresses, which stay the same from launch to launch."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, int, Array | None]] = {}
        self._next = GLOBAL_BASE
        self.allocations: list[Allocation] = []
        self._bases: list[int] = []

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> Array:
        """Return an array of poison; a kernel may not read an element before it is written."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        owner = np.full(max(size, 1), POISON, np.uint8)
        self._remember(owner, np.full(len(owner), UNWRITTEN, np.uint8))
        return owner[:size].view(dtype).reshape(shape)

    def unwritten(self, array: Array) -> int:
        """Count the elements of an array made by `empty` that have a byte that was never written."""
        states = self._states(array)
        return 0 if states is None else int((states == UNWRITTEN).any(-1).sum())

    def mark_written(self, array: Array) -> None:
        """Mark an array made by `empty` as written by the host."""
        if (states := self._states(array)) is not None:
            states[...] = WRITTEN

    def _states(self, array: Array) -> Array | None:
        """Return the states of the bytes of an array or view, (*shape, itemsize); ``None`` unless `empty` made it."""
        owner: np.ndarray = owner_of(array)
        reference, _, state = self._known.get(owner.ctypes.data, (lambda: None, 0, None))
        if state is None or reference() is not owner:
            return None
        start = state[array.ctypes.data - owner.ctypes.data :]
        return np.lib.stride_tricks.as_strided(start, (*array.shape, array.itemsize), (*array.strides, 1))

    def _remember(self, owner: Array, state: Array | None) -> tuple[weakref.ref, int, Array | None]:
        entry = (weakref.ref(owner), self._next, state)
        self._known[owner.ctypes.data] = entry
        self._next += -(-max(owner.nbytes, 1) // ALIGNMENT) * ALIGNMENT + GAP
        return entry

    def begin(self) -> None:
        """Forget which bytes the previous launch was allowed to access."""
        self.allocations, self._bases = [], []

    def attach(self, array: Array, name: str) -> int:
        """Let the next launch access an array; return its device address."""
        owner = owner_of(array)
        entry = self._known.get(owner.ctypes.data)
        if entry is None or entry[0]() is not owner:
            entry = self._remember(owner, None)
        _, address, state = entry
        allocation = next((a for a in self.allocations if a.address == address), None)
        if allocation is None:
            flat = owner.reshape(-1, order="A").view(np.uint8) if owner.size else np.zeros(1, np.uint8)
            if owner.size and not np.shares_memory(flat, owner):
                raise EmulatorError("launch", f"{name} views memory that is not contiguous")
            allocation = Allocation("", "global", flat, state, address)
            position = bisect_right(self._bases, address)
            self._bases.insert(position, address)
            self.allocations.insert(position, allocation)
        low, high = (int(b) - owner.ctypes.data for b in np.lib.array_utils.byte_bounds(array))
        allocation.allow(low, high if array.size else low, name)
        return address + array.ctypes.data - owner.ctypes.data

    def locate(self, addresses: Array) -> list[tuple[Array | slice, Allocation | None]]:
        """Group addresses by the allocation that they may lie in; usually there is one group."""
        if not self.allocations:
            return [(slice(None), None)]
        first = bisect_right(self._bases, int(addresses[0])) - 1
        if first >= 0:
            low = self._bases[first]
            high = self._bases[first + 1] if first + 1 < len(self._bases) else 1 << 62
            if low <= int(addresses.min()) and int(addresses.max()) < high:
                return [(slice(None), self.allocations[first])]
        owners = np.searchsorted(np.array(self._bases), addresses, side="right") - 1
        return [(np.flatnonzero(owners == o), self.allocations[max(o, 0)]) for o in np.unique(owners).tolist()]
