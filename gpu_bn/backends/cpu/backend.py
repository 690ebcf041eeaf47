"""The compiled backend: implements :mod:`gpu_bn.backends.protocol` with the kernels in ``gpu_bn.kernels.cpu``.

Masked tensors, and tensors whose strides kernels cannot read, go through :mod:`gpu_bn.backends.cpu.pieces`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_bn.activations import IDENTITY
from gpu_bn.backends.cpu import launch, pieces
from gpu_bn.backends.cpu.arrays import Arrays, NumpyArrays
from gpu_bn.backends.layout import check_out
from gpu_bn.backends.protocol import Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.kernels.cpu.vector import SIZES
from gpu_bn.spec import BatchNormSpec

Array = Any


def backend() -> CpuBackend:
    """Return the backend of NumPy arrays, for :func:`gpu_bn.registry.load`."""
    return CpuBackend(NumpyArrays())


class CpuBackend:
    """See :class:`gpu_bn.backends.protocol.Backend` and :class:`gpu_bn.backends.protocol.FusedBackend`."""

    name = "cpu"
    fuses_plain_calls_only = True
    """Calls with masks or ghost batches are computed phase by phase."""

    def __init__(self, arrays: Arrays, doors: Any = None) -> None:
        self.arrays = arrays
        self.doors = doors
        """The module :mod:`gpu_bn.backends.cpu.doors`, for torch tensors."""

    # ------------------------------------------------------------------------------------------------- whole calls
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        assert call.valid is None
        in_place = call.out is not None
        weight, bias, y = call.weight, call.bias, self.arrays.empty_like(call.x) if call.out is None else call.out
        if keep or in_place:  # copy them, for out may share memory with them
            weight, bias = (None if one is None else self.vector(one) for one in (weight, bias))
        running = (call.running_mean, call.running_var)
        moments = self._forward(Call(call.x, weight, bias, call.residual, *running, out=y), spec, in_place)
        return y, Saved.from_call(call, spec, moments, weight, bias)

    def forward_at_once(self, call: Call, spec: BatchNormSpec) -> tuple[Array, Saved] | None:
        """Do the work of :meth:`forward` on torch tensors so that the last call into C writes all tracked values.

        The parameters are saved themselves, not as copies. Do nothing and return ``None`` where this is not possible.
        """
        y = self.arrays.empty_like(call.x)
        moments = launch.forward(self.arrays, call._replace(out=y), spec, at_once=True, fresh=True)
        return None if moments is None else (y, Saved.from_call(call, spec, moments, call.weight, call.bias))

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        arrays, channels, identity = self.arrays, saved.x.shape[saved.spec.axis], saved.spec.activation.is_identity
        grads = Grads(
            dx=arrays.empty_like(saved.x) if "dx" in need else None,
            dweight=arrays.empty((channels,), saved.weight_dtype) if "dweight" in need else None,
            dbias=arrays.empty((channels,), saved.bias_dtype) if "dbias" in need else None,
            dresidual=arrays.empty_like(saved.x) if "dresidual" in need and not identity else None,
        )
        sums = bool(need & {"dweight", "dbias"}) or ("dx" in need and saved.spec.batch_stats)
        if sums or grads.dx is not None or grads.dresidual is not None:
            self._backward(dy, saved, grads, sums, fresh=True)
        if "dresidual" in need and identity:
            return grads._replace(dresidual=self.copy(dy, saved.x))
        return grads

    def keeps_output(self, activation: str, dtype: Any) -> bool:
        """Tell whether a call with a residual may save y as ``Saved.mask``, instead of the residual.

        Then y must have the sign of z, which rounding to half precision can lose. This is for torch tensors only: their
        versions show if the caller has changed y, and NumPy arrays have none.
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
        check_out(out, x, residual, in_place)

    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        if groups > 1:
            size = x.shape[0] // groups
            parts = [slice(group * size, (group + 1) * size) for group in range(groups)]  # of empty batches too
            return self._concatenate([self.stats(x[at], axis, None if valid is None else valid[at]) for at in parts])
        count = math.prod(x.shape) // max(x.shape[axis], 1)
        if count and x.shape[axis]:
            spec = BatchNormSpec(axis, True, 0.0, 1.0, IDENTITY)
            moments = self._forward(Call(x, valid=valid), spec)
        else:
            zeros = self.arrays.zeros((2, x.shape[axis]), self.arrays.float64)
            moments = Moments(count, zeros[0], zeros[1])
        return moments if valid is None else replace(moments, count=self.arrays.scalar(float(moments.count)))

    @np.errstate(all="ignore")
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = float(momentum)
        mean, var = self.vector(running_mean), self.vector(running_var)
        for part in moments.parts(len(moments.mean) // max(len(mean), 1)):
            count = launch.count_value(part.count)
            if count:
                mean = (1.0 - momentum) * mean + momentum * part.mean
                var = (1.0 - momentum) * var + momentum * (part.var * (count / max(count - 1.0, 1.0)))
        self.arrays.assign(running_mean, mean)
        self.arrays.assign(running_var, var)

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        parts = list(saved.parts()) if saved.spec.groups > 1 else [(slice(None), saved)]
        first, spec = parts[0][1], replace(saved.spec, batch_stats=False, groups=1)
        part_pieces = pieces.Pieces(self.arrays, first.x, spec.axis, first.valid, 1 if residual is None else 2)
        for at, part in parts:
            added = None if residual is None else residual[at]
            call = Call(part.x, part.weight, part.bias, added, part.mean, part.moments.var, None, part.valid, out[at])
            if part.valid is not None or self.run_kernels(call, spec, in_place=True) is None:
                pieces.write(self, part_pieces, call, spec)

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        if saved.spec.groups > 1:
            parts = [self.backward_reduce(dy[at], part, None if dz is None else dz[at]) for at, part in saved.parts()]
            return Sums(*map(self.arrays.concatenate, zip(*parts, strict=True)))
        added = None if saved.spec.activation.is_identity else dz
        if dz is not None and added is None:
            if saved.valid is None:
                self.arrays.assign(dz, dy)
            else:
                dy_pieces = pieces.Pieces(self.arrays, dy, saved.spec.axis, saved.valid, 1)
                for at in dy_pieces:
                    dy_pieces.put(dz, at, dy_pieces.take(dy, at))
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
        """Write ``call.out`` if it is given, update the running statistics, and return the moments."""
        moments = self.run_kernels(call, spec, in_place) if call.valid is None else None
        return moments or pieces.forward(self, call, spec)

    def run_kernels(self, call: Call, spec: BatchNormSpec, in_place: bool) -> Moments | None:
        """Serve a forward call by kernels alone; do nothing and return ``None`` where they cannot."""
        return launch.forward(self.arrays, call, spec, in_place)

    def _backward(
        self, dy: Array, saved: Saved, grads: Grads, sums: bool, given: Sums | None = None, fresh: bool = False
    ) -> Sums:
        """Write the gradients whose arrays are given, and return the sums, ``given`` or computed if ``sums``.

        ``fresh`` tells that dx and dresidual are new and laid out like x.
        """
        moments, known = saved.moments, None if given is None else Sums(*map(self._contiguous, given))
        mean, var = self._contiguous(moments.mean), self._contiguous(moments.var)
        if mean is not moments.mean or var is not moments.var:
            saved = replace(saved, moments=replace(moments, mean=mean, var=var))
        totals = None
        if saved.valid is None:
            totals = launch.backward(self.arrays, saved, dy, grads, sums, known, fresh)
        return totals or pieces.backward(self, dy, saved, grads, sums, given)

    def _contiguous(self, vector: Array) -> Array:
        """Return a float64 vector, or a copy of it if it is not contiguous."""
        return vector if self.arrays.strides(vector) == (1,) else self.vector(vector)

    def _concatenate(self, parts: list[Moments]) -> Moments:
        """Return the statistics of all ghost batches as one object."""
        count, mean, var = zip(*[(part.count, part.mean, part.var) for part in parts], strict=True)
        join = self.arrays.concatenate
        return Moments(count[0] if isinstance(count[0], int) else join(count), join(mean), join(var))
