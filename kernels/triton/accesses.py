"""Where elements are, and how they are loaded and stored.

A program works on a *strip*: one channel (rows), or LANES * VEC adjacent ones (COLUMNS, channels-last). Per-channel
values are scalars in the first case and vectors in the second. A *position* is one step along a strip: a vector of VEC
elements in rows, LANES of them in columns; a *tile* is a block of elements [POSITIONS, LANES * VEC]. Vectors are
counted over the whole tensor, so that an element's offset is known to be a multiple of VEC whatever the sizes are.

*Ragged* rows begin and end within vectors of the tensor. A row's positions are the vectors that any row can span at
most; a vector at its end is loaded whole, and of it only the row's own elements count and are stored.

Functions take what belongs together as named tuples. A kernel makes them of its own parameters: a :class:`Layout` of
its constants, a :class:`Strip` of its numbers. An assignment makes numbers of constants, also of those in a tuple,
unless it is annotated ``tl.constexpr``; so these have a tuple of their own.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """What is constant to a kernel."""

    LANES: Any  # vectors side by side across a strip; 1 in rows
    VEC: Any  # elements of a vector
    COLUMNS: Any  # whether a strip is adjacent channels of a channels-last tensor, or else one channel's rows
    WIDE: Any = False  # whether offsets take 64 bits
    GROUPS: Any = 1  # ghost batches
    POSITIONS: Any = None  # of a tile
    COMPUTE: Any = None  # the dtype that elements are computed in
    RANGE: Any = False  # whether squares of the tensor's dtype may leave float32's range
    RAGGED: Any = False  # whether rows begin and end within vectors


class Strip(NamedTuple):
    """A program's strip of channels, and where it lies in the tensors."""

    number: Any  # of the strip in its ghost batch
    group: Any  # the ghost batch's number
    start: Any  # the number of the ghost batch's first vector
    valid: Any  # its mask, a byte for each element of a channel; None: all count
    channels: Any  # of the tensor
    row: Any  # vectors in a row: of a channel, or in columns of all channels; those that a ragged row may span
    jump: Any  # from a channel's row to its next: vectors, from end to start; of ragged rows elements, start to start
    magic: Any  # position // row is (position * magic) >> power
    power: Any
    length: Any  # elements in a ragged row; None: rows are of whole vectors
    positions: Any  # of the strip


class Share(NamedTuple):
    """Positions of a strip: a program's, or some of those."""

    first: Any
    last: Any  # one after them


class Tile(NamedTuple):
    """A block of a strip's elements."""

    position: Any  # [POSITIONS]
    present: Any  # [POSITIONS]: which positions there are
    vector: Any  # [POSITIONS]: the number of each position's (first) vector
    offsets: Any  # [POSITIONS, LANES * VEC]: of the elements in the tensor
    loaded: Any  # [POSITIONS, 1] or [POSITIONS, LANES * VEC]: which elements there are, all or none of a vector
    known: Any  # those of the strip: in ragged rows, not its neighbours'
    whole: Any  # the known ones in vectors that are the strip's alone
    counted: Any  # the known ones that a mask leaves


class Channels(NamedTuple):
    """A strip's channels, or its statistics, among those of a per-channel vector."""

    place: Any  # a scalar, or in columns [LANES * VEC]
    known: Any  # which of them there are
    count: Any  # the vector's length


class PerChannel(NamedTuple):
    """What an element is normalised with, in float64."""

    mean: Any
    var: Any
    weight: Any
    bias: Any


@triton.jit
def share_of(block, share, strip, L: tl.constexpr):
    """A program's share of a strip."""
    if L.WIDE:
        first = tl.cast(block, tl.int64) * share
    else:
        first = block * share
    return Share(first, tl.minimum(first + share, strip.positions))


@triton.jit
def group_of(program, L: tl.constexpr):
    """A program's strip and ghost batch, of GROUPS that the strips of a launch are shared by."""
    if L.GROUPS == 1:
        return program, 0
    else:
        strips = tl.num_programs(0) // L.GROUPS
        return program % strips, program // strips


@triton.jit
def start_of(group, channels, row, positions, L: tl.constexpr):
    """The number of a ghost batch's first vector."""
    if L.GROUPS == 1:
        return 0
    else:
        if L.WIDE:
            group = tl.cast(group, tl.int64)
        return group * positions * (row if L.COLUMNS else channels)


@triton.jit
def mask_of(valid, group, positions, L: tl.constexpr):
    """Where the mask of a ghost batch starts: it has a byte for each element of a channel."""
    if L.WIDE:
        group = tl.cast(group, tl.int64)
    return valid + group * positions * (1 if L.COLUMNS else L.VEC)


@triton.jit
def tile_at(position, last, strip, L: tl.constexpr):
    """The tile of some positions, of those before ``last``."""
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
    """A tile of whose elements only the valid ones count."""
    valid = valid_positions(tile.position, tile.present, strip, L)
    counted = tile.known & (valid[:, None] if L.COLUMNS else valid)
    return Tile(tile.position, tile.present, tile.vector, tile.offsets, tile.loaded, tile.known, tile.whole, counted)


@triton.jit
def vectors_at(position, strip, L: tl.constexpr):
    """The number of each position's (first) vector."""
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
    """The number of a position's row, among those of a channel."""
    if L.WIDE:
        return position // strip.row
    else:
        return ((tl.cast(position, tl.int64) * strip.magic) >> strip.power).to(tl.int32)


@triton.jit
def vectors_of_ragged_rows(position, strip, L: tl.constexpr):
    """The number of each position's vector, and the place in the row of its first element, below 0 before the row.

    A position beyond the last vector that its row spans has a place beyond the row.
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
    """[POSITIONS, VEC]: which elements of vectors at some places of a row belong to it."""
    places = place[:, None] + tl.arange(0, L.VEC)[None, :]
    return places.to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def known_elements(position, last, strip, L: tl.constexpr):
    """[POSITIONS, 1] or [POSITIONS, LANES * VEC]: which elements there are, all or none of a vector."""
    known = (position < last)[:, None]
    if L.COLUMNS:
        known = known & (strip.number * L.LANES + tl.arange(0, L.LANES * L.VEC) // L.VEC < strip.row)[None, :]
    return known


@triton.jit
def elements_before(position, strip, L: tl.constexpr):
    """How many elements a channel has before a position, in ragged rows."""
    _, place = vectors_of_ragged_rows(position, strip, L)
    outer = row_of(position, strip, L)
    return outer * strip.length + tl.minimum(tl.maximum(place, 0), strip.length)


@triton.jit
def known_vectors(tile, strip, L: tl.constexpr):
    """[POSITIONS, LANES]: which vectors there are."""
    known = tile.present[:, None]
    if L.COLUMNS:
        known = known & (strip.number * L.LANES + tl.arange(0, L.LANES) < strip.row)[None, :]
    return known


@triton.jit
def valid_positions(position, present, strip, L: tl.constexpr):
    """[POSITIONS, VEC] or, in columns, [POSITIONS]: what a mask leaves of a channel."""
    if L.COLUMNS:
        return tl.load(strip.valid + position, mask=present, other=0) != 0
    else:
        places = position[:, None] * L.VEC + tl.arange(0, L.VEC)[None, :]
        return tl.load(strip.valid + places, mask=present[:, None], other=0) != 0


@triton.jit
def channels_of(number, channels, L: tl.constexpr):
    """The channels of a strip, of a tensor with so many."""
    if L.COLUMNS:
        place = number * L.LANES * L.VEC + tl.arange(0, L.LANES * L.VEC)
        return Channels(place, place < channels, channels)
    else:
        return Channels(number, number < channels, channels)


@triton.jit
def statistics_of(channels, group, L: tl.constexpr):
    """The statistics of a strip's channels in a ghost batch, among those of all ghost batches."""
    return Channels(channels.place + group * channels.count, channels.known, channels.count * L.GROUPS)


@triton.jit
def wide(value):
    """A parameter or a statistic in float64."""
    if value.dtype == tl.bfloat16:
        return value.to(tl.float32).to(tl.float64)
    else:
        return value.to(tl.float64)


@triton.jit
def load_wide(pointer, channels, default):
    """A per-channel vector in float64; ``default`` where there is none."""
    if pointer is None:
        return tl.where(channels.known, default, 0.0).to(tl.float64)
    else:
        return wide(tl.load(pointer + channels.place, mask=channels.known, other=0.0))


@triton.jit
def load_once(pointer, channels, L: tl.constexpr):
    """A per-channel vector in float64, of which a thread has few channels; 0 where there is none.

    Of what hangs on loads alone Triton has each thread make its own copy, for all channels of its vectors, and of all
    that follows in double precision too. So it comes here as a sum over threads, of one number and zeros.
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
    """Per-channel values as they are, which now hang on sums over threads: see :func:`load_once`."""
    always = (sums == sums) | (sums != sums)
    mean, var = tl.where(always, values.mean, 0.0), tl.where(always, values.var, 0.0)
    return PerChannel(mean, var, tl.where(always, values.weight, 0.0), tl.where(always, values.bias, 0.0))


@triton.jit
def one_each(sums, L: tl.constexpr):
    """Per-channel sums over threads, dealt out again: to each thread one channel's.

    A sum lies where the elements lay, for which a thread has all channels of its vectors; it would compute for all of
    them what follows in double precision. What is gathered lies as its indices do.
    """
    if L.COLUMNS:
        return tl.gather(sums, tl.arange(0, sums.shape[0]), 0)
    else:
        return sums


@triton.jit
def store_as(pointer, value, mask):
    """Store float64 or COMPUTE values in the pointer's dtype."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, value.to(tl.float32).to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(pointer, value, tile, L: tl.constexpr):
    """Store a tile's elements; of vectors that neighbours have a part in, one by one."""
    store_as(pointer + tile.offsets, value, tile.whole)
    if L.RAGGED:
        store_as(pointer + tile.offsets, value, tile.known & (tile.whole == 0))


@triton.jit
def load_bits(mask, tile, strip, L: tl.constexpr):
    """[POSITIONS, LANES * VEC]: which elements keep ``dy``, from one byte for each vector."""
    places = mask + tile.vector[:, None] + tl.arange(0, L.LANES)[None, :]
    byte = tl.load(places, mask=known_vectors(tile, strip, L), other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, L.VEC)[None, None, :]) & 1
    return tl.reshape(bits, (L.POSITIONS, L.LANES * L.VEC)) != 0


@triton.jit
def store_bits(mask, keep, tile, strip, L: tl.constexpr):
    """Store one byte for each vector: bit j says whether its element j keeps ``dy``."""
    bits = tl.reshape(keep.to(tl.int32), (L.POSITIONS, L.LANES, L.VEC)) << tl.arange(0, L.VEC)[None, None, :]
    places = mask + tile.vector[:, None] + tl.arange(0, L.LANES)[None, :]
    tl.store(places, tl.sum(bits, 2).to(tl.uint8), mask=known_vectors(tile, strip, L))
