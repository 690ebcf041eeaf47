"""Share statistics of several processes on a GPU: merge packets in one launch, move running statistics in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.backends.cupy.device import compiled
from gpu_bn.backends.cupy.steps import BLOCK, NULL

Array = Any
LANES = 32
"""Numbers that a block merges."""


class SharedStatistics:
    """Do what a backend on GPUs does for :class:`gpu_bn.nn.SyncBatchNorm` beside the phases, on the current device."""

    def merge_packets(
        self, packets: Sequence[Array], channels: int, header: int, room: int, unknown: float
    ) -> tuple[Array, Array, Array]:
        """Return the count, (1,), mean and variance, (C,), float64, of reports in packets of (W, header + room).

        Mean and variance are NaN where headers differ, other than by ``unknown``, or start with a number that is not 0.
        """
        count, mean, var = (cupy.empty(size, np.float64) for size in (1, channels, channels))
        _launch_merge("bn_sync_merge_kernel", packets, header, room, unknown, (count, mean, var), channels)
        return count, mean, var

    def sum_packets(self, packets: Sequence[Array], length: int, header: int, room: int, unknown: float) -> Array:
        """Return the sums of all processes' numbers, (length,); NaN as those of :meth:`merge_packets`."""
        sums = cupy.empty(length, np.float64)
        _launch_merge("bn_sync_sum_kernel", packets, header, room, unknown, (sums,), length)
        return sums

    def update_shared(
        self, running_mean: Array | None, running_var: Array | None, counter: Array | None, momentum: float | None,
        momentum_at: Array | None, count: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """Move running statistics towards those of a batch whose count is known to the device, and count the batch.

        Without a momentum that is 1 / the number of batches.
        """
        running = running_mean, running_var
        dense = [one if one is None or one.flags.c_contiguous else one.copy() for one in running]
        dtypes = cuda_sources.parameter_codes(*[None if one is None else one.dtype.name for one in dense])
        momentum_at = None if momentum_at is None else cupy.asarray(momentum_at, np.float64)
        cumulative = momentum is None and momentum_at is None and counter is not None
        pointers = [NULL if array is None else array for array in (*dense, counter, count, mean, var, momentum_at)]
        sizes = dtypes, mean.size, cumulative
        _launch("bn_sync_update_kernel", 1, *pointers, *map(np.uint32, sizes), np.float64(momentum or 0))
        for moved, theirs in zip(dense, running, strict=True):
            if theirs is not None and moved is not theirs:
                theirs[...] = moved


def _launch_merge(
    name: str, packets: Sequence[Array], header: int, room: int, unknown: float, results: Sequence[Array], size: int
) -> None:
    """Launch a kernel that merges packets to results, the last of which has this size."""
    lone = len(packets) == 1 and packets[0].flags.c_contiguous
    together = packets[0] if lone else cupy.concatenate(packets)
    sizes = len(packets), len(packets[0]), header, room
    _launch(name, -(-size // LANES), together, *map(np.uint32, sizes), np.float64(unknown), *results, np.uint32(size))


def _launch(name: str, blocks: int, *arguments: Any) -> None:
    compiled(None, f"{name}<double>", 0, cupy.cuda.runtime.getDevice())((blocks,), BLOCK, arguments)
