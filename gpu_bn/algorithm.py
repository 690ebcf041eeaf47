"""The algorithm, once for all backends: statistics, running update, normalise; reduce, input gradient.

Arguments have been checked; a failure on the way (say, out of memory) leaves the running statistics as they were,
because they are written last: on a CPU in one call, between whose ends no signal handler runs, on a GPU by kernels
whose launches Ctrl-C waits for.
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

    ``in_place`` allows ``call.out`` to be the input or the residual, which a backward call would read; ``call.valid``
    is what :func:`valid_positions` makes of a mask; ``keep`` as in :class:`gpu_bn.backends.protocol.FusedBackend`.

    Raises:
        ValueError: an array that is written shares memory with another, or two of its elements do.
    """
    if call.valid is not None and hasattr(backend, "fuses_plain_calls_only") and bool(call.valid.all()):
        call = call._replace(valid=None)
    counter, writes = call.counter, spec.batch_stats
    if not aliasing.check_call(call, writes) and call.out is not None:
        backend.check_out(call.out, call.x, call.residual, in_place)
    written = [array for array in call[4:7] if array is not None and writes]
    if written and _on_host(call.x):
        mean, var, count = moved = [_copy(array) for array in call[4:7]]
        copied = Call(*call[:4], mean, var, count, call.valid, call.out)
        if count is not None:
            count[...] += 1
        result = _forward(backend, copied, spec, keep, copies=True)
        commit(written, [array for array in moved if array is not None])
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
    """Make a call whose kernels write the statistics last, and increment a counter on a GPU: both, or neither.

    Ctrl-C waits until both are done. The counter is first, because it may refuse; a call that raises takes it back.
    """
    with deferred():
        counter += 1
        try:
            return call()
        except BaseException:
            counter -= 1
            raise


def commit(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Write several arrays, all or none: in one call into C, which no signal interrupts on a CPU."""
    tuple(map(operator.setitem, targets, repeat(...), values))


def _forward(
    backend: Backend, call: Call, spec: BatchNormSpec, keep: bool, copies: bool = False
) -> tuple[Array, Saved]:
    """Do the work of :func:`forward`, on arguments that may be written.

    ``copies``: the running statistics are copies already; otherwise those of a call with ``out`` are copied here, so
    that all memory is there before anything is written to ``out``.
    """
    x, running, plain = call.x, (call.running_mean, call.running_var), call.valid is None and spec.groups == 1
    updates = spec.batch_stats and running[0] is not None
    late = updates and not plain and call.out is not None and hasattr(backend, "updates_after_output")
    if spec.renorm is None and 0 not in x.shape and not late and (fused := _fused(backend, plain)):
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
        early = updates and call.out is not None  # its memory must be there before the output's old contents are lost
        moved = running if copies or not early else (_copy(running[0]), _copy(running[1]))
        if early:
            backend.update_running(moments, *moved, spec.momentum)
        backend.normalize(saved, call.residual, y)
        if updates and not early:
            backend.update_running(moments, *running, spec.momentum)
        elif moved is not running:
            with deferred():
                commit(running, moved)
        return y, saved


def save(backend: Backend, call: Call, spec: BatchNormSpec, moments: Moments) -> Saved:
    """Collect what the backward call of a call with these statistics needs."""
    weight, bias = (None if one is None else backend.vector(one) for one in (call.weight, call.bias))
    return Saved.from_call(call, spec, moments, weight, bias)


def backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Return the gradients named in ``need``, which names only arguments that the forward call had."""
    plain = saved.valid is None and saved.spec.groups == 1
    if saved.renorm is None and 0 not in saved.x.shape and (fused := _fused(backend, plain)):
        return fused.backward(dy, saved, need)
    with on_device_of(dy):
        return (_backward if saved.renorm is None else _renormalized_backward)(backend, dy, saved, need)


def _backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Do the work of :func:`backward`, phase after phase."""
    activation, batch_stats = saved.spec.activation, saved.spec.batch_stats
    dx = backend.empty_like(saved.x) if "dx" in need else None
    if math.prod(saved.x.shape) == 0:
        return _empty_grads(backend, saved, dx, need)
    dresidual = dz = None
    if "dresidual" in need:
        same = activation.is_identity and saved.valid is None
        dresidual = backend.copy(dy, saved.x) if same else backend.empty_like(saved.x)
        dz = None if same else dresidual
    sums: Sums | None = None
    if need & {"dweight", "dbias"} or (dx is not None and batch_stats) or dz is not None:
        sums = backend.backward_reduce(dy, saved, dz)
    if dx is not None:
        backend.backward_input(dy, saved, sums if batch_stats else None, dx)
    return Grads(
        dx=dx,
        dweight=backend.cast(_total(sums.dz_xhat, saved), saved.weight_dtype) if sums and "dweight" in need else None,
        dbias=backend.cast(_total(sums.dz, saved), saved.bias_dtype) if sums and "dbias" in need else None,
        dresidual=dresidual,
    )


def valid_positions(mask: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Return a checked mask as backends take it: bool, dense, of the input's ``shape`` but one channel on ``axis``."""
    with on_device_of(mask):
        if mask.ndim < len(shape):
            mask = mask[(slice(None),) * axis + (None,)]
        # Comparing a torch tensor with a number would first copy it to eight bytes an element.
        valid = mask.logical_not().logical_not() if hasattr(mask, "logical_not") else mask != 0
        wanted = (*shape[:axis], 1, *shape[axis + 1 :])
        if hasattr(valid, "expand"):  # a tensor's broadcast is a method, an array's would need its library
            return valid.expand(wanted).contiguous()
        for at, size in enumerate(wanted):
            if valid.shape[at] != size:
                valid = valid.repeat(size, at)
        return valid if valid.flags.c_contiguous else valid.copy()


@np.errstate(all="ignore")
def _total(sums: Array, saved: Saved) -> Array:
    """Add up the sums of all ghost batches, (C,)."""
    groups = saved.spec.groups
    return sums if groups == 1 else sums.reshape((groups, -1)).sum(0)


def renormalize(saved: Saved, r: Array, d: Array) -> Saved:
    """Return the call with ``xhat * r + d`` in the place of xhat, by a change of weight and bias."""
    weight, bias = (r, d) if saved.weight is None else (saved.weight * r, saved.weight * d)
    return replace(saved, weight=weight, bias=bias if saved.bias is None else bias + saved.bias, renorm=(r, d))


@np.errstate(all="ignore")
def _renormalize_batch(backend: Backend, saved: Saved, running_mean: Array, running_var: Array) -> Saved:
    """Renormalise a batch by the running statistics as they are before the call."""
    assert saved.spec.renorm is not None
    r_max, d_max = saved.spec.renorm
    rstd = (backend.vector(running_var) + saved.spec.eps) ** -0.5
    r = (rstd / saved.rstd).clip(1 / r_max, r_max)
    d = ((saved.mean - backend.vector(running_mean)) * rstd).clip(-d_max, d_max)
    return renormalize(saved, r, d)


@np.errstate(all="ignore")
def _renormalized_backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """Return the gradients by the original weight and bias; ``r`` and ``d`` are constants."""
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
    """Return the gradients of an empty batch: nothing for the inputs, zeros for the parameters."""
    mean = saved.moments.mean[: saved.x.shape[saved.spec.axis]]  # of one ghost batch
    zeros = abs(mean) < 0  # false in every channel, also where the mean is NaN
    return Grads(
        dx=dx,
        dweight=backend.cast(zeros, saved.weight_dtype) if "dweight" in need else None,
        dbias=backend.cast(zeros, saved.bias_dtype) if "dbias" in need else None,
        dresidual=backend.empty_like(saved.x) if "dresidual" in need else None,
    )


def _fused(backend: Any, plain: bool) -> FusedBackend | None:
    """Return the backend if it fuses such a call; a plain call has no mask and no ghost batches."""
    return (
        backend if hasattr(backend, "forward") and (plain or not hasattr(backend, "fuses_plain_calls_only")) else None
    )
