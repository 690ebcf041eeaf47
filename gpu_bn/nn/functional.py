"""Batch normalisation of torch tensors, differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gpu_bn import algorithm, registry, spec
from gpu_bn import functional as front
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.call import Call, Options
from gpu_bn.nn.checks import (
    check,
    check_extensions,
    check_finite,
    check_inference,
    check_memory,
    check_tensors,
    is_ordinary,
    plain_number,
)
from gpu_bn.nn.operators import autograd, composition, library, masked, plain_calls
from gpu_bn.nn.running import untracked_statistics, updates


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
    """Normalise as ``torch.nn.functional.batch_norm`` does; add a residual and apply an activation in the same pass.

    Args:
        input: (N, C, ...), 2-D to 5-D; float16, bfloat16, float32 or float64; any strides.
        running_mean: (C,); used in evaluation, updated in place in training. In training it may be ``None``, together
            with ``running_var``.
        running_var: (C,), like ``running_mean``.
        weight: (C,), or ``None`` for 1.
        bias: (C,), or ``None`` for 0.
        training: whether to use the batch's statistics.
        momentum: the weight of the batch in the running update, a number or a 0-d tensor; ``None`` averages over all
            batches that ``num_batches_tracked`` counts.
        eps: added to the variance; positive in training.
        residual: added before the activation; it has ``input``'s shape, dtype and device.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` (the
            erf form), ``"gelu_tanh"``, ``"hardswish"``, ``"sigmoid"`` or ``"tanh"``; or an ``Activation`` with its
            parameter, as :func:`gpu_bn.leaky_relu` and :func:`gpu_bn.elu` make it. ``None`` is the identity.
        num_batches_tracked: 0-d int64, incremented in training.
        mask: which positions count, as in :func:`gpu_bn.batch_norm`.
        virtual_batch_size: how many samples are normalised together in training, as in :func:`gpu_bn.batch_norm`.
        renorm: ``(r_max, d_max)`` of batch renormalisation, as in :func:`gpu_bn.batch_norm`.

    Returns:
        ``y``, with ``input``'s shape, dtype and memory format. The gradient of ``input`` has the same ones.

    An error leaves all tensors unchanged. A mistake that torch reports raises torch's exception, with its text.

    Raises:
        RuntimeError: a mistake for which torch raises it, such as a weight of another length than C.
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
    training = bool(training)
    counter = num_batches_tracked if training else None
    tensors = input, weight, bias, residual, running_mean, running_var, counter
    if mask is None and virtual_batch_size is None and renorm is None:
        y = plain_calls.forward(tensors, training, momentum, eps, activation.name, activation.parameter)
        if y is not None:
            return y
    options = Options(training, momentum, eps, activation, 1, virtual_batch_size, renorm)
    return general_batch_norm(Call(*tensors, mask), options)


def normalize(call: Call, options: Options) -> Tensor:
    """Call :func:`batch_norm` with its arguments in two tuples."""
    training, momentum, eps, activation, _, groups, renorm = options
    return batch_norm(
        call.x, call.running_mean, call.running_var, call.weight, call.bias, training, momentum, eps,
        residual=call.residual, activation=activation, num_batches_tracked=call.counter, mask=call.valid,
        virtual_batch_size=groups, renorm=renorm,
    )  # fmt: skip


def general_batch_norm(call: Call, options: Options) -> Tensor:
    """Compute any call of :func:`batch_norm`, with an ``Activation``, and without a counter in evaluation."""
    extended = call.valid is not None or options.virtual_batch_size is not None or options.renorm is not None
    if extended or not is_ordinary(call, options):
        return _checked_batch_norm(call, options)
    training, momentum, eps, activation, *_ = options
    batch_weight = library.batch_weight(momentum, None, call.counter) if training else 0.0
    spec = library.options(training, batch_weight, eps, activation.name, activation.parameter)
    return autograd.call_backend(registry.backend_for(call.x), spec, call)


def _checked_batch_norm(call: Call, options: Options) -> Tensor:
    """Check and compute a call that may be wrong or transformed, or have a mask, ghost batches or renormalisation."""
    check_tensors(call)
    if call.x.is_mkldnn:  # only oneDNN can read its memory
        residual = None if call.residual is None else call.residual.to_dense()
        return _checked_batch_norm(call._replace(x=call.x.to_dense(), residual=residual), options).to_mkldnn()
    training, momentum, eps, *rest = options
    momentum, eps = plain_number(momentum), plain_number(eps)
    check(call, Options(training, momentum, eps))
    extended = call.valid is not None or options.virtual_batch_size is not None or options.renorm is not None
    groups = check_extensions(call, options) if extended else 1
    extended = call.valid is not None or groups > 1 or options.renorm is not None
    if training and not torch.compiler.is_compiling():
        if updates.off:
            mean, var = untracked_statistics(call.running_mean, call.running_var, options.renorm)
            call = Call(*call[:4], mean, var, None, call.valid)
        check_memory(call)
    if isinstance(momentum, Tensor) and (extended or not library.stays_on_device(momentum)):
        momentum = momentum.item()
    eps = eps.item() if isinstance(eps, Tensor) else eps
    check_finite(momentum, eps)
    options = Options(training, momentum, eps, *rest)
    return masked.batch_norm(call, options, groups) if extended else _traceable_batch_norm(call, options)


def _traceable_batch_norm(call: Call, options: Options) -> Tensor:
    """Compute a checked call by operations that the active transform, exporter or compiler understands."""
    training, compiling = options.training, torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return composition.wide_batch_norm(call, options)
    if any(isinstance(tensor, Tensor) and is_traceable_wrapper_subclass(tensor) for tensor in call[:7]):
        return composition.torch_batch_norm(call, options)  # a DTensor can distribute only torch's operators
    if is_exporting() and not (training and compiling and not isinstance(options.momentum, float)):
        return composition.torch_batch_norm(call, options)
    if not training and compiling:
        return composition.evaluated(call, options)
    return autograd.forward(call, options)


def is_exporting() -> bool:
    """Tell whether a call is recorded for a file that is used without this package.

    torch.jit, both exporters to ONNX and ``torch.export`` record torch's operator. ``torch.export`` records ours for
    training with a momentum that is ``None`` or a tensor, which torch's operator does not accept.
    """
    if torch.compiler.is_compiling():
        return bool(torch.compiler._is_exporting_flag)  # torch 2.11 compiles a call of is_exporting() to True
    return autograd.tracing_state() is not None


def front_door(call: Call, options: Options, backend: str | None) -> Tensor:
    """Compute :func:`gpu_bn.batch_norm` of tensors: with any channel axis, its errors, and ``out`` without autograd."""
    x, residual, out, mask = call.x, call.residual, call.out, call.valid
    engine = registry.select(backend, **front.tensors_by_name(call))
    checked = spec.check_forward(call, options)
    ready = call if mask is None else front.with_valid_positions(call, checked)
    if out is not None:
        differentiable = [tensor for tensor in call[:6] if tensor is not None and tensor.requires_grad]
        if torch.is_grad_enabled() and (differentiable or out.requires_grad):
            raise RuntimeError(
                "batch_norm(): functions with out=... arguments don't support automatic differentiation, "
                "but one of the arguments requires grad."
            )
        check_writes(call, checked.batch_stats)
        result: Tensor = algorithm.forward(engine, ready, checked, in_place=True, keep=False)[0]
        count_writes(call, checked.batch_stats)
        return result
    if backend not in (None, registry.TORCH, registry.default_name(x)):
        check_writes(call, checked.batch_stats)
        return autograd.call_backend(engine, checked, ready)
    if residual is not None:
        residual = residual.movedim(checked.axis, 1)
    if mask is not None and mask.dim() == x.dim():
        mask = mask.movedim(checked.axis, 1)
    moved = call._replace(x=x.movedim(checked.axis, 1), residual=residual, valid=mask)
    options = options._replace(training=checked.batch_stats, activation=checked.activation)
    return normalize(moved, options).movedim(1, checked.axis)


def check_writes(call: Call, batch_stats: bool) -> None:
    """Check before a call that torch allows it to write the running statistics."""
    if batch_stats:
        check_inference((call.running_mean, call.running_var))


def count_writes(call: Call, batch_stats: bool) -> None:
    """Increment the versions of the tensors that a call wrote, so that autograd rejects graphs that saved them."""
    library.mark_written((call.running_mean, call.running_var, call.out) if batch_stats else (call.out,))
