"""NumPy on the CPU: two sweeps over contiguous pieces, each piece small enough to stay in the cache between its passes.

Forward: one sweep sums, one writes ``y``. Backward: one sweep sums (and writes ``dz`` where an activation makes it
differ from ``dy``), one writes ``dx``. The second sweep runs backwards, so that it starts with what the first left in
the cache. Per-channel values are float64 throughout. Tensors are computed in their own precision, but half precision
and small tensors (:mod:`gpu_bn.backends._small`) in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_bn.backends import _small
from gpu_bn.backends._layout import Layout, check_out
from gpu_bn.backends._small import SMALL
from gpu_bn.backends._sweep import Operand, PerChannel, Tile, Workspace, run, sweep
from gpu_bn.backends.protocol import Moments, Saved, Sums

Array = NDArray[Any]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
TRUSTED_RATIO = 2.0
"""Raw sums, and y = x * scale + shift, serve while |mean| <= 2 sd: the cancellation then costs less than 3 bits.
Beyond, the mean is subtracted first. Decided channel by channel, so that no channel's result depends on another."""
UNDERFLOW = 1e-30
"""Mean squares below this may have lost float32's small numbers."""


def backend() -> NumpyBackend:
    """The backend, for :func:`gpu_bn.dispatch.load`."""
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
        return Layout.of(x, 0).empty(x.dtype)

    def copy(self, array: Array, like: Array) -> Array:
        y = self.empty_like(like)
        np.copyto(y, array)
        return y

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        if groups > 1:
            parts = zip(np.split(x, groups), [None] * groups if valid is None else np.split(valid, groups), strict=True)
            return _joined([self.stats(part, axis, there) for part, there in parts])
        layout = Layout.of(x, axis)
        if x.size == 0:
            return Moments(0, np.zeros(layout.c), np.zeros(layout.c))
        hidden = layout.hidden(valid)
        count = layout.count if hidden is None else hidden.size - int(np.count_nonzero(hidden))
        with np.errstate(all="ignore"):
            if x.size <= SMALL:
                moments = _small.stats(layout, x, hidden, max(count, 1))
            else:
                moments = _moments(layout.read(x), _working_dtype(x), hidden, max(count, 1))
        return moments if hidden is None else replace(moments, count=np.array([count], FLOAT64))

    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        momentum = float(momentum)
        mean, var = running_mean.astype(FLOAT64), running_var.astype(FLOAT64)
        with np.errstate(all="ignore"):
            for part in moments.parts(len(moments.mean) // max(len(mean), 1)):
                count = float(np.squeeze(part.count))
                if count:
                    _small.move(mean, var, part.mean, part.var, count, momentum)
            running_mean[...], running_var[...] = mean, var

    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        if saved.spec.groups > 1:
            for at, part in saved.parts():
                self.normalize(part, None if residual is None else residual[at], out[at])
            return
        layout = Layout.of(saved.x, saved.spec.axis)
        with np.errstate(all="ignore"):
            if saved.x.size <= SMALL:
                _small.normalize(layout, saved, residual, out)
                return
            y = layout.write(out)
            target = np.empty((layout.n, layout.c, layout.s), out.dtype) if y is None else y
            _normalize(saved, layout, residual, target)
            if y is None:
                layout.assign(out, target)

    def keeps_dz(self, saved: Saved) -> bool:
        return saved.x.size > SMALL * saved.spec.groups and bool(
            _working_dtype(saved.x, saved.moments) == saved.x.dtype
        )

    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        if saved.spec.groups > 1:
            parts = [self.backward_reduce(dy[at], part, None if dz is None else dz[at]) for at, part in saved.parts()]
            return Sums(*map(np.concatenate, zip(*parts, strict=True)))
        layout = Layout.of(saved.x, saved.spec.axis)
        with np.errstate(all="ignore"):
            if saved.x.size <= SMALL:
                return _small.backward_reduce(layout, saved, dy, dz)
            return _backward_reduce(saved, layout, dy, dz)

    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array, dz: Array | None) -> None:
        if saved.spec.groups > 1:
            each = [None] * saved.spec.groups if sums is None else _split(sums, saved.spec.groups)
            for (at, part), sums_here in zip(saved.parts(), each, strict=True):
                dx = out[at]
                self.backward_input(dy[at], part, sums_here, dx, dx if dz is out else None if dz is None else dz[at])
            return
        layout = Layout.of(saved.x, saved.spec.axis)
        with np.errstate(all="ignore"):
            if saved.x.size <= SMALL:
                _small.backward_input(layout, saved, dy, sums, out)
            else:
                _backward_input(saved, layout, dy, dz, sums, out)


def _working_dtype(x: Array, moments: Moments | None = None) -> np.dtype[Any]:
    """What a tensor is computed in: float32 if it is in that and its range suffices, else float64."""
    if x.dtype != FLOAT32 or (moments is not None and moments.wide):
        return FLOAT64
    return FLOAT32


def _joined(parts: list[Moments]) -> Moments:
    """The statistics of ghost batches in one."""
    count = parts[0].count if isinstance(parts[0].count, int) else np.concatenate([part.count for part in parts])
    mean, var = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "var"))
    return Moments(count, mean, var, any(part.wide for part in parts))


def _split(sums: Sums, groups: int) -> list[Sums]:
    return [Sums(*pair) for pair in zip(*(np.split(vector, groups) for vector in sums), strict=True)]


def _moments(x: Array, dtype: np.dtype[Any], hidden: Array | None, count: int) -> Moments:
    """Mean and variance of an (N, C, S) tensor: raw sums where they serve, else the corrected two-pass algorithm.

    ``hidden``, (N, 1, S), says which positions do not count, ``count`` how many do.

    Where float32 loses the squares' range (overflow or underflow), all is done again in float64. In float64 an
    overflow makes the variance, and with it the channel, NaN: never a plausible wrong number.
    """
    sum_x, sum_xx = _sums(x, None, dtype, hidden)
    if dtype == FLOAT32 and (lost := _range_lost(sum_x, sum_xx, count)).any():
        moments = _moments(x, FLOAT64, hidden, count)
        if np.isfinite(moments.var[lost]).any():
            return Moments(count, moments.mean, moments.var, wide=True)
    mean = sum_x / count
    var = sum_xx / count - mean * mean
    trusted = ~(mean * mean > TRUSTED_RATIO**2 * var)
    if not trusted.all():
        # Subtracting zero leaves the trusted channels exactly as they were.
        centre = np.where(trusted, 0.0, mean).astype(dtype)
        sum_x, sum_xx = _sums(x, centre, dtype, hidden)
        remainder = sum_x / count
        mean = centre + remainder
        var = sum_xx / count - remainder * remainder
    return Moments(count, mean, np.where(var < np.inf, np.maximum(var, 0.0), np.nan))


def _range_lost(sum_x: Array, sum_xx: Array, count: int) -> Array:
    """(C,) which channels' squares may have left float32's range; not those of zeros alone."""
    overflow = ~np.isfinite(sum_xx)
    underflow = (sum_xx < count * UNDERFLOW) & (sum_x != 0)
    lost: Array = overflow | underflow
    return lost


def _sums(x: Array, centre: Array | None, dtype: np.dtype[Any], hidden: Array | None) -> tuple[Array, Array]:
    """Sum of x - centre and of its square."""
    source = Operand("x", x, dtype, hidden)
    tiles = sweep(
        *x.shape,
        dtype.itemsize,
        sums=True,
        temporaries=source.temporaries + (centre is not None),
        stored_itemsize=x.itemsize,
    )
    shift = None if centre is None else PerChannel("centre", centre, tiles, dtype)
    sums, squares = tiles.partials(dtype), tiles.partials(dtype)

    def body(tile: Tile, work: Workspace) -> None:
        piece = source.load(tile, work)
        if shift is not None:
            piece = np.subtract(piece, shift.at(tile, work), out=work.take("centred", tile.shape))
            source.clear(tile, piece)
        tiles.add(squares, tile, piece, piece)
        tiles.add(sums, tile, piece)

    run(tiles, dtype, body)
    return tiles.total(sums), tiles.total(squares)


class _Affine(NamedTuple):
    """z = (x - centre) * scale + shift: (C,), ``centre`` ``None`` where it is zero in all channels."""

    centre: Array | None
    scale: Array
    shift: Array
    rstd: Array
    rest: Array
    """mean - centre."""

    @staticmethod
    def of(saved: Saved, dtype: np.dtype[Any]) -> _Affine:
        mean, rstd = saved.moments.mean, saved.rstd
        far = _far_from_zero(saved)
        centre = np.where(far, mean, 0.0).astype(dtype) if far.any() else None
        rest = mean if centre is None else mean - centre
        scale = rstd if saved.weight is None else rstd * saved.weight
        shift = -rest * scale
        if saved.bias is not None:
            shift += saved.bias
        return _Affine(centre, scale, shift, rstd, rest)


def _far_from_zero(saved: Saved) -> Array:
    """(C,) which channels' means are subtracted before all else."""
    far: Array = np.abs(saved.moments.mean * saved.rstd) > TRUSTED_RATIO
    return far


class _Pass:
    """One sweep over the tensors of a call: the tiles, the operands, and how ``z`` comes from ``x``.

    ``temporaries`` is how many arrays of a tile's size the caller makes in each. ``y`` is given as (N, C, S).
    """

    def __init__(
        self, saved: Saved, layout: Layout, *, sums: bool, temporaries: int = 0, **operands: Array | None
    ) -> None:
        self.dtype = _working_dtype(saved.x, saved.moments)
        self.affine = _Affine.of(saved, self.dtype)
        self.activation = saved.spec.activation
        hidden = layout.hidden(saved.valid)
        self.operands = {
            name: Operand(name, array if name == "y" else layout.read(array), self.dtype, hidden)
            for name, array in {"x": saved.x, **operands}.items()
            if array is not None
        }
        self._separate_residual()
        temporaries += sum(operand.temporaries for operand in self.operands.values())
        self.sweep = sweep(
            layout.n,
            layout.c,
            layout.s,
            self.dtype.itemsize,
            sums=sums,
            temporaries=temporaries,
            stored_itemsize=saved.x.itemsize,
        )
        self.centre = None if self.affine.centre is None else self.per_channel("centre", self.affine.centre)
        self.scale = self.per_channel("scale", self.affine.scale)
        self.shift = self.per_channel("shift", self.affine.shift)

    def _separate_residual(self) -> None:
        """A residual that is also the output is read before it is overwritten."""
        residual, y = self.operands.get("residual"), self.operands.get("y")
        if residual is not None and y is not None and np.may_share_memory(residual.array, y.array):
            residual.in_place = False

    def per_channel(self, name: str, vector: Array) -> PerChannel:
        """A per-channel vector for this sweep's tiles."""
        return PerChannel(name, vector, self.sweep, self.dtype)

    def centred(self, tile: Tile, work: Workspace, out: Array | None = None) -> Array:
        """A tile of x - centre, in ``out`` or a temporary unless it is x itself."""
        x = self.operands["x"].load(tile, work)
        if self.centre is None:
            return x
        return np.subtract(x, self.centre.at(tile, work), out=work.take("centred", x.shape) if out is None else out)

    def residual(self, tile: Tile, work: Workspace) -> Array | None:
        """A tile of the residual."""
        return self.operands["residual"].load(tile, work) if "residual" in self.operands else None

    def pre_activation(self, tile: Tile, work: Workspace, centred: Array, residual: Array | None, out: Array) -> None:
        """Write a tile of z to ``out``; the order of roundings is the same forward and backward."""
        np.multiply(centred, self.scale.at(tile, work), out=out)
        np.add(out, self.shift.at(tile, work), out=out)
        if residual is not None:
            np.add(out, residual, out=out)

    def gradient(self, tile: Tile, work: Workspace, centred: Array, target: Operand | None = None) -> Array:
        """A tile of dz: dy itself, or computed where ``target`` lies or in a temporary."""
        dy = self.operands["dy"].load(tile, work)
        if self.activation.is_identity:
            if target is None:
                return dy
            copy = target.open(tile, work)
            np.copyto(copy, dy)
            return copy
        z = work.take("z", tile.shape) if target is None else target.open(tile, work)
        self.pre_activation(tile, work, centred, self.residual(tile, work), z)
        self.activation.gradient(z, dy, z)
        return z


def _normalize(saved: Saved, layout: Layout, residual: Array | None, y: Array) -> None:
    needs = saved.spec.activation.row.value_needs
    a_pass = _Pass(saved, layout, sums=False, temporaries=needs, residual=residual, y=y)
    target = a_pass.operands["y"]

    def body(tile: Tile, work: Workspace) -> None:
        z = target.open(tile, work)
        residual = a_pass.residual(tile, work)  # first: z may be where it lies
        a_pass.pre_activation(tile, work, a_pass.centred(tile, work, z), residual, z)
        a_pass.activation.value(z)
        target.store(tile, z)

    run(a_pass.sweep, a_pass.dtype, body, backwards=True)


def _backward_reduce(saved: Saved, layout: Layout, dy: Array, dz: Array | None) -> Sums:
    needs = saved.spec.activation.row.gradient_needs + (dz is None and not saved.spec.activation.is_identity)
    needs += bool(_far_from_zero(saved).any())
    a_pass = _Pass(saved, layout, sums=True, temporaries=needs, residual=saved.residual, dy=dy, dz=dz)
    target = a_pass.operands.get("dz")
    dtype, tiles = a_pass.dtype, a_pass.sweep
    sums, products = tiles.partials(dtype), tiles.partials(dtype)

    def body(tile: Tile, work: Workspace) -> None:
        centred = a_pass.centred(tile, work)
        gradient = a_pass.gradient(tile, work, centred, target)
        tiles.add(products, tile, gradient, centred)
        tiles.add(sums, tile, gradient)
        if target is not None:
            target.store(tile, gradient)

    run(tiles, dtype, body)
    total = tiles.total(sums)
    return Sums(total, (tiles.total(products) - a_pass.affine.rest * total) * a_pass.affine.rstd)


def _backward_input(saved: Saved, layout: Layout, dy: Array, dz: Array | None, sums: Sums | None, dx: Array) -> None:
    """dx = ((x - centre) * slope + dz + offset) * scale; with frozen statistics, dx = dz * scale."""
    known = saved.spec.activation.is_identity or dz is not None
    shared = dz is dx
    needs = 0 if known else 1 + bool(_far_from_zero(saved).any()) + saved.spec.activation.row.gradient_needs
    a_pass = _Pass(
        saved,
        layout,
        sums=False,
        temporaries=needs + shared,
        residual=None if known else saved.residual,
        dy=dy if dz is None else dz,
        dx=dx,
    )
    target, source = a_pass.operands["dx"], a_pass.operands["dy"]
    slope = offset = None
    if sums is not None:
        count = saved.positions
        slope_c = -sums.dz_xhat * a_pass.affine.rstd / count
        slope = a_pass.per_channel("slope", slope_c)
        offset = a_pass.per_channel("offset", -sums.dz / count - slope_c * a_pass.affine.rest)

    def body(tile: Tile, work: Workspace) -> None:
        out = target.open(tile, work)
        room = work.take("product", tile.shape) if shared else out
        gradient = source.load(tile, work) if known else a_pass.gradient(tile, work, a_pass.centred(tile, work))
        if slope is not None and offset is not None:
            np.multiply(a_pass.centred(tile, work, room), slope.at(tile, work), out=room)
            np.add(room, gradient, out=out)
            np.add(out, offset.at(tile, work), out=out)
            gradient = out
        np.multiply(gradient, a_pass.scale.at(tile, work), out=out)
        target.store(tile, out)

    run(a_pass.sweep, a_pass.dtype, body, backwards=True)
