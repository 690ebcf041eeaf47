"""Batch normalisation of CuPy arrays by CUDA C++ kernels (:mod:`gpu_bn.kernels`), compiled at first use.

A training call is one launch where a plan (:mod:`gpu_bn.plan`) can keep each channel on chip, else two; evaluation and
the gradients with frozen statistics are one. Kernels run on the current stream of the input's device; nothing waits for
the device, so that calls may be captured in a CUDA graph. Statistics are saved as float64, sums are in a fixed order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from math import prod
from threading import get_ident
from typing import Any, TypeVar, cast

import cupy
import numpy as np

from gpu_bn.activations import Activation
from gpu_bn.backends import _cuda
from gpu_bn.backends._layout import Layout
from gpu_bn.backends.protocol import BackendUnavailableError, Moments, Saved, Sums
from gpu_bn.plan import THREADS, VECTOR_BYTES, Device, LaunchPlan, Work, alignment, plan, plan_once
from gpu_bn.spec import MAX_RANK, BatchNormSpec, check_overlap, dtype_name

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])
NULL = np.intp(0)
OLDEST_ARCH = 70
COUNTERS = 4096
STREAM_PER_THREAD = 2
"""CUDA's name for a thread's own default stream: the same in all threads."""
NATURAL = tuple(range(MAX_RANK))


def backend() -> CupyBackend:
    """The backend, for :func:`gpu_bn.dispatch.load`.

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
        array = first.x if isinstance(first, Saved) else first.mean if isinstance(first, Moments) else first
        device = array.device.id
        if device == cupy.cuda.runtime.getDevice():
            return method(self, first, *others, **options)
        with cupy.cuda.Device(device):
            return method(self, first, *others, **options)

    return cast(Method, run)


class CupyBackend:
    """See :class:`gpu_bn.backends.protocol.Backend` and :class:`gpu_bn.backends.protocol.Fused`."""

    name = "cupy"
    xp = cupy

    def __init__(self, tier: str | None = None) -> None:
        """``tier`` forces a tier of :data:`gpu_bn.plan.TIERS` on training calls, for tests and benchmarks."""
        self.tier = tier
        self._counters: dict[tuple[int, int, int], Array] = {}

    # ------------------------------------------------------------------------------------------ small things
    @_where_it_is
    def vector(self, array: Array) -> Array:
        return array.astype(np.float64)

    @_where_it_is
    def cast(self, vector: Array, dtype: Any) -> Array:
        return vector.astype(dtype)

    @_where_it_is
    def empty_like(self, x: Array) -> Array:
        return _empty(Layout.of(x, 0), x.dtype)

    @_where_it_is
    def copy(self, array: Array, like: Array) -> Array:
        y = self.empty_like(like)
        y[...] = array
        return y

    def check_out(self, out: Array, x: Array, residual: Array | None, in_place: bool) -> None:
        for name, array in (("input", x), ("residual", residual)):
            if array is not None and cupy.shares_memory(out, array):
                check_overlap(name, (out.data.ptr, out.strides) == (array.data.ptr, array.strides), in_place)

    # -------------------------------------------------------------------------------------- one call, fused
    @_where_it_is
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
    ) -> tuple[Array, Saved]:
        call = _Call(
            self, x, spec.axis, spec.activation, residual=residual, out=out, valid=valid, groups=_groups(spec),
            counts=_new_counts(valid, _groups(spec)) if spec.batch_stats else None,
        )  # fmt: skip
        saves_residual = residual is not None and not spec.activation.is_identity
        mask = call.new_mask() if saves_residual and _cuda.switched(spec.activation.name) else None
        plans = call.plan(
            spec.batch_stats, lambda plan: call.forward_kernel(plan, mask), reads=1 + (residual is not None),
            mask=mask is not None,
        )  # fmt: skip
        scratch = call.scratch(plans, rows=4) if spec.batch_stats else cupy.empty(4 * call.layout.c, np.float64)
        saved = scratch[: 4 * call.statistics].reshape(4, call.statistics)
        call.forward(plans, spec, running_mean, running_var, weight, bias, mask, saved, scratch)
        return call.finish(), Saved(
            x=x,
            residual=residual if saves_residual and mask is None else None,
            moments=Moments(call.count, saved[0], saved[1]),
            weight=None if weight is None else saved[2, : call.layout.c],
            bias=None if bias is None else saved[3, : call.layout.c],
            weight_dtype=None if weight is None else weight.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            has_residual=residual is not None,
            spec=spec,
            mask=mask,
            valid=valid,
        )

    @_where_it_is
    def backward(self, dy: Array, saved: Saved, need: frozenset[str]) -> tuple[Array | None, ...]:
        full = saved.mask is not None  # which has a byte for each
        call = self._call(saved, dy=dy, residual=saved.residual, full_vectors=full)
        grads = {
            "dx": call.new() if "dx" in need else None,
            "dweight": cupy.empty(call.layout.c, saved.weight_dtype) if "dweight" in need else None,
            "dbias": cupy.empty(call.layout.c, saved.bias_dtype) if "dbias" in need else None,
            "dresidual": call.new() if "dresidual" in need else None,
        }
        call.backward(saved, **grads)
        return call.like_input(grads["dx"]), grads["dweight"], grads["dbias"], call.like_input(grads["dresidual"])

    def _call(self, saved: Saved, **tensors: Any) -> _Call:
        """A call with the options of a saved one."""
        spec, count = saved.spec, saved.moments.count
        counts = count if _on_device(count) else None
        return _Call(
            self, saved.x, spec.axis, spec.activation, valid=saved.valid, groups=_groups(spec), counts=counts, **tensors
        )

    # ------------------------------------------------------------------------------------------------ phases
    @_where_it_is
    def stats(self, x: Array, axis: int, valid: Array | None = None, groups: int = 1) -> Moments:
        layout = Layout.of(x, axis)
        saved = cupy.zeros((4, groups * layout.c), np.float64)
        if not x.size:
            return Moments(0 if valid is None else cupy.zeros(groups, np.float64), saved[0], saved[1])
        counts = _new_counts(valid, groups)
        call = _Call(self, x, axis, Activation("identity"), valid=valid, groups=groups, counts=counts)
        call.stats(call.once(), saved, call.scratch(call.once(), rows=0))
        return Moments(call.count, saved[0], saved[1])

    @_where_it_is
    def update_running(self, moments: Moments, running_mean: Array, running_var: Array, momentum: Any) -> None:
        if _on_device(moments.count) or moments.mean.size != running_mean.size:
            _track(moments.mean, moments.var, moments.count, running_mean, running_var, momentum)
            return
        bessel = moments.count / max(moments.count - 1, 1)
        running_mean[...] = (1 - momentum) * running_mean.astype(np.float64) + momentum * moments.mean
        running_var[...] = (1 - momentum) * running_var.astype(np.float64) + (momentum * bessel) * moments.var

    @_where_it_is
    def normalize(self, saved: Saved, residual: Array | None, out: Array) -> None:
        call = self._call(saved, residual=residual, out=out)
        call.normalize(call.once(), saved.spec, saved.moments.mean, saved.moments.var, saved.weight, saved.bias)
        call.finish()

    def keeps_dz(self, saved: Saved) -> bool:
        del saved
        return False

    @_where_it_is
    def backward_reduce(self, dy: Array, saved: Saved, dz: Array | None) -> Sums:
        call = self._call(saved, dy=dy, residual=saved.residual)
        once = call.once()
        scratch = call.scratch(once, rows=2)
        with call.writing(dz) as dresidual:
            call.backward_reduce(once, saved, scratch, dresidual=dresidual)
        return Sums(*scratch[: 2 * call.statistics].reshape(2, call.statistics))

    @_where_it_is
    def backward_input(self, dy: Array, saved: Saved, sums: Sums | None, out: Array, dz: Array | None) -> None:
        del dz
        call = self._call(saved, dy=dy, residual=saved.residual)
        both = None if sums is None else cupy.stack([sums.dz, sums.dz_xhat])
        with call.writing(out) as dx:
            call.backward_input(call.once(), saved, both, dx=dx)

    # ---------------------------------------------------------------------------------------------- counters
    def counters(self, size: int) -> Array:
        """Zeros, which a kernel leaves as it found them: one array a stream; a graph gets one of its own."""
        stream = cupy.cuda.get_current_stream()
        if stream.is_capturing():
            return cupy.zeros(size, np.uint32)
        thread = get_ident() if stream.ptr == STREAM_PER_THREAD else 0
        key = (cupy.cuda.runtime.getDevice(), stream.ptr, thread)
        found = self._counters.get(key)
        if found is None or found.size < size:
            found = self._counters[key] = cupy.zeros(max(size, COUNTERS), np.uint32)
        return found


def from_host(array: np.ndarray[Any, Any]) -> Array:
    """A NumPy array's values on the current device, in the same strides, at an address that its dtype allows."""
    low, high = np.lib.array_utils.byte_bounds(array)
    raw: Any = (ctypes.c_uint8 * max(high - low, 1)).from_address(low) if array.size else np.zeros(1, np.uint8)
    memory = cupy.asarray(np.frombuffer(raw, np.uint8))
    return cupy.ndarray(array.shape, array.dtype, memory.data + (array.ctypes.data - low), array.strides)


class _Call:
    """One direction of one call: its tensors as dense memory in the input's order, and its launches."""

    def __init__(
        self, owner: CupyBackend, x: Array, axis: int, activation: Activation, *,
        dy: Array | None = None, residual: Array | None = None, out: Array | None = None, full_vectors: bool = False,
        valid: Array | None = None, groups: int = 1, counts: Array | None = None,
    ) -> None:  # fmt: skip
        """``counts``: how many positions each group has, if the device alone knows."""
        self.owner = owner
        self.activation = activation
        self.given = self.layout = Layout.of(x, axis)
        if groups > 1 and not _leads(0, self.given):  # a group is one piece of memory
            self.layout = Layout.of_strides(x.shape, tuple(range(x.ndim, 0, -1)), axis)
        self.groups = groups
        self.valid = None if valid is None else self._dense_valid(valid)
        self.counts = counts
        grouped = groups > 1 or counts is not None
        self.batch = "MASKED_GROUPS" if valid is not None else "GROUPS" if grouped else _cuda.WHOLE
        self.dtype = dtype_name(x)
        self.x_dtype = x.dtype
        self.x, self.dy, self.residual = (self._dense(array) for array in (x, dy, residual))
        if full_vectors and self.dy is not None and self.dy.data.ptr % VECTOR_BYTES:
            self.dy = self._copy(self.dy)
        self.out = out
        if dy is None:
            self.y = out if out is not None and self._is_dense(out) else self.new()

    def new(self) -> Array:
        """An output tensor."""
        return _empty(self.layout, self.x_dtype)

    def new_mask(self) -> Array | None:
        """A bit mask for all elements, if they come in full vectors."""
        tiling = self.once().tiling
        full = tiling.vector * self.x_dtype.itemsize == VECTOR_BYTES
        return cupy.empty(prod(self.layout.shape) // tiling.vector, np.uint8) if full else None

    @property
    def count(self) -> Any:
        """Positions that a channel has in a group, as the statistics have it."""
        return self.layout.count // self.groups if self.counts is None else self.counts

    @property
    def statistics(self) -> int:
        return self.groups * self.layout.c

    def finish(self) -> Array:
        """The output, copied to where the caller wants it if that is not dense."""
        if self.out is None or self.out is self.y:
            return self.like_input(self.y)
        self.out[...] = self.y
        return self.out

    def like_input(self, array: Array | None) -> Array | None:
        """An output in the input's memory format, copied if groups are served in another."""
        if array is None or self.layout is self.given:
            return array
        like = _empty(self.given, self.x_dtype)
        like[...] = array
        return like

    @contextmanager
    def writing(self, out: Array | None) -> Iterator[Array | None]:
        """Memory for an output, which then is the array given."""
        if out is None or self._is_dense(out):
            yield out
        else:
            dense = self.new()
            yield dense
            out[...] = dense

    # ------------------------------------------------------------------------------------------------ plans
    def plan(self, train: bool, kernel: Callable[[LaunchPlan], str], **work: Any) -> LaunchPlan:
        """The plan; ``kernel`` names what an on-chip plan launches."""
        if not train:
            return self.once()
        wanted, device = self._work(**work), _device()
        found = plan(wanted, device, self.owner.tier if self.batch == _cuda.WHOLE else "split")
        if found.tier == "cooperative" and found.grid > device.sms * self._resident_blocks(kernel(found), found):
            return plan(wanted, device, "split")  # its blocks would wait for blocks that never start
        return found

    def _resident_blocks(self, name: str, plan: LaunchPlan) -> int:
        kernel = _compiled(self.activation.name, name, plan.shared_bytes, cupy.cuda.runtime.getDevice())
        return _resident_blocks(kernel, plan.shared_bytes)

    def once(self) -> LaunchPlan:
        """The plan of one pass over the tensors."""
        return plan_once(self._work(), _device())

    def _work(self, **more: Any) -> Work:
        tensors = (self.x, self.dy, self.residual, getattr(self, "y", None))
        addresses = [array.data.ptr for array in tensors if array is not None]
        layout = self.layout
        return Work(
            layout.n, layout.c, layout.s, self.x_dtype.itemsize, alignment=alignment(addresses),
            masked=self.valid is not None, groups=self.groups, **more,
        )  # fmt: skip

    def scratch(self, plan: LaunchPlan, rows: int) -> Array:
        """One block of float64: ``rows`` vectors of statistics, then the blocks' partial sums, counts and origins."""
        more = 0 if self.valid is None else plan.grid + plan.partials // 2
        return cupy.empty(rows * self.statistics + plan.partials + more, np.float64)

    # ---------------------------------------------------------------------------------------------- forward
    def forward(
        self, plan: LaunchPlan, spec: BatchNormSpec, running_mean: Array | None, running_var: Array | None,
        weight: Array | None, bias: Array | None, mask: Array | None, saved: Array, scratch: Array,
    ) -> None:  # fmt: skip
        """All launches of a forward call."""
        if not spec.batch_stats:
            self.normalize(plan, spec, running_mean, running_var, weight, bias, mask, saved)
        elif plan.tier == "split":
            self.stats(plan, saved, scratch[saved.size :], spec, running_mean, running_var, weight, bias)
            self.normalize(plan, spec, saved[0], saved[1], saved[2], saved[3], mask)
        else:
            code = _codes(weight, bias, running_mean, running_var)
            name = self.forward_kernel(plan, mask)
            momentum_at, momentum = _momentum(spec.momentum)
            arguments = [
                *_pointers(self.x, self.y, self.residual, mask, weight, bias, running_mean, running_var, momentum_at),
                *_pointers(saved, scratch[saved.size :], self._counters(plan)),
                code, *_geometry(plan), momentum, np.float64(spec.eps), self._parameter,
            ]  # fmt: skip
            self._launch(name, plan, arguments)

    def forward_kernel(self, plan: LaunchPlan, mask: Array | None) -> str:
        return self._on_chip("forward", plan, self.residual is not None, mask is not None)

    def stats(
        self, plan: LaunchPlan, saved: Array, partials: Array, spec: BatchNormSpec | None = None,
        running_mean: Array | None = None, running_var: Array | None = None,
        weight: Array | None = None, bias: Array | None = None,
    ) -> None:  # fmt: skip
        """Write ``saved``: mean, variance, weight, bias; and update the running statistics."""
        momentum_at, momentum = (None, np.float64(0)) if spec is None else _momentum(spec.momentum)
        running = (running_mean, running_var) if self.groups == 1 else (None, None)
        arguments = [
            *_pointers(self.x, weight, bias, *running, momentum_at),
            *_pointers(saved, partials, self._counters(plan)),
            _codes(weight, bias, *running), *_geometry(plan, self.groups), momentum, *self._selection,
        ]  # fmt: skip
        self._launch(self._kernel("bn_stats_kernel", plan), plan, arguments)
        if self.groups > 1 and spec is not None and running_mean is not None:
            _track(saved[0], saved[1], self.count, running_mean, running_var, spec.momentum)

    def normalize(
        self, plan: LaunchPlan, spec: BatchNormSpec, mean: Array, var: Array, weight: Array | None,
        bias: Array | None, mask: Array | None = None, saved: Array | None = None,
    ) -> None:  # fmt: skip
        """Write ``y`` from given statistics."""
        name = self._kernel("bn_normalize_kernel", plan, self.residual is not None, mask is not None)
        arguments = [
            *_pointers(self.x, self.y, self.residual, mask, weight, bias, mean, var, saved),
            _codes(weight, bias, mean, var), *_geometry(plan, self.groups), np.float64(spec.eps), self._parameter,
            *self._selection,
        ]  # fmt: skip
        self._launch(name, plan, arguments)

    # --------------------------------------------------------------------------------------------- backward
    def backward(
        self, saved: Saved, dx: Array | None, dweight: Array | None, dbias: Array | None, dresidual: Array | None
    ) -> None:
        """All launches of a backward call."""
        train = saved.spec.batch_stats and dx is not None
        reads = 2 + (saved.residual is not None)
        plan = self.plan(
            train, lambda plan: self._backward_kernel(plan, saved), backward=True, reads=reads, staged=reads,
            writes=1 + (dresidual is not None), mask=saved.mask is not None,
        )  # fmt: skip
        scratch = self.scratch(plan, rows=2)
        if train and plan.tier != "split":
            self._backward_resident(plan, saved, scratch, dx, dweight, dbias, dresidual)
        elif dweight is not None or dbias is not None or train:
            frozen_dx = None if train else dx
            self.backward_reduce(plan, saved, scratch, frozen_dx, dweight, dbias, dresidual)
            if train:
                self.backward_input(plan, saved, scratch[: 2 * self.statistics], dx)
        elif dx is not None:
            self.backward_input(plan, saved, None, dx, dresidual)
        else:
            self.backward_reduce(plan, saved, scratch, dresidual=dresidual)

    def _backward_resident(
        self, plan: LaunchPlan, saved: Saved, scratch: Array, dx: Array | None, dweight: Array | None,
        dbias: Array | None, dresidual: Array | None,
    ) -> None:  # fmt: skip
        arguments = [
            *self._upstream(saved, dx, dresidual), *_pointers(dweight, dbias),
            *_pointers(scratch[2 * self.layout.c :], self._counters(plan)), self._backward_codes(saved, dweight, dbias),
            *_geometry(plan), np.float64(saved.moments.count), np.float64(saved.spec.eps), self._parameter,
        ]  # fmt: skip
        self._launch(self._backward_kernel(plan, saved), plan, arguments)

    def _backward_kernel(self, plan: LaunchPlan, saved: Saved) -> str:
        return self._on_chip("backward", plan, self._from(saved))

    def backward_reduce(
        self, plan: LaunchPlan, saved: Saved, scratch: Array, dx: Array | None = None, dweight: Array | None = None,
        dbias: Array | None = None, dresidual: Array | None = None,
    ) -> None:  # fmt: skip
        """Write the sums of ``dz`` and ``dz * xhat`` to the start of ``scratch``; ``dx`` with frozen statistics."""
        partials = scratch[2 * self.statistics :]
        gradients = (dweight, dbias) if self.groups == 1 else (None, None)
        arguments = [
            *self._upstream(saved, dx, dresidual),
            *_pointers(*gradients, scratch, partials, self._counters(plan)), self._backward_codes(saved, *gradients),
            *_geometry(plan, self.groups), np.float64(saved.spec.eps), self._parameter, *self._selection,
        ]  # fmt: skip
        self._launch(self._kernel("bn_backward_reduce_kernel", plan, self._from(saved)), plan, arguments)
        if self.groups > 1 and (dweight is not None or dbias is not None):
            sizes = np.uint32(self.layout.c), np.uint32(self.groups)
            arguments = [*_pointers(scratch, dweight, dbias), _codes(dweight, dbias), *sizes]
            _launch_small("bn_add_groups_kernel", self.layout.c, arguments)

    def backward_input(
        self, plan: LaunchPlan, saved: Saved, sums: Array | None, dx: Array | None, dresidual: Array | None = None
    ) -> None:
        """Write ``dx`` from the sums, or without them for frozen statistics."""
        arguments = [
            *self._upstream(saved, dx, dresidual), *_pointers(sums), self._backward_codes(saved),
            *_geometry(plan, self.groups), np.float64(self._count_of(saved)), np.float64(saved.spec.eps),
            self._parameter, *self._selection,
        ]  # fmt: skip
        self._launch(self._kernel("bn_backward_input_kernel", plan, self._from(saved)), plan, arguments)

    def _count_of(self, saved: Saved) -> int:
        return 0 if self.counts is not None else saved.moments.count  # where there are counts, kernels look there

    def _upstream(self, saved: Saved, dx: Array | None, dresidual: Array | None) -> list[Any]:
        moments = saved.moments
        tensors = (self.x, self.dy, self.residual, saved.mask, dx, dresidual)
        return _pointers(*tensors, saved.weight, saved.bias, moments.mean, moments.var)

    def _from(self, saved: Saved) -> str:
        if self.activation.is_identity:
            return "DY"
        if saved.mask is not None:
            return "FROM_MASK"
        return "FROM_RESIDUAL" if saved.residual is not None else "FROM_X"

    def _backward_codes(self, saved: Saved, dweight: Array | None = None, dbias: Array | None = None) -> np.uint32:
        return _codes(saved.weight, saved.bias, saved.moments.mean, saved.moments.var, dweight, dbias)

    # --------------------------------------------------------------------------------------------- launching
    @property
    def _parameter(self) -> np.float64:
        return np.float64(self.activation.parameter)

    def _kernel(self, name: str, plan: LaunchPlan, *arguments: str | bool) -> str:
        return _kernel_name(name, self.dtype, plan.tiling, *arguments, batch=self.batch)

    def _on_chip(self, direction: str, plan: LaunchPlan, *arguments: str | bool) -> str:
        if plan.tier == "cluster":
            return self._kernel(f"bn_{direction}_cluster_kernel", plan, str(plan.blocks), *arguments)
        return self._kernel(f"bn_{direction}_kernel", plan, plan.tier.capitalize(), *arguments)

    @property
    def _selection(self) -> list[Any]:
        """The arguments that a kernel for groups has beyond another's."""
        return [] if self.batch == _cuda.WHOLE else _pointers(self.valid, self.counts)

    def _counters(self, plan: LaunchPlan) -> Array | None:
        return self.owner.counters(plan.counters) if plan.counters else None

    def _launch(self, name: str, plan: LaunchPlan, arguments: list[Any]) -> None:
        kernel = _compiled(self.activation.name, name, plan.shared_bytes, cupy.cuda.runtime.getDevice())
        if plan.tier == "cooperative":
            _launch_cooperative(kernel, plan, arguments)
        else:
            kernel((plan.grid,), (THREADS,), tuple(arguments), shared_mem=plan.shared_bytes)

    # ------------------------------------------------------------------------------------------------ memory
    def _is_dense(self, array: Array) -> bool:
        order = self.layout.order
        ordered = array if order == NATURAL[: len(order)] else array.transpose(order)
        return bool(ordered.flags.c_contiguous) and array.data.ptr % array.dtype.itemsize == 0

    def _dense(self, array: Array | None) -> Array | None:
        """An array as memory in the layout's order, copied unless it is that already."""
        return array if array is None or self._is_dense(array) else self._copy(array)

    def _copy(self, array: Array) -> Array:
        dense = self.new()
        dense[...] = array
        return dense

    def _dense_valid(self, valid: Array) -> Array:
        """A byte for each position, in the layout's order, at an address where a vector may begin."""
        ordered = valid.transpose(self.layout.order)
        if ordered.flags.c_contiguous and valid.data.ptr % VECTOR_BYTES == 0:
            return ordered
        dense = cupy.empty(ordered.shape, valid.dtype)
        dense[...] = ordered
        return dense


def _groups(spec: BatchNormSpec) -> int:
    return spec.groups if spec.batch_stats else 1


def _on_device(count: Any) -> bool:
    return isinstance(count, cupy.ndarray)


def _new_counts(valid: Array | None, groups: int) -> Array | None:
    """Where the statistics' launch writes how many positions of each group count, if it has to find that out."""
    return None if valid is None else cupy.empty(groups, np.float64)


def _leads(axis: int, layout: Layout) -> bool:
    """Whether an axis is the outermost in memory."""
    return prod(layout.shape[a] for a in layout.order[: layout.order.index(axis)]) == 1


def _empty(layout: Layout, dtype: Any) -> Array:
    dense = cupy.empty(tuple(layout.shape[axis] for axis in layout.order), dtype)
    return dense if layout.order == NATURAL[: len(layout.order)] else dense.transpose(_inverse(layout.order))


@cache
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))


def _pointers(*arrays: Array | None) -> list[Any]:
    return [NULL if array is None else array for array in arrays]


def _codes(*vectors: Array | None) -> np.uint32:
    return _codes_of(*[None if vector is None else dtype_name(vector) for vector in vectors])


@cache
def _codes_of(*dtypes: str | None) -> np.uint32:
    return np.uint32(_cuda.parameter_codes(*dtypes))


def _momentum(momentum: Any) -> tuple[Array | None, np.float64]:
    """The momentum, where the device finds it or by value."""
    if isinstance(momentum, float):
        return None, np.float64(momentum)
    return cupy.asarray(momentum, np.float64), np.float64(0)


def _track(mean: Array, var: Array, count: Any, running_mean: Array, running_var: Array, momentum: Any) -> None:
    """The running update of groups in order, or of a count that only the device knows."""
    channels, counted = running_mean.size, _on_device(count)
    momentum_at, value = _momentum(momentum)
    arguments = [
        *_pointers(mean, var, running_mean, running_var, momentum_at, count if counted else None),
        _codes(running_mean, running_var), np.uint32(channels), np.uint32(mean.size // channels),
        np.float64(0 if counted else count), value,
    ]  # fmt: skip
    _launch_small("bn_track_kernel", channels, arguments)


@lru_cache(4096)
def _geometry(plan: LaunchPlan, groups: int = 1) -> tuple[Any, ...]:
    tiling = plan.tiling
    inner = (tiling.c if tiling.columns else tiling.s) // tiling.vector
    return (
        np.uint32(tiling.c), np.uint32(inner), np.uint32(tiling.lanes), np.uint32(tiling.strips // groups),
        np.int64(tiling.positions), np.uint32(plan.share), np.uint32(plan.blocks), np.uint32(plan.groups),
    )  # fmt: skip


_kernel_name = lru_cache(4096)(_cuda.kernel)


def _device() -> Device:
    return _device_of(cupy.cuda.runtime.getDevice())


@cache
def _device_of(index: int) -> Device:
    found = cupy.cuda.runtime.getDeviceProperties(index)
    arch = 10 * found["major"] + found["minor"]
    name = found["name"].decode()
    if arch < OLDEST_ARCH:
        raise BackendUnavailableError(
            f"{name} is sm_{arch}, the kernels need sm_{OLDEST_ARCH} or newer; use NumPy arrays"
        )
    return Device(
        name, arch, found["multiProcessorCount"], found["sharedMemPerMultiprocessor"], found["sharedMemPerBlockOptin"],
        found["l2CacheSize"], _bandwidth(found),
    )  # fmt: skip


def _bandwidth(properties: dict[str, Any]) -> float:
    """Bytes per second; plans do not depend on it. CUDA 13 does not tell the clock any more."""
    clock, width = float(properties.get("memoryClockRate", 0) or 1e6), float(properties["memoryBusWidth"])  # kHz, bits
    return 2e3 * clock * width / 8


@lru_cache(4096)
def _compiled(activation: str, name: str, shared_bytes: int, device: int) -> Any:
    """A kernel, allowed to use a block's shared memory: the current device's, which is asked for each."""
    del device  # part of the key
    try:
        kernel = _module(activation, name).get_function(name)
    except Exception as error:  # NVRTC is missing, or does not know the GPU, or has complaints: CuPy has many types
        raise BackendUnavailableError(
            f"the kernel {name} could not be compiled ({type(error).__name__}): {error}\n"
            "If NVRTC is missing: pip install 'gpu_bn[cupy]'. If it does not know the GPU: update CuPy."
        ) from error
    if shared_bytes > 32 << 10:  # the kernel's, for plans of all sizes
        kernel.max_dynamic_shared_size_bytes = max(shared_bytes, kernel.max_dynamic_shared_size_bytes)
    return kernel


@cache
def _module(activation: str, name: str) -> Any:
    return cupy.RawModule(code=_cuda.source(activation), options=_cuda.OPTIONS, name_expressions=(name,))


@cache
def _resident_blocks(kernel: Any, shared_bytes: int) -> int:
    """Blocks of a kernel that an SM holds."""
    driver = cupy.cuda.driver
    blocks: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, THREADS, shared_bytes)
    return blocks


def _launch_small(name: str, channels: int, arguments: list[Any]) -> None:
    """Launch a kernel that has a thread for each channel."""
    kernel = _compiled("identity", f"{name}<double>", 0, cupy.cuda.runtime.getDevice())
    kernel((-(-channels // THREADS),), (THREADS,), tuple(arguments))


def _launch_cooperative(kernel: Any, plan: LaunchPlan, arguments: list[Any]) -> None:
    """Launch with all blocks co-resident. CuPy's own way to ask for that needs a CUDA toolkit to link with."""
    values = [np.uint64(a.data.ptr) if hasattr(a, "data") and hasattr(a.data, "ptr") else a for a in arguments]
    cells = [np.array(value) for value in values]
    table = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
    stream = cupy.cuda.get_current_stream().ptr
    cupy.cuda.driver.launchCooperativeKernel(
        kernel.kernel.ptr, plan.grid, 1, 1, THREADS, 1, 1, plan.shared_bytes, stream, ctypes.addressof(table)
    )
