"""The front door: batch normalisation of arrays, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from gpu_bn import algorithm, aliasing, registry, spec
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Backend, Grads, Saved
from gpu_bn.call import Call, Options
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
    call = Call(x, weight, bias, residual, running_mean, running_var, None, mask, out)
    options = Options(training, momentum, eps, activation, channel_axis, virtual_batch_size, renorm)
    front = registry.differentiable(x, backend)
    if front is not None:
        return front.front_door(call, options, backend)
    return forward(call, options, backend, in_place=True)[0]


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
    call = Call(x, weight, bias, residual, running_mean, running_var, None, mask, out)
    options = Options(training, momentum, eps, activation, channel_axis, virtual_batch_size, renorm)
    return forward(call, options, backend)


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
        return algorithm.backward(registry.resolve(backend, row), dy, saved, wanted)
    row = registry.find_row(backend, dy=dy, input=saved.x)
    engine = registry.resolve(backend, row)
    spec.check_like("dy", dy, saved.x)
    wanted = _check_need(need, saved)
    if key is not None and registry.is_known_by_type(dy) and _lasts(backend, [dy, saved.x]):
        _remember(_BACKWARDS, key, (row, wanted))
    return algorithm.backward(engine, dy, saved, wanted)


def _check_need(need: Iterable[str] | None, saved: Saved) -> frozenset[str]:
    """Return the gradients to compute; ``need`` is a set if it is anything."""
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


def forward(call: Call, options: Options, backend: Backend | str | None, in_place: bool = False) -> tuple[Array, Saved]:
    """Check a call, unless one like it has been checked, and compute it; ``call.valid`` is a mask as it was given.

    ``in_place`` allows ``out`` to be the input or the residual: no backward call follows.
    """
    momentum, training = options.momentum, options.training
    try:
        key: Any = _signature(call, options, backend)
        known = _FORWARDS.get(key)
    except (AttributeError, TypeError):  # not an array, or nothing to look up: the checks say what is wrong
        key = known = None
    if known is None:
        engine, checked = _checked(key, call, options, backend)
    else:
        engine = registry.resolve(backend, known.row)
        if known.guarded:
            for name in (*(("running_mean", "running_var") if training else ()), "out"):
                spec.check_writeable(name, getattr(call, name))
        checked = known.checked
        if momentum is not checked.momentum:
            spec.check_momentum(momentum)
            checked = spec.specify(options, checked.axis, checked.groups, checked.renorm)
    if call.valid is not None:
        call = with_valid_positions(call, checked)
    result = algorithm.forward(engine, call, checked, in_place, keep=not in_place)
    if known is None and (front := registry.differentiable(call.x, None)) is not None:  # its arrays are never known
        front.count_writes(call, checked.batch_stats)
    return result


def with_valid_positions(call: Call, checked: BatchNormSpec) -> Call:
    """Put the positions that count in the place of a checked mask, which may not lie where the call writes."""
    written = {"running_mean": call.running_mean, "running_var": call.running_var} if checked.batch_stats else {}
    aliasing.check_written({"out": call.out, **written}, {"mask": call.valid})
    return call._replace(valid=algorithm.valid_positions(call.valid, call.x.shape, checked.axis))


def tensors_by_name(call: Call) -> dict[str, Any]:
    """Return the tensors of a call by the names that messages use, in their order."""
    return {
        "input": call.x,
        "running_mean": call.running_mean,
        "running_var": call.running_var,
        "weight": call.weight,
        "bias": call.bias,
        "residual": call.residual,
        "out": call.out,
        "mask": call.valid,
    }


def _checked(key: Any, call: Call, options: Options, backend: Backend | str | None) -> tuple[Backend, BatchNormSpec]:
    """Check a forward call, and remember by its key that it is right."""
    row = registry.find_row(backend, **tensors_by_name(call))
    engine = registry.resolve(backend, row)
    checked = spec.check_forward(call, options)
    arrays = [array for array in (*call, options.momentum) if hasattr(array, "dtype")]
    if key is not None and registry.is_known_by_type(call.x) and _lasts(backend, arrays):
        guarded = hasattr(getattr(call.x, "flags", None), "writeable")
        kept = checked if type(checked.momentum) is float else replace(checked, momentum=None)  # not an array
        _remember(_FORWARDS, key, _Known(row, kept, guarded))
    return engine, checked


# ------------------------------------------------------------------------------ what has been checked before
# Whether a call is right depends on its options and on its arrays' types, dtypes and shapes. Those that are, are not
# checked again; of errors nothing is remembered. What is left for each call is whether arrays may be written to.

REMEMBERED = 1024


class _Known(NamedTuple):
    """What the checks of a forward call have found."""

    row: registry.Row | None
    checked: BatchNormSpec
    """With the first call's momentum, unless that was an array."""
    guarded: bool
    """Whether the library has arrays that may not be written to."""


_FORWARDS: dict[Any, _Known] = {}
_BACKWARDS: dict[Any, tuple[registry.Row | None, frozenset[str]]] = {}


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value


def _lasts(backend: Backend | str | None, arrays: Iterable[Array]) -> bool:
    """Tell whether a key of these has no class but those of array libraries: it would keep another from going away."""
    return (backend is None or isinstance(backend, str)) and all(registry.is_named(type(array)) for array in arrays)


def _signature(call: Call, options: Options, backend: Backend | str | None) -> tuple[Any, ...]:
    """Return what calls have in common that are right if one of them is."""
    training, momentum, eps, activation, axis, size, renorm = options
    return (
        _named(backend), *[None if one is None else (type(one), one.dtype, one.shape) for one in call],
        bool(training), eps, activation, axis, size, renorm, type(eps), type(axis), type(size), type(momentum),
        None if type(momentum) is float else _kind(momentum) if hasattr(momentum, "dtype") else (),
    )  # fmt: skip


def _kind(array: Array | None) -> tuple[Any, ...] | None:
    return None if array is None else (type(array), array.dtype, array.shape)


def _named(backend: Backend | str | None) -> Any:
    if backend is None or isinstance(backend, str):
        return backend
    raise TypeError("of calls with a backend given as an object nothing is remembered")
