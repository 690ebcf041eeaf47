"""Calls on tensors that kernels cannot follow, or of which a mask leaves positions out.

They are gone through in pieces: some positions of all channels, copied to dense memory, computed there, copied back. A
piece takes a small part of the tensor's memory. How it is cut depends on shapes and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_bn.backends.cpu import plans
from gpu_bn.backends.cpu.arrays import Arrays
from gpu_bn.backends.layout import block_sizes, for_each_block
from gpu_bn.backends.protocol import Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

if TYPE_CHECKING:
    from gpu_bn.backends.cpu.backend import CpuBackend

Array = Any
Piece = tuple[slice, ...]
SHARE, LEAST, MOST = 0.04, 512 << 10, 8 << 20
"""The copies of a piece take this share of the tensor, but between so many bytes."""


class Pieces:
    """The pieces of a tensor, and of others of its shape; ``tensors`` is how many are copied at a time.

    Attributes:
        axis: where the copies have their channels; those of a masked tensor are (C, positions that count).
    """

    def __init__(self, arrays: Arrays, x: Array, axis: int, valid: Array | None, tensors: int) -> None:
        self.arrays, self.valid, self._axis = arrays, valid, axis
        self.axis = axis if valid is None else 0
        shape, strides = tuple(x.shape), arrays.strides(x) or arrays.byte_strides(x)
        self.order = plans.geometry(shape, strides, axis).order
        size, channels = x.dtype.itemsize, shape[axis]
        indices = 0 if valid is None else 8 * len(shape)
        room = min(MOST, max(LEAST, int(SHARE * math.prod(shape) * size)))
        copies = tensors if valid is None else tensors + 1  # while positions are chosen
        positions = int(room / (channels * copies * size + indices))
        summed = tuple([at for at in self.order if at != axis])
        steps = zip(shape, block_sizes(shape, summed, (axis,), positions, channels), strict=True)
        ends = [[slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in steps]
        self._all = list(product(*ends))  # now, for later nothing may fail

    def __iter__(self) -> Iterator[Piece]:
        yield from self._all

    def take(self, tensor: Array | None, at: Piece) -> Array | None:
        """A dense copy of a piece."""
        if tensor is None:
            return None
        part = tensor[at]
        if self.valid is not None:
            return self.arrays.chosen(part, self._axis, self.valid[at])
        copy = self.arrays.dense(part, self.order)
        self.arrays.assign(copy, part)
        return copy

    def put(self, target: Array | None, at: Piece, values: Array) -> None:
        """Write a piece back, with zeros where positions do not count."""
        if target is None:
            return
        if self.valid is None:
            self.arrays.assign(target[at], values)
        else:
            self.arrays.scatter(target[at], self._axis, self.valid[at], values)


def forward(backend: CpuBackend, call: Call, spec: BatchNormSpec) -> Moments:
    """See ``CpuBackend._forward``."""
    arrays, x, running = backend.arrays, call.x, (call.running_mean, call.running_var)
    pieces, channels = Pieces(arrays, x, spec.axis, call.valid, 1), x.shape[spec.axis]
    within = replace(spec, axis=pieces.axis)

    def moments_of(at: Piece) -> Moments:
        part = pieces.take(x, at)
        return backend._forward(Call(part), within) if _size(part) else Moments(0, None, None)

    if spec.batch_stats:
        moments = merged(arrays, channels, map(moments_of, pieces))
    else:
        moments = Moments(math.prod(x.shape) // channels, *map(backend.vector, running))
    if spec.batch_stats and call.running_mean is not None:
        backend.update_running(moments, *running, spec.momentum)
    if call.out is not None:
        cut = Pieces(arrays, x, spec.axis, call.valid, 1 if call.residual is None else 2)
        write(backend, cut, call._replace(running_mean=moments.mean, running_var=moments.var), spec)
    return moments


def write(backend: CpuBackend, cut: Pieces, call: Call, spec: BatchNormSpec) -> None:
    """Write ``call.out``, which may be x, piece by piece, by the running statistics; ``cut`` is of tensors alike."""
    cut.valid, within = call.valid, replace(spec, axis=cut.axis, batch_stats=False)

    def work(at: Piece) -> None:
        part = cut.take(call.x, at)
        piece = call._replace(x=part, residual=cut.take(call.residual, at), valid=None, out=part)
        if _size(part) and backend.kernels(piece, within, in_place=True) is None:
            raise MemoryError("no memory for a piece of the output")
        cut.put(call.out, at, part)

    for_each_block(cut, tuple([at for at in cut.order if at != spec.axis]), work)


def backward(backend: CpuBackend, dy: Array, saved: Saved, grads: Grads, sums: bool, given: Sums | None) -> Sums:
    """See ``CpuBackend._backward``."""
    arrays, spec, dresidual = backend.arrays, saved.spec, grads.dresidual
    zeros = Sums(*arrays.zeros((2, saved.x.shape[spec.axis]), arrays.float64))

    def compute(pieces: Pieces, at: Piece, targets: Grads, given: Sums | None) -> Sums | None:
        x = pieces.take(saved.x, at)
        rooms = Grads(*[None if target is None else arrays.empty_like(x) for target in targets])
        found = None
        if _size(x):
            within = replace(spec, axis=pieces.axis)
            residual, mask = pieces.take(saved.residual, at), pieces.take(saved.mask, at)
            part = replace(saved, x=x, residual=residual, mask=mask, valid=None, spec=within)
            found = backend._backward(pieces.take(dy, at), part, rooms, given is None and sums, given)
        for target, room in zip(targets, rooms, strict=True):
            pieces.put(target, at, room)
        return found

    def through(targets: Grads, given: Sums | None) -> Sums:
        tensors = [one for one in (saved.x, saved.residual, saved.mask, dy, *targets) if one is not None]
        pieces = Pieces(arrays, saved.x, spec.axis, saved.valid, len(tensors))
        total = zeros
        for at in pieces:
            found = compute(pieces, at, targets, given)
            if found is not None:
                with np.errstate(all="ignore"):
                    total = Sums(total.dz + found.dz, total.dz_xhat + found.dz_xhat)
        return total

    if sums:
        given, dresidual = through(Grads(dresidual=dresidual), None), None
    if grads.dx is not None or dresidual is not None:
        through(Grads(dx=grads.dx, dresidual=dresidual), given)
    found = zeros if given is None else given
    for target, values in ((grads.dweight, found.dz_xhat), (grads.dbias, found.dz)):
        if target is not None:
            arrays.assign(target, values)
    return found


def merged(arrays: Arrays, channels: int, parts: Iterable[Moments]) -> Moments:
    """The statistics of parts in one, as :func:`gpu_bn.merge.merge` has them, of one part at a time."""
    count, (mean, var) = 0, arrays.zeros((2, channels), arrays.float64)
    for part in parts:
        total = count + part.count
        if not part.count:
            continue
        if not count:
            mean, var = part.mean, part.var
        else:
            with np.errstate(all="ignore"):
                apart = part.mean - mean
                mean = mean * (count / total) + part.mean * (part.count / total)
                var = var * (count / total) + part.var * (part.count / total)
                var = var + apart * apart * (count / total * (part.count / total))
        count = total
    return Moments(count, mean, var)


def _size(array: Array) -> int:
    return math.prod(array.shape)
