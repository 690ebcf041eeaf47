"""Addresses of elements, and the loads and stores of tiles and of per-channel vectors.

A program works on a *strip*: one channel (rows), or LANES * VEC adjacent channels (COLUMNS, channels-last). Per-channel
values are scalars in rows and vectors in columns. A *position* is one step along a strip: one vector of VEC elements in
rows, LANES vectors in columns. A *tile* is a block of elements of shape [POSITIONS, LANES * VEC]. Vectors are numbered
over the whole tensor, so that the compiler knows, for any shape, that a vector's offset is a multiple of VEC.

*Ragged* rows begin and end inside vectors of the tensor. Each row has as many positions as the most vectors that a row
can span. The vectors at its ends are loaded whole, but only the elements of the row count and are stored.

Values that belong together are passed as named tuples. A kernel builds them from its parameters: a :class:`Layout` from
the constants, a :class:`Strip` from the run-time numbers. The constants have a separate tuple because an assignment
turns them into run-time numbers, even inside a tuple, unless it is annotated ``tl.constexpr``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """Compile-time constants of a kernel."""

    LANES: Any  # vectors side by side across a strip; 1 in rows
    VEC: Any  # elements in a vector
    COLUMNS: Any  # True: a strip is adjacent channels of a channels-last tensor; False: it is the rows of one channel
    WIDE: Any = False  # whether offsets need 64 bits
    GROUPS: Any = 1  # number of ghost batches
    POSITIONS: Any = None  # positions in a tile
    COMPUTE: Any = None  # dtype of the arithmetic on elements
    RANGE: Any = False  # whether squares of elements may leave the range of float32
    RAGGED: Any = False  # whether rows begin and end inside vectors


class Strip(NamedTuple):
    """A program's strip of channels, and its place in the tensors."""

    number: Any  # number of the strip in its ghost batch
    group: Any  # number of the ghost batch
    start: Any  # number of the ghost batch's first vector
    valid: Any  # the ghost batch's mask, a byte for each element of a channel; None: all elements count
    channels: Any  # channels of the tensor
    row: Any  # vectors in a row: of one channel, or in columns of all channels; the most that a ragged row can span
    jump: Any  # vectors from the end of a channel's row to its next row; in ragged rows, elements from start to start
    magic: Any  # position // row is (position * magic) >> power
    power: Any
    length: Any  # elements in a ragged row; None: rows consist of whole vectors
    positions: Any  # positions in the strip


class Share(NamedTuple):
    """A range of positions of a strip: those of a program, or a part of them."""

    first: Any
    last: Any  # one after the last position


class Tile(NamedTuple):
    """A block of a strip's elements."""

    position: Any  # [POSITIONS]
    present: Any  # [POSITIONS]: whether the position exists
    vector: Any  # [POSITIONS]: the number of each position's (first) vector
    offsets: Any  # [POSITIONS, LANES * VEC]: offsets of the elements in the tensor
    loaded: Any  # [POSITIONS, 1] or [POSITIONS, LANES * VEC]: whether the element exists, the same for a whole vector
    known: Any  # whether the element belongs to the strip; false for the neighbours' elements in ragged rows
    whole: Any  # whether it is known and its vector belongs to the strip alone
    counted: Any  # whether it is known and the mask keeps it


class Channels(NamedTuple):
    """Places of a strip's channels, or of their statistics, in a per-channel vector."""

    place: Any  # a scalar, or in columns [LANES * VEC]
    known: Any  # whether the channel exists
    count: Any  # length of the vector


class PerChannel(NamedTuple):
    """Statistics and parameters of channels, in float64."""

    mean: Any
    var: Any
    weight: Any
    bias: Any


@triton.jit
def share_of(block, share, strip, L: tl.constexpr):
    """Return a program's share of a strip."""
    if L.WIDE:
        first = tl.cast(block, tl.int64) * share
    else:
        first = block * share
    return Share(first, tl.minimum(first + share, strip.positions))


@triton.jit
def group_of(program, L: tl.constexpr):
    """Return a program's strip and ghost batch. Programs are ordered by ghost batch, then by strip."""
    if L.GROUPS == 1:
        return program, 0
    else:
        strips = tl.num_programs(0) // L.GROUPS
        return program % strips, program // strips


@triton.jit
def start_of(group, channels, row, positions, L: tl.constexpr):
    """Return the number of a ghost batch's first vector."""
    if L.GROUPS == 1:
        return 0
    else:
        if L.WIDE:
            group = tl.cast(group, tl.int64)
        return group * positions * (row if L.COLUMNS else channels)


@triton.jit
def mask_of(valid, group, positions, L: tl.constexpr):
    """Return a pointer to the mask of a ghost batch, which has one byte for each element of a channel."""
    if L.WIDE:
        group = tl.cast(group, tl.int64)
    return valid + group * positions * (1 if L.COLUMNS else L.VEC)


@triton.jit
def tile_at(position, last, strip, L: tl.constexpr):
    """Return the tile at some positions; only those before ``last`` exist."""
    if L.RAGGED:
        vector, place = vectors_of_ragged_rows(position, strip, L)
        length = tl.cast(strip.length, tl.int32)
        present = (position < last) & (place < length)
        known = own_elements(tl.where(present, place, -L.VEC), length, L)
        loaded = present[:, None]
        whole = loaded & ((place >= 0) & (place + L.VEC <= length))[:, None]
    else:
        vector, present = vectors_at(position, strip, L), position < last
        known = known_elements(position, last, strip, L)
        loaded, whole = known, known
    offsets = vector[:, None] * L.VEC + tl.arange(0, L.LANES * L.VEC)[None, :]
    return Tile(position, present, vector, offsets, loaded, known, whole, known)


@triton.jit
def masked(tile, strip, L: tl.constexpr):
    """Return a tile in which only those elements count that the mask keeps."""
    valid = valid_positions(tile.position, tile.present, strip, L)
    counted = tile.known & (valid[:, None] if L.COLUMNS else valid)
    return Tile(tile.position, tile.present, tile.vector, tile.offsets, tile.loaded, tile.known, tile.whole, counted)


@triton.jit
def vectors_at(position, strip, L: tl.constexpr):
    """Return the number of each position's (first) vector."""
    number = strip.number
    if L.WIDE:
        number = tl.cast(number, tl.int64)
    if L.COLUMNS:
        return position * strip.row + number * L.LANES + strip.start
    else:
        outer = row_of(position, strip, L)
        return position + number * strip.row + outer * strip.jump + strip.start


@triton.jit
def row_of(position, strip, L: tl.constexpr):
    """Return the number of a position's row among the rows of its channel."""
    if L.WIDE:
        return position // strip.row
    else:
        return ((tl.cast(position, tl.int64) * strip.magic) >> strip.power).to(tl.int32)


@triton.jit
def vectors_of_ragged_rows(position, strip, L: tl.constexpr):
    """Return the number of each position's vector, and the place of its first element in the row.

    The place is negative if the vector begins before the row. If the row does not reach the vector, it is at least the
    row's length.
    """
    outer = row_of(position, strip, L)
    rest = (position - outer * strip.row).to(tl.int32)
    number = strip.number
    if L.WIDE:
        number = tl.cast(number, tl.int64)
    start = number * strip.length + outer * strip.jump
    SHIFT: tl.constexpr = 3 if L.VEC == 8 else 2
    return (start >> SHIFT) + rest, rest * L.VEC - (start & (L.VEC - 1)).to(tl.int32)


@triton.jit
def own_elements(place, length, L: tl.constexpr):
    """Tell which elements [POSITIONS, VEC] belong to a row, from the place of each vector's first element in it."""
    places = place[:, None] + tl.arange(0, L.VEC)[None, :]
    return places.to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def known_elements(position, last, strip, L: tl.constexpr):
    """Tell which elements exist: [POSITIONS, 1] or, in columns, [POSITIONS, LANES * VEC]; vectors exist whole."""
    known = (position < last)[:, None]
    if L.COLUMNS:
        known = known & (strip.number * L.LANES + tl.arange(0, L.LANES * L.VEC) // L.VEC < strip.row)[None, :]
    return known


@triton.jit
def elements_before(position, strip, L: tl.constexpr):
    """Return the number of elements that a channel has before a position, in ragged rows."""
    _, place = vectors_of_ragged_rows(position, strip, L)
    outer = row_of(position, strip, L)
    return outer * strip.length + tl.minimum(tl.maximum(place, 0), strip.length)


@triton.jit
def known_vectors(tile, strip, L: tl.constexpr):
    """Tell which vectors of a tile exist: [POSITIONS, LANES]."""
    known = tile.present[:, None]
    if L.COLUMNS:
        known = known & (strip.number * L.LANES + tl.arange(0, L.LANES) < strip.row)[None, :]
    return known


@triton.jit
def valid_positions(position, present, strip, L: tl.constexpr):
    """Tell which elements of a channel the mask keeps: [POSITIONS, VEC] or, in columns, [POSITIONS]."""
    if L.COLUMNS:
        return tl.load(strip.valid + position, mask=present, other=0) != 0
    else:
        places = position[:, None] * L.VEC + tl.arange(0, L.VEC)[None, :]
        return tl.load(strip.valid + places, mask=present[:, None], other=0) != 0


@triton.jit
def channels_of(number, channels, L: tl.constexpr):
    """Return the channels of strip ``number`` in a tensor of ``channels`` channels."""
    if L.COLUMNS:
        place = number * L.LANES * L.VEC + tl.arange(0, L.LANES * L.VEC)
        return Channels(place, place < channels, channels)
    else:
        return Channels(number, number < channels, channels)


@triton.jit
def statistics_of(channels, group, L: tl.constexpr):
    """Return the places of a ghost batch's statistics in a vector of [groups * channels] values."""
    return Channels(channels.place + group * channels.count, channels.known, channels.count * L.GROUPS)


@triton.jit
def wide(value):
    """Convert a parameter or a statistic to float64."""
    if value.dtype == tl.bfloat16:
        return value.to(tl.float32).to(tl.float64)
    else:
        return value.to(tl.float64)


@triton.jit
def load_wide(pointer, channels, default):
    """Load a per-channel vector as float64, or return ``default`` if the pointer is None; 0 beyond the last channel."""
    if pointer is None:
        return tl.where(channels.known, default, 0.0).to(tl.float64)
    else:
        return wide(tl.load(pointer + channels.place, mask=channels.known, other=0.0))


@triton.jit
def load_once(pointer, channels, L: tl.constexpr):
    """Load a per-channel vector as float64, with few channels in each thread; 0 beyond the last channel.

    Triton repeats a plain load in each thread for all channels of its vectors, and with it all double precision that
    depends on loads alone. It does not repeat a sum over threads. So the value is loaded in one row and summed with the
    zeros of 15 others.
    """
    if L.COLUMNS:
        row = tl.arange(0, 16)
        place = channels.place[None, :] + row[:, None] * 0
        first = (row == 0)[:, None] & channels.known[None, :]
        return tl.sum(wide(tl.load(pointer + place, mask=first, other=0.0)), 0)
    else:
        return load_wide(pointer, channels, 0.0)


@triton.jit
def after(sums, values):
    """Return per-channel values unchanged, but make them depend on sums over threads: see :func:`load_once`."""
    always = (sums == sums) | (sums != sums)
    mean, var = tl.where(always, values.mean, 0.0), tl.where(always, values.var, 0.0)
    return PerChannel(mean, var, tl.where(always, values.weight, 0.0), tl.where(always, values.bias, 0.0))


@triton.jit
def one_each(sums, L: tl.constexpr):
    """Redistribute per-channel sums so that each thread has one channel.

    A sum has the layout of the elements, where a thread has all channels of its vectors: it would repeat the double
    precision that follows for each of them. The result of a gather has the layout of its indices instead.
    """
    if L.COLUMNS:
        return tl.gather(sums, tl.arange(0, sums.shape[0]), 0)
    else:
        return sums


@triton.jit
def store_as(pointer, value, mask):
    """Store float64 or COMPUTE values in the dtype of the pointer."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, value.to(tl.float32).to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(pointer, value, tile, L: tl.constexpr):
    """Store the elements of a tile; in vectors shared with neighbouring rows, one by one."""
    store_as(pointer + tile.offsets, value, tile.whole)
    if L.RAGGED:
        store_as(pointer + tile.offsets, value, tile.known & (tile.whole == 0))


@triton.jit
def load_bits(mask, tile, strip, L: tl.constexpr):
    """Load the sign bits, one byte for each vector, and tell which elements [POSITIONS, LANES * VEC] keep ``dy``."""
    places = mask + tile.vector[:, None] + tl.arange(0, L.LANES)[None, :]
    byte = tl.load(places, mask=known_vectors(tile, strip, L), other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, L.VEC)[None, None, :]) & 1
    return tl.reshape(bits, (L.POSITIONS, L.LANES * L.VEC)) != 0


@triton.jit
def store_bits(mask, keep, tile, strip, L: tl.constexpr):
    """Store the sign bits, one byte for each vector: bit j says whether element j keeps ``dy``."""
    bits = tl.reshape(keep.to(tl.int32), (L.POSITIONS, L.LANES, L.VEC)) << tl.arange(0, L.VEC)[None, None, :]
    places = mask + tile.vector[:, None] + tl.arange(0, L.LANES)[None, :]
    tl.store(places, tl.sum(bits, 2).to(tl.uint8), mask=known_vectors(tile, strip, L))
