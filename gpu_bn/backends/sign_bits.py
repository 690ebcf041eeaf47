"""Sign bits: the size of the mask that a GPU keeps for the backward call instead of a residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpu_bn.activations import ROWS
from gpu_bn.plan import VECTOR_BYTES


def mask_bytes(sizes: Sequence[int], at: int, itemsize: int, activation: str, groups: int = 1) -> int:
    """Return the bytes of the mask that a call keeps instead of its residual; 0 if it keeps the residual.

    Each vector of 16 bytes takes one byte of the mask, so rows (channels-last: the channels) must be whole vectors. The
    result depends on shape, memory format, dtype and activation only, never on an address: compilers ask in advance.

    Args:
        sizes: the shape of the tensor, with its axes in memory order.
        at: the index of the channel axis in ``sizes``.
        itemsize: bytes of an element.
        activation: the name of the activation.
        groups: the number of ghost batches that axis 0 is cut into.
    """
    n, c, s = math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])
    row = n * s // groups if c == 1 else c if s == 1 else s
    if not ROWS[activation].device.drop or row % (VECTOR_BYTES // itemsize):
        return 0
    return n * c * s * itemsize // VECTOR_BYTES
