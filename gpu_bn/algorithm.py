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
from typing import Any, NamedTuple

import numpy as np

from gpu_bn import aliasing
from gpu_bn.backends.protocol import Backend, Fused, Moments, Saved, Sums
from gpu_bn.interrupts import deferred
from gpu_bn.spec import BatchNormSpec, is_cupy, on_device_of

Array = Any


class Grads(NamedTuple):
    """Hold the gradients of one call; those not asked for, or of arguments that were not given, are ``None``.

    Attributes:
        dx: like the input.
        dweight: (C,), in the weight's dtype.
        dbias: (C,), in the bias's dtype.
        dresidual: like the input.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


def forward(
    backend: Backend,
    x: Array,
    spec: BatchNormSpec,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
    in_place: bool,
    valid: Array | None = None,
    keep: bool = True,
    counter: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalise, update the running statistics, and return ``y`` and what the backward call needs.

    ``in_place`` allows ``out`` to be the input or the residual, which a backward call would read; ``valid`` is what
    :func:`positions` makes of a mask; ``keep`` as in :class:`gpu_bn.backends.protocol.Fused`. ``counter`` is
    incremented when the statistics are written.

    Raises:
        ValueError: an array that is written shares memory with another, or two of its elements do.
    """
    if valid is not None and hasattr(backend, "fuses_plain_calls_only") and bool(valid.all()):
        valid = None
    state = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": counter}
    distinct = aliasing.check_written(
        {"out": out, **(state if spec.batch_stats else {})},
        {"input": x, "weight": weight, "bias": bias, "residual": residual, **({} if spec.batch_stats else state)},
    )
    if out is not None and not distinct:
        backend.check_out(out, x, residual, in_place)
    rest = weight, bias, residual, out, valid, keep
    written = [array for array in state.values() if array is not None and spec.batch_stats]
    if written and _on_host(x):
        moved = {name: _copy(array) for name, array in state.items()}
        result = _forward(backend, x, spec, moved["running_mean"], moved["running_var"], *rest, copies=True)
        if counter is not None:
            moved["num_batches_tracked"] += 1
        commit(written, [array for array in moved.values() if array is not None])
        return result
    if counter is None or not spec.batch_stats:
        return _forward(backend, x, spec, running_mean, running_var, *rest)
    with on_device_of(counter):
        result = counted(counter, lambda: _forward(backend, x, spec, running_mean, running_var, *rest))
        return result  # type: ignore[no-any-return]


def _on_host(array: Array) -> bool:
    return bool(getattr(array, "is_cpu", False)) or (isinstance(array, np.ndarray) and not is_cupy(array))


def _copy(array: Array | None) -> Any:
    return array if array is None else array.clone() if hasattr(array, "clone") else array.copy()


def counted(counter: Array, call: Callable[[], Any]) -> Any:
    """Make a call whose kernels write the statistics last, and increment a counter on a GPU: both, or neither.

    Ctrl-C waits until both are done. The counter is first, for it may refuse; a call that raises takes it back.
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
    backend: Backend,
    x: Array,
    spec: BatchNormSpec,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
    valid: Array | None,
    keep: bool,
    copies: bool = False,
) -> tuple[Array, Saved]:
    """:func:`forward` of arguments that may be written.

    ``copies``: the running statistics are copies, and are moved before anything is written to ``out``.
    """
    if spec.renorm is None and 0 not in x.shape and (fused := _fused(backend, valid is None and spec.groups == 1)):
        return fused.forward(x, spec, running_mean, running_var, weight, bias, residual, out, valid, keep)
    with on_device_of(x):
        count = math.prod(x.shape) // max(x.shape[spec.axis], 1)
        tracked = running_mean is not None and running_var is not None
        if spec.batch_stats:
            plain = valid is None and spec.groups == 1
            moments = backend.stats(x, spec.axis) if plain else backend.stats(x, spec.axis, valid, spec.groups)
        else:
            moments = Moments(count, backend.vector(running_mean), backend.vector(running_var))
        saved = kept(backend, x, spec, moments, weight, bias, residual, valid)
        if spec.renorm is not None:
            saved = _renormalized(backend, saved, running_mean, running_var)
        y = backend.empty_like(x) if out is None else out
        updates = spec.batch_stats and tracked and count > 0
        if updates and copies:
            backend.update_running(moments, running_mean, running_var, spec.momentum)
        if count:
            backend.normalize(saved, residual, y)
        if updates and not copies:
            backend.update_running(moments, running_mean, running_var, spec.momentum)
        return y, saved


def kept(
    backend: Backend,
    x: Array,
    spec: BatchNormSpec,
    moments: Moments,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    valid: Array | None,
) -> Saved:
    """What a call with these arguments and statistics keeps."""
    return Saved(
        x=x,
        residual=None if spec.activation.is_identity else residual,
        moments=moments,
        weight=None if weight is None else backend.vector(weight),
        bias=None if bias is None else backend.vector(bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        has_residual=residual is not None,
        spec=spec,
        valid=valid,
    )


def backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """The gradients named in ``need``, which names only arguments that the forward call had."""
    plain = saved.valid is None and saved.spec.groups == 1
    if saved.renorm is None and 0 not in saved.x.shape and (fused := _fused(backend, plain)):
        return Grads(*fused.backward(dy, saved, need))
    with on_device_of(dy):
        return (_backward if saved.renorm is None else _renormalized_backward)(backend, dy, saved, need)


def _backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """:func:`backward`, phase after phase."""
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


def positions(mask: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A checked mask as backends take it: bool, dense, of the input's ``shape`` but one channel along ``axis``."""
    with on_device_of(mask):
        if mask.ndim < len(shape):
            mask = mask[(slice(None),) * axis + (None,)]
        # Of a tensor, a comparison with a number would first copy it to eight bytes an element.
        valid = mask.logical_not().logical_not() if hasattr(mask, "logical_not") else mask != 0
        wanted = (*shape[:axis], 1, *shape[axis + 1 :])
        if hasattr(valid, "expand"):  # a tensor's broadcast is a method, an array's would need its library
            return valid.expand(wanted).contiguous()
        for at, size in enumerate(wanted):
            if valid.shape[at] != size:
                valid = valid.repeat(size, at)
        return valid if valid.flags.c_contiguous else valid.copy()


def _total(sums: Array, saved: Saved) -> Array:
    """The sums of all ghost batches, (C,)."""
    groups = saved.spec.groups
    return sums if groups == 1 else sums.reshape((groups, -1)).sum(0)


def renormalized(saved: Saved, r: Array, d: Array) -> Saved:
    """The call with xhat * r + d in the place of xhat, which a change of weight and bias brings about."""
    weight, bias = (r, d) if saved.weight is None else (saved.weight * r, saved.weight * d)
    return replace(saved, weight=weight, bias=bias if saved.bias is None else bias + saved.bias, renorm=(r, d))


def _renormalized(backend: Backend, saved: Saved, running_mean: Array, running_var: Array) -> Saved:
    """Batch renormalisation with the running statistics as they are before the call."""
    assert saved.spec.renorm is not None
    r_max, d_max = saved.spec.renorm
    rstd = (backend.vector(running_var) + saved.spec.eps) ** -0.5
    r = (rstd / saved.rstd).clip(1 / r_max, r_max)
    d = ((saved.mean - backend.vector(running_mean)) * rstd).clip(-d_max, d_max)
    return renormalized(saved, r, d)


def _renormalized_backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """The gradients by the original weight and bias; ``r`` and ``d`` are constants."""
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
    """The gradients of an empty batch: nothing for the inputs, zeros for the parameters."""
    mean = saved.moments.mean[: saved.x.shape[saved.spec.axis]]  # of one ghost batch
    zeros = abs(mean) < 0  # false in every channel, also where the mean is NaN
    return Grads(
        dx=dx,
        dweight=backend.cast(zeros, saved.weight_dtype) if "dweight" in need else None,
        dbias=backend.cast(zeros, saved.bias_dtype) if "dbias" in need else None,
        dresidual=backend.empty_like(saved.x) if "dresidual" in need else None,
    )


def _fused(backend: Any, plain: bool) -> Fused | None:
    """The backend if it fuses such a call, which is plain without a mask and ghost batches."""
    return (
        backend if hasattr(backend, "forward") and (plain or not hasattr(backend, "fuses_plain_calls_only")) else None
    )
