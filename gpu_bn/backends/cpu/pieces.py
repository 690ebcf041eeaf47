"""Calls on masked tensors, and on tensors whose strides kernels cannot read.

Such a tensor is processed in pieces. A piece is some positions of all channels; it is copied to memory without gaps,
computed there, and copied back. It takes a small part of the tensor's memory, and depends on shapes and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_bn.backends.cpu.arrays import Arrays
from gpu_bn.backends.layout import block_sizes, for_each_block, memory_order
from gpu_bn.backends.protocol import Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

if TYPE_CHECKING:
    from gpu_bn.backends.cpu.backend import CpuBackend

Array = Any
Piece = tuple[slice, ...]
SHARE, MIN_BYTES, MAX_BYTES = 0.04, 512 << 10, 8 << 20
"""The copies of a piece take this share of the tensor's bytes, within these bounds."""


class Pieces:
    """The pieces of tensors of one shape; ``tensors`` is the number of tensors that are copied at a time.

    Attributes:
        axis: the channel axis of the copies; the copies from a masked tensor are (C, valid positions).
    """

    def __init__(self, arrays: Arrays, x: Array, axis: int, valid: Array | None, tensors: int) -> None:
        self.arrays, self.valid, self._axis = arrays, valid, axis
        self.axis = axis if valid is None else 0
        shape, strides = tuple(x.shape), arrays.strides(x) or arrays.byte_strides(x)
        self.order = memory_order(shape, strides)
        size, channels = x.dtype.itemsize, shape[axis]
        indices = 0 if valid is None else 8 * len(shape)
        room = min(MAX_BYTES, max(MIN_BYTES, int(SHARE * math.prod(shape) * size)))
        copies = tensors if valid is None else tensors + 1  # one more while positions are selected
        positions = int(room / (channels * copies * size + indices))
        self.summed = tuple([a for a in self.order if a != axis])
        steps = zip(shape, block_sizes(shape, self.summed, (axis,), positions, channels), strict=True)
        cuts = [[slice(start, min(start + step, size)) for start in range(0, size, step)] for size, step in steps]
        self._pieces = list(product(*cuts))  # in advance: once writing has begun, no allocation may fail

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces

    def take(self, tensor: Array | None, at: Piece) -> Array | None:
        """Return a copy of a piece without gaps; ``None`` for no tensor."""
        if tensor is None:
            return None
        part = tensor[at]
        if self.valid is not None:
            return self.arrays.select_valid(part, self._axis, self.valid[at])
        copy = self.arrays.empty_ordered(part, self.order)
        self.arrays.assign(copy, part)
        return copy

    def put(self, target: Array | None, at: Piece, values: Array) -> None:
        """Write a piece back to ``target`` if given, with zeros at positions that are not valid."""
        if target is None:
            return
        if self.valid is None:
            self.arrays.assign(target[at], values)
        else:
            self.arrays.scatter_valid(target[at], self._axis, self.valid[at], values)


def forward(backend: CpuBackend, call: Call, spec: BatchNormSpec) -> Moments:
    """Write ``call.out`` if it is given, update the running statistics, and return the moments."""
    arrays, x, running = backend.arrays, call.x, (call.running_mean, call.running_var)
    pieces, channels = Pieces(arrays, x, spec.axis, call.valid, 1), x.shape[spec.axis]
    within = replace(spec, axis=pieces.axis)

    def moments_of(at: Piece) -> Moments:
        part = pieces.take(x, at)
        return backend._forward(Call(part), within) if _size(part) else Moments(0, None, None)

    if spec.batch_stats:
        moments = merge_moments(arrays, channels, map(moments_of, pieces))
    else:
        moments = Moments(math.prod(x.shape) // channels, *map(backend.vector, running))
    if spec.batch_stats and call.running_mean is not None:
        backend.update_running(moments, *running, spec.momentum)
    if call.out is not None:
        pieces = Pieces(arrays, x, spec.axis, call.valid, 1 if call.residual is None else 2)
        write(backend, pieces, call._replace(running_mean=moments.mean, running_var=moments.var), spec)
    return moments


def write(backend: CpuBackend, pieces: Pieces, call: Call, spec: BatchNormSpec) -> None:
    """Normalise by the running statistics and write ``call.out``, which may be x, piece by piece."""
    pieces.valid, within = call.valid, replace(spec, axis=pieces.axis, batch_stats=False)

    def work(at: Piece) -> None:
        part = pieces.take(call.x, at)
        piece = call._replace(x=part, residual=pieces.take(call.residual, at), valid=None, out=part)
        if _size(part) and backend.run_kernels(piece, within, in_place=True) is None:
            raise MemoryError("no memory for a piece of the output")
        pieces.put(call.out, at, part)

    for_each_block(pieces, pieces.summed, work)


def backward(backend: CpuBackend, dy: Array, saved: Saved, grads: Grads, sums: bool, given: Sums | None) -> Sums:
    """Write the gradients whose arrays are given, and return the sums, ``given`` or computed if ``sums``."""
    arrays, spec, dresidual = backend.arrays, saved.spec, grads.dresidual
    zeros = Sums(*arrays.zeros((2, saved.x.shape[spec.axis]), arrays.float64))

    def compute(pieces: Pieces, at: Piece, targets: Grads, given: Sums | None) -> Sums | None:
        x = pieces.take(saved.x, at)
        results = Grads(*[None if target is None else arrays.empty_like(x) for target in targets])
        piece_sums = None
        if _size(x):
            within = replace(spec, axis=pieces.axis)
            residual, mask = pieces.take(saved.residual, at), pieces.take(saved.mask, at)
            part = replace(saved, x=x, residual=residual, mask=mask, valid=None, spec=within)
            piece_sums = backend._backward(pieces.take(dy, at), part, results, given is None and sums, given)
        for target, result in zip(targets, results, strict=True):
            pieces.put(target, at, result)
        return piece_sums

    def process(targets: Grads, given: Sums | None) -> Sums:
        tensors = [one for one in (saved.x, saved.residual, saved.mask, dy, *targets) if one is not None]
        pieces = Pieces(arrays, saved.x, spec.axis, saved.valid, len(tensors))
        total = zeros
        for at in pieces:
            more = compute(pieces, at, targets, given)
            if more is not None:
                with np.errstate(all="ignore"):
                    total = Sums(total.dz + more.dz, total.dz_xhat + more.dz_xhat)
        return total

    if sums:
        given, dresidual = process(Grads(dresidual=dresidual), None), None
    if grads.dx is not None or dresidual is not None:
        process(Grads(dx=grads.dx, dresidual=dresidual), given)
    totals = zeros if given is None else given
    for target, values in ((grads.dweight, totals.dz_xhat), (grads.dbias, totals.dz)):
        if target is not None:
            arrays.assign(target, values)
    return totals


def merge_moments(arrays: Arrays, channels: int, parts: Iterable[Moments]) -> Moments:
    """Merge the statistics of parts by the formula of :func:`gpu_bn.merge.merge`, one part at a time."""
    count, (mean, var) = 0, arrays.zeros((2, channels), arrays.float64)
    for part in parts:
        if not part.count:
            continue
        total = count + part.count
        if not count:
            mean, var = part.mean, part.var
        else:
            with np.errstate(all="ignore"):
                difference = part.mean - mean
                mean = mean * (count / total) + part.mean * (part.count / total)
                var = var * (count / total) + part.var * (part.count / total)
                var = var + difference * difference * (count / total * (part.count / total))
        count = total
    return Moments(count, mean, var)


def _size(array: Array) -> int:
    return math.prod(array.shape)
