"""Derivatives of the operators in :mod:`gpu_bn.nn.operators.library`, to any order, and calls that need no operator.

The first derivative is the operator ``backward``. The derivative of ``backward`` computes the normalisation by torch
operations and differentiates these twice. Forward-mode differentiation raises an error, because the tangent would be
lost silently.

If only autograd needs to see a call, :func:`call_backend` calls the backend without torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from gpu_bn import algorithm, registry
from gpu_bn.activations import IDENTITY, Activation
from gpu_bn.backends.protocol import Backend, Saved
from gpu_bn.call import Call, Options
from gpu_bn.nn.operators import composition, library
from gpu_bn.nn.operators.library import LIBRARY, backward, infer, train
from gpu_bn.spec import BatchNormSpec

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_is_inference, _is_neg = Tensor.is_inference, Tensor.is_neg
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # a tensor of is_grads_batched=True; else it looks ordinary
is_compiling = torch.compiler.is_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active

PLAIN = frozenset((Tensor, Parameter))
"""The types of ordinary tensors."""
Gradients = Sequence[Tensor | None]


# ------------------------------------------------------------------------------------------------------------- calls
def forward(call: Call, options: Options, groups: int = 1) -> Tensor:
    """Compute ``y`` of a checked call in ``groups`` ghost batches.

    The backend is called directly, unless a compiler, tracer, dispatch mode or tensor subclass has to see an operator.
    """
    momentum, activation, renorm = options.momentum, options.activation, options.renorm or ()
    number, momentum_at = (None, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    rest = (options.eps, activation.name, activation.parameter)
    if forward_ad._current_level < 0 and _is_plain_call(call):
        batch_weight = library.batch_weight(number, momentum_at, call.counter) if options.training else 0.0
        spec = library.options(options.training, batch_weight, *rest, groups, renorm)
        return call_backend(registry.backend_for(call.x), spec, call)
    inputs, running = (call.x, call.weight, call.bias, call.residual), (call.running_mean, call.running_var)
    if not options.training:
        return infer(*inputs, *running, *rest)[0]  # type: ignore[no-any-return]
    return train(*inputs, *running, call.counter, number, *rest, call.valid, groups, list(renorm), momentum_at)[0]  # type: ignore[no-any-return]


def call_backend(engine: Backend, spec: BatchNormSpec, call: Call) -> Tensor:
    """Compute ``y`` by a backend; all tensors are plain, and forward-mode differentiation is not active."""
    x, weight, bias, residual = inputs = (call.x, call.weight, call.bias, call.residual)
    if torch.is_grad_enabled() and _any_requires_grad(*inputs):
        y: Tensor = _apply(x, weight, bias, residual, engine, spec, call)
    else:
        y = library.forward(engine, call, spec, False)[0]
    if spec.batch_stats and not x.is_cpu:  # torch does not see what a GPU kernel writes
        library.mark_written((call.running_mean, call.running_var))
    return y


class _BackendCall(Function):
    """The autograd function of a call by a backend."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        engine: Backend,
        spec: BatchNormSpec,
        call: Call,
    ) -> Tensor:
        identity = spec.activation.is_identity
        require_savable((x, weight) if identity else (x, weight, bias, residual))
        y, saved = library.forward(engine, call, spec)
        if _keeps_output(engine, saved):
            saved = replace(saved, residual=None, mask=y)
        ctx.save_for_backward(x, weight, None if identity else bias, saved.residual, saved.valid, saved.mask)
        bias_dtype = x.dtype if bias is None else bias.dtype
        own = [None if kept is given else kept for kept, given in ((saved.weight, weight), (saved.bias, bias))]
        vectors = (saved.moments, *own, saved.weight_dtype, bias_dtype)
        ctx.engine, ctx.vectors, ctx.has_residual = engine, vectors, saved.has_residual
        ctx.spec, ctx.renorm = spec, saved.renorm
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, bias, residual, valid, mask = ctx.saved_tensors
        moments, own_weight, own_bias, *dtypes = ctx.vectors  # the backend's own copies of weight and bias, or None
        kept = weight if own_weight is None else own_weight, bias if own_bias is None else own_bias
        saved = Saved(x, residual, moments, *kept, *dtypes, ctx.has_residual, ctx.spec, mask, valid, ctx.renorm)  # type: ignore[call-arg]
        return *backend_gradients(ctx.engine, dy, saved, weight, bias, ctx.needs_input_grad), *[None] * 3


def _keeps_output(engine: Any, saved: Saved) -> bool:
    """Tell whether to save y in place of the residual, for a backend that can compute the gradient from y."""
    plain = saved.valid is None and saved.spec.groups == 1 and saved.renorm is None
    possible = plain and saved.residual is not None and hasattr(engine, "keeps_output")
    return possible and engine.keeps_output(saved.spec.activation.name, saved.x.dtype)


def backend_gradients(
    engine: Backend, dy: Tensor, saved: Saved, weight: Tensor | None, bias: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight, bias and residual of a backend's call, ``None`` for those not ``needed``."""

    def gradients(need: list[bool]) -> Gradients:
        if needs_operator(dy, saved.x):
            return _operator_gradients(engine, dy, saved, weight, bias, need)
        return algorithm.backward(engine, dy, saved, library.NEEDS[tuple(need)])

    identity = saved.spec.activation.is_identity
    return _needed_gradients(gradients, dy, list(needed[:4]), identity and saved.valid is None)


_apply = super(Function, _BackendCall).apply
"""``_BackendCall.apply`` without its search for dead wrappers of ``torch.func``, which takes a quarter of its time."""


def _is_default_backend(name: str, device: str) -> bool:
    """Tell whether a backend is the default one for a device's tensors; compiled autograd takes it for a constant."""
    return registry.backend_for(torch.empty(0, device=device)).name == name


# torch.compiler.assume_constant_result does the same, but it imports torch._dynamo, which takes longer than torch.
_is_default_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator_gradients(
    engine: Backend, dy: Tensor, saved: Saved, weight: Tensor | None, bias: Tensor | None, need: list[bool]
) -> Gradients:
    """Return the gradients of a backend's call by the operator ``backward``, which can be differentiated again."""
    spec, x = saved.spec, saved.x
    if spec.axis != 1 or not _is_default_backend(engine.name, x.device.type):
        raise NotImplementedError(f"backend {engine.name!r} has no second derivative: leave backend out")
    mask = x.new_empty(0, dtype=torch.uint8) if saved.mask is None else saved.mask
    tensors = (weight, bias, saved.residual, saved.valid, library.pack_statistics(saved), mask)
    options = (spec.batch_stats, spec.eps, spec.activation.name, spec.activation.parameter, spec.groups)
    return backward(dy, x, *tensors, saved.bias_dtype, *options, saved.renorm is not None, need)  # type: ignore[no-any-return]


def _needed_gradients(
    gradients: Callable[[list[bool]], Gradients], dy: Tensor, need: list[bool], passes: bool
) -> list[Tensor | None]:
    """Return the needed gradients of x, weight, bias and residual; ``passes``: the residual's gradient is ``dy``."""
    dresidual = None
    if need[3] and passes:
        dresidual, need[3] = dy, False
    if not any(need):
        return [None, None, None, dresidual]
    results = [result if needed else None for result, needed in zip(gradients(need), need, strict=True)]
    return results if dresidual is None else [*results[:3], dresidual]


# --------------------------------------------------------------------------------------------------------- operators
class _Forward(Function):
    """The autograd function of ``train`` and ``infer``; ``options`` are those of ``backward``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        operator: Any,
        others: tuple[Any, ...],
        valid: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.identity = options[2] == "identity"  # its gradient reads neither bias nor residual
        require_savable((x, weight) if ctx.identity else (x, weight, bias, residual))
        y, statistics, mask = _call_below_autograd(operator, x, weight, bias, residual, *others)
        ctx.options = (x.dtype if bias is None else bias.dtype, *options)
        if ctx.identity or mask.shape[0]:
            residual = None
        ctx.save_for_backward(x, weight, None if ctx.identity else bias, residual, valid, statistics, mask)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics, mask)
        return y, statistics, mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        kept, need = ctx.saved_tensors, list(ctx.needs_input_grad[:4])

        def gradients(need: list[bool]) -> Gradients:
            return backward(dy, *kept, *ctx.options, need)  # type: ignore[no-any-return]

        return *_needed_gradients(gradients, dy, need, ctx.identity and kept[4] is None), *[None] * 4


class _Backward(Function):
    """The autograd function of the operator ``backward``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments[:8])
        ctx.options = arguments[8:]
        ctx.set_materialize_grads(False)
        return _call_below_autograd(backward, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, valid, statistics, mask = ctx.saved_tensors
        bias_dtype, batch_stats, eps, activation, parameter, groups, renorm, need = ctx.options
        results: list[Tensor | None] = [None] * 16
        wanted = [i for i, gradient in enumerate(incoming) if gradient is not None and need[i]]
        if not wanted:
            return tuple(results)
        masked = mask.shape[0] > 0
        others = (x, weight, bias, None, valid, statistics, mask, *ctx.options[:-1], [False, False, False, True])
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if bias is None and need[2]:
                bias = x.new_zeros(x.shape[1], dtype=bias_dtype)
            if residual is None and need[3]:
                residual = torch.zeros_like(x)
            views: list[Any] = [
                None if tensor is None else _differentiable_view(tensor, create_graph)
                for tensor in (dy, x, weight, bias, residual)
            ]
            dy, x, weight, bias, residual = views
            applied = IDENTITY if masked else Activation(activation, parameter)
            if valid is None and groups == 1 and not renorm:
                mean, var = (None, None) if batch_stats else statistics
                y = composition.batch_norm(x, mean, var, weight, bias, residual, eps, applied)
            else:
                correction = (statistics[-2], statistics[-1]) if renorm else None
                masked_call = Call(x, weight, bias, residual, valid=valid)
                y = composition.masked_batch_norm(masked_call, eps, applied, groups, correction)
            if masked:
                dy = _Masked.apply(dy, others)
            firsts = torch.autograd.grad(y, [views[1 + i] for i in wanted], dy, create_graph=True)
            inputs = [i for i, needed in enumerate(ctx.needs_input_grad[:5]) if needed]
            seconds = torch.autograd.grad(
                firsts,
                [views[i] for i in inputs],
                [incoming[i] for i in wanted],
                create_graph=create_graph,
                allow_unused=True,
            )
        for i, second in zip(inputs, seconds, strict=True):
            results[i] = second
        return tuple(results)


class _Masked(Function):
    """The gradient dz of the activation's input, from dy and the sign bits; linear in dy, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, others: tuple[Any, ...]) -> Tensor:
        ctx.others = others
        return _call_below_autograd(backward, dy, *others)[3]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Any, None]:
        return _Masked.apply(incoming[0], ctx.others), None


def _differentiable_view(tensor: Tensor, create_graph: bool) -> Tensor:
    """Return a view of a tensor that requires a gradient; with ``create_graph`` it stays connected to its graph."""
    return tensor.view_as(tensor) if create_graph and tensor.requires_grad else tensor.detach().requires_grad_()


def _train_autograd(*arguments: Any) -> Any:
    arguments = library.with_defaults(arguments)
    tracked, (eps, activation, parameter, valid, groups, renorm) = arguments[4:7], arguments[8:14]
    options = (True, eps, activation, parameter, groups, bool(renorm))
    result = _forward_autograd(train, arguments[:4], arguments[4:], valid, options)
    library.mark_written(tracked)
    return result


def _infer_autograd(*arguments: Any) -> Any:
    return _forward_autograd(infer, arguments[:4], arguments[4:], None, (False, *arguments[6:9], 1, False))


def _forward_autograd(
    operator: Any, inputs: tuple[Any, ...], others: Any, valid: Tensor | None, options: tuple[Any, ...]
) -> Any:
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs
    ):
        raise NotImplementedError(
            "torch.ops.gpu_bn has no forward-mode derivative; gpu_bn.nn.functional.batch_norm has"
        )
    if torch.is_grad_enabled() and _any_requires_grad(*inputs):
        return _Forward.apply(*inputs, operator, others, valid, options)
    return _call_below_autograd(operator, *inputs, *others)


def _backward_autograd(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and _any_requires_grad(*arguments[:5]):
        return _Backward.apply(*arguments)
    return _call_below_autograd(backward, *arguments)


def _call_below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator below autograd."""
    with _BelowAutograd():
        return operator(*arguments)


def require_savable(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise torch's error if autograd would have to save an inference tensor, before anything has changed."""
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            with torch.enable_grad():
                tensor * torch.ones((), device=tensor.device, requires_grad=True)  # the product would save the tensor


def _is_plain_call(arguments: tuple[Any, ...]) -> bool:
    """Tell whether all tensors of a call are ordinary and nothing intercepts it."""
    return not is_intercepted() and not any(map(_is_special, arguments))


def is_intercepted() -> bool:
    """Tell whether a compiler, a tracer, a dispatch mode or a ``torch.func`` transform is active."""
    return is_compiling() or dispatch_modes() > 0 or tracing_state() is not None or transforms_active()


def plain_tensors(call: Call, options: Options) -> tuple[list[Tensor], list[Tensor], bool] | None:
    """Return a call's tensors, the tensors that it writes, and whether it is differentiated; ``None`` if not plain.

    The tensors: x, residual, weight, bias, running mean, running variance and counter, if they are not ``None``.
    """
    x, weight, bias, residual, mean, var, counter, _, _ = call
    if type(options.eps) is not float or not 0.0 < options.eps < inf:
        return None
    tensors = [tensor for tensor in (x, residual, weight, bias, mean, var, counter) if tensor is not None]
    if not PLAIN.issuperset(map(type, tensors)) or any(map(_is_neg, tensors)):
        return None
    training, differentiated = options.training, torch.is_grad_enabled()
    if mean is None or var is None:
        if not training or mean is not var:
            return None
    elif differentiated and (mean.requires_grad or var.requires_grad):
        return None
    differentiated = differentiated and _any_requires_grad(x, weight, bias, residual)
    written = [tensor for tensor in (mean, var, counter) if tensor is not None] if training else []
    saved = [tensor for tensor in call[:4] if tensor is not None] if differentiated else []
    if any(map(_is_inference, (*saved, *written))):
        return None  # autograd cannot save an inference tensor, and nothing may write to it
    return tensors, written, differentiated


def needs_operator(dy: Tensor, x: Tensor) -> bool:
    """Tell whether gradients will be differentiated again, something intercepts the call, or tensors are special."""
    return torch.is_grad_enabled() or is_intercepted() or _is_batched(dy) or not (is_plain(dy) and is_plain(x))


def is_plain(tensor: Any) -> bool:
    """Tell whether a tensor is ordinary: no subclass, on a CPU or a CUDA GPU, and without torch's negative bit."""
    return type(tensor) in PLAIN and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()


def _is_special(argument: Any) -> bool:
    """Tell whether an argument is a tensor that is not ordinary."""
    return isinstance(argument, Tensor) and not is_plain(argument)


for _operator, _kernel in ((train, _train_autograd), (infer, _infer_autograd), (backward, _backward_autograd)):
    LIBRARY.impl(_operator, _kernel, "Autograd")
