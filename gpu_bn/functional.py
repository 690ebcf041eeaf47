"""The public functions: batch normalisation of arrays, forward and backward."""

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
        running_mean: (C,), any of these dtypes; updated in place in training. In training it and ``running_var`` may
            both be ``None``; in evaluation the two are the statistics used.
        running_var: (C,); see ``running_mean``.
        weight: (C,), any of these dtypes; ``None`` stands for 1.
        bias: (C,), any of these dtypes; ``None`` stands for 0.
        training: whether to use the statistics of the batch.
        momentum: the weight of the batch in the running update, usually between 0 and 1; or a 0-d array of ``x``'s
            library.
        eps: added to the variance, in its units; positive in training.
        residual: added before the activation; like ``x``.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` (the
            erf form), ``"gelu_tanh"``, ``"hardswish"``, ``"sigmoid"`` or ``"tanh"``; or an ``Activation`` with its
            parameter, from :func:`leaky_relu` or :func:`elu`. ``None`` is the identity.
        channel_axis: the axis of the channels; a negative one counts from the end.
        backend: a backend's name, or ``None`` for the one that serves ``x``.
        out: the array to write the result to; like ``x``; ``x`` or ``residual`` itself is allowed.
        mask: which positions count, bool or uint8; of ``x``'s rank with one channel, or without the channel axis; the
            other axes have ``x``'s size or 1. Other positions are left out of all statistics and sums, whatever ``x``
            holds there; ``y`` and the gradients are 0 there.
        virtual_batch_size: how many samples (axis 0) are normalised together in training, a *ghost batch*; it divides
            the batch. The result, gradients and running statistics are those of one call for each ghost batch, in
            order (Hoffer et al. 2017, Alg. 1).
        renorm: ``(r_max, d_max)`` of batch renormalisation (Ioffe 2017). In training, the statistics of the batch are
            corrected towards the running ones, by a factor of at most ``r_max`` and by at most ``d_max`` standard
            deviations; ``(1, 0)`` corrects nothing.

    Returns:
        ``y``, with ``x``'s shape, dtype and memory format.

    Raises:
        TypeError: an argument is not an array, the arrays belong to several libraries, a dtype is none of the above, or
            ``residual`` or ``out`` has another dtype than ``x``.
        ValueError: a shape, length or option does not fit; running statistics are missing; in training, a channel (of a
            ghost batch) has only one value; ``renorm`` comes without running statistics or with ghost batches; an array
            that is written (``out``, and in training the running statistics) overlaps itself or shares memory with
            another, unless ``out`` is ``x`` or ``residual`` itself.
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

    A call that raises has changed nothing, with one exception: if an interrupt (Ctrl-C) arrives while ``out`` is being
    written, part of ``out`` is new. If ``out`` is ``x`` or ``residual``, that part of the input is lost. If memory runs
    out on a CPU at that time, the call goes on with smaller blocks. The running statistics are written last and
    together: in NumPy arrays they are all old or all new, whatever interrupts.

    For torch tensors the call is differentiable; :func:`gpu_bn.nn.batch_norm` is the same with torch's errors and
    arguments. For other arrays use :func:`batch_norm_forward` and :func:`batch_norm_backward`.
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
    """Compute :func:`batch_norm` and also return what :func:`batch_norm_backward` needs.

    Args:
        x: 2-D to 5-D, C channels along ``channel_axis``; float16, bfloat16, float32 or float64. :func:`batch_norm`
            describes all arguments in full.
        running_mean: (C,); updated in place in training.
        running_var: (C,); updated in place in training.
        weight: (C,); ``None`` stands for 1.
        bias: (C,); ``None`` stands for 0.
        training: whether to use the statistics of the batch.
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
        TypeError: for the reasons given at :func:`batch_norm`; nothing has changed.
        ValueError: for the reasons given at :func:`batch_norm`; nothing has changed.
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
        saved: the second result of the forward call.
        need: the gradients to compute, some of ``"dx"``, ``"dweight"``, ``"dbias"`` and ``"dresidual"``; ``None``
            means those of all arguments that the forward call had. The others cost nothing.
        backend: the backend of the forward call, or ``None`` for the one that serves ``dy``.

    Returns:
        ``Grads(dx, dweight, dbias, dresidual)``. ``dx`` and ``dresidual`` are like ``x``; ``dweight`` and ``dbias`` are
        (C,) in the dtype of the parameter; those not requested are ``None``.

    Raises:
        TypeError: ``dy`` is not an array of ``x``'s library and dtype, or ``saved`` did not come from a forward call.
        ValueError: ``dy`` has another shape than ``x``, or a name in ``need`` is unknown or belongs to an argument that
            the forward call did not have.

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
        key: Any = (_backend_key(backend), _array_key(dy), _array_key(saved.x), parameters, need)
        known = _BACKWARDS.get(key)
    except (AttributeError, TypeError):  # invalid arguments, which the checks report, or nothing to remember
        key = known = None
    if known is not None:
        row, wanted = known
        return algorithm.backward(registry.resolve(backend, row), dy, saved, wanted)
    row = registry.find_row(backend, dy=dy, input=saved.x)
    engine = registry.resolve(backend, row)
    spec.check_like("dy", dy, saved.x)
    wanted = _check_need(need, saved)
    if key is not None and registry.is_known_by_type(dy) and _may_remember(backend, [dy, saved.x]):
        _remember(_BACKWARDS, key, (row, wanted))
    return algorithm.backward(engine, dy, saved, wanted)


def _check_need(need: Iterable[str] | None, saved: Saved) -> frozenset[str]:
    """Check the names of gradients and return the set of those to compute."""
    available = {
        "dx": True,
        "dweight": saved.weight_dtype is not None,
        "dbias": saved.bias_dtype is not None,
        "dresidual": saved.has_residual,
    }
    if need is None:
        return frozenset(name for name, present in available.items() if present)
    need = frozenset(need)
    for name in need:
        if name not in available:
            raise ValueError(f"unknown gradient {name!r}, expected some of {', '.join(available)}")
        if not available[name]:
            raise ValueError(f"{name} was requested, but the forward call had no {name[1:]}")
    return need


def forward(call: Call, options: Options, backend: Backend | str | None, in_place: bool = False) -> tuple[Array, Saved]:
    """Check a call, unless a similar one has been checked, and compute it. ``call.valid`` is the mask as given.

    ``in_place`` allows ``out`` to be the input or the residual, and tells that no backward call follows.
    """
    momentum, training = options.momentum, options.training
    try:
        key: Any = _signature(call, options, backend)
        known = _FORWARDS.get(key)
    except (AttributeError, TypeError):  # invalid arguments, which the checks report, or nothing to remember
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
    front = registry.differentiable(call.x, None) if known is None else None  # calls with tensors are not remembered
    if front is not None:
        front.check_writes(call, checked.batch_stats)
    result = algorithm.forward(engine, call, checked, in_place, keep=not in_place)
    if front is not None:
        front.count_writes(call, checked.batch_stats)
    return result


def with_valid_positions(call: Call, checked: BatchNormSpec) -> Call:
    """Replace a checked mask by the array of valid positions; check that it shares no memory with what is written."""
    written = {"running_mean": call.running_mean, "running_var": call.running_var} if checked.batch_stats else {}
    aliasing.check_written({"out": call.out, **written}, {"mask": call.valid})
    return call._replace(valid=algorithm.valid_positions(call.valid, call.x.shape, checked.axis))


def tensors_by_name(call: Call) -> dict[str, Any]:
    """Return the tensors of a call by their names in messages, in the order of the arguments."""
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
    """Check a forward call, and remember under its key that it passed."""
    row = registry.find_row(backend, **tensors_by_name(call))
    engine = registry.resolve(backend, row)
    checked = spec.check_forward(call, options)
    arrays = [array for array in (*call, options.momentum) if hasattr(array, "dtype")]
    if key is not None and registry.is_known_by_type(call.x) and _may_remember(backend, arrays):
        guarded = hasattr(getattr(call.x, "flags", None), "writeable")
        kept = checked if type(checked.momentum) is float else replace(checked, momentum=None)  # keep no array
        _remember(_FORWARDS, key, _Known(row, kept, guarded))
    return engine, checked


# ------------------------------------------------------------------------------ calls that have been checked
# Whether a call passes the checks depends on its options and on the types, dtypes and shapes of its arrays. A call that
# is like one that has passed is not checked again, except for whether its arrays may be written to.

REMEMBERED = 1024


class _Known(NamedTuple):
    """The result of the checks of a forward call."""

    row: registry.Row | None
    checked: BatchNormSpec
    """The options, with the momentum of the first such call, or ``None`` if that was an array."""
    guarded: bool
    """Whether the library has read-only arrays."""


_FORWARDS: dict[Any, _Known] = {}
_BACKWARDS: dict[Any, tuple[registry.Row | None, frozenset[str]]] = {}


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value


def _may_remember(backend: Backend | str | None, arrays: Iterable[Array]) -> bool:
    """Tell whether a key of these holds only classes of the array libraries; it would keep other classes alive."""
    return (backend is None or isinstance(backend, str)) and all(registry.is_named(type(array)) for array in arrays)


def _signature(call: Call, options: Options, backend: Backend | str | None) -> tuple[Any, ...]:
    """Return a key of a call: if one call passes the checks, all calls with an equal key do."""
    training, momentum, eps, activation, axis, size, renorm = options
    return (
        _backend_key(backend), *[None if one is None else (type(one), one.dtype, one.shape) for one in call],
        bool(training), eps, activation, axis, size, renorm, type(eps), type(axis), type(size), type(momentum),
        None if type(momentum) is float else _array_key(momentum) if hasattr(momentum, "dtype") else (),
    )  # fmt: skip


def _array_key(array: Array | None) -> tuple[Any, ...] | None:
    return None if array is None else (type(array), array.dtype, array.shape)


def _backend_key(backend: Backend | str | None) -> Any:
    if backend is None or isinstance(backend, str):
        return backend
    raise TypeError("calls with a backend given as an object are not remembered")
