"""Describe a call as a plan sees it, and cut its tensors into strips of channels and vectors.

A *position* is one vector of a strip (``rows``: of the channel's (N, S) slab; ``columns``: a row of the strip). Where
rows are *ragged*, they begin and end within vectors, whose other elements belong to other channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

VECTOR_BYTES = 16
STRIP_BYTES = 128
RAGGED_BYTES, RAGGED_FILL = 4, 0.75
"""Where a row is no whole number of vectors, it is ragged, or its elements are accessed one by one. It is ragged if a
single access would have at most so many bytes, and if at least this share of the elements in the row's vectors are its
own. By the machine code an element of a ragged row takes as many instructions as one by one, in Triton's kernels fewer,
and four to eight times the bytes are under way. Vectors of two or four elements, where they fit, take still fewer.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Describe one direction of one call: tensors of (N, C, S), S = 1 for channels-last.

    Attributes:
        n, c, s: the geometry.
        itemsize: bytes of an element.
        backward: which direction.
        alignment: bytes, of the least aligned tensor.
        reads, writes: how many tensors are read and written; ``staged`` of those read are needed twice.
        sign_bits: whether one bit for each element is written (forward) or read (backward).
        masked: whether a byte for each position tells if it counts.
        groups: ghost batches: parts of ``n``, each normalised by itself.
        ragged: whether rows may be ragged: kernels for that exist, and no tensor is written in another's place.
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
        """Bytes of one tensor."""
        return self.n * self.c * self.s * self.itemsize

    @property
    def sign_bytes(self) -> int:
        """Bytes of the sign bits: one byte for each full vector."""
        return self.tensor_bytes // VECTOR_BYTES if self.sign_bits else 0

    @property
    def floor_bytes(self) -> int:
        """Bytes if every tensor, and the sign bits, are read and written once."""
        return (self.reads + self.writes) * self.tensor_bytes + self.sign_bytes

    @property
    def valid_bytes(self) -> int:
        """Bytes that tell which positions count. Each pass reads them."""
        return self.n * self.s if self.masked else 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """Describe how a tensor is cut into strips and vectors.

    Attributes:
        columns: whether a strip is some adjacent channels (channels-last), or one channel's rows.
        n, c, s: the geometry of one ghost batch; a single channel is one long row.
        vector: elements of a vector.
        lanes: threads side by side across a strip.
        strips: the number of strips, in all ghost batches.
        positions: vectors that a lane goes through in one strip.
        ragged: whether rows begin and end within vectors.
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
        """Vectors in a row; the most that a ragged row may span."""
        if self.ragged:
            return _spanned(self.s, self.vector)
        return (self.c if self.columns else self.s) // self.vector

    @property
    def channels_per_strip(self) -> int:
        """Channels that a block's sums are for."""
        return self.lanes * self.vector if self.columns else 1


def alignment(addresses: Iterable[int]) -> int:
    """Return the largest power of two, up to a vector's size, that divides all addresses."""
    least = VECTOR_BYTES
    for address in addresses:
        least |= address
    return least & -least


def tile(work: Work) -> Tiling:
    """Cut a tensor into the widest strips, of the widest vectors that its geometry and alignment allow."""
    n = work.n // work.groups
    n, c, s = (1, 1, n * work.s) if work.c == 1 else (n, work.c, work.s)
    columns = s == 1 and c > 1
    inner = c if columns else s
    full = VECTOR_BYTES // work.itemsize
    vector = math.gcd(full, inner, max(work.alignment // work.itemsize, 1))
    if not columns:
        if work.ragged and vector == 1 and _gains(work, n * c * s, s):
            return Tiling(False, n, c, s, full, 1, c, n * _spanned(s, full), ragged=True)
        return Tiling(False, n, c, s, vector, 1, work.groups * c, n * s // vector)
    across = c // vector
    lanes = min(32, STRIP_BYTES // (vector * work.itemsize), 1 << (across - 1).bit_length())
    return Tiling(True, n, c, s, vector, lanes, work.groups * -(-across // lanes), n)


def _gains(work: Work, elements: int, row: int) -> bool:
    """Tell whether ragged rows serve a tensor, and pay for what is read twice and written in pieces."""
    full = VECTOR_BYTES // work.itemsize
    serves = work.alignment == VECTOR_BYTES and elements % full == 0 and row < 1 << 31
    return serves and work.itemsize <= RAGGED_BYTES and row >= RAGGED_FILL * _spanned(row, full) * full


def _spanned(row: int, vector: int) -> int:
    """Return how many vectors a row of a tensor spans at most; rows begin at multiples of their common divisor."""
    return -(-(row + vector - math.gcd(row, vector)) // vector)


def narrower_tilings(tiling: Tiling, least_bytes: int, itemsize: int) -> Iterator[Tiling]:
    """Yield a tiling of one group, then those with strips half as wide, a quarter, and so on to ``least_bytes``."""
    yield tiling
    while tiling.columns and tiling.lanes > 1 and tiling.lanes * tiling.vector * itemsize // 2 >= least_bytes:
        lanes = tiling.lanes // 2
        tiling = replace(tiling, lanes=lanes, strips=-(-(tiling.c // tiling.vector) // lanes))
        yield tiling
