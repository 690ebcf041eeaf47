"""The compiled backend: what :mod:`gpu_bn.backends.protocol` asks for, of kernels in ``gpu_bn.kernels.cpu``.

Tensors whose strides kernels cannot follow, and masked ones, go through :mod:`gpu_bn.backends.cpu.pieces`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_bn.activations import IDENTITY
from gpu_bn.backends.cpu import launch, pieces
from gpu_bn.backends.cpu.arrays import Arrays, NumpyArrays
from gpu_bn.backends.protocol import Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.kernels.cpu.vector import SIZES
from gpu_bn.spec import BatchNormSpec

Array = Any


def backend() -> CpuBackend:
    """The backend of NumPy arrays, for :func:`gpu_bn.registry.load`."""
    return CpuBackend(NumpyArrays())


class CpuBackend:
    """See :class:`gpu_bn.backends.protocol.Backend`; ``forward`` and ``backward`` are of ``FusedBackend``."""

    name = "cpu"
    fuses_plain_calls_only = True
    """Masks and ghost batches go phase by phase."""

    def __init__(self, arrays: Arrays, doors: Any = None) -> None:
        self.arrays = arrays
        self.doors = doors
        """:mod:`gpu_bn.backends.cpu.doors`, for tensors."""

    # ------------------------------------------------------------------------------------------------- whole calls
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        assert call.valid is None
        in_place = call.out is not None
        weight, bias, y = call.weight, call.bias, self.arrays.empty_like(call.x) if call.out is None else call.out
        if keep or in_place:  # out may hold parameters
            weight, bias = (None if one is None else self.vector(one) for one in (weight, bias))
        running = (call.running_mean, call.running_var)
        moments = self._forward(Call(call.x, weight, bias, call.residual, *running, out=y), spec, in_place)
        return y, Saved.from_call(call, spec, moments, weight, bias)

    def forward_at_once(self, call: Call, spec: BatchNormSpec) -> tuple[Array, Saved] | None:
        """:meth:`forward` of torch's tensors, where one call into C, the last, writes the statistics and the counter.

        What it keeps are the parameters themselves, no copies. ``None``, and nothing done, where it cannot.
        """
        y = self.arrays.empty_like(call.x)
        found = launch.forward(self.arrays, call._replace(out=y), spec, at_once=True, fresh=True)
        return found and (y, Saved.from_call(call, spec, Moments(found[2], found[0], found[1]), call.weight, call.bias))

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        arrays, channels, identity = self.arrays, saved.x.shape[saved.spec.axis], saved.spec.activation.is_identity
        copied = "dresidual" in need and identity
        grads = Grads(
            dx=arrays.empty_like(saved.x) if "dx" in need else None,
            dweight=arrays.empty((channels,), saved.weight_dtype) if "dweight" in need else None,
            dbias=arrays.empty((channels,), saved.bias_dtype) if "dbias" in need else None,
            dresidual=arrays.empty_like(saved.x) if "dresidual" in need and not identity else None,
        )
        sums = bool(need & {"dweight", "dbias"}) or ("dx" in need and saved.spec.batch_stats)
        if sums or grads.dx is not None or grads.dresidual is not None:
            self._backward(dy, saved, grads, sums, fresh=True)
        return grads._replace(dresidual=self.copy(dy, saved.x)) if copied else grads

    def keeps_output(self, activation: str, dtype: Any) -> bool:
        """Whether the gradient after a residual can be told from y, to be kept as ``Saved.mask`` in its place.

        y must have z's sign, which rounding to half precision can lose. NumPy's arrays know no versions: nothing would
        notice that the caller has changed y.
        """
        return activation == "relu" and SIZES[self.arrays.code(dtype)] > 2

    # ------------------------------------------------------------------------------------------------------- phases
    def vector(self, array: Array) -> Array:
        return self.cast(array, self.arrays.float64)

    def cast(self, vector: Array, dtype: Any) -> Array:
        copy = self.arrays.empty(tuple(vector.shape), dtype)
        self.arrays.assign(copy, vector)
        return copy

    def empty_like(self, x: Array) -> Array:
        return self.arrays.empty_like(x)

    def copy(self, array: Array, like: Array) -> Array:
        copy = self.arrays.empty_like(like)
        self.arrays.assign(copy, array)
        return copy

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        self.arrays.check_out(out, x, residual, in_place)

    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        if groups > 1:
            size = x.shape[0] // groups
            parts = [slice(group * size, (group + 1) * size) for group in range(groups)]  # also of an empty batch
            return self._joined([self.stats(x[at], axis, None if valid is None else valid[at]) for at in parts])
        count = math.prod(x.shape) // max(x.shape[axis], 1)
        if count and x.shape[axis]:
            spec = BatchNormSpec(axis, True, 0.0, 1.0, IDENTITY)
            moments = self._forward(Call(x, valid=valid), spec)
        else:
            zeros = self.arrays.zeros((2, x.shape[axis]), self.arrays.float64)
            moments = Moments(count, zeros[0], zeros[1])
        return moments if valid is None else replace(moments, count=self.arrays.number(float(moments.count)))

    @np.errstate(all="ignore")
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = float(momentum)
        mean, var = self.vector(running_mean), self.vector(running_var)
        for part in moments.parts(len(moments.mean) // max(len(mean), 1)):
            count = launch.number(part.count)
            if count:
                mean = (1.0 - momentum) * mean + momentum * part.mean
                var = (1.0 - momentum) * var + momentum * (part.var * (count / max(count - 1.0, 1.0)))
        self.arrays.assign(running_mean, mean)
        self.arrays.assign(running_var, var)

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        parts = list(saved.parts()) if saved.spec.groups > 1 else [(slice(None), saved)]
        first, spec = parts[0][1], replace(saved.spec, batch_stats=False, groups=1)
        cut = pieces.Pieces(self.arrays, first.x, spec.axis, first.valid, 1 if residual is None else 2)
        for at, part in parts:
            added = None if residual is None else residual[at]
            call = Call(part.x, part.weight, part.bias, added, part.mean, part.moments.var, None, part.valid, out[at])
            if part.valid is not None or self.kernels(call, spec, in_place=True) is None:
                pieces.write(self, cut, call, spec)

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        if saved.spec.groups > 1:
            each = [self.backward_reduce(dy[at], part, None if dz is None else dz[at]) for at, part in saved.parts()]
            return Sums(*map(self.arrays.concatenate, zip(*each, strict=True)))
        added = None if saved.spec.activation.is_identity else dz
        if dz is not None and added is None:
            if saved.valid is None:
                self.arrays.assign(dz, dy)
            else:
                cut = pieces.Pieces(self.arrays, dy, saved.spec.axis, saved.valid, 1)
                for at in cut:
                    cut.put(dz, at, cut.take(dy, at))
        return self._backward(dy, saved, Grads(dresidual=added), sums=True)

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        if saved.spec.groups > 1:
            for i, (at, part) in enumerate(saved.parts()):
                length = len(part.mean)
                own = slice(i * length, (i + 1) * length)
                self.backward_input(dy[at], part, sums and Sums(sums.dz[own], sums.dz_xhat[own]), out[at])
            return
        self._backward(dy, saved, Grads(dx=out), sums=False, given=sums)

    # ------------------------------------------------------------------------------------------------------ the rest
    def _forward(self, call: Call, spec: BatchNormSpec, in_place: bool = False) -> Moments:
        """Write ``call.out``, if it is given, and move the running statistics."""
        found = self.kernels(call, spec, in_place) if call.valid is None else None
        return found or pieces.forward(self, call, spec)

    def kernels(self, call: Call, spec: BatchNormSpec, in_place: bool) -> Moments | None:
        """:meth:`_forward` by kernels alone; ``None``, and nothing done, as of :func:`launch.forward`."""
        found = launch.forward(self.arrays, call, spec, in_place)
        return found and Moments(found[2], found[0], found[1])

    def _backward(
        self, dy: Array, saved: Saved, grads: Grads, sums: bool, given: Sums | None = None, fresh: bool = False
    ) -> Sums:
        """Write the gradients that are given, and return the sums: those given, or computed if ``sums``.

        ``fresh``: dx and dresidual are new, like x.
        """
        moments, known = saved.moments, None if given is None else Sums(*map(self._double, given))
        mean, var = self._double(moments.mean), self._double(moments.var)
        if mean is not moments.mean or var is not moments.var:
            saved = replace(saved, moments=replace(moments, mean=mean, var=var))
        found = None if saved.valid is not None else launch.backward(self.arrays, saved, dy, grads, sums, known, fresh)
        return Sums(*found) if found else pieces.backward(self, dy, saved, grads, sums, given)

    def _double(self, vector: Array) -> Array:
        """A float64 vector as a dense one."""
        return vector if self.arrays.strides(vector) == (1,) else self.vector(vector)

    def _joined(self, parts: list[Moments]) -> Moments:
        """The statistics of ghost batches in one."""
        count, mean, var = zip(*[(part.count, part.mean, part.var) for part in parts], strict=True)
        together = self.arrays.concatenate
        return Moments(count[0] if isinstance(count[0], int) else together(count), together(mean), together(var))
