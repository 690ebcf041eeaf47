"""The compiled backend: what :mod:`gpu_bn.backends.protocol` asks for, of kernels in ``gpu_bn.kernels.cpu``.

Tensors whose strides kernels cannot follow, and masked ones, go through :mod:`gpu_bn.backends.cpu.pieces`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gpu_bn.activations import IDENTITY
from gpu_bn.backends.cpu import call, pieces
from gpu_bn.backends.cpu.arrays import Arrays, NumpyArrays
from gpu_bn.backends.protocol import Moments, Saved, Sums
from gpu_bn.spec import BatchNormSpec

Array = Any


def backend() -> CpuBackend:
    """The backend of NumPy arrays, for :func:`gpu_bn.registry.load`."""
    return CpuBackend(NumpyArrays())


class CpuBackend:
    """See :class:`gpu_bn.backends.protocol.Backend`; ``forward`` and ``backward`` are of ``Fused``."""

    name = "cpu"
    fuses_plain_calls_only = True
    """Masks and ghost batches go phase by phase."""

    def __init__(self, arrays: Arrays, doors: Any = None) -> None:
        self.arrays = arrays
        self.doors = doors
        """:mod:`gpu_bn.backends.cpu.doors`, for tensors."""

    # ------------------------------------------------------------------------------------------------- whole calls
    def forward(
        self,
        x: Array,
        spec: BatchNormSpec,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        out: Array | None,
        valid: Array | None = None,
        keep: bool = True,
    ) -> tuple[Array, Saved]:
        assert valid is None
        y = self.arrays.empty_like(x) if out is None else out
        dtypes = [None if one is None else one.dtype for one in (weight, bias)]
        if keep or out is not None:  # which may hold parameters
            weight, bias = (None if one is None else self.vector(one) for one in (weight, bias))
        moments = self._forward(x, spec, (weight, bias, running_mean, running_var), residual, y, out is not None)
        return y, Saved(
            x=x,
            residual=None if spec.activation.is_identity else residual,
            moments=moments,
            weight=weight,
            bias=bias,
            weight_dtype=dtypes[0],
            bias_dtype=dtypes[1],
            has_residual=residual is not None,
            spec=spec,
        )

    def forward_at_once(
        self,
        x: Array,
        spec: BatchNormSpec,
        running_mean: Array | None,
        running_var: Array | None,
        counter: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
    ) -> tuple[Array, Saved] | None:
        """:meth:`forward` of torch's tensors, where one call into C, the last, writes the statistics and the counter.

        What it keeps are the parameters themselves, no copies. ``None``, and nothing done, where it cannot.
        """
        activation, y = spec.activation, self.arrays.empty_like(x)
        found = call.forward(
            self.arrays, x, spec.axis, spec.batch_stats, float(spec.momentum), spec.eps, activation.name,
            activation.parameter, (weight, bias, running_mean, running_var), residual, y, False, counter, at_once=True,
            fresh=True,
        )  # fmt: skip
        if found is None:
            return None
        weight_dtype, bias_dtype = (None if one is None else one.dtype for one in (weight, bias))
        kept = None if activation.is_identity else residual
        moments = Moments(found[2], found[0], found[1])
        return y, Saved(x, kept, moments, weight, bias, weight_dtype, bias_dtype, residual is not None, spec)

    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> tuple[Array | None, ...]:
        arrays, channels = self.arrays, saved.x.shape[saved.spec.axis]
        dx = arrays.empty_like(saved.x) if "dx" in need else None
        dresidual = added = None
        if "dresidual" in need and saved.spec.activation.is_identity:
            dresidual = self.copy(dy, saved.x)
        elif "dresidual" in need:
            dresidual = added = arrays.empty_like(saved.x)
        dweight = arrays.empty((channels,), saved.weight_dtype) if "dweight" in need else None
        dbias = arrays.empty((channels,), saved.bias_dtype) if "dbias" in need else None
        sums = dweight is not None or dbias is not None or (dx is not None and saved.spec.batch_stats)
        if sums or dx is not None or added is not None:
            self._backward(dy, saved, sums, dx, added, (dweight, dbias), fresh=True)
        return dx, dweight, dbias, dresidual

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
            moments = self._forward(x, spec, (None, None, None, None), None, None, valid=valid)
        else:
            zeros = self.arrays.zeros((2, x.shape[axis]), self.arrays.float64)
            moments = Moments(count, zeros[0], zeros[1])
        return moments if valid is None else replace(moments, count=self.arrays.number(float(moments.count)))

    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = float(momentum)
        mean, var = self.vector(running_mean), self.vector(running_var)
        for part in moments.parts(len(moments.mean) // max(len(mean), 1)):
            count = _number(part.count)
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
            call = part.x, spec, (part.weight, part.bias, part.mean, part.moments.var), added, out[at]
            if part.valid is not None or self.kernels(*call, in_place=True) is None:
                pieces.write(self, cut, *call, part.valid)

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        if saved.spec.groups > 1:
            each = [self.backward_reduce(dy[at], part, None if dz is None else dz[at]) for at, part in saved.parts()]
            return Sums(*map(self.arrays.concatenate, zip(*each, strict=True)))
        added = None if saved.spec.activation.is_identity else dz
        if dz is not None and added is None:
            if saved.valid is None:
                self.arrays.assign(dz, dy)
            else:
                there = pieces.Pieces(self.arrays, dy, saved.spec.axis, saved.valid, 1)
                for at in there:
                    there.put(dz, at, there.take(dy, at))
        return self._backward(dy, saved, True, None, added)

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        if saved.spec.groups > 1:
            for i, (at, part) in enumerate(saved.parts()):
                length = len(part.mean)
                own = slice(i * length, (i + 1) * length)
                self.backward_input(dy[at], part, sums and Sums(sums.dz[own], sums.dz_xhat[own]), out[at])
            return
        self._backward(dy, saved, False, out, None, given=sums)

    # ------------------------------------------------------------------------------------------------------ the rest
    def _forward(
        self,
        x: Array,
        spec: BatchNormSpec,
        vectors: tuple[Array | None, Array | None, Array | None, Array | None],
        residual: Array | None,
        y: Array | None,
        in_place: bool = False,
        valid: Array | None = None,
    ) -> Moments:
        """Write y, if it is given, and move the running statistics, after weight and bias in ``vectors``."""
        found = self.kernels(x, spec, vectors, residual, y, in_place) if valid is None else None
        return found or pieces.forward(self, x, spec, vectors, residual, y, valid)

    def kernels(
        self,
        x: Array,
        spec: BatchNormSpec,
        vectors: tuple[Array | None, Array | None, Array | None, Array | None],
        residual: Array | None,
        y: Array | None,
        in_place: bool,
    ) -> Moments | None:
        """:meth:`_forward` by kernels alone; ``None``, and nothing done, as of :func:`call.forward`."""
        activation, options = spec.activation, (spec.axis, spec.batch_stats, float(spec.momentum), spec.eps)
        found = call.forward(
            self.arrays, x, *options, activation.name, activation.parameter, vectors, residual, y, in_place
        )
        return found and Moments(found[2], found[0], found[1])

    def _backward(
        self,
        dy: Array,
        saved: Saved,
        sums: bool,
        dx: Array | None,
        dresidual: Array | None,
        gradients: tuple[Array | None, Array | None] = (None, None),
        given: Sums | None = None,
        fresh: bool = False,
    ) -> Sums:
        """Write the gradients that are given, and return the sums: those given, or computed if ``sums``.

        ``fresh``: dx and dresidual are new, like x.
        """
        spec, activation = saved.spec, saved.spec.activation
        vectors = (saved.weight, saved.bias, self._double(saved.mean), self._double(saved.moments.var))
        known = None if given is None else (self._double(given.dz), self._double(given.dz_xhat))
        found = saved.valid is None and call.backward(
            self.arrays, saved.x, spec.axis, spec.batch_stats, spec.eps, activation.name, activation.parameter, vectors,
            _number(saved.positions), saved.residual, dy, dx, dresidual, gradients, sums, known, fresh,
        )  # fmt: skip
        return Sums(*found) if found else pieces.backward(self, dy, saved, sums, dx, dresidual, gradients, given)

    def _double(self, vector: Array) -> Array:
        """A float64 vector as a dense one."""
        return vector if self.arrays.strides(vector) == (1,) else self.vector(vector)

    def _joined(self, parts: list[Moments]) -> Moments:
        """The statistics of ghost batches in one."""
        count, mean, var = zip(*[(part.count, part.mean, part.var) for part in parts], strict=True)
        together = self.arrays.concatenate
        return Moments(count[0] if isinstance(count[0], int) else together(count), together(mean), together(var))


def _number(count: Any) -> float:
    """A count, which may be an array of one."""
    return float(count if isinstance(count, int) else count.item())
