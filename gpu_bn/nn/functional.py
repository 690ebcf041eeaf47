"""Batch normalisation of torch tensors, differentiable to any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from threading import local
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.overrides import is_tensor_like

from gpu_bn import algorithm, aliasing, registry, spec
from gpu_bn import functional as front
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import autograd, composition, cpu_calls, library, masked
from gpu_bn.spec import MAX_RANK, MIN_RANK

VECTORS = ("running_mean", "running_var", "weight", "bias")
TENSORS = ("input", *VECTORS, "residual", "num_batches_tracked")
PLAIN = autograd.PLAIN
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Updates(local):
    """Whether running statistics are left alone, in this thread."""

    off = False


_updates = _Updates()


@contextmanager
def no_tracking() -> Iterator[None]:
    """Leave running statistics and batch counters as they are, also in training (eager mode only).

    Returns:
        A context manager; it holds for this thread.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(4)
        >>> with nn.no_tracking():
        ...     y = layer(torch.randn(8, 4))
        >>> layer.num_batches_tracked.item()
        0
    """
    before = _updates.off
    _updates.off = True
    try:
        yield
    finally:
        _updates.off = before


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts for activation checkpointing: the forward pass that is run again updates no statistics.

    Returns:
        A pair of context managers, for ``context_fn`` of ``torch.utils.checkpoint.checkpoint``.

    Examples:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(4)
        >>> x = torch.randn(8, 4, requires_grad=True)
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=nn.checkpoint_contexts)
        >>> y.sum().backward()
        >>> layer.num_batches_tracked.item()  # not 2
        1
    """
    return nullcontext(), no_tracking()


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    num_batches_tracked: Tensor | None = None,
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
    renorm: tuple[float, float] | None = None,
) -> Tensor:
    """Do what ``torch.nn.functional.batch_norm`` does, and a residual sum and an activation in the same pass.

    Args:
        input: (N, C, ...), 2-D to 5-D; float16, bfloat16, float32 or float64; any strides.
        running_mean: (C,); updated in place in training. In training it may be absent together with ``running_var``;
            otherwise the two are the statistics used.
        running_var: (C,), as ``running_mean``.
        weight: (C,); absent, it is 1.
        bias: (C,); absent, it is 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the batch in the running update, a number or a 0-d tensor; ``None`` averages over all
            batches that ``num_batches_tracked`` counts.
        eps: added to the variance.
        residual: added before the activation; like ``input``.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` (the
            erf form), ``"gelu_tanh"``, ``"hardswish"``, ``"sigmoid"`` or ``"tanh"``; or an ``Activation`` with its
            parameter, as :func:`gpu_bn.leaky_relu` and :func:`gpu_bn.elu` make it. ``None`` is the identity.
        num_batches_tracked: 0-d int64, incremented in training.
        mask: which positions count, as in :func:`gpu_bn.batch_norm`.
        virtual_batch_size: how many samples are normalised together in training, as in :func:`gpu_bn.batch_norm`.
        renorm: ``(r_max, d_max)`` of batch renormalisation, as in :func:`gpu_bn.batch_norm`.

    Returns:
        ``y``, with ``input``'s shape, dtype and memory format, and so is its gradient.

    Raises:
        RuntimeError: as torch for the same mistake, with its text; nothing has changed. So are the next three.
        ValueError: a shape or an option that does not fit.
        TypeError: an argument of a wrong type.
        NotImplementedError: a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> x = torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> y = nn.batch_norm(x, training=True, activation="relu")
        >>> y.round(decimals=3).tolist()
        [[0.0], [1.0]]
        >>> y.sum().backward()
        >>> x.grad.shape
        torch.Size([2, 1])

    Source: Ioffe & Szegedy 2015; :mod:`gpu_bn.spec` has the equations.
    """
    activation = IDENTITY if activation is None else Activation.of(activation)
    counter = num_batches_tracked if training else None
    given = Call(input, weight, bias, residual, running_mean, running_var, counter, mask)
    return normalize(given, Options(training, momentum, eps, activation, 1, virtual_batch_size, renorm))


def normalize(call: Call, options: Options) -> Tensor:
    """:func:`batch_norm` of a known activation; the counter is call in training only."""
    if call.valid is None and options.virtual_batch_size is None and options.renorm is None:
        if not _updates.off:
            y = cpu_calls.forward(call, options)
            if y is not None:
                return y
        if _ordinary(call, options):
            training, momentum, eps, activation, *_ = options
            weighs = library.weighs(momentum, None, call.counter) if training else 0.0
            spec = library.options(training, weighs, eps, activation.name, activation.parameter)
            return autograd.direct(registry.serving(call.x), spec, call)
    return _any_call(call, options)


def _ordinary(call: Call, options: Options) -> bool:
    """Whether a call is one that :func:`check` allows, of plain tensors, and nobody watches or transforms it.

    It looks at everything in every call, once, and remembers nothing. What it is not sure of is for :func:`_any_call`.
    """
    x, weight, bias, residual, mean, var, counter, _, _ = call
    training, momentum, eps, *_ = options
    if autograd.watched() or forward_ad._current_level >= 0 or not autograd.is_plain(x):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if not (
        MIN_RANK <= len(shape) <= MAX_RANK
        and dtype in FLOATS
        and x.layout is torch.strided
        and type(eps) is float
        and 0.0 < eps < inf
        and (momentum is None or (type(momentum) is float and -inf < momentum < inf))
    ):
        return False
    channels = shape[1:2]
    for vector in (mean, var, weight, bias):
        if vector is not None and (
            type(vector) not in PLAIN
            or vector.shape != channels
            or vector.dtype not in FLOATS
            or vector.device != device
            or vector.is_neg()
        ):
            return False
    if mean is None or var is None:
        if not training or mean is not var:
            return False
    elif (torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)) or (
        training and mean.data_ptr() == var.data_ptr()
    ):
        return False
    if training and (
        _updates.off
        or x.numel() == channels[0]
        or not (counter is None or (autograd.is_plain(counter) and not counter.is_inference()))
        or (mean is not None and var is not None and (mean.is_inference() or var.is_inference()))
    ):
        return False
    return residual is None or (
        autograd.is_plain(residual)
        and residual.shape == shape
        and residual.dtype is dtype
        and residual.device == device
    )


def _any_call(call: Call, options: Options) -> Tensor:
    """A call that may be wrong, extended, watched or transformed."""
    x, weight, bias, residual, running_mean, running_var, counter, mask, _ = call
    training, momentum, eps, activation, axis, virtual_batch_size, renorm = options
    tensors = (x, running_mean, running_var, weight, bias, residual, counter)
    for name, value in zip(TENSORS, tensors, strict=True):
        _check_tensor(name, value)
    if x.is_mkldnn:  # whose memory is oneDNN's
        dense = None if residual is None else residual.to_dense()
        return _any_call(Call(x.to_dense(), weight, bias, dense, *call[4:]), options).to_mkldnn()
    momentum, eps = _number(momentum), _number(eps)
    check(call, Options(training, momentum, eps))
    eps = eps.item() if isinstance(eps, Tensor) else eps
    extended = mask is not None or virtual_batch_size is not None or renorm is not None
    groups = _check_extensions(call, options) if extended else 1
    extended = mask is not None or groups > 1 or renorm is not None
    if training and running_mean is not None and not torch.compiler.is_compiling() and _updates.off:
        if renorm is not None and running_var is not None:
            running_mean, running_var = running_mean.clone(), running_var.clone()
        else:
            running_mean = running_var = None
        counter = None
    if training and not torch.compiler.is_compiling():
        named = zip((*TENSORS, "mask"), (*tensors, mask), strict=True)
        read = {name: one for name, one in named if _shows_memory(one)}
        aliasing.check_written({name: read.pop(name) for name in library.TRACKED if name in read}, read)
        for written in (running_mean, running_var, counter):
            if written is not None and written.is_inference():
                written.add_(0)  # outside inference mode torch refuses, when it has already added
    if isinstance(momentum, Tensor) and (extended or not library.unread(momentum)):
        momentum = momentum.item()
    call = Call(x, weight, bias, residual, running_mean, running_var, counter, mask)
    options = Options(training, momentum, eps, activation, axis, virtual_batch_size, renorm)
    if extended:
        return masked.batch_norm(call, options, groups)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return composition.wide_batch_norm(call, options)
    if exporting() and not (training and torch.compiler.is_compiling() and not isinstance(momentum, float)):
        return composition.torch_batch_norm(call, options)
    if not training and torch.compiler.is_compiling():
        return composition.evaluated(call, options)
    return autograd.forward(call, options)


def _shows_memory(one: Any) -> bool:
    return one is not None and autograd.is_plain(one) and not library._is_wrapped(one)


def exporting() -> bool:
    """Whether a call is recorded for a file that is used without this package.

    torch.jit, both exporters to ONNX and ``torch.export`` record torch's own operator, with its results. What it does
    not have stays ours: of ``torch.export``, training whose momentum is ``None`` or a tensor.
    """
    if torch.compiler.is_compiling():
        return bool(torch.compiler._is_exporting_flag)  # torch 2.11 compiles a call of is_exporting() to True
    return autograd._tracing() is not None


def _number(value: Any) -> Any:
    """A number of NumPy's as Python's; in compiled code, where it is an array, as a tensor."""
    if torch.compiler.is_compiling():
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    return value.item() if isinstance(value, np.generic) else value


def _is_number(value: Any) -> bool:
    """Whether torch's function takes it for a number."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad and not value.is_complex()
    return isinstance(value, (float, int))


def _check_tensor(name: str, value: Any) -> None:
    """Raise what torch raises for what is no tensor, nor stands for one; only the input must be given."""
    if not (isinstance(value, Tensor) or (value is None and name != "input") or is_tensor_like(value)):
        kind = type(value)
        got = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {got}")


def check(call: Call, options: Options) -> None:
    """Raise what torch raises for arguments that do not fit."""
    input, weight, bias, residual, running_mean, running_var, *_ = call
    training, momentum, eps, *_ = options
    rank = input.dim()
    if not MIN_RANK <= rank <= MAX_RANK:
        raise ValueError(f"expected {MIN_RANK}D to {MAX_RANK}D input (got {rank}D input)")
    shape, device = input.shape, input.device
    channels = shape[1]
    if training and input.numel() == channels and channels > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, float) and not -inf < number < inf:  # isfinite cannot be compiled
            raise ValueError(f"batch_norm {name} must be finite, but got {number}")
    plain = input.dtype in FLOATS and input.layout is torch.strided
    unknown = [] if plain else [f"input of {input.dtype} and layout {input.layout}"]
    for name, number in (("momentum", momentum), ("eps", eps)):
        if not _is_number(number) and not (number is None and name == "momentum"):
            unknown.append(f"{name} of type {type(number).__name__}")
    vectors = (running_mean, running_var, weight, bias)
    for name, vector in zip(VECTORS, vectors, strict=True):
        if vector is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
        if vector.dim() != 1:
            raise RuntimeError(f"TensorAccessor expected 1 dims but tensor has {vector.dim()}")
        if vector.dtype not in FLOATS or vector.device != device:
            unknown.append(f"{name} of {vector.dtype} on {vector.device}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training and running_mean is not None and running_var is not None and _share(running_mean, running_var):
        raise ValueError("running_mean and running_var must be two tensors: a call in training writes to both")
    if unknown:
        momentum = 0.0 if momentum is None else momentum
        mean, var = (None if running is None else running.clone() for running in (running_mean, running_var))
        F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)  # says what is wrong, and may say nothing
        raise TypeError(
            f"gpu_bn.nn expects arguments of {', '.join(map(str, FLOATS))} on one device, got {', '.join(unknown)}"
        )
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        if vector is not None and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual should have the input's shape {tuple(shape)}, got {tuple(residual.shape)}")
        if residual.dtype != input.dtype:
            raise TypeError(f"residual should have the input's dtype {input.dtype}, got {residual.dtype}")
        if residual.device != device:
            raise RuntimeError(f"residual should be on the input's device {device}, got {residual.device}")


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors start at one place in memory, as far as this can be seen."""
    if a is b or torch.compiler.is_compiling() or not (autograd.is_plain(a) and autograd.is_plain(b)):
        return a is b
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _check_extensions(call: Call, options: Options) -> int:
    """Check what torch's function does not have; returns the number of ghost batches."""
    input, mask, training, renorm = call.x, call.valid, options.training, options.renorm
    virtual_batch_size = options.virtual_batch_size
    shape = input.shape
    groups = 1 if virtual_batch_size is None else spec.check_groups(shape, 1, virtual_batch_size, training)
    if training and input.numel() == groups * shape[1] > 0:
        size = torch.Size((shape[0] // groups, *shape[1:]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask should be a Tensor, got {type(mask).__name__}")
        spec.check_mask(mask, shape, 1)
        if mask.device != input.device:
            raise RuntimeError(f"mask should be on the input's device {input.device}, got {mask.device}")
    if renorm is not None:
        spec.check_renorm(renorm, training and call.running_mean is not None, groups)
    return groups


def front_door(call: Call, options: Options, backend: str | None) -> Tensor:
    """:func:`gpu_bn.batch_norm` for tensors: any channel axis, its errors, and ``out`` without gradients."""
    x, residual, out, mask = call.x, call.residual, call.out, call.valid
    engine = registry.select(backend, **front.named(call))
    checked = spec.check_forward(call, options)
    ready = call if mask is None else front.with_positions(call, checked)
    if out is not None:
        differentiable = [one for one in call[:6] if one is not None and one.requires_grad]
        if torch.is_grad_enabled() and (differentiable or out.requires_grad):
            raise RuntimeError(
                "batch_norm(): functions with out=... arguments don't support automatic differentiation, "
                "but one of the arguments requires grad."
            )
        result: Tensor = algorithm.forward(engine, ready, checked, in_place=True, keep=False)[0]
        count_writes(call, checked.batch_stats)
        return result
    if backend not in (None, registry.TORCH, registry.default(x)):
        return autograd.direct(engine, checked, ready)
    if residual is not None:
        residual = residual.movedim(checked.axis, 1)
    if mask is not None and mask.dim() == x.dim():
        mask = mask.movedim(checked.axis, 1)
    moved = call._replace(x=x.movedim(checked.axis, 1), residual=residual, valid=mask)
    return normalize(moved, options._replace(activation=checked.activation)).movedim(1, checked.axis)


def count_writes(call: Call, batch_stats: bool) -> None:
    """Tell autograd what a call without it has written, so that a graph that has saved it refuses to go backward."""
    written = (call.running_mean, call.running_var, call.out) if batch_stats else (call.out,)
    increment_version([tensor for tensor in written if tensor is not None])
