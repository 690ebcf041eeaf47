"""Where elements are, and how they are loaded and stored.

A program works on a *strip*: one channel (rows), or LANES * VEC adjacent ones (COLUMNS, channels-last). Per-channel
values are scalars in the first case and vectors in the second. A *position* is one step along a strip: a vector of VEC
elements in rows, LANES of them in columns; a block of elements is [POSITIONS, LANES * VEC]. Vectors are counted over
the whole tensor, so that an element's offset is known to be a multiple of VEC whatever the sizes are.
"""

import triton
import triton.language as tl


@triton.jit
def share_of(block, share, positions, WIDE: tl.constexpr):
    """The first position of a program's share, and the one after its last."""
    if WIDE:
        first = tl.cast(block, tl.int64) * share
    else:
        first = block * share
    return first, tl.minimum(first + share, positions)


@triton.jit
def group_of(program, GROUPS: tl.constexpr):
    """A program's strip and ghost batch, of GROUPS that the strips of a launch are shared by."""
    if GROUPS == 1:
        return program, 0
    else:
        strips = tl.num_programs(0) // GROUPS
        return program % strips, program // strips


@triton.jit
def start_of(group, channels, row, positions, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """The number of a ghost batch's first vector."""
    if GROUPS == 1:
        return 0
    else:
        if WIDE:
            group = tl.cast(group, tl.int64)
        return group * positions * (row if COLUMNS else channels)


@triton.jit
def vectors_at(
    position, strip, row, jump, magic, power, LANES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, start=0
):  # fmt: skip
    """The number of each position's (first) vector, from ``start`` on.

    Rows have ``row`` vectors; from the end of one of a channel's rows to the start of its next it is ``jump``.
    position // row is (position * magic) >> power.
    """
    if WIDE:
        strip = tl.cast(strip, tl.int64)
    if COLUMNS:
        return position * row + strip * LANES + start
    elif WIDE:
        return position + strip * row + (position // row) * jump + start
    else:
        outer = ((position.to(tl.int64) * magic) >> power).to(tl.int32)
        return position + strip * row + outer * jump + start


@triton.jit
def mask_of(valid, group, positions, VEC: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where the mask of a ghost batch starts: it has a byte for each element of a channel."""
    if WIDE:
        group = tl.cast(group, tl.int64)
    return valid + group * positions * (1 if COLUMNS else VEC)


@triton.jit
def valid_positions(valid, position, last, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    """[POSITIONS, VEC] or, in columns, [POSITIONS]: what a mask leaves of a channel."""
    if COLUMNS:
        return tl.load(valid + position, mask=position < last, other=0) != 0
    else:
        places = position[:, None] * VEC + tl.arange(0, VEC)[None, :]
        return tl.load(valid + places, mask=(position < last)[:, None], other=0) != 0


@triton.jit
def valid_elements(valid, known, position, last, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    """The known elements that a mask leaves."""
    counted = valid_positions(valid, position, last, VEC, COLUMNS)
    return known & (counted[:, None] if COLUMNS else counted)


@triton.jit
def offsets_of(vector, LANES: tl.constexpr, VEC: tl.constexpr):
    """[POSITIONS, LANES * VEC] offsets of the elements."""
    return vector[:, None] * VEC + tl.arange(0, LANES * VEC)[None, :]


@triton.jit
def known_elements(position, last, strip, row, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    """[POSITIONS, 1] or [POSITIONS, LANES * VEC]: which elements there are, all or none of a vector."""
    known = (position < last)[:, None]
    if COLUMNS:
        known = known & (strip * LANES + tl.arange(0, LANES * VEC) // VEC < row)[None, :]
    return known


@triton.jit
def channels_of(strip, channels, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    """A strip's channels, and which of them there are."""
    if COLUMNS:
        channel = strip * LANES * VEC + tl.arange(0, LANES * VEC)
        return channel, channel < channels
    else:
        return strip, strip < channels


@triton.jit
def wide(value):
    """A parameter or a statistic in float64."""
    if value.dtype == tl.bfloat16:
        return value.to(tl.float32).to(tl.float64)
    else:
        return value.to(tl.float64)


@triton.jit
def load_wide(pointer, channel, known, default):
    """A per-channel vector in float64; ``default`` where there is none."""
    if pointer is None:
        return tl.where(known, default, 0.0).to(tl.float64)
    else:
        return wide(tl.load(pointer + channel, mask=known, other=0.0))


@triton.jit
def load_once(pointer, channel, known, COLUMNS: tl.constexpr):
    """A per-channel vector in float64, of which a thread has few channels; 0 where there is none.

    Of what hangs on loads alone Triton has each thread make its own copy, for all channels of its vectors, and of all
    that follows in double precision too. So it comes here as a sum over threads, of one number and zeros.
    """
    if COLUMNS:
        row = tl.arange(0, 16)
        place = channel[None, :] + row[:, None] * 0
        return tl.sum(wide(tl.load(pointer + place, mask=(row == 0)[:, None] & known[None, :], other=0.0)), 0)
    else:
        return load_wide(pointer, channel, known, 0.0)


@triton.jit
def after(sums, mean, var, weight, bias):
    """The last four as they are, which now hang on sums over threads: see :func:`load_once`."""
    always = (sums == sums) | (sums != sums)
    mean, var = tl.where(always, mean, 0.0), tl.where(always, var, 0.0)
    return mean, var, tl.where(always, weight, 0.0), tl.where(always, bias, 0.0)


@triton.jit
def one_each(sums, COLUMNS: tl.constexpr):
    """Per-channel sums over threads, dealt out again: to each thread one channel's.

    A sum lies where the elements lay, for which a thread has all channels of its vectors; it would compute for all of
    them what follows in double precision. What is gathered lies as its indices do.
    """
    if COLUMNS:
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
def load_bits(mask, vector, position, last, strip, row, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr):
    """[POSITIONS, LANES * VEC]: which elements keep ``dy``, from one byte for each vector."""
    lane = tl.arange(0, LANES)
    known = (position < last)[:, None]
    if COLUMNS:
        known = known & (strip * LANES + lane < row)[None, :]
    byte = tl.load(mask + vector[:, None] + lane[None, :], mask=known, other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, VEC)[None, None, :]) & 1
    return tl.reshape(bits, (position.shape[0], LANES * VEC)) != 0


@triton.jit
def store_bits(
    mask, keep, vector, position, last, strip, row, LANES: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Store one byte for each vector: bit j says whether its element j keeps ``dy``."""
    lane = tl.arange(0, LANES)
    known = (position < last)[:, None]
    if COLUMNS:
        known = known & (strip * LANES + lane < row)[None, :]
    bits = tl.reshape(keep.to(tl.int32), (position.shape[0], LANES, VEC)) << tl.arange(0, VEC)[None, None, :]
    tl.store(mask + vector[:, None] + lane[None, :], tl.sum(bits, 2).to(tl.uint8), mask=known)
