"""The algorithm, once for all backends: statistics, running update, normalise; reduce, input gradient.

Arguments have been checked; a failure on the way (say, out of memory) leaves the running statistics as they were,
because they are written last.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gpu_bn.backends.protocol import Backend, Fused, Moments, Saved, Sums
from gpu_bn.spec import BatchNormSpec

Array = Any


class Grads(NamedTuple):
    """Gradients; those not asked for, or of arguments that were not given, are ``None``.

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
) -> tuple[Array, Saved]:
    """Normalise, update the running statistics, and return ``y`` and what the backward call needs.

    ``in_place`` allows ``out`` to be the input or the residual, which a backward call would read.
    """
    if out is not None:
        backend.check_out(out, x, residual, in_place)
    count = math.prod(x.shape) // max(x.shape[spec.axis], 1)
    if count and x.shape[spec.axis] and (fused := _fused(backend)):
        return fused.forward(x, spec, running_mean, running_var, weight, bias, residual, out)
    tracked = running_mean is not None and running_var is not None
    if spec.batch_stats:
        moments = backend.stats(x, spec.axis)
    else:
        moments = Moments(count, backend.vector(running_mean), backend.vector(running_var))
    saved = Saved(
        x=x,
        residual=None if spec.activation.is_identity else residual,
        moments=moments,
        weight=None if weight is None else backend.vector(weight),
        bias=None if bias is None else backend.vector(bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        has_residual=residual is not None,
        spec=spec,
    )
    y = backend.empty_like(x) if out is None else out
    if count:
        backend.normalize(saved, residual, y)
    if spec.batch_stats and tracked and count:
        backend.update_running(moments, running_mean, running_var, spec.momentum)
    return y, saved


def backward(backend: Backend, dy: Array, saved: Saved, need: frozenset[str]) -> Grads:
    """The gradients named in ``need``, which names only arguments that the forward call had."""
    activation, batch_stats = saved.spec.activation, saved.spec.batch_stats
    if math.prod(saved.x.shape) and (fused := _fused(backend)):
        return Grads(*fused.backward(dy, saved, need))
    dx = backend.empty_like(saved.x) if "dx" in need else None
    if math.prod(saved.x.shape) == 0:
        return _empty_grads(backend, saved, dx, need)
    dresidual = dz = None
    if "dresidual" in need:
        dresidual = backend.copy(dy, saved.x) if activation.is_identity else backend.empty_like(saved.x)
    exact = not activation.is_identity and backend.keeps_dz(saved)
    if not activation.is_identity:
        dz = dx if exact and dresidual is None else dresidual
    sums: Sums | None = None
    if need & {"dweight", "dbias"} or (dx is not None and batch_stats) or (dz is not None and dz is dresidual):
        sums = backend.backward_reduce(dy, saved, dz)
    if dx is not None:
        backend.backward_input(dy, saved, sums if batch_stats else None, dx, dz if exact and sums else None)
    return Grads(
        dx=dx,
        dweight=backend.cast(sums.dz_xhat, saved.weight_dtype) if sums and "dweight" in need else None,
        dbias=backend.cast(sums.dz, saved.bias_dtype) if sums and "dbias" in need else None,
        dresidual=dresidual,
    )


def _empty_grads(backend: Backend, saved: Saved, dx: Array | None, need: frozenset[str]) -> Grads:
    """The gradients of an empty batch: nothing for the inputs, zeros for the parameters."""
    zeros = abs(saved.moments.mean) < 0  # false in every channel, also where the mean is NaN
    return Grads(
        dx=dx,
        dweight=backend.cast(zeros, saved.weight_dtype) if "dweight" in need else None,
        dbias=backend.cast(zeros, saved.bias_dtype) if "dbias" in need else None,
        dresidual=backend.empty_like(saved.x) if "dresidual" in need else None,
    )


def _fused(backend: Any) -> Fused | None:
    return backend if hasattr(backend, "forward") else None
