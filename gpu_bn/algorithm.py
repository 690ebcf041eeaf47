"""The algorithm for all backends. Forward: statistics, normalise, running update. Backward: sums, input gradient.

The arguments have been checked. The running statistics are written last, so a failure on the way (say, out of memory)
leaves them unchanged. On a CPU they are written in one call into C, during which no signal handler runs; on a GPU by
kernels, and Ctrl-C is delayed until these are launched.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np

from gpu_bn import aliasing
from gpu_bn.backends.protocol import Backend, FusedBackend, Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.interrupts import deferred
from gpu_bn.spec import BatchNormSpec, is_cupy, on_device_of

Array = Any


def forward(
    backend: Backend, call: Call, spec: BatchNormSpec, in_place: bool = False, keep: bool = True
) -> tuple[Array, Saved]:
    """Normalise, update the running statistics, and return ``y`` and what the backward call needs.

    ``in_place`` allows ``call.out`` to be the input or the residual, which a backward call would read. ``call.valid``
    comes from :func:`valid_positions`. ``keep`` is described at :class:`gpu_bn.backends.protocol.FusedBackend`.

    Raises:
        ValueError: an array that is written shares memory with another, or overlaps itself.
    """
    if call.valid is not None and hasattr(backend, "fuses_plain_calls_only") and bool(call.valid.all()):
        call = call._replace(valid=None)
    counter, writes = call.counter, spec.batch_stats
    if not aliasing.check_call(call, writes) and call.out is not None:
        backend.check_out(call.out, call.x, call.residual, in_place)
    written = [array for array in call[4:7] if array is not None and writes]
    if written and _on_host(call.x):
        mean, var, count = updated = [_copy(array) for array in call[4:7]]
        copied = Call(*call[:4], mean, var, count, call.valid, call.out)
        if count is not None:
            count[...] += 1
        result = _forward(backend, copied, spec, keep, copies=True)
        commit(written, [array for array in updated if array is not None])
        return result
    if counter is None or not writes:
        return _forward(backend, call, spec, keep)
    with on_device_of(counter):
        return increment_and_call(counter, lambda: _forward(backend, call, spec, keep))  # type: ignore[no-any-return]


def _on_host(array: Array) -> bool:
    return bool(getattr(array, "is_cpu", False)) or (isinstance(array, np.ndarray) and not is_cupy(array))


def _copy(array: Array | None) -> Any:
    return array if array is None else array.clone() if hasattr(array, "clone") else array.copy()


def increment_and_call(counter: Array, call: Callable[[], Any]) -> Any:
    """Increment a counter on a GPU and make a call whose kernels write the statistics last: both or neither.

    Ctrl-C is delayed until both are done. The increment is first, because it may fail; it is undone if the call raises.
    """
    with deferred():
        counter += 1
        try:
            return call()
        except BaseException:
            counter -= 1
            raise


def commit(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Write several arrays, all or none: one call into C does it, which no signal interrupts on a CPU."""
    tuple(map(operator.setitem, targets, repeat(...), values))


def _forward(
    backend: Backend, call: Call, spec: BatchNormSpec, keep: bool, copies: bool = False
) -> tuple[Array, Saved]:
    """Compute :func:`forward` on checked arguments.

    ``copies`` tells that the running statistics are copies already. If they are not and ``call.out`` is given, they are
    copied here, so that all memory is allocated before anything is written to ``out``.
    """
    x, running, plain = call.x, (call.running_mean, call.running_var), call.valid is None and spec.groups == 1
    updates = spec.batch_stats and running[0] is not None
    late = updates and not plain and call.out is not None and hasattr(backend, "updates_after_output")
    if spec.renorm is None and 0 not in x.shape and not late and (fused := _fused_backend(backend, plain)):
        return fused.forward(call, spec, keep)
    with on_device_of(x):
        count = math.prod(x.shape) // max(x.shape[spec.axis], 1)
        if spec.batch_stats:
            moments = backend.stats(x, spec.axis) if plain else backend.stats(x, spec.axis, call.valid, spec.groups)
        else:
            moments = Moments(count, *map(backend.vector, running))
        saved = save(backend, call, spec, moments)
        if spec.renorm is not None:
            saved = _renormalize_batch(backend, saved, *running)
        y = backend.empty_like(x) if call.out is None else call.out
        if not count:
            return y, saved
        early = updates and call.out is not None  # allocate before the old contents of the output are lost
        updated = running if copies or not early else (_copy(running[0]), _copy(running[1]))
        if early:
            backend.update_running(moments, *updated, spec.momentum)
        backend.normalize(saved, call.residual, y)
        if updates and not early:
            backend.update_running(moments, *running, spec.momentum)
        elif updated is not running:
            with deferred():
                commit(running, updated)
        return y, saved


def save(backend: Backend, call: Call, spec: BatchNormSpec, moments: Moments) -> Saved:
    """Collect what the backward call needs after a forward call with these statistics."""
    weight, bias = (None if one is None else backend.vector(one) for one in (call.weight, call.bias))
    return Saved.from_call(call, spec, moments, weight, bias)


def backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Return the gradients named in ``need``, all of arguments that the forward call had."""
    plain = saved.valid is None and saved.spec.groups == 1
    if saved.renorm is None and 0 not in saved.x.shape and (fused := _fused_backend(backend, plain)):
        return fused.backward(dy, saved, need)
    with on_device_of(dy):
        return (_backward if saved.renorm is None else _renormalized_backward)(backend, dy, saved, need)


def _backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Compute :func:`backward` phase by phase."""
    activation, batch_stats = saved.spec.activation, saved.spec.batch_stats
    dx = backend.empty_like(saved.x) if "dx" in need else None
    if math.prod(saved.x.shape) == 0:
        return _empty_grads(backend, saved, dx, need)
    dresidual = dz = None
    if "dresidual" in need:
        equals_dy = activation.is_identity and saved.valid is None
        dresidual = backend.copy(dy, saved.x) if equals_dy else backend.empty_like(saved.x)
        dz = None if equals_dy else dresidual
    sums: Sums | None = None
    if need & {"dweight", "dbias"} or (dx is not None and batch_stats) or dz is not None:
        sums = backend.backward_reduce(dy, saved, dz)
    if dx is not None:
        backend.backward_input(dy, saved, sums if batch_stats else None, dx)
    return Grads(
        dx=dx,
        dweight=backend.cast(_sum_groups(sums.dz_xhat, saved), saved.weight_dtype)
        if sums and "dweight" in need
        else None,
        dbias=backend.cast(_sum_groups(sums.dz, saved), saved.bias_dtype) if sums and "dbias" in need else None,
        dresidual=dresidual,
    )


def valid_positions(mask: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Return a checked mask as a contiguous bool array of the input's ``shape`` with one channel, on ``axis``."""
    with on_device_of(mask):
        if mask.ndim < len(shape):
            mask = mask[(slice(None),) * axis + (None,)]
        # Comparing a torch tensor with a number would first copy it to int64.
        valid = mask.logical_not().logical_not() if hasattr(mask, "logical_not") else mask != 0
        wanted = (*shape[:axis], 1, *shape[axis + 1 :])
        if hasattr(valid, "expand"):  # a torch tensor
            return valid.expand(wanted).contiguous()
        for i, size in enumerate(wanted):  # broadcast by a method, which needs no import of the library
            if valid.shape[i] != size:
                valid = valid.repeat(size, i)
        return valid if valid.flags.c_contiguous else valid.copy()


@np.errstate(all="ignore")
def _sum_groups(sums: Array, saved: Saved) -> Array:
    """Add up the sums of all ghost batches, (C,)."""
    groups = saved.spec.groups
    return sums if groups == 1 else sums.reshape((groups, -1)).sum(0)


def renormalize(saved: Saved, r: Array, d: Array) -> Saved:
    """Return a call that uses ``xhat * r + d`` instead of xhat, by a change of weight and bias."""
    weight, bias = (r, d) if saved.weight is None else (saved.weight * r, saved.weight * d)
    return replace(saved, weight=weight, bias=bias if saved.bias is None else bias + saved.bias, renorm=(r, d))


@np.errstate(all="ignore")
def _renormalize_batch(backend: Backend, saved: Saved, running_mean: Array, running_var: Array) -> Saved:
    """Renormalise a batch by the running statistics before their update."""
    assert saved.spec.renorm is not None
    r_max, d_max = saved.spec.renorm
    rstd = (backend.vector(running_var) + saved.spec.eps) ** -0.5
    r = (rstd / saved.rstd).clip(1 / r_max, r_max)
    d = ((saved.mean - backend.vector(running_mean)) * rstd).clip(-d_max, d_max)
    return renormalize(saved, r, d)


@np.errstate(all="ignore")
def _renormalized_backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Return the gradients for the original weight and bias; ``r`` and ``d`` are constants."""
    assert saved.renorm is not None
    r, d = saved.renorm
    plain = replace(saved, renorm=None, weight_dtype=r.dtype, bias_dtype=r.dtype)
    grads = backward(backend, dy, plain, need | {"dweight", "dbias"} if "dweight" in need else need)
    dweight, dbias = grads.dweight, grads.dbias
    if dweight is not None:
        dweight = backend.cast(r * dweight + d * dbias, saved.weight_dtype)
    dbias = backend.cast(dbias, saved.bias_dtype) if "dbias" in need else None
    return grads._replace(dweight=dweight, dbias=dbias)


def _empty_grads(backend: Backend, saved: Saved, dx: Array | None, need: frozenset[str]) -> Grads:
    """Return the gradients of an empty batch: empty for the inputs, zeros for the parameters."""
    mean = saved.moments.mean[: saved.x.shape[saved.spec.axis]]  # of one ghost batch
    zeros = abs(mean) < 0  # false in every channel, even where the mean is NaN
    return Grads(
        dx=dx,
        dweight=backend.cast(zeros, saved.weight_dtype) if "dweight" in need else None,
        dbias=backend.cast(zeros, saved.bias_dtype) if "dbias" in need else None,
        dresidual=backend.empty_like(saved.x) if "dresidual" in need else None,
    )


def _fused_backend(backend: Any, plain: bool) -> FusedBackend | None:
    """Return the backend if it fuses the phases of a call; a ``plain`` call has no mask and no ghost batches."""
    fuses = hasattr(backend, "forward") and (plain or not hasattr(backend, "fuses_plain_calls_only"))
    return backend if fuses else None
