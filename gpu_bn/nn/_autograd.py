"""Derivatives of the operators in :mod:`gpu_bn.nn._library`, to any order.

The first is the operator ``backward``. Its own derivative composes the transform of torch's operations and
differentiates that twice. Forward-mode differentiation is refused: it would lose the tangent without a word.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.nn import _composed
from gpu_bn.nn._library import KERNELS, LIBRARY, backward, infer, train

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched=True; an ordinary tensor to all else
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active

PLAIN = frozenset((Tensor, Parameter))
"""The types of ordinary tensors."""


class _Forward(Function):
    """``train`` or ``infer``, where something is differentiated; a direct call gives ``y`` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        operator: Any,
        others: tuple[Any, ...],
        direct: bool,
    ) -> Any:
        inputs = (x, weight, bias, residual)
        require_savable(inputs[:2] if others[-2] == "identity" else inputs)
        result = KERNELS[operator](*inputs, *others) if direct else _below(operator, *inputs, *others)
        y, mean, var, mask = result
        ctx.batch_stats = operator is train
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.options = others[-3:]
        if others[-2] == "identity":  # whose gradient reads neither
            bias = residual = None
        elif mask is not None and mask.shape[0]:
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, mean, var, mask)
        ctx.set_materialize_grads(False)
        if direct:
            return y
        ctx.mark_non_differentiable(mean, var, mask)
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        dresidual = None
        need = list(ctx.needs_input_grad[:4])
        if need[3] and ctx.options[1] == "identity":
            dresidual, need[3] = dy, False
        if not any(need):
            return None, None, None, dresidual, None, None, None
        arguments = (dy, *ctx.saved_tensors, ctx.bias_dtype, ctx.batch_stats, *ctx.options, need)
        if torch.is_grad_enabled() or _is_compiling() or _is_batched(dy) or not _plain(arguments):
            results = backward(*_with_mask(arguments))
            results = [result if needed else None for result, needed in zip(results, need, strict=True)]
        else:
            results = KERNELS[backward](*arguments)
        return *results[:3], dresidual if results[3] is None else results[3], None, None, None


_apply = super(Function, _Forward).apply
"""``_Forward.apply`` without its search for leftovers of ``torch.func``, which takes a quarter of its time."""


class _Backward(Function):
    """The operator ``backward``, where it is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments[:8])
        ctx.options = arguments[8:]
        ctx.set_materialize_grads(False)
        return _below(backward, *arguments)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, mean, var, mask = ctx.saved_tensors
        bias_dtype, batch_stats, eps, activation, parameter, need = ctx.options
        results: list[Tensor | None] = [None] * 14
        wanted = [i for i, gradient in enumerate(incoming) if gradient is not None and need[i]]
        if not wanted:
            return tuple(results)
        masked = mask.shape[0] > 0
        slope = (x, weight, bias, residual, mean, var, mask, *ctx.options[:-1], [False, False, False, True])
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            if bias is None and need[2]:
                bias = x.new_zeros(x.shape[1], dtype=bias_dtype)
            if masked and need[3]:
                residual = torch.zeros_like(x)
            given: list[Any] = [
                None if tensor is None else _stand_in(tensor, again) for tensor in (dy, x, weight, bias, residual)
            ]
            dy, x, weight, bias, residual = given
            mean, var = (None, None) if batch_stats else (mean, var)
            chosen = IDENTITY if masked else Activation(activation, parameter)
            y = _composed.batch_norm(x, mean, var, weight, bias, residual, eps, chosen)
            if masked:
                dy = _Masked.apply(dy, slope)
            firsts = torch.autograd.grad(y, [given[1 + i] for i in wanted], dy, create_graph=True)
            inputs = [i for i, needed in enumerate(ctx.needs_input_grad[:5]) if needed]
            seconds = torch.autograd.grad(
                firsts,
                [given[i] for i in inputs],
                [incoming[i] for i in wanted],
                create_graph=again,
                allow_unused=True,
            )
        for i, second in zip(inputs, seconds, strict=True):
            results[i] = second
        return tuple(results)


class _Masked(Function):
    """dz of dy where bits of a mask decide: linear in dy, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, slope: tuple[Any, ...]) -> Tensor:
        ctx.slope = slope
        return _below(backward, dy, *slope)[3]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Any, None]:
        return _Masked.apply(incoming[0], ctx.slope), None


def _stand_in(tensor: Tensor | None, again: bool) -> Tensor | None:
    """A tensor to differentiate by: part of the graph if that is to be differentiated once more."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if again and tensor.requires_grad else tensor.detach().requires_grad_()


# ----------------------------------------------------------------------------------------- the operators' entry points
def call(operator: Any, *arguments: Any) -> Tensor:
    """``y`` of an operator; without torch's dispatcher, where nothing but autograd is between it and its kernel.

    Compilers, tracers, dispatch modes and subclasses of tensors see the operator.
    """
    if forward_ad._current_level < 0 and _plain(arguments):
        return direct(operator, *arguments)
    return operator(*arguments)[0]  # type: ignore[no-any-return]


def direct(
    operator: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *others: Any
) -> Tensor:
    """:func:`call` for arguments that are known to be plain, outside forward-mode differentiation."""
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        y: Tensor = _apply(x, weight, bias, residual, operator, others, True)
    else:
        y = KERNELS[operator](x, weight, bias, residual, *others, False)[0]
    if operator is train and others[0] is not None:
        increment_version(others[:2])  # the counter's has been
    return y


def _enter(operator: Any, *arguments: Any) -> Any:
    inputs = arguments[:4]
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    if torch.is_grad_enabled() and _any_requires_grad(*inputs):
        result = _Forward.apply(*inputs, operator, arguments[4:], False)
    else:
        result = _below(operator, *arguments)
    if operator is train:
        increment_version([tensor for tensor in arguments[4:7] if tensor is not None])
    return result


def _enter_backward(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and _any_requires_grad(*arguments[:5]):
        return _Backward.apply(*arguments)
    return _below(backward, *arguments)


def _below(operator: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call an operator below autograd."""
    with _BelowAutograd():
        return operator(*arguments)  # type: ignore[no-any-return]


def _with_mask(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the operator ``backward``: a direct call has kept no mask where it is empty."""
    if arguments[7] is not None:
        return arguments
    return (*arguments[:7], arguments[1].new_empty(0, dtype=torch.uint8), *arguments[8:])


def require_savable(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise what torch raises for tensors of inference mode in a graph, but before anything has changed."""
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            with torch.enable_grad():
                tensor * torch.ones((), requires_grad=True)  # which would save it


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether arguments are ordinary tensors and nobody watches what is called."""
    return not watched() and not any(map(_is_odd, arguments[:8]))


def watched() -> bool:
    """Whether a compiler, a tracer, a mode or a transform wants to see the operator."""
    return _is_compiling() or _modes() > 0 or _tracing() is not None or _transforms_active()


def is_plain(tensor: Any) -> bool:
    """Whether this is an ordinary tensor in the memory of a CPU or a GPU."""
    return type(tensor) in PLAIN and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()


def _is_odd(argument: Any) -> bool:
    return isinstance(argument, Tensor) and not is_plain(argument)


def _refuse_tangents(inputs: tuple[Tensor | None, ...]) -> None:
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise NotImplementedError(
            "torch.ops.gpu_bn has no forward-mode derivative; gpu_bn.nn.functional.batch_norm has"
        )


for _operator in (train, infer):
    LIBRARY.impl(_operator, partial(_enter, _operator), "Autograd")
LIBRARY.impl(backward, _enter_backward, "Autograd")
