"""The front door: batch normalisation of arrays, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from gpu_bn import algorithm, aliasing, registry, spec
from gpu_bn.activations import Activation
from gpu_bn.algorithm import Grads
from gpu_bn.backends.protocol import Backend, Saved
from gpu_bn.spec import BatchNormSpec

Array = Any


def batch_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: Activation | str | None = None,
    channel_axis: int = 1,
    backend: Backend | str | None = None,
    out: Array | None = None,
    mask: Array | None = None,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
) -> Array:
    """Normalise each channel and apply an activation, ``activation(weight * (x - mean) * rstd + bias + residual)``.

    Here ``rstd = 1 / sqrt(var + eps)``. The transform is that of Ioffe & Szegedy 2015 (Alg. 1 in training, Alg. 2
    otherwise); :mod:`gpu_bn.spec` has the equations. The arguments up to ``eps`` are those of
    ``torch.nn.functional.batch_norm``.

    A *position* is one place in the batch and in all axes but the channel axis; a channel has one element at each.

    Args:
        x: 2-D to 5-D, with C channels along ``channel_axis``; float16, bfloat16, float32 or float64; any strides.
        running_mean: (C,), any of these dtypes; updated in place in training. In training it may be absent together
            with ``running_var``; otherwise the two are the statistics used.
        running_var: (C,), as ``running_mean``.
        weight: (C,), any of these dtypes; absent, it is 1.
        bias: (C,), any of these dtypes; absent, it is 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the batch in the running update, usually between 0 and 1; or a 0-d array of ``x``'s
            library that holds it, which is not read on the host.
        eps: added to the variance, in its units; positive in training.
        residual: added before the activation; like ``x``.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` (the
            erf form), ``"gelu_tanh"``, ``"hardswish"``, ``"sigmoid"`` or ``"tanh"``; or an ``Activation`` with its
            parameter, as :func:`leaky_relu` and :func:`elu` make it. ``None`` is the identity.
        channel_axis: the axis of the channels; a negative one counts from the end.
        backend: a backend's name, or ``None`` for the one that serves ``x``.
        out: the array to write the result to; like ``x``; ``x`` or ``residual`` itself is allowed.
        mask: which positions count, bool or uint8; of ``x``'s rank with one channel, or without the channel axis; other
            extents are ``x``'s or 1. The rest, whatever ``x`` holds there, is left out of all statistics and sums;
            ``y`` and its gradients are 0 there.
        virtual_batch_size: how many samples (axis 0) are normalised together in training, a *ghost batch*; it divides
            the batch. The result, gradients and running statistics are those of one call for each ghost batch, in
            order (Hoffer et al. 2017, Alg. 1).
        renorm: ``(r_max, d_max)`` of batch renormalisation (Ioffe 2017). In training, statistics are pulled towards the
            running ones, up to a factor ``r_max`` and ``d_max`` standard deviations; ``(1, 0)`` changes nothing.

    Returns:
        ``y``, with ``x``'s shape, dtype and memory format.

    Raises:
        TypeError: not an array, arrays of several libraries, a dtype that is none of the above, or a ``residual`` or
            ``out`` of another dtype than ``x``.
        ValueError: a shape, length or option that does not fit; missing running statistics; one value per channel in
            training (of a ghost batch); ``renorm`` without running statistics or with ghost batches; an array that is
            written (``out``, and in training the running statistics) and shares memory with another of the call, or
            two of whose elements do, but for ``out`` that is ``x`` or ``residual`` itself.
        BackendUnavailableError: the backend is not available; the message says why.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> gpu_bn.batch_norm(x, training=True).round(3)
        array([[-1., -1.],
               [ 1.,  1.]])
        >>> gpu_bn.batch_norm(x, training=True, activation="relu").round(3)
        array([[0., 0.],
               [1., 1.]])

    A call that raises has changed nothing, with one exception: when an interrupt (Ctrl-C) arrives while ``out`` is
    being written, part of ``out`` is new, which is lost input where ``out`` is ``x`` or ``residual``. Where memory runs
    out on a CPU meanwhile, the call goes on with smaller blocks. Running statistics are written last, together:
    NumPy's are all old or all new, whatever interrupts.

    For torch tensors the call is differentiable, and :func:`gpu_bn.nn.batch_norm` has the same arguments and torch's
    errors. For other arrays, :func:`batch_norm_forward` and :func:`batch_norm_backward` are the two halves.
    """
    front = registry.differentiable(x, backend)
    if front is not None:
        y: Array = front.front_door(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            channel_axis=channel_axis,
            backend=backend,
            out=out,
            mask=mask,
            virtual_batch_size=virtual_batch_size,
            renorm=renorm,
        )
        return y
    return _forward(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
        channel_axis,
        backend,
        out,
        mask,
        virtual_batch_size,
        renorm,
        in_place=True,
    )[0]


def batch_norm_forward(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: Activation | str | None = None,
    channel_axis: int = 1,
    backend: Backend | str | None = None,
    out: Array | None = None,
    mask: Array | None = None,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
) -> tuple[Array, Saved]:
    """Do what :func:`batch_norm` does, and return also what :func:`batch_norm_backward` needs.

    Args:
        x: as in :func:`batch_norm`, like all other arguments: 2-D to 5-D, C channels along ``channel_axis``; float16,
            bfloat16, float32 or float64.
        running_mean: (C,); updated in place in training.
        running_var: (C,); updated in place in training.
        weight: (C,); absent, it is 1.
        bias: (C,); absent, it is 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the batch in the running update.
        eps: added to the variance; positive in training.
        residual: added before the activation; like ``x``.
        activation: a name or an ``Activation``; :func:`batch_norm` lists the names.
        channel_axis: the axis of the channels.
        backend: a backend's name, or ``None`` for the one that serves ``x``.
        out: the array to write the result to; like ``x``. It may not share memory with ``x`` or ``residual`` here.
        mask: which positions count, bool or uint8.
        virtual_batch_size: how many samples are normalised together in training.
        renorm: ``(r_max, d_max)`` of batch renormalisation.

    Returns:
        ``(y, saved)``. ``y`` is like ``x``. ``saved`` refers to ``x``, and to ``residual`` if an activation follows it:
        do not write to them before the backward call.

    Raises:
        TypeError: as :func:`batch_norm`; nothing has changed.
        ValueError: as :func:`batch_norm`; nothing has changed.
        BackendUnavailableError: the backend is not available; the message says why.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> mean, var = np.zeros(2), np.ones(2)
        >>> y, saved = gpu_bn.batch_norm_forward(x, mean, var, training=True)
        >>> mean  # a tenth of the way to the batch's mean
        array([0.2, 2. ])

    Source: Ioffe & Szegedy 2015, Alg. 1; :mod:`gpu_bn.spec` has the equations.
    """
    return forward_counting(
        None, x, running_mean, running_var, weight, bias, training, momentum, eps, residual=residual,
        activation=activation, channel_axis=channel_axis, backend=backend, out=out, mask=mask,
        virtual_batch_size=virtual_batch_size, renorm=renorm,
    )  # fmt: skip


def forward_counting(
    counter: Array | None,
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    residual: Array | None,
    activation: Activation | str | None,
    channel_axis: int,
    backend: Backend | str | None,
    mask: Array | None,
    virtual_batch_size: int | None,
    renorm: tuple[float, float] | None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """:func:`batch_norm_forward`, and a counter of batches that is incremented when the statistics are written."""
    return _forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, channel_axis,
        backend, out, mask, virtual_batch_size, renorm, in_place=False, counter=counter,
    )  # fmt: skip


def batch_norm_backward(
    dy: Array, saved: Saved, *, need: Iterable[str] | None = None, backend: Backend | str | None = None
) -> Grads:
    """Compute the gradients of a :func:`batch_norm_forward` call.

    Args:
        dy: the gradient of ``y``; of ``x``'s shape, dtype and library.
        saved: what the forward call returned.
        need: which gradients to compute, some of ``"dx"``, ``"dweight"``, ``"dbias"`` and ``"dresidual"``; ``None``
            means all those of arguments that the forward call had. The others cost nothing.
        backend: as in the forward call.

    Returns:
        ``Grads(dx, dweight, dbias, dresidual)``. ``dx`` and ``dresidual`` are like ``x``; ``dweight`` and ``dbias`` are
        (C,) in the dtype of the parameter; what was not asked for is ``None``.

    Raises:
        TypeError: ``dy`` is not an array of ``x``'s library and dtype, or ``saved`` did not come from a forward call.
        ValueError: ``dy`` is not of ``x``'s shape, or a name in ``need`` is unknown or of an argument that the forward
            call did not have.

    Examples:
        >>> import numpy as np, gpu_bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, 20.0]])
        >>> y, saved = gpu_bn.batch_norm_forward(x, None, None, np.ones(2), np.zeros(2), training=True)
        >>> grads = gpu_bn.batch_norm_backward(np.ones_like(y), saved)
        >>> grads.dbias
        array([3., 3.])
        >>> bool(abs(grads.dx).max() < 1e-12)  # y does not change when all of x moves
        True

    Source: Ioffe & Szegedy 2015, section 3; :mod:`gpu_bn.spec` has the equations.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved should be what batch_norm_forward returned, got {type(saved).__name__}")
    try:
        if need is not None:
            need = frozenset([need] if isinstance(need, str) else need)
        parameters = saved.weight_dtype is None, saved.bias_dtype is None, saved.has_residual
        key: Any = (_named(backend), _kind(dy), _kind(saved.x), parameters, need)
        known = _BACKWARDS.get(key)
    except (AttributeError, TypeError):  # the checks say what is wrong
        key = known = None
    if known is not None:
        row, wanted = known
        return algorithm.backward(registry.loaded(backend, row), dy, saved, wanted)
    row = registry.row_of(backend, dy=dy, input=saved.x)
    engine = registry.loaded(backend, row)
    spec.check_like("dy", dy, saved.x)
    wanted = _check_need(need, saved)
    if key is not None and registry.told_by_type(dy) and _lasts(backend, [dy, saved.x]):
        _remember(_BACKWARDS, key, (row, wanted))
    return algorithm.backward(engine, dy, saved, wanted)


def _check_need(need: Iterable[str] | None, saved: Saved) -> frozenset[str]:
    """The gradients to compute; ``need`` is a set if it is anything."""
    available = {
        "dx": True,
        "dweight": saved.weight_dtype is not None,
        "dbias": saved.bias_dtype is not None,
        "dresidual": saved.has_residual,
    }
    if need is None:
        return frozenset(name for name, there in available.items() if there)
    need = frozenset(need)
    for name in need:
        if name not in available:
            raise ValueError(f"unknown gradient {name!r}, expected some of {', '.join(available)}")
        if not available[name]:
            raise ValueError(f"{name} was asked for, but the forward call had no {name[1:]}")
    return need


def _forward(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Array | None,
    activation: Activation | str | None,
    channel_axis: int,
    backend: Backend | str | None,
    out: Array | None,
    mask: Array | None,
    virtual_batch_size: int | None,
    renorm: tuple[float, float] | None,
    in_place: bool,
    counter: Array | None = None,
) -> tuple[Array, Saved]:
    try:
        key: Any = (
            _named(backend), _kind(x), _kind(running_mean), _kind(running_var), _kind(weight), _kind(bias),
            _kind(residual), _kind(out), _kind(mask), bool(training), eps, activation, channel_axis,
            virtual_batch_size, renorm, type(eps), type(channel_axis), type(virtual_batch_size), type(momentum),
            None if type(momentum) is float else _kind(momentum) if hasattr(momentum, "dtype") else (),
        )  # fmt: skip
        known = _FORWARDS.get(key)
    except (AttributeError, TypeError):  # not an array, or nothing to look up: the checks say what is wrong
        key = known = None
    if known is None or (type(momentum) is float and not math.isfinite(momentum)):
        engine, options = _checked(
            key, x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
            channel_axis, backend, out, mask, virtual_batch_size, renorm,
        )  # fmt: skip
    else:
        engine = registry.loaded(backend, known.row)
        if known.guarded:
            written = {"running_mean": running_mean, "running_var": running_var} if training else {}
            for name, array in (written | {"out": out}).items():
                spec.check_writeable(name, array)
        options = spec.options(known.axis, training, momentum, eps, activation, known.groups, known.renorm)
    valid = None
    if mask is not None:
        written = {"running_mean": running_mean, "running_var": running_var} if training else {}
        aliasing.check_written({"out": out, **written}, {"mask": mask})
        valid = algorithm.positions(mask, x.shape, options.axis)
    vectors = running_mean, running_var, weight, bias
    result = algorithm.forward(
        engine, x, options, *vectors, residual, out, in_place, valid, keep=not in_place, counter=counter
    )
    if known is None and (front := registry.differentiable(x, None)) is not None:  # its arrays are never known
        front.count_writes(training, running_mean, running_var, out)
    return result


def _checked(
    key: Any,
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Array | None,
    activation: Activation | str | None,
    channel_axis: int,
    backend: Backend | str | None,
    out: Array | None,
    mask: Array | None,
    virtual_batch_size: int | None,
    renorm: tuple[float, float] | None,
) -> tuple[Backend, BatchNormSpec]:
    """Check a forward call, and remember by its key that it is right."""
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    row = registry.row_of(backend, input=x, **vectors, residual=residual, out=out, mask=mask)
    engine = registry.loaded(backend, row)
    options = spec.check_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, channel_axis, out,
        mask, virtual_batch_size, renorm,
    )  # fmt: skip
    arrays = [array for array in (x, *vectors.values(), residual, out, mask, momentum) if hasattr(array, "dtype")]
    if key is not None and registry.told_by_type(x) and _lasts(backend, arrays):
        guarded = hasattr(getattr(x, "flags", None), "writeable")
        _remember(_FORWARDS, key, _Known(row, options.axis, options.groups, options.renorm, guarded))
    return engine, options


# ------------------------------------------------------------------------------ what has been checked before
# Whether a call is right depends on its options and on its arrays' types, dtypes and shapes. Those that are, are not
# checked again; of errors nothing is remembered. What is left for each call is whether arrays may be written to.

REMEMBERED = 1024


class _Known(NamedTuple):
    """What the checks of a forward call have found."""

    row: registry.Row | None
    axis: int
    groups: int
    renorm: tuple[float, float] | None
    guarded: bool
    """Whether the library has arrays that may not be written to."""


_FORWARDS: dict[Any, _Known] = {}
_BACKWARDS: dict[Any, tuple[registry.Row | None, frozenset[str]]] = {}


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value


def _lasts(backend: Backend | str | None, arrays: Iterable[Array]) -> bool:
    """Whether a key of these has no class but those of array libraries: it would keep another from going away."""
    return (backend is None or isinstance(backend, str)) and all(registry.is_named(type(array)) for array in arrays)


def _kind(array: Array | None) -> tuple[Any, ...] | None:
    return None if array is None else (type(array), array.dtype, array.shape)


def _named(backend: Backend | str | None) -> Any:
    if backend is None or isinstance(backend, str):
        return backend
    raise TypeError("of calls with a backend given as an object nothing is remembered")
