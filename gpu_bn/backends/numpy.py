"""The NumPy backend: the equations of :mod:`gpu_bn.spec` as NumPy expressions, computed block by block.

Only axis 0 is reshaped, into (ghost batches, samples). That is a view for any strides, so no result is written to a
copy. The other axes stay as they are. Per-channel values have size 1 along the axes that are summed over, and are
broadcast.

Per-channel values and sums are float64. Tensors are computed in float64 if they are float64 or if their values leave
the range of float32, else in float32. Where the mean is far from 0, ``x - mean`` is computed first to avoid
cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_bn.backends.layout import Layout, block_sizes, check_out, for_each_block, memory_order, prepared_blocks, select
from gpu_bn.backends.protocol import Moments, Saved, Sums

Array = NDArray[Any]
Block = tuple[slice, ...]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
TINY, HUGE = 1e-15, 1e15
"""Standard deviations below ``TINY`` or above ``HUGE``, and means above it, need float64 for their squares."""
FAR = 2.0
"""A mean is subtracted first if it exceeds this many standard deviations: cancellation would cost more than 3 bits."""
SCRATCH_SHARE, SCRATCH_BYTES, MAX_BLOCK, MIN_CHANNELS = 0.03, 512 << 10, 32 << 10, 2 << 10
"""A block's temporaries take this share of the tensor's bytes, or ``SCRATCH_BYTES`` if that is more. A block has at
most ``MAX_BLOCK`` elements. Only more than ``MIN_CHANNELS`` channels are cut."""
RUN = 64
"""Float64 numbers that are added up in one chain: a longer chain has a larger rounding error."""


def backend() -> NumpyBackend:
    """Return the backend, for :func:`gpu_bn.registry.load`."""
    return NumpyBackend()


class NumpyBackend:
    """See :class:`gpu_bn.backends.protocol.Backend`."""

    name = "numpy"

    def vector(self, array: Array) -> Array:
        return array.astype(FLOAT64)

    def cast(self, vector: Array, dtype: Any) -> Array:
        with np.errstate(all="ignore"):
            return vector.astype(dtype)

    def empty_like(self, x: Array) -> Array:
        return Layout.from_array(x, 0).empty(x.dtype)

    def copy(self, array: Array, like: Array) -> Array:
        np.copyto(y := self.empty_like(like), array)
        return y

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    @np.errstate(all="ignore")
    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        """Sum ``x - centre`` and its square; ``centre`` is first 0, then the mean where that is far from 0."""
        blocks = Blocks(x, axis, groups, valid, 4)
        count: Any = x.size // max(groups * x.shape[axis], 1)
        if valid is not None:
            count = np.count_nonzero(valid.reshape(groups, -1), 1).astype(FLOAT64)
        mean, var = blocks.zeros(), blocks.zeros()
        for channels in blocks.parts(blocks.kept):
            n, centre, far = np.maximum(blocks.per_group(count, channels), 1), np.zeros(1), np.ones(1)
            for _ in range(3):
                offset = square = np.zeros(1)
                for block in blocks.parts(blocks.summed, channels):
                    deviation = blocks.centred(block, centre)
                    offset = offset + blocks.sum(deviation)
                    square = square + blocks.sum(np.square(deviation))
                offset, square = offset / n, square / n
                variance = np.maximum(square - offset * offset, 0)
                if not (far := offset * offset > FAR**2 * variance).any():
                    break
                centre = np.where(far, centre + offset, centre)
            select(mean, channels)[...] = np.where(far, centre, centre + offset)
            select(var, channels)[...] = np.where(variance < np.inf, variance, np.nan)  # NaN after an overflow
        return Moments(count, mean.ravel(), var.ravel())

    @np.errstate(all="ignore")
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = float(momentum)
        mean, var = running_mean.astype(FLOAT64), running_var.astype(FLOAT64)
        for part in moments.parts(len(moments.mean) // max(len(mean), 1)):
            count = float(np.squeeze(part.count))
            if count:
                mean = (1 - momentum) * mean + momentum * part.mean
                var = (1 - momentum) * var + momentum * (count / max(count - 1, 1)) * part.var
        running_mean[...], running_var[...] = mean, var

    @np.errstate(all="ignore")
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        call = Normalization(saved, residual, saved.spec.activation.row.value_needs)
        out = call.split(out)
        for whole in call.parts(call.kept):
            for channels, (centre, scale, shift, *_) in prepared_blocks(whole, call.kept, call.vectors):
                for_each_block(call.parts(call.summed, channels), call.summed, call.write, out, centre, scale, shift)

    @np.errstate(all="ignore")
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        call = Normalization(saved, saved.residual, saved.spec.activation.row.gradient_needs + 2)
        dy, dz, dbias, dweight = call.split(dy), call.split(dz), call.zeros(), call.zeros()
        for channels in call.parts(call.kept):
            centre, scale, shift, sd, rest = call.vectors(channels)
            sums, products = select(dbias, channels), select(dweight, channels)
            for block in call.parts(call.summed, channels):
                centred = call.centred(block, centre)
                gradient = call.dz(block, centred, scale, shift, dy)
                if dz is not None:
                    dz[block] = gradient
                sums += call.sum(gradient)
                products += call.sum(gradient * centred)
            products -= rest * sums
            products /= sd
        return Sums(dbias.ravel(), dweight.ravel())

    @np.errstate(all="ignore")
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        call = Normalization(saved, saved.residual, saved.spec.activation.row.gradient_needs + 2)
        dy, out = call.split(dy), call.split(out)
        dbias, dweight = map(call.per_channel, sums or (None, None))
        for channels in call.parts(call.kept):
            centre, scale, shift, sd, rest = call.vectors(channels)
            if sums is not None:
                n = call.per_group(saved.positions, channels)
                slope = select(dweight, channels) / (n * sd)
                offset = (select(dbias, channels) / n - rest * slope).astype(scale.dtype)
                slope = slope.astype(scale.dtype)
            for block in call.parts(call.summed, channels):
                centred = call.centred(block, centre)
                gradient = call.dz(block, centred, scale, shift, dy)
                if sums is not None:
                    gradient = gradient - centred * slope
                    gradient -= offset
                out[block] = call.clear(gradient * scale, block)


class Blocks:
    """A tensor with the axes (ghost batch, sample, ...), cut into blocks.

    ``arrays`` is the number of temporaries of a block's size that exist at a time.
    """

    def __init__(self, x: Array, axis: int, groups: int, valid: Array | None, arrays: int) -> None:
        self.shape = (groups, x.shape[0] // groups, *x.shape[1:])
        self.kept = (0, axis + 1)
        self.summed = tuple([a for a in range(x.ndim + 1) if a not in self.kept])
        scratch = max(int(SCRATCH_SHARE * x.nbytes), SCRATCH_BYTES)
        elements = min(scratch // (arrays * max(x.itemsize, FLOAT32.itemsize)), MAX_BLOCK)
        order = (0, *[a + 1 for a in memory_order(x.shape, x.strides)])
        self.steps = block_sizes(self.shape, order, self.kept, elements, MIN_CHANNELS)
        self.x, self.valid = self.split(x), self.split(valid)

    def split(self, tensor: Any) -> Any:
        """Return a view of a tensor with axis 0 split into (ghost batches, samples)."""
        return None if tensor is None else tensor.reshape((*self.shape[:2], *tensor.shape[1:]), copy=False)

    def per_channel(self, vector: Any) -> Any:
        """Reshape a vector of length C or groups * C to broadcast against tensors."""
        channels = self.shape[self.kept[1]]
        shape = [channels if axis == self.kept[1] else 1 for axis in range(1, len(self.shape))]
        return None if vector is None else vector.reshape(len(vector) // channels, *shape)

    def per_group(self, count: Any, channels: Block) -> Any:
        """Return a count, or an array of one for each ghost batch, so that it broadcasts against the channels."""
        return count if isinstance(count, int) else select(count.reshape(-1, *[1] * (len(self.shape) - 1)), channels)

    def zeros(self) -> Array:
        """Return zeros, one for each ghost batch and channel."""
        return np.zeros([size if axis in self.kept else 1 for axis, size in enumerate(self.shape)])

    def parts(self, axes: tuple[int, ...], within: Block | None = None) -> Iterator[Block]:
        """Yield the parts of the tensor, or of the block ``within``, that result from cuts along the axes."""
        cut = [axis for axis in axes if self.steps[axis] < self.shape[axis]]
        for starts in product(*[range(0, self.shape[axis], self.steps[axis]) for axis in cut]):
            part = list(within or [slice(0, size) for size in self.shape])
            for axis, start in zip(cut, starts, strict=True):
                part[axis] = slice(start, start + self.steps[axis])
            yield tuple(part)

    def clear(self, values: Array, block: Block) -> Array:
        """Set the values at positions that the mask leaves out to 0, in place."""
        if self.valid is not None:
            np.copyto(values, 0, where=~select(self.valid, block))
        return values

    def sum(self, block: Array) -> Any:
        """Return the sum of a block for each ghost batch and channel."""
        if self.x.dtype.itemsize == FLOAT64.itemsize:  # axis by axis: NumPy would add up several axes in one chain
            for axis in sorted(self.summed, key=block.shape.__getitem__, reverse=True):
                if block.shape[axis] > RUN:
                    block = np.add.reduceat(block, range(0, block.shape[axis], RUN), axis)
                block = np.add.reduce(block, axis, keepdims=True)
            return block
        return np.add.reduce(block, self.summed, FLOAT64, keepdims=True)

    def centred(self, block: Block, centre: Array) -> Array:
        """Return ``x - centre``, 0 where the mask leaves positions out. It may be ``x`` itself: do not write to it."""
        x = self.x[block]
        if centre.any():
            return self.clear(np.subtract(x, centre), block)
        return self.clear(x.astype(centre.dtype, copy=self.valid is not None), block)


class Normalization(Blocks):
    """The tensors and per-channel values of a call; ``needs`` is the number of temporaries besides ``z``."""

    def __init__(self, saved: Saved, residual: Array | None, needs: int) -> None:
        super().__init__(saved.x, saved.spec.axis, saved.spec.groups, saved.valid, 1 + needs)
        self.activation, self.eps, self.residual = saved.spec.activation, saved.spec.eps, self.split(residual)
        vectors = saved.moments.mean, saved.moments.var, saved.weight, saved.bias
        self.mean, self.var, self.weight, self.bias = map(self.per_channel, vectors)

    def vectors(self, channels: Block) -> tuple[Array, Array, Array, Array, Array]:
        """Return centre, scale, shift of ``z = (x - centre) * scale + shift``; sqrt(var + eps), ``mean - centre``."""
        mean, sd = select(self.mean, channels), np.sqrt(select(self.var, channels) + self.eps)
        scale = (1.0 if self.weight is None else select(self.weight, channels)) / sd
        extreme = (sd < TINY) | (sd > HUGE) | ((np.abs(mean) > HUGE) & (np.abs(mean) < np.inf))
        dtype = FLOAT64 if self.x.dtype.itemsize == FLOAT64.itemsize or extreme.any() else FLOAT32
        centre = np.where(np.abs(mean) > FAR * sd, mean, 0.0).astype(dtype)
        shift = (0.0 if self.bias is None else select(self.bias, channels)) - (mean - centre) * scale
        return centre, scale.astype(dtype), shift.astype(dtype), sd, mean - centre

    def z(self, block: Block, centred: Array, scale: Array, shift: Array) -> Any:
        """Compute ``weight * xhat + bias + residual``."""
        z = centred * scale
        z += shift
        if self.residual is not None:
            z += self.residual[block]
        return z

    def write(self, block: Block, out: Array, centre: Array, scale: Array, shift: Array) -> None:
        """Write a block of ``y``."""
        self.activation.value(z := self.z(block, self.centred(block, centre), scale, shift))
        out[block] = self.clear(z, block)

    def dz(self, block: Block, centred: Array, scale: Array, shift: Array, dy: Array) -> Array:
        """Compute ``dy * activation'(z)``, 0 where the mask leaves positions out. It may be ``dy`` itself."""
        gradient = dy[block]
        if not self.activation.is_identity:
            self.activation.gradient(z := self.z(block, centred, scale, shift), gradient.astype(z.dtype, copy=False), z)
            gradient = z
        return gradient if self.valid is None else self.clear(gradient.astype(centred.dtype), block)
