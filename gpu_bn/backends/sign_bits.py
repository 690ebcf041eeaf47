"""When a GPU keeps one bit an element in place of a residual, and how many bytes these are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpu_bn.activations import ROWS
from gpu_bn.plan import VECTOR_BYTES


def mask_bytes(sizes: Sequence[int], at: int, itemsize: int, activation: str, groups: int = 1) -> int:
    """Return the length of the mask that a call with a residual keeps in its place; 0 if it keeps the residual.

    A byte serves each vector of 16 bytes, so that rows (channels-last: the channels) have to be whole vectors. The
    answer depends on shape, memory format, dtype and activation alone, never on an address: compilers ask in advance.

    Args:
        sizes: the tensor's shape, its axes in the order in which they lie in memory.
        at: which of them is the channels'.
        itemsize: bytes an element.
        activation: its name.
        groups: the number of ghost batches, which axis 0 is cut into.
    """
    n, c, s = math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])
    row = n * s // groups if c == 1 else c if s == 1 else s
    if not ROWS[activation].device.drop or row % (VECTOR_BYTES // itemsize):
        return 0
    return n * c * s * itemsize // VECTOR_BYTES
