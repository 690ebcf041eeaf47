"""Merging the statistics of several parts of a batch into those of the whole.

The parts are those of processes (:class:`gpu_bn.nn.SyncBatchNorm`), micro-batches, or the batches of a data set. Each
part has, for each channel, a count ``n``, a mean, and ``m2``, the sum of squared deviations from that mean (Chan, Golub
& LeVeque 1979)::

    N = sum(n)        mean = sum(n * mean_i) / N        m2 = sum(m2_i + n_i * (mean_i - mean)**2)

The square of a mean is never subtracted from a mean square, so nothing cancels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class Pool(NamedTuple):
    """The statistics of each channel over some positions, in float64.

    A count in float64 is an exact integer up to 2**53. With a leading axis, all three arrays hold several parts.

    Attributes:
        count: (1,), or (C,) if it differs between channels.
        mean: (C,); 0 where the count is 0.
        m2: (C,), the sum of squared deviations from the mean; 0 where the count is 0.
    """

    count: Array
    mean: Array
    m2: Array

    @property
    def var(self) -> Array:
        """The biased variance, (C,); 0 where the count is 0."""
        return self.m2 / _at_least_one(self.count)

    @property
    def unbiased(self) -> Array:
        """The variance with Bessel's correction, (C,); 0 where the count is less than 2."""
        return self.m2 / _at_least_one(self.count - 1)


def merge(parts: Pool) -> Pool:
    """Merge the parts along the leading axis. Nothing is read from a device.

    The order of additions depends on shapes alone, so all processes get the same bits from the same parts. Empty parts
    change nothing.
    """
    count = parts.count.sum(0)
    mean = (parts.mean * (parts.count / _at_least_one(count))).sum(0)
    difference = parts.mean - mean
    return Pool(count, mean, (parts.m2 + parts.count * (difference * difference)).sum(0))


def _at_least_one(count: Array) -> Array:
    return count + (count < 1) * (1 - count)
