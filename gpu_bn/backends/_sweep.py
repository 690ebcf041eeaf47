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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpu_bn.backends import _threads
from gpu_bn.backends._half import to_float16

Array = NDArray[Any]

THREADED = 3 << 19
"""Elements: from here on threads pay for their start."""
TILE_BYTES = 2 << 20
SCRATCH_SHARE = 0.03
"""A tile's temporaries take at most this share of the tensor. Such tiles are small, so one thread works on them:
several would wait for the interpreter's lock most of the time."""
MIN_SCRATCH, MAX_SCRATCH = 8 << 10, 64 << 10
"""Elements of a tile with temporaries."""
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
SUMMED = 512
"""Positions of a channel in one partial sum at least, so that these stay small beside the tensor."""
REUSED = 8
"""Rows of a tile at least, so that expanded parameters are used more than once."""


class Tile(NamedTuple):
    """One piece: where it lies in (N, C, S), the shape it is computed in, and its share of parameters and sums."""

    box: tuple[slice, slice, slice]
    shape: tuple[int, ...]
    parameters: slice
    sums: slice


@dataclass(frozen=True, slots=True)
class Sweep:
    """The tiles of one pass; ``fold`` samples make one row, 0 stands for columns.

    Tiles that add to the same partial sum make one task: one thread takes them in their order.
    """

    n: int
    c: int
    s: int
    fold: int
    chunk: int
    threaded: bool
    tasks: tuple[tuple[Tile, ...], ...]

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles, in order."""
        return tuple(chain.from_iterable(self.tasks))

    def partials(self, dtype: DTypeLike) -> Array:
        """Room for the partial sums of :meth:`add`."""
        if self.fold:
            return np.zeros((self.tasks[-1][0].sums.stop, self.c))
        return np.empty((self.n, self.c, -(-self.s // self.chunk)), dtype)

    def add(self, partials: Array, tile: Tile, a: Array, b: Array | None = None) -> None:
        """Sum ``a * b`` over a tile; without ``b``, sum ``a``."""
        if not self.fold:
            _sum_along(a, b, partials[tile.box[0], tile.box[1], tile.sums], self.chunk)
            return
        out = partials[tile.sums.start, tile.box[1]]
        columns = _sum_down(a, b)
        if self.s > 1:
            columns = np.vecdot(columns.reshape(-1, self.s), _ones(self.s, columns.dtype))
        out += np.add.reduce(columns.reshape(-1, len(out)), axis=0)

    def total(self, partials: Array) -> Array:
        """The sums, (C,) in float64."""
        sums: Array = np.add.reduce(partials, axis=0, dtype=np.float64)
        if not self.fold:
            sums = np.add.reduce(sums, axis=1)
        return sums


@lru_cache(512)
def sweep(
    n: int, c: int, s: int, itemsize: int, *, sums: bool, temporaries: int, stored_itemsize: int | None = None
) -> Sweep:
    """The sweep for a tensor: one that sums, or one that only maps.

    ``temporaries`` is how many arrays a tile needs beside the operands; ``itemsize`` is that of the arithmetic,
    ``stored_itemsize`` the tensor's own if that is another.
    """
    limit = TILE_BYTES // itemsize
    threaded = not temporaries and n * c * s >= THREADED
    if temporaries:
        scratch = SCRATCH_SHARE * n * c * s * (stored_itemsize or itemsize)
        limit = min(limit, max(MIN_SCRATCH, min(int(scratch / (temporaries * itemsize)), MAX_SCRATCH)))
    if s >= (COLUMN_SUMS if sums else COLUMNS):
        chunk = _chunk(s, min(DOT, TILE_BYTES // itemsize // 512))
        return Sweep(n, c, s, 0, chunk, threaded, tuple((tile,) for tile in _column_tiles(n, c, s, limit, chunk)))
    fold = 1
    while 2 * fold * c * s <= ROW and 2 * fold <= n:
        fold *= 2
    width = max(1, min(c, ROW_BLOCK // s, limit // (min(n, REUSED) * s)))
    width = -(-c // -(-c // width)) if fold == 1 else c
    rows = max(1, limit // (fold * width * s))
    together = -(-SUMMED // (rows * fold * s)) if sums else 1
    tiles = _row_tiles(n, c, s, fold, rows, width, together)
    if not sums:
        return Sweep(n, c, s, fold, s, threaded, tuple((tile,) for tile in tiles))
    tasks = groupby(tiles, key=lambda tile: (tile.box[1].start, tile.sums.start))
    return Sweep(n, c, s, fold, s, threaded, tuple(tuple(task) for _, task in tasks))


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


def _row_tiles(n: int, c: int, s: int, fold: int, rows: int, width: int, together: int) -> tuple[Tile, ...]:
    """``width`` channels of ``rows`` rows; samples left over when rows are joined make a row of their own.

    ``together`` tiles in a row share a partial sum.
    """
    tiles, whole = [], n // fold
    for c0, c1 in _ranges(c, width):
        for i, (r0, r1) in enumerate(_ranges(whole, rows)):
            columns = slice(c0 * s, c1 * s) if fold == 1 else slice(0, fold * c * s)
            shape = (r1 - r0, columns.stop - columns.start)
            box = (slice(r0 * fold, r1 * fold), slice(c0, c1), slice(0, s))
            tiles.append(Tile(box, shape, columns, slice(i // together, i // together + 1)))
    if rest := n - whole * fold:
        last = tiles[-1].sums.stop
        box = (slice(n - rest, n), slice(0, c), slice(0, s))
        tiles.append(Tile(box, (1, rest * c * s), slice(0, rest * c * s), slice(last, last + 1)))
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


def _sum_down(a: Array, b: Array | None) -> Array:
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
    columns: Array = sums[0].astype(np.float64) if len(sums) == 1 else np.add.reduce(sums, axis=0, dtype=np.float64)
    return columns


@lru_cache(64)
def _ones(length: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(length, dtype)


class Workspace:
    """Buffers that a thread keeps from tile to tile."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.buffers: dict[str, Array] = {}
        self.expanded: dict[str, int] = {}
        """The first channel of each expanded parameter held."""

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """An uninitialised array; the same memory each time that the name is asked for."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self.buffers[name] = np.empty(size, self.dtype)
        return buffer[:size].reshape(shape)


class PerChannel:
    """A per-channel vector in the shape that broadcasts against each tile."""

    def __init__(self, name: str, vector: Array, sweep: Sweep, dtype: np.dtype[Any]) -> None:
        self.name = name
        self.vector = vector.astype(dtype, copy=False)
        self.sweep = sweep
        self.row = self.vector if sweep.fold == sweep.s == 1 else None
        if sweep.fold and self.row is None and sweep.fold * sweep.c * sweep.s <= ROW_BLOCK:
            self.row = np.empty((sweep.fold, sweep.c, sweep.s), dtype)
            self.row[...] = self.vector[:, None]
            self.row = self.row.reshape(-1)

    def at(self, tile: Tile, work: Workspace) -> Array:
        """The tile's share; expanded on the way, and kept for the next tile, where a whole row would be large."""
        if not self.sweep.fold:
            return self.vector[tile.parameters, None]
        if self.row is not None:
            return self.row[tile.parameters]
        channels = tile.box[1]
        row = work.take(self.name, (tile.shape[1],))
        if work.expanded.get(self.name) != channels.start:
            row.reshape(-1, self.sweep.s)[...] = self.vector[channels, None]
            work.expanded[self.name] = channels.start
        return row


class Operand:
    """A tensor, seen as (N, C, S), as the tiles meet it: in place if it is contiguous and in the working dtype.

    Where ``hidden``, (N, 1, S), is true, it is read and written as 0.
    """

    def __init__(self, name: str, array: Array, dtype: np.dtype[Any], hidden: Array | None = None) -> None:
        self.name = name
        self.array = array
        self.hidden = hidden
        self.in_place = bool(array.dtype == dtype) and array.flags.c_contiguous

    @property
    def temporaries(self) -> int:
        """How many arrays of a tile's size loading and storing need."""
        return (self.hidden is not None) if self.in_place else 3 if self.array.dtype == np.float16 else 1

    def load(self, tile: Tile, work: Workspace) -> Array:
        """A tile of it to read."""
        piece = self.array[tile.box]
        if self.in_place and self.hidden is None:
            return piece.reshape(tile.shape)
        buffer = work.take(self.name, piece.shape)
        np.copyto(buffer, piece, casting="unsafe")
        self.clear(tile, buffer)
        return buffer.reshape(tile.shape)

    def clear(self, tile: Tile, piece: Array) -> None:
        """Put 0 into a tile where positions do not count."""
        if self.hidden is not None:
            samples, channels, inner = tile.box
            hidden = self.hidden[samples, :, inner]
            shape = (hidden.shape[0], channels.stop - channels.start, hidden.shape[2])
            np.copyto(piece.reshape(shape), 0, where=hidden)

    def open(self, tile: Tile, work: Workspace) -> Array:
        """A tile of it to write; :meth:`store` ends the writing."""
        if self.in_place:
            return self.array[tile.box].reshape(tile.shape)
        return work.take(self.name, tile.shape)

    def store(self, tile: Tile, value: Array) -> None:
        """Put a tile, which :meth:`open` gave, where it belongs."""
        self.clear(tile, value)
        if not self.in_place:
            piece = self.array[tile.box]
            if piece.dtype == np.float16:
                value = to_float16(value)
            np.copyto(piece, value.reshape(piece.shape), casting="unsafe")


def run(
    sweep: Sweep, dtype: np.dtype[Any], body: Callable[[Tile, Workspace], None], *, backwards: bool = False
) -> None:
    """Call ``body`` on each tile of a sweep, on several threads where they pay."""
    tasks = sweep.tasks[::-1] if backwards else sweep.tasks
    threads = _threads.get_num_threads() if sweep.threaded else 1
    local = threading.local()

    def task(tiles: tuple[Tile, ...]) -> None:
        work = getattr(local, "work", None)
        if work is None:
            work = local.work = Workspace(dtype)
        for tile in tiles:
            body(tile, work)

    _threads.run(task, tasks, threads)
