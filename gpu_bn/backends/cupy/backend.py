"""Batch normalisation of CuPy arrays by CUDA C++ kernels (:mod:`gpu_bn.kernels`), compiled at first use.

A training call is one launch where a plan (:mod:`gpu_bn.plan`) can keep each channel on chip, else two; evaluation and
the gradients with frozen statistics are one. Kernels run on the current stream of the input's device; nothing waits for
the device, so that calls may be captured in a CUDA graph. Statistics are saved as float64, sums are in a fixed order.

What a call launches is prepared once for all calls of its signature (:mod:`gpu_bn.backends.cupy.calls`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache, wraps
from threading import local
from typing import Any, TypeVar, cast

import cupy
import numpy as np

from gpu_bn.backends.cupy import calls
from gpu_bn.backends.cupy.builder import Vector, check_device
from gpu_bn.backends.cupy.calls import ABSENT, place, row, tensor, vector
from gpu_bn.backends.cupy.steps import ClusterRefusedError, Frame, empty
from gpu_bn.backends.layout import Layout, check_out
from gpu_bn.backends.protocol import BackendUnavailableError, Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])
COUNTERS = 4096
STREAMS = 64
"""Streams for which a backend keeps counters."""
STREAM_PER_THREAD = 2
"""CUDA's name for a thread's own default stream: the same in all threads."""
PREPARED = 1024
"""Signatures that a backend remembers, for each kind of call; the one not used for longest is forgotten."""


def backend() -> CupyBackend:
    """The backend, for :func:`gpu_bn.registry.load`.

    Raises:
        BackendUnavailableError: no GPU, no driver, or a GPU too old; the message names the remedy.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"CuPy finds no usable CUDA driver ({error}); install or update the NVIDIA driver, or use NumPy arrays"
        ) from None
    if count == 0:
        raise BackendUnavailableError("CuPy finds no GPU; use NumPy arrays, or check CUDA_VISIBLE_DEVICES")
    return CupyBackend()


def _where_it_is(method: Method) -> Method:
    """A method that runs on the device where its first argument is, if that is not the current one."""

    @wraps(method)
    def run(self: CupyBackend, first: Any, *others: Any, **options: Any) -> Any:
        array = first.x if isinstance(first, Call | Saved) else first.mean if isinstance(first, Moments) else first
        device = array.data.device_id
        if device == cupy.cuda.runtime.getDevice():
            return method(self, first, *others, **options)
        with cupy.cuda.Device(device):
            return method(self, first, *others, **options)

    return cast(Method, run)


class Kept(Saved):
    """What a forward call of this backend keeps: its vectors are the ``rows`` of one array.

    They become arrays when they are first asked for; a backward call only needs their addresses.
    """

    __slots__ = ("count", "rows")

    count: Any
    rows: Array

    @staticmethod
    def of(rows: Array, count: Any, **fields: Any) -> Kept:
        """All other fields are given."""
        kept = object.__new__(Kept)
        put = object.__setattr__
        put(kept, "rows", rows)
        put(kept, "count", count)
        for name, value in fields.items():
            put(kept, name, value)
        return kept

    def __getattr__(self, name: str) -> Any:
        """A field that has not been set."""
        if name == "rows":
            return None  # one of a copy's, which has the vectors instead
        channels = self.x.shape[self.spec.axis]
        if name == "moments":
            value: Any = Moments(self.count, self.rows[0], self.rows[1])
        elif name == "weight":
            value = None if self.weight_dtype is None else self.rows[2, :channels]
        elif name == "bias":
            value = None if self.bias_dtype is None else self.rows[3, :channels]
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)
        return value


class CupyBackend:
    """See :class:`gpu_bn.backends.protocol.Backend` and :class:`gpu_bn.backends.protocol.Fused`."""

    name = "cupy"
    xp = cupy

    def __init__(self, tier: str | None = None) -> None:
        """``tier`` forces a tier of :data:`gpu_bn.plan.TIERS` on training calls, for tests and benchmarks."""
        self.tier = tier
        self._counters: dict[tuple[int, int], tuple[Any, Array]] = {}
        self._of_thread = local()
        prepared = lru_cache(PREPARED)
        self._forward, self._backward = prepared(calls.forward), prepared(calls.backward)
        self._stats, self._normalize = prepared(calls.stats), prepared(calls.normalize)
        self._backward_phase, self._track = prepared(calls.backward_phase), prepared(calls.track)

    # ------------------------------------------------------------------------------------------ small things
    @_where_it_is
    def vector(self, array: Array) -> Array:
        return array.astype(np.float64)

    @_where_it_is
    def cast(self, vector: Array, dtype: Any) -> Array:
        return vector.astype(dtype)

    @_where_it_is
    def empty_like(self, x: Array) -> Array:
        return empty(Layout.of(x, 0), x.dtype)

    @_where_it_is
    def copy(self, array: Array, like: Array) -> Array:
        y = self.empty_like(like)
        y[...] = array
        return y

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    # -------------------------------------------------------------------------------------- one call, fused
    @_where_it_is
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        x, weight, bias, residual, running_mean, running_var, _, valid, out = call
        activation = spec.activation
        bits = residual is not None and (keep or spec.batch_stats)
        momentum_at, momentum = _momentum(spec.momentum, x.data.device_id)
        frame = ABSENT | {
            "x": x, "y": out, "residual": residual, "valid": valid, "weight": weight, "bias": bias,
            "running_mean": running_mean, "running_var": running_var, "momentum_at": momentum_at,
            "momentum": momentum, "eps": np.float64(spec.eps), "parameter": np.float64(activation.parameter),
            "zeros": self.counters,
        }  # fmt: skip
        prepared, frame = self._made(
            self._forward, frame, tensor(x), spec.axis, activation.name, _groups(spec), place(valid),
            bool(spec.batch_stats), place(residual), place(out), vector(weight), vector(bias), vector(running_mean),
            vector(running_var), bits,
        )  # fmt: skip
        counts = frame["counts"]
        return frame["y"], Kept.of(
            frame["rows"],
            prepared.count if counts is None else counts,
            x=x,
            residual=residual if prepared.keeps == "residual" else None,
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            has_residual=residual is not None,
            spec=spec,
            mask=frame["mask"],
            valid=valid,
            renorm=None,
        )

    @_where_it_is
    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        frame, signature, vectors = self._upstream(saved)
        frame |= {"dy": dy, "residual": saved.residual, "mask": saved.mask}
        _, frame = self._made(
            self._backward, frame, *signature, bool(saved.spec.batch_stats), place(dy), place(saved.residual),
            saved.mask is not None, vectors, need, saved.weight_dtype, saved.bias_dtype,
        )  # fmt: skip
        return Grads(frame["dx"], frame["dweight"], frame["dbias"], frame["dresidual"])

    def _made(self, prepare: Any, frame: Frame, *signature: Any) -> tuple[calls.Call, Frame]:
        """Make a call, prepared before or now, and return it with its filled frame.

        A device that refuses a cluster has run nothing: the call is prepared again, without clusters.
        """
        call = prepare(self.tier, *signature)
        filled = frame.copy()
        try:
            call(filled)
        except ClusterRefusedError:
            prepare.cache_clear()
            call, filled = prepare(self.tier, *signature), frame
            call(filled)
        return call, filled

    # ------------------------------------------------------------------------------------------------ phases
    @_where_it_is
    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        rows = cupy.zeros((len(calls.SAVED), groups * x.shape[axis]), np.float64)
        if not x.size:
            return Moments(0 if valid is None else cupy.zeros(groups, np.float64), rows[0], rows[1])
        call = self._stats(self.tier, tensor(x), axis, groups, place(valid))
        frame = ABSENT | {"x": x, "valid": valid, "rows": rows, "momentum": np.float64(0), "zeros": self.counters}
        call(frame)
        return Moments(call.count if valid is None else frame["counts"], rows[0], rows[1])

    @_where_it_is
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        mean, var, count = moments.mean, moments.var, moments.count
        counts = count if _on_device(count) else None
        if counts is None and mean.size == running_mean.size:
            bessel = count / max(count - 1, 1)
            running_mean[...] = (1 - momentum) * running_mean.astype(np.float64) + momentum * mean
            running_var[...] = (1 - momentum) * running_var.astype(np.float64) + (momentum * bessel) * var
            return
        channels = running_mean.size
        vectors = {"mean": mean, "var": var, "running_mean": running_mean, "running_var": running_var}
        call = self._track(
            mean.data.device_id, channels, mean.size // channels, 0 if counts is not None else count,
            tuple(map(vector, vectors.values())),
        )  # fmt: skip
        momentum_at, value = _momentum(momentum, mean.data.device_id)
        call(ABSENT | vectors | {"momentum_at": momentum_at, "momentum": value, "counts": counts})

    @_where_it_is
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        frame, signature, vectors = self._upstream(saved)
        frame |= {"residual": residual, "y": out}
        self._normalize(self.tier, *signature, place(residual), place(out), vectors)(frame)

    @_where_it_is
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        frame, signature, vectors = self._upstream(saved)
        frame |= {"dy": dy, "residual": saved.residual, "dresidual": dz}
        self._backward_phase(
            self.tier, *signature, place(dy), place(saved.residual), vectors, "dresidual", place(dz)
        )(frame)  # fmt: skip
        size = saved.moments.mean.size
        return Sums(*frame["sums"][: 2 * size].reshape(2, size))

    @_where_it_is
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        frame, signature, vectors = self._upstream(saved)
        frame |= {"dy": dy, "residual": saved.residual, "dx": out}
        if sums is not None:
            frame["sums"] = cupy.stack([sums.dz, sums.dz_xhat])
        self._backward_phase(
            self.tier, *signature, place(dy), place(saved.residual), vectors, "dx", place(out)
        )(frame)  # fmt: skip

    def _upstream(self, saved: Saved) -> tuple[Frame, tuple[Any, ...], tuple[Vector | None, ...]]:
        """What a forward call has left: a frame with it, its part of a signature, and that of its vectors."""
        spec = saved.spec
        if not isinstance(saved, Kept) or saved.rows is None:
            count = saved.moments.count
            arrays = saved.moments.mean, saved.moments.var, saved.weight, saved.bias
            vectors = tuple(map(vector, arrays))
        else:
            count, start, size = saved.count, saved.rows.data, saved.rows.nbytes // len(calls.SAVED)
            weighs, biased = saved.weight_dtype is not None, saved.bias_dtype is not None
            arrays = start, start + size, start + 2 * size if weighs else None, start + 3 * size if biased else None
            one = row(start.device_id)
            vectors = one, one, one if weighs else None, one if biased else None
        counts = count if _on_device(count) else None
        frame = ABSENT | {
            "x": saved.x, "valid": saved.valid, "counts": counts, "zeros": self.counters,
            "count": np.float64(count if counts is None else 0),  # where there are counts, kernels look there
            "eps": np.float64(spec.eps), "parameter": np.float64(spec.activation.parameter),
        }  # fmt: skip
        frame.update(zip(calls.SAVED, arrays, strict=True))
        signature = (
            tensor(saved.x), spec.axis, spec.activation.name, _groups(spec), place(saved.valid), counts is not None
        )  # fmt: skip
        return frame, signature, vectors

    # ---------------------------------------------------------------------------------------------- counters
    def counters(self, size: int) -> Array:
        """Zeros, which a kernel leaves as it found them: one array a stream; a graph gets one of its own.

        Streams are kept with their counters, so that no other stream gets the handle of one that is still running.
        Those of a thread's own default stream end with the thread.
        """
        stream = cupy.cuda.get_current_stream()
        if stream.is_capturing():
            return cupy.zeros(size, np.uint32)
        of_thread = stream.ptr == STREAM_PER_THREAD
        known = self._of_thread.__dict__.setdefault("counters", {}) if of_thread else self._counters
        key = (cupy.cuda.runtime.getDevice(), stream.ptr)
        _, found = known.get(key, (None, None))
        if found is None or found.size < size:
            if len(known) >= STREAMS:
                known.pop(next(iter(known.copy())), None)
            found = cupy.zeros(max(size, COUNTERS), np.uint32)
            known[key] = stream, found
        return found


def from_host(array: np.ndarray[Any, Any]) -> Array:
    """A NumPy array's values on the current device, in the same strides, at an address that its dtype allows."""
    low, high = np.lib.array_utils.byte_bounds(array)
    raw: Any = (ctypes.c_uint8 * max(high - low, 1)).from_address(low) if array.size else np.zeros(1, np.uint8)
    memory = cupy.asarray(np.frombuffer(raw, np.uint8))
    return cupy.ndarray(array.shape, array.dtype, memory.data + (array.ctypes.data - low), array.strides)


def _groups(spec: BatchNormSpec) -> int:
    return spec.groups if spec.batch_stats else 1


def _on_device(count: Any) -> bool:
    return isinstance(count, cupy.ndarray)


def _momentum(momentum: Any, device: int) -> tuple[Array | None, np.float64]:
    """The momentum, where the device finds it or by value."""
    if isinstance(momentum, float):
        return None, np.float64(momentum)
    if _on_device(momentum):
        check_device(device, "momentum", momentum.data.device_id)
    return cupy.asarray(momentum, np.float64), np.float64(0)
