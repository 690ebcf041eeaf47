"""Statistics of several processes on a GPU: one launch merges packets, another updates running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.cupy.device import get_kernel
from gpu_bn.backends.cupy.steps import BLOCK, NULL

Array = Any
LANES = 32
"""Channels that a block merges, or numbers that it adds up."""


class SharedStatistics:
    """Methods of the CuPy backend for :class:`gpu_bn.nn.SyncBatchNorm`, beside the phases, on the current device."""

    def merge_packets(
        self, packets: Sequence[Array], channels: int, header: int, room: int, unknown: float
    ) -> tuple[Array, Array, Array]:
        """Return float64 count (1,), mean (C,) and variance (C,) of reports in packets of shape (W, header + room).

        Mean and variance are NaN if headers differ, other than in fields with the value ``unknown``, or if one starts
        with a number that is not 0.
        """
        count, mean, var = (cupy.empty(size, np.float64) for size in (1, channels, channels))
        _launch_merge("bn_sync_merge_kernel", packets, header, room, unknown, (count, mean, var), channels)
        return count, mean, var

    def sum_packets(self, packets: Sequence[Array], length: int, header: int, room: int, unknown: float) -> Array:
        """Return the sums (length,) of all processes' numbers; NaN on the conditions of :meth:`merge_packets`."""
        sums = cupy.empty(length, np.float64)
        _launch_merge("bn_sync_sum_kernel", packets, header, room, unknown, (sums,), length)
        return sums

    def update_shared(
        self, running_mean: Array | None, running_var: Array | None, counter: Array | None, momentum: float | None,
        momentum_at: Array | None, count: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """Update running statistics with those of a batch whose count is on the device, and count the batch.

        Without a momentum, 1 / the number of batches is used.
        """
        running = running_mean, running_var
        dense = [vector if vector is None or vector.flags.c_contiguous else vector.copy() for vector in running]
        dtypes = cuda_sources.parameter_codes(*[None if vector is None else vector.dtype.name for vector in dense])
        momentum_at = None if momentum_at is None else cupy.asarray(momentum_at, np.float64)
        cumulative = momentum is None and momentum_at is None and counter is not None
        pointers = [NULL if array is None else array for array in (*dense, counter, count, mean, var, momentum_at)]
        sizes = dtypes, mean.size, cumulative
        _launch("bn_sync_update_kernel", 1, *pointers, *map(np.uint32, sizes), np.float64(momentum or 0))
        for source, target in zip(dense, running, strict=True):
            if target is not None and source is not target:
                target[...] = source


def _launch_merge(
    name: str, packets: Sequence[Array], header: int, room: int, unknown: float, results: Sequence[Array], size: int
) -> None:
    """Launch a kernel that merges packets into results; ``size``: the size of the last result."""
    usable = len(packets) == 1 and packets[0].flags.c_contiguous
    joined = packets[0] if usable else cupy.concatenate(packets)
    sizes = len(packets), len(packets[0]), header, room
    _launch(name, -(-size // LANES), joined, *map(np.uint32, sizes), np.float64(unknown), *results, np.uint32(size))


def _launch(name: str, blocks: int, *arguments: Any) -> None:
    get_kernel(None, f"{name}<double>", 0, cupy.cuda.runtime.getDevice())((blocks,), BLOCK, arguments)
