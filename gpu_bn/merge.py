"""Statistics of several parts of a batch, merged exactly: the one place where that is done.

Parts are processes (:class:`gpu_bn.nn.SyncBatchNorm`), micro-batches, or the batches of a data set. Each has, for each
channel, a count ``n``, a mean, and ``m2``, the sum of squared deviations from that mean (Chan, Golub & LeVeque 1979)::

    N = sum(n)        mean = sum(n * mean_i) / N        m2 = sum(m2_i + n_i * (mean_i - mean)**2)

No square of a mean is ever subtracted from a mean square, so nothing cancels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class Pool(NamedTuple):
    """What is known of each channel over some positions, in float64.

    A count in float64 is an exact integer up to 2**53. With a leading axis, all three hold several parts.

    Attributes:
        count: (1,), or (C,) where channels differ in it.
        mean: (C,); 0 where the count is.
        m2: (C,), the sum of squared deviations from the mean; 0 where the count is.
    """

    count: Array
    mean: Array
    m2: Array

    @property
    def var(self) -> Array:
        """(C,) biased; 0 where nothing was counted."""
        return self.m2 / _at_least_one(self.count)

    @property
    def unbiased(self) -> Array:
        """(C,) the variance with Bessel's correction; 0 where fewer than two positions were counted."""
        return self.m2 / _at_least_one(self.count - 1)


def merge(parts: Pool) -> Pool:
    """Merge parts along the leading axis of one library's arrays; nothing is read from a device.

    The order of additions depends on shapes alone, so that whoever holds the same parts gets the same bits. Empty
    parts change nothing.
    """
    count = parts.count.sum(0)
    mean = (parts.mean * (parts.count / _at_least_one(count))).sum(0)
    apart = parts.mean - mean
    return Pool(count, mean, (parts.m2 + parts.count * (apart * apart)).sum(0))


def _at_least_one(count: Array) -> Array:
    return count + (count < 1) * (1 - count)
