"""How a pass over an (N, C, S) tensor is cut into tiles, and how per-channel sums and parameters meet a tile.

Measured rules (bench/README.md): a tile is about 2 MB of one operand, which hides the interpreter's cost per tile and
stays in the outer cache; it is contiguous wherever it can be. A tile is computed in one of two shapes:

``columns``
    (n, c, s) with parameters of shape (c, 1), when the inner axes are long enough for NumPy's inner loop. Sums are
    BLAS dot products over at most 1,024 elements, too few for BLAS to start threads of its own.
``rows``
    (n, c * s) with parameters expanded to one row, when they are short. Several samples make one row when a single
    one would be short too. Sums run down the columns, 32 rows at a time.

How a sum is cut depends on the tensor's shape alone, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpu_bn.backends import _threads

Array = NDArray[Any]

THREADED = 3 << 19
"""Elements: from here on threads pay for their start."""
TILE_BYTES = 2 << 20
SCRATCH_SHARE = 96
"""A tile that needs temporaries is at most this fraction of the tensor for each of them: memory stays within 5 %."""
MIN_SCRATCH, MAX_SCRATCH = 4 << 10, 64 << 10
"""Elements of such a tile."""
DOT = 1024
"""Elements of one dot product; and NumPy lets other threads run only during calls of more than 500 of them."""
COLUMN_SUMS = 96
"""S: from here on sums are dot products."""
COLUMNS = 512
"""S: from here on all is computed in columns."""
ROW = 1024
"""Elements: samples are joined until a row is about this long."""
ROW_BLOCK = 16 << 10
"""Elements: wider rows are cut, so that the expanded parameters stay in the inner cache."""
RUN = 32
"""Rows summed in the tensor's precision before float64 takes over."""


class Tile(NamedTuple):
    """One piece: where it lies in (N, C, S), the shape it is computed in, and its share of parameters and sums."""

    box: tuple[slice, slice, slice]
    shape: tuple[int, ...]
    parameters: slice
    sums: slice


@dataclass(frozen=True, slots=True)
class Sweep:
    """The tiles of one pass; ``fold`` samples make one row, 0 stands for columns."""

    n: int
    c: int
    s: int
    fold: int
    chunk: int
    tiles: tuple[Tile, ...]

    def expand(self, vector: Array, dtype: DTypeLike) -> Array:
        """A per-channel vector that broadcasts against a tile, once cut by ``tile.parameters``."""
        vector = vector.astype(dtype, copy=False)
        if not self.fold:
            return vector[:, None]
        if self.fold == self.s == 1:
            return vector
        row = np.empty((self.fold, self.c, self.s), vector.dtype)
        row[...] = vector[:, None]
        return row.reshape(-1)

    def partials(self, dtype: DTypeLike) -> Array:
        """Room for the partial sums of :meth:`add`."""
        if self.fold:
            return np.zeros((self.tiles[-1].sums.stop, self.fold * self.c * self.s))
        return np.empty((self.n, self.c, -(-self.s // self.chunk)), dtype)

    def add(self, partials: Array, tile: Tile, a: Array, b: Array | None = None) -> None:
        """Sum ``a * b`` over a tile; without ``b``, sum ``a``."""
        if self.fold:
            _sum_down(a, b, partials[tile.sums.start, tile.parameters])
        else:
            _sum_along(a, b, partials[tile.box[0], tile.box[1], tile.sums], self.chunk)

    def total(self, partials: Array) -> Array:
        """The sums, (C,) in float64."""
        if not self.fold:
            sums: Array = np.add.reduce(np.add.reduce(partials, axis=0, dtype=np.float64), axis=1)
            return sums
        rows: Array = partials[0] if len(partials) == 1 else np.add.reduce(partials, axis=0)
        if self.s > 1:
            rows = np.vecdot(rows.reshape(-1, self.s), _ones(self.s, rows.dtype))
        sums = np.add.reduce(rows.reshape(self.fold, self.c), axis=0)
        return sums


@lru_cache(512)
def sweep(n: int, c: int, s: int, itemsize: int, *, sums: bool, temporaries: int) -> Sweep:
    """The sweep for a tensor: one that sums or one that only maps; ``temporaries`` a tile."""
    limit = TILE_BYTES // itemsize
    if temporaries:
        limit = min(limit, max(MIN_SCRATCH, min(n * c * s // (SCRATCH_SHARE * temporaries), MAX_SCRATCH)))
    if s >= (COLUMN_SUMS if sums else COLUMNS):
        chunk = _chunk(s, min(DOT, TILE_BYTES // itemsize // 512))
        return Sweep(n, c, s, 0, chunk, _column_tiles(n, c, s, limit, chunk))
    fold = 1
    while 2 * fold * c * s <= ROW and 2 * fold <= n:
        fold *= 2
    width = max(1, min(c, ROW_BLOCK // s))
    width = -(-c // -(-c // width))
    return Sweep(n, c, s, fold, s, _row_tiles(n, c, s, fold, limit, width))


def _chunk(s: int, most: int) -> int:
    """A length of at most ``most`` that divides ``s`` if there is one above half of it."""
    for pieces in range(-(-s // most), 2 * -(-s // most)):
        if s % pieces == 0:
            return s // pieces
    return most


def _column_tiles(n: int, c: int, s: int, limit: int, chunk: int) -> tuple[Tile, ...]:
    """Whole samples while they fit, else whole channels of one sample, else parts of one channel."""
    samples = max(1, limit // (c * s))
    channels = c if c * s <= limit else max(1, limit // s)
    inner = s if s <= limit else max(1, limit // chunk) * chunk
    return tuple(
        Tile(
            (slice(n0, n1), slice(c0, c1), slice(s0, s1)),
            (n1 - n0, c1 - c0, s1 - s0),
            slice(c0, c1),
            slice(s0 // chunk, -(-s1 // chunk)),
        )
        for n0, n1 in _ranges(n, samples)
        for c0, c1 in _ranges(c, channels)
        for s0, s1 in _ranges(s, inner)
    )


def _row_tiles(n: int, c: int, s: int, fold: int, limit: int, width: int) -> tuple[Tile, ...]:
    """``width`` channels of as many rows as fit; samples left over when rows are joined make a row of their own."""
    rows = max(1, limit // (fold * width * s))
    tiles, whole = [], n // fold
    blocks = _ranges(whole, rows)
    for block, (r0, r1) in enumerate(blocks):
        for c0, c1 in _ranges(c, width):
            columns = slice(c0 * s, c1 * s) if fold == 1 else slice(0, fold * c * s)
            shape = (r1 - r0, columns.stop - columns.start)
            box = (slice(r0 * fold, r1 * fold), slice(c0, c1), slice(0, s))
            tiles.append(Tile(box, shape, columns, slice(block, block + 1)))
    if rest := n - whole * fold:
        box = (slice(n - rest, n), slice(0, c), slice(0, s))
        tiles.append(Tile(box, (1, rest * c * s), slice(0, rest * c * s), slice(len(blocks), len(blocks) + 1)))
    return tuple(tiles)


def _ranges(stop: int, step: int) -> list[tuple[int, int]]:
    return [(i, min(i + step, stop)) for i in range(0, stop, step)]


def _sum_along(a: Array, b: Array | None, out: Array, chunk: int) -> None:
    """Dot products over pieces of the last axis of (n, c, s); the last piece may be shorter."""
    n, c, s = a.shape
    if s == chunk:
        np.vecdot(a, _ones(s, a.dtype) if b is None else b, out=out[..., 0])
        return
    pieces = s // chunk
    whole = (n, c, pieces, chunk)
    head = slice(0, pieces * chunk)
    if pieces:
        other = _ones(chunk, a.dtype) if b is None else b[..., head].reshape(whole)
        np.vecdot(a[..., head].reshape(whole), other, out=out[..., :pieces])
    if rest := s - head.stop:
        other = _ones(rest, a.dtype) if b is None else b[..., head.stop :]
        np.vecdot(a[..., head.stop :], other, out=out[..., pieces])


def _sum_down(a: Array, b: Array | None, out: Array) -> None:
    """Sums of (rows, columns) down the rows, RUN of them at a time and then in float64."""
    whole = len(a) // RUN
    sums = np.empty((whole + (len(a) % RUN > 0), a.shape[1]), a.dtype)
    if whole:
        runs = a[: whole * RUN].reshape(whole, RUN, -1)
        if b is None:
            np.add.reduce(runs, axis=1, out=sums[:whole])
        else:
            np.einsum("rnk,rnk->rk", runs, b[: whole * RUN].reshape(runs.shape), out=sums[:whole])
    if whole < len(sums):
        tail = a[whole * RUN :]
        if b is None:
            np.add.reduce(tail, axis=0, out=sums[whole])
        else:
            np.einsum("nk,nk->k", tail, b[whole * RUN :], out=sums[whole])
    np.add.reduce(sums, axis=0, dtype=out.dtype, out=out)


@lru_cache(64)
def _ones(length: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(length, dtype)


class Workspace:
    """Buffers that a thread keeps from tile to tile."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.buffers: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """An uninitialised array; the same memory each time that the name is asked for."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self.buffers[name] = np.empty(size, self.dtype)
        return buffer[:size].reshape(shape)


class Operand:
    """A tensor, seen as (N, C, S), as the tiles meet it: in place if it is contiguous and in the working dtype."""

    def __init__(self, name: str, array: Array, dtype: np.dtype[Any]) -> None:
        self.name = name
        self.array = array
        self.in_place = array.dtype == dtype and array.flags.c_contiguous

    def load(self, tile: Tile, work: Workspace) -> Array:
        """A tile of it to read."""
        piece = self.array[tile.box]
        if self.in_place:
            return piece.reshape(tile.shape)
        buffer = work.take(self.name, piece.shape)
        np.copyto(buffer, piece, casting="unsafe")
        return buffer.reshape(tile.shape)

    def open(self, tile: Tile, work: Workspace) -> Array:
        """A tile of it to write; :meth:`store` ends the writing."""
        if self.in_place:
            return self.array[tile.box].reshape(tile.shape)
        return work.take(self.name, tile.shape)

    def store(self, tile: Tile, value: Array) -> None:
        """Put a tile, which :meth:`open` gave, where it belongs."""
        if not self.in_place:
            piece = self.array[tile.box]
            np.copyto(piece, value.reshape(piece.shape), casting="unsafe")


def run(
    sweep: Sweep, dtype: np.dtype[Any], body: Callable[[Tile, Workspace], None], *, backwards: bool = False
) -> None:
    """Call ``body`` on each tile of a sweep, on several threads where they pay."""
    tiles: Sequence[Tile] = sweep.tiles[::-1] if backwards else sweep.tiles
    threads = _threads.get_num_threads() if sweep.n * sweep.c * sweep.s >= THREADED else 1
    local = threading.local()

    def task(tile: Tile) -> None:
        work = getattr(local, "work", None)
        if work is None:
            work = local.work = Workspace(dtype)
        body(tile, work)

    _threads.run(task, tiles, threads)
