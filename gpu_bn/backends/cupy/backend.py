"""Normalise CuPy arrays by CUDA C++ kernels (:mod:`gpu_bn.kernels`), which are compiled at first use.

A training call is one launch if its plan (:mod:`gpu_bn.plan`) keeps each channel on chip, or else two. Evaluation and
the gradients with frozen statistics are one launch. Kernels run on the current stream of the input's device. Nothing
waits for the device, so that calls can be captured in a CUDA graph. Saved statistics are float64, and sums are added up
in a fixed order.

The launches of a call are prepared once for all calls with its signature (:mod:`gpu_bn.backends.cupy.calls`).
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
from gpu_bn.backends.cupy.builder import check_device
from gpu_bn.backends.cupy.signatures import (
    Signature,
    VectorSignatures,
    input_signature,
    row_signature,
    tensor_signature,
    vector_signature,
)
from gpu_bn.backends.cupy.steps import NULL, Arguments, ClusterRefusedError, PreparedCall, empty, memory_shape
from gpu_bn.backends.cupy.sync import SharedStatistics
from gpu_bn.backends.layout import Layout, check_out
from gpu_bn.backends.protocol import BackendUnavailableError, Grads, Moments, OnPlan, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])
COUNTERS = 4096
"""The fewest counters that are allocated for a stream."""
STREAMS = 64
"""The most streams for which a backend keeps counters."""
STREAM_PER_THREAD = 2
"""The handle of the per-thread default stream of CUDA, the same in all threads."""
PREPARED = 1024
"""The most signatures whose prepared calls are kept, for each kind of call; the least recently used one is dropped."""


def backend() -> CupyBackend:
    """Return the backend, for :func:`gpu_bn.registry.load`.

    Raises:
        BackendUnavailableError: CuPy finds no driver or no GPU; the message names the remedy.
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


def _on_its_device(method: Method) -> Method:
    """Decorate a method to run on the device of its first argument."""

    @wraps(method)
    def run(self: CupyBackend, first: Any, *others: Any, **options: Any) -> Any:
        array = first.x if isinstance(first, Call | Saved) else first.mean if isinstance(first, Moments) else first
        device = array.data.device_id
        if device == cupy.cuda.runtime.getDevice():
            return method(self, first, *others, **options)
        with cupy.cuda.Device(device):
            return method(self, first, *others, **options)

    return cast(Method, run)


class SavedRows(Saved):
    """The saved values of a forward call of this backend, with the vectors as ``rows`` of one array.

    The vectors become separate arrays when they are first read: a backward call needs only their addresses.
    """

    __slots__ = ("count", "rows")

    count: Any
    rows: Array

    @staticmethod
    def with_fields(**fields: Any) -> SavedRows:
        """Return an object with these fields set, and no others."""
        saved = object.__new__(SavedRows)
        for name, value in fields.items():
            object.__setattr__(saved, name, value)
        return saved

    def __getattr__(self, name: str) -> Any:
        """Compute a field that has not been set."""
        if name == "rows":
            return None  # dataclasses.replace makes an object with vectors, and without rows
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


class CupyBackend(SharedStatistics):
    """Implement :class:`gpu_bn.backends.protocol.Backend` and ``FusedBackend`` by CUDA C++ kernels.

    Args:
        tier: the tier of :data:`gpu_bn.plan.TIERS` to use for training calls that it can serve.
        on_plan: is called with the plan of each prepared call.
    """

    name = "cupy"
    xp = cupy

    def __init__(self, tier: str | None = None, on_plan: OnPlan | None = None) -> None:
        self.tier = tier
        self._counters: dict[tuple[int, int], tuple[Any, Array]] = {}
        self._thread = local()

        def prepared(prepare: Callable[..., PreparedCall]) -> Any:
            def reporting(*signature: Any) -> PreparedCall:
                call = prepare(*signature)
                if on_plan is not None and call.plan is not None:
                    on_plan(call.plan, call.launches)
                return call

            return lru_cache(PREPARED)(reporting)

        self._forward, self._backward = prepared(calls.forward), prepared(calls.backward)
        self._stats, self._track = prepared(calls.stats), prepared(calls.track)
        self._normalize = prepared(calls.normalize)
        self._reduce, self._input = prepared(calls.backward_reduce), prepared(calls.backward_input)

    # ------------------------------------------------------------------------------------------ small things
    @_on_its_device
    def vector(self, array: Array) -> Array:
        return array.astype(np.float64)

    @_on_its_device
    def cast(self, vector: Array, dtype: Any) -> Array:
        return vector.astype(dtype)

    @_on_its_device
    def empty_like(self, x: Array) -> Array:
        layout = Layout.from_array(x, 0)
        return empty(*memory_shape(layout.shape, layout.order), dtype=x.dtype)

    @_on_its_device
    def copy(self, array: Array, like: Array) -> Array:
        y = self.empty_like(like)
        y[...] = array
        return y

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        check_out(out, x, residual, in_place)

    # -------------------------------------------------------------------------------------- one call, fused
    @_on_its_device
    def forward(self, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Array, Saved]:
        x, weight, bias, residual, running_mean, running_var, _, valid, out = call
        activation, groups = spec.activation, _groups(spec)
        momentum_at, momentum = _momentum(spec.momentum, x.data.device_id)
        arguments = Arguments(
            counters=self.counters, x=x, residual=residual, out=out, valid=valid, weight=weight, bias=bias,
            running_mean=running_mean, running_var=running_var, momentum_at=momentum_at, momentum=momentum,
            eps=np.float64(spec.eps), parameter=np.float64(activation.parameter),
        )  # fmt: skip
        signature = Signature(
            self.tier, input_signature(x), spec.axis, activation.name, groups, tensor_signature(valid),
            spec.batch_stats and valid is not None,
        )  # fmt: skip
        vectors = (
            vector_signature(weight), vector_signature(bias), vector_signature(running_mean),
            vector_signature(running_var),
        )  # fmt: skip
        prepared, (y, rows, sign_bits, counts) = self._run(
            self._forward, arguments, signature, spec.batch_stats, tensor_signature(residual), tensor_signature(out),
            vectors, keep or spec.batch_stats,
        )  # fmt: skip
        return y, SavedRows.with_fields(
            rows=rows,
            count=prepared.count if counts is None else counts,
            x=x,
            residual=residual if prepared.keeps_residual else None,
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            has_residual=residual is not None,
            spec=spec,
            mask=sign_bits,
            valid=valid,
            renorm=None,
        )

    @_on_its_device
    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
        arguments, signature, vectors = self._upstream(saved, dy=dy, sign_bits=saved.mask)
        _, gradients = self._run(
            self._backward, arguments, signature, saved.spec.batch_stats, tensor_signature(dy),
            tensor_signature(saved.residual), saved.mask is not None, vectors, need,
            (saved.weight_dtype, saved.bias_dtype),
        )  # fmt: skip
        return Grads(*gradients)

    def _run(self, prepare: Any, arguments: Arguments, *signature: Any) -> tuple[PreparedCall, list[Any]]:
        """Prepare a call, unless one with its signature has been prepared, run it, and return it with its results.

        If the device refuses a cluster, nothing has run: the call is prepared again, without clusters.
        """
        call = prepare(*signature)
        try:
            return call, call(arguments)
        except ClusterRefusedError:
            prepare.cache_clear()
            call = prepare(*signature)
            return call, call(arguments)

    # ------------------------------------------------------------------------------------------------ phases
    @_on_its_device
    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        rows = cupy.zeros((len(calls.SAVED), groups * x.shape[axis]), np.float64)
        if not x.size:
            return Moments(0 if valid is None else cupy.zeros(groups, np.float64), rows[0], rows[1])
        signature = Signature(
            self.tier, input_signature(x), axis, "identity", groups, tensor_signature(valid), valid is not None
        )
        call = self._stats(signature)
        (counts,) = call(Arguments(counters=self.counters, x=x, valid=valid, rows=rows, momentum=np.float64(0)))
        return Moments(call.count if counts is None else counts, rows[0], rows[1])

    @_on_its_device
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        mean, var, count = moments.mean, moments.var, moments.count
        counts = count if _on_device(count) else None
        channels = running_mean.size
        vectors = mean, var, running_mean, running_var
        call = self._track(
            mean.data.device_id, channels, mean.size // channels, count if counts is None else None,
            tuple(map(vector_signature, vectors)),
        )  # fmt: skip
        momentum_at, value = _momentum(momentum, mean.data.device_id)
        call(Arguments(
            mean=mean, var=var, running_mean=running_mean, running_var=running_var, momentum_at=momentum_at,
            momentum=value, counts=counts,
        ))  # fmt: skip

    @_on_its_device
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        arguments, signature, vectors = self._upstream(saved, out=out)
        call = self._normalize(signature, tensor_signature(residual), tensor_signature(out), vectors)
        call(arguments._replace(residual=residual))

    @_on_its_device
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        arguments, signature, vectors = self._upstream(saved, dy=dy, dresidual=dz)
        tensors = tensor_signature(dy), tensor_signature(saved.residual)
        (sums,) = self._reduce(signature, *tensors, vectors, tensor_signature(dz))(arguments)
        size = saved.moments.mean.size
        return Sums(*sums[: 2 * size].reshape(2, size))

    @_on_its_device
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array) -> None:
        stacked = None if sums is None else cupy.stack([sums.dz, sums.dz_xhat])
        arguments, signature, vectors = self._upstream(saved, dy=dy, dx=out, sums=stacked)
        tensors = tensor_signature(dy), tensor_signature(saved.residual)
        self._input(signature, *tensors, vectors, sums is not None, tensor_signature(out))(arguments)

    def _upstream(self, saved: Saved, **tensors: Any) -> tuple[Arguments, Signature, VectorSignatures]:
        """Return a later call's arguments, which include ``tensors``, its signature, and those of the saved vectors."""
        spec = saved.spec
        if not isinstance(saved, SavedRows) or saved.rows is None:
            count = saved.moments.count
            weight, bias, mean, var = saved.weight, saved.bias, saved.moments.mean, saved.moments.var
            vectors = tuple(map(vector_signature, (weight, bias, mean, var)))
        else:
            count, mean, size = saved.count, saved.rows.data, saved.rows.nbytes // len(calls.ROWS)
            has_weight, has_bias, var = saved.weight_dtype is not None, saved.bias_dtype is not None, mean + size
            weight, bias = mean + 2 * size if has_weight else None, mean + 3 * size if has_bias else None
            row = row_signature(mean.device_id)
            vectors = row if has_weight else None, row if has_bias else None, row, row
        counts = count if _on_device(count) else None
        arguments = Arguments(
            counters=self.counters, x=saved.x, residual=saved.residual, valid=saved.valid, counts=counts,
            weight=weight, bias=bias, mean=mean, var=var, eps=np.float64(spec.eps),
            parameter=np.float64(spec.activation.parameter),
            count=np.float64(count if counts is None else 0),  # kernels read counts instead if they are given
            **tensors,
        )  # fmt: skip
        signature = Signature(
            self.tier, input_signature(saved.x), spec.axis, spec.activation.name, _groups(spec),
            tensor_signature(saved.valid), counts is not None,
        )  # fmt: skip
        return arguments, signature, vectors

    # ---------------------------------------------------------------------------------------------- counters
    def counters(self, size: int) -> Array:
        """Return an array of at least ``size`` zeros, which kernels reset to zero. Each stream and graph has its own.

        Streams are kept with their counters, so that no new stream gets the handle of one that is still running. The
        counters of a per-thread default stream are freed with the thread.
        """
        stream = cupy.cuda.get_current_stream()
        if stream.is_capturing():
            return cupy.zeros(size, np.uint32)
        is_of_thread = stream.ptr == STREAM_PER_THREAD
        known = self._thread.__dict__.setdefault("counters", {}) if is_of_thread else self._counters
        key = (cupy.cuda.runtime.getDevice(), stream.ptr)
        _, found = known.get(key, (None, None))
        if found is None or found.size < size:
            if len(known) >= STREAMS:
                known.pop(next(iter(known.copy())), None)
            found = cupy.zeros(max(size, COUNTERS), np.uint32)
            known[key] = stream, found
        return found


def from_host(array: np.ndarray[Any, Any]) -> Array:
    """Copy a NumPy array to the current device, with the same strides and aligned for its dtype."""
    low, high = np.lib.array_utils.byte_bounds(array)
    raw: Any = (ctypes.c_uint8 * max(high - low, 1)).from_address(low) if array.size else np.zeros(1, np.uint8)
    memory = cupy.asarray(np.frombuffer(raw, np.uint8))
    return cupy.ndarray(array.shape, array.dtype, memory.data + (array.ctypes.data - low), array.strides)


def _groups(spec: BatchNormSpec) -> int:
    return spec.groups if spec.batch_stats else 1


def _on_device(count: Any) -> bool:
    return isinstance(count, cupy.ndarray)


def _momentum(momentum: Any, device: int) -> tuple[Array, np.float64]:
    """Return the momentum as an array on the device and 0, or as a null pointer and a number."""
    if isinstance(momentum, float):
        return NULL, np.float64(momentum)
    if _on_device(momentum):
        check_device(device, "momentum", momentum.data.device_id)
    return cupy.asarray(momentum, np.float64), np.float64(0)
