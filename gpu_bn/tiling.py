"""The work of a call, and how its tensors are cut into strips of channels and into vectors.

In *rows* a strip is one channel, and a *position* is one vector of it. In *columns* (channels-last) a strip is some
adjacent channels, and a position is one row of it. *Ragged* rows begin and end within vectors, whose other elements
belong to other channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

VECTOR_BYTES = 16
STRIP_BYTES = 128
RAGGED_BYTES, RAGGED_FILL = 4, 0.75
"""A row that is not a whole number of vectors is ragged, or its elements are accessed one by one.

It is ragged if an element has at most ``RAGGED_BYTES``, and if at least the share ``RAGGED_FILL`` of the elements in
the row's vectors belong to the row. By the machine code, an element of a ragged row takes no more instructions than a
single access (in Triton fewer), and four to eight times as many bytes are in flight. Where vectors of two or four
elements fit the rows, these take still fewer instructions.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """One direction of a call on tensors of shape (N, C, S), with S = 1 for channels-last.

    Attributes:
        n, c, s: the shape.
        itemsize: bytes of an element.
        backward: whether this is the backward call.
        alignment: bytes to which the least aligned tensor is aligned.
        reads, writes: the numbers of tensors that are read and written.
        staged: how many of the tensors that are read are needed twice.
        sign_bits: whether one bit for each element is written (forward) or read (backward).
        masked: whether there is a mask, one byte for each position.
        groups: the number of ghost batches, parts of ``n`` that are normalised separately.
        ragged: whether rows may be ragged: kernels for them exist, and no output overwrites an input.
    """

    n: int
    c: int
    s: int
    itemsize: int
    backward: bool = False
    alignment: int = VECTOR_BYTES
    reads: int = 1
    writes: int = 1
    staged: int = 1
    sign_bits: bool = False
    masked: bool = False
    groups: int = 1
    ragged: bool = False

    @property
    def tensor_bytes(self) -> int:
        """The bytes of one tensor."""
        return self.n * self.c * self.s * self.itemsize

    @property
    def sign_bytes(self) -> int:
        """The bytes of the sign bits: one byte for each full vector."""
        return self.tensor_bytes // VECTOR_BYTES if self.sign_bits else 0

    @property
    def floor_bytes(self) -> int:
        """The bytes that move if each tensor and the sign bits are read or written once."""
        return (self.reads + self.writes) * self.tensor_bytes + self.sign_bytes

    @property
    def valid_bytes(self) -> int:
        """The bytes of the mask, which each pass reads."""
        return self.n * self.s if self.masked else 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """A division of a tensor into strips and vectors.

    Attributes:
        columns: whether a strip is some adjacent channels (channels-last), not the rows of one channel.
        n, c, s: the shape of one ghost batch; a single channel is one long row.
        vector: elements of a vector.
        lanes: adjacent threads across a strip, one vector each.
        strips: the number of strips, in all ghost batches.
        positions: vectors that a lane processes in one strip.
        ragged: whether rows may begin and end within vectors.
    """

    columns: bool
    n: int
    c: int
    s: int
    vector: int
    lanes: int
    strips: int
    positions: int
    ragged: bool = False

    @property
    def inner(self) -> int:
        """The vectors in a row; for ragged rows the most that one may span."""
        if self.ragged:
            return _max_vectors(self.s, self.vector)
        return (self.c if self.columns else self.s) // self.vector

    @property
    def channels_per_strip(self) -> int:
        """The channels for which a block computes sums."""
        return self.lanes * self.vector if self.columns else 1


def alignment(addresses: Iterable[int]) -> int:
    """Return the largest power of two, at most the bytes of a vector, that divides all addresses."""
    least = VECTOR_BYTES
    for address in addresses:
        least |= address
    return least & -least


def tile(work: Work) -> Tiling:
    """Cut a tensor into the widest strips, with the widest vectors that its shape and alignment allow."""
    n = work.n // work.groups
    n, c, s = (1, 1, n * work.s) if work.c == 1 else (n, work.c, work.s)
    columns = s == 1 and c > 1
    inner = c if columns else s
    full = VECTOR_BYTES // work.itemsize
    vector = math.gcd(full, inner, max(work.alignment // work.itemsize, 1))
    if not columns:
        if work.ragged and vector == 1 and _ragged_pays(work, n * c * s, s):
            return Tiling(False, n, c, s, full, 1, c, n * _max_vectors(s, full), ragged=True)
        return Tiling(False, n, c, s, vector, 1, work.groups * c, n * s // vector)
    across = c // vector
    lanes = min(32, STRIP_BYTES // (vector * work.itemsize), 1 << (across - 1).bit_length())
    return Tiling(True, n, c, s, vector, lanes, work.groups * -(-across // lanes), n)


def _ragged_pays(work: Work, elements: int, row: int) -> bool:
    """Tell whether ragged rows can serve a tensor and gain more than their shared vectors cost."""
    full = VECTOR_BYTES // work.itemsize
    possible = work.alignment == VECTOR_BYTES and elements % full == 0 and row < 1 << 31
    return possible and work.itemsize <= RAGGED_BYTES and row >= RAGGED_FILL * _max_vectors(row, full) * full


def _max_vectors(row: int, vector: int) -> int:
    """Return the most vectors that a row may span; rows begin at multiples of gcd(row, vector)."""
    return -(-(row + vector - math.gcd(row, vector)) // vector)


def narrower_tilings(tiling: Tiling, least_bytes: int, itemsize: int) -> Iterator[Tiling]:
    """Yield a tiling of one ghost batch, then the tilings with strips of half the width, down to ``least_bytes``."""
    yield tiling
    while tiling.columns and tiling.lanes > 1 and tiling.lanes * tiling.vector * itemsize // 2 >= least_bytes:
        lanes = tiling.lanes // 2
        tiling = replace(tiling, lanes=lanes, strips=-(-(tiling.c // tiling.vector) // lanes))
        yield tiling
