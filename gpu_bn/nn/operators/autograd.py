"""Derivatives of the operators in :mod:`gpu_bn.nn.operators.library`, to any order, and calls that need no operator.

The first derivative is the operator ``backward``. Its own composes the transform of torch's operations and
differentiates that twice. Forward-mode differentiation is refused: it would lose the tangent without a word.

Where nothing but autograd is to see a call, it goes to its backend without torch's dispatcher (:func:`direct`).
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
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched=True; an ordinary tensor to all else
is_compiling = torch.compiler.is_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active

PLAIN = frozenset((Tensor, Parameter))
"""The types of ordinary tensors."""
Gradients = Sequence[Tensor | None]


# ------------------------------------------------------------------------------------------------------------- calls
def forward(call: Call, options: Options, groups: int = 1) -> Tensor:
    """Compute ``y`` of a checked call: by the operator if something watches, else by the backend itself.

    Compilers, tracers, dispatch modes and subclasses of tensors see the operator.
    """
    momentum, activation, renorm = options.momentum, options.activation, options.renorm or ()
    number, at = (None, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    rest = (options.eps, activation.name, activation.parameter)
    if forward_ad._current_level < 0 and _plain(call):
        momentum = library.batch_weight(number, at, call.counter) if options.training else 0.0
        spec = library.options(options.training, momentum, *rest, groups, renorm)
        return direct(registry.backend_for(call.x), spec, call)
    inputs, running = (call.x, call.weight, call.bias, call.residual), (call.running_mean, call.running_var)
    if not options.training:
        return infer(*inputs, *running, *rest)[0]  # type: ignore[no-any-return]
    return train(*inputs, *running, call.counter, number, *rest, call.valid, groups, list(renorm), at)[0]  # type: ignore[no-any-return]


def direct(engine: Backend, spec: BatchNormSpec, call: Call) -> Tensor:
    """Compute ``y`` by a backend, for arguments known to be plain, outside forward-mode differentiation."""
    x, weight, bias, residual = inputs = (call.x, call.weight, call.bias, call.residual)
    if torch.is_grad_enabled() and _any_requires_grad(*inputs):
        y: Tensor = _apply(x, weight, bias, residual, engine, spec, call)
    else:
        y = library.forward(engine, call, spec, False)[0]
    if spec.batch_stats and not x.is_cpu:  # which torch has not seen
        library.mark_written((call.running_mean, call.running_var))
    return y


class _Direct(Function):
    """A call by a backend of which something is differentiated."""

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
        moments, own_weight, own_bias, *dtypes = ctx.vectors
        kept = weight if own_weight is None else own_weight, bias if own_bias is None else own_bias
        saved = Saved(x, residual, moments, *kept, *dtypes, ctx.has_residual, ctx.spec, mask, valid, ctx.renorm)  # type: ignore[call-arg]

        return *gradients_of(ctx.engine, dy, saved, weight, bias, ctx.needs_input_grad), *[None] * 3


def _keeps_output(engine: Any, saved: Saved) -> bool:
    """Whether to keep y in place of the residual: a backend tells the gradient of a plain call from it."""
    plain = saved.valid is None and saved.spec.groups == 1 and saved.renorm is None
    chosen = plain and saved.residual is not None and hasattr(engine, "keeps_output")
    return chosen and engine.keeps_output(saved.spec.activation.name, saved.x.dtype)


def gradients_of(
    engine: Backend, dy: Tensor, saved: Saved, weight: Tensor | None, bias: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the needed gradients of x, weight, bias and residual, of a call by a backend."""

    def gradients(need: list[bool]) -> Gradients:
        if needs_operator(dy, saved.x):
            return _by_operator(engine, dy, saved, weight, bias, need)
        return algorithm.backward(engine, dy, saved, library.NEEDS[tuple(need)])

    identity = saved.spec.activation.is_identity
    return _wanted(gradients, dy, list(needed[:4]), identity and saved.valid is None)


_apply = super(Function, _Direct).apply
"""``_Direct.apply`` without its search for leftovers of ``torch.func``, which takes a quarter of its time."""


def _serves(name: str, device: str) -> bool:
    """Whether a backend serves a device's tensors unless another is asked for; compiled autograd takes the answer."""
    return registry.backend_for(torch.empty(0, device=device)).name == name


# torch.compiler.assume_constant_result does the same, but it imports torch._dynamo, which takes longer than torch.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_operator(
    engine: Backend, dy: Tensor, saved: Saved, weight: Tensor | None, bias: Tensor | None, need: list[bool]
) -> Gradients:
    """Return the gradients of a direct call by the operator, which can be differentiated again."""
    spec, x = saved.spec, saved.x
    if spec.axis != 1 or not _serves(engine.name, x.device.type):
        raise NotImplementedError(f"backend {engine.name!r} has no second derivative: leave backend out")
    mask = x.new_empty(0, dtype=torch.uint8) if saved.mask is None else saved.mask
    options = (spec.batch_stats, spec.eps, spec.activation.name, spec.activation.parameter, spec.groups)
    return backward(  # type: ignore[no-any-return]
        dy, x, weight, bias, saved.residual, saved.valid, library.packed(saved), mask, saved.bias_dtype, *options,
        saved.renorm is not None, need,
    )  # fmt: skip


def _wanted(
    gradients: Callable[[list[bool]], Gradients], dy: Tensor, need: list[bool], passes: bool
) -> list[Tensor | None]:
    """The gradients that are needed; ``passes``: the residual's is ``dy`` itself."""
    dresidual = None
    if need[3] and passes:
        dresidual, need[3] = dy, False
    if not any(need):
        return [None, None, None, dresidual]
    found = [result if needed else None for result, needed in zip(gradients(need), need, strict=True)]
    return found if dresidual is None else [*found[:3], dresidual]


# --------------------------------------------------------------------------------------------------------- operators
class _Forward(Function):
    """An operator ``train`` or ``infer``, where something is differentiated; ``options`` are those of ``backward``."""

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
        ctx.identity = options[2] == "identity"  # whose gradient reads neither bias nor residual
        require_savable((x, weight) if ctx.identity else (x, weight, bias, residual))
        y, statistics, mask = _below(operator, x, weight, bias, residual, *others)
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

        return *_wanted(gradients, dy, need, ctx.identity and kept[4] is None), *[None] * 4


class _Backward(Function):
    """The operator ``backward``, where it is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments[:8])
        ctx.options = arguments[8:]
        ctx.set_materialize_grads(False)
        return _below(backward, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, valid, statistics, mask = ctx.saved_tensors
        bias_dtype, batch_stats, eps, activation, parameter, groups, renorm, need = ctx.options
        results: list[Tensor | None] = [None] * 16
        wanted = [i for i, gradient in enumerate(incoming) if gradient is not None and need[i]]
        if not wanted:
            return tuple(results)
        masked = mask.shape[0] > 0
        slope = (x, weight, bias, None, valid, statistics, mask, *ctx.options[:-1], [False, False, False, True])
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            if bias is None and need[2]:
                bias = x.new_zeros(x.shape[1], dtype=bias_dtype)
            if residual is None and need[3]:
                residual = torch.zeros_like(x)
            given: list[Any] = [
                None if tensor is None else _stand_in(tensor, again) for tensor in (dy, x, weight, bias, residual)
            ]
            dy, x, weight, bias, residual = given
            chosen = IDENTITY if masked else Activation(activation, parameter)
            if valid is None and groups == 1 and not renorm:
                mean, var = (None, None) if batch_stats else statistics
                y = composition.batch_norm(x, mean, var, weight, bias, residual, eps, chosen)
            else:
                limits = (statistics[-2], statistics[-1]) if renorm else None
                masked_call = Call(x, weight, bias, residual, valid=valid)
                y = composition.masked_batch_norm(masked_call, eps, chosen, groups, limits)
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
        return _below(backward, dy, *slope)[3]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Any, None]:
        return _Masked.apply(incoming[0], ctx.slope), None


def _stand_in(tensor: Tensor, again: bool) -> Tensor:
    """A tensor to differentiate by: part of the graph if that is to be differentiated once more."""
    return tensor.view_as(tensor) if again and tensor.requires_grad else tensor.detach().requires_grad_()


def _enter_train(*given: Any) -> Any:
    arguments = library.completed(given)
    tracked, (eps, activation, parameter, valid, groups, renorm) = arguments[4:7], arguments[8:14]
    options = (True, eps, activation, parameter, groups, bool(renorm))
    result = _enter(train, arguments[:4], arguments[4:], valid, options)
    library.mark_written(tracked)
    return result


def _enter_infer(*arguments: Any) -> Any:
    return _enter(infer, arguments[:4], arguments[4:], None, (False, *arguments[6:9], 1, False))


def _enter(operator: Any, inputs: tuple[Any, ...], others: Any, valid: Tensor | None, options: tuple[Any, ...]) -> Any:
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    if torch.is_grad_enabled() and _any_requires_grad(*inputs):
        return _Forward.apply(*inputs, operator, others, valid, options)
    return _below(operator, *inputs, *others)


def _enter_backward(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and _any_requires_grad(*arguments[:5]):
        return _Backward.apply(*arguments)
    return _below(backward, *arguments)


def _below(operator: Any, *arguments: Any) -> Any:
    """Call an operator below autograd."""
    with _BelowAutograd():
        return operator(*arguments)


def require_savable(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise what torch raises for tensors of inference mode in a graph, but before anything has changed."""
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            with torch.enable_grad():
                tensor * torch.ones((), device=tensor.device, requires_grad=True)  # which would save it


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether all arguments are ordinary tensors and nothing watches the call."""
    return not watched() and not any(map(_is_odd, arguments))


def watched() -> bool:
    """Whether a compiler, a tracer, a mode or a transform wants to see the operator."""
    return is_compiling() or dispatch_modes() > 0 or tracing_state() is not None or transforms_active()


def plain_parts(call: Call, options: Options) -> tuple[list[Tensor], list[Tensor], bool] | None:
    """Return a call's tensors, those that it writes, and whether it is differentiated; ``None`` if it is not plain.

    The tensors: x, residual, weight, bias, running mean and variance, counter; no absent ones.
    """
    x, weight, bias, residual, mean, var, counter, _, _ = call
    if type(options.eps) is not float or not 0.0 < options.eps < inf:
        return None
    given = [one for one in (x, residual, weight, bias, mean, var, counter) if one is not None]
    if not PLAIN.issuperset(map(type, given)) or any(map(_is_neg, given)):
        return None
    training, grows = options.training, torch.is_grad_enabled()
    if mean is None or var is None:
        if not training or mean is not var:
            return None
    elif grows and (mean.requires_grad or var.requires_grad):
        return None
    grows = grows and _any_requires_grad(x, weight, bias, residual)
    tracked = [one for one in (mean, var, counter) if one is not None] if training else []
    kept = tracked if not grows else given if training else [one for one in call[:4] if one is not None]
    if any(map(_is_inference, kept)):
        return None  # such a tensor can neither be kept nor be written
    return given, tracked, grows


def needs_operator(dy: Tensor, x: Tensor) -> bool:
    """Whether gradients are to be differentiated again, something watches, or tensors are not ordinary."""
    return torch.is_grad_enabled() or watched() or _is_batched(dy) or not (is_plain(dy) and is_plain(x))


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


for _operator, _entrance in ((train, _enter_train), (infer, _enter_infer), (backward, _enter_backward)):
    LIBRARY.impl(_operator, _entrance, "Autograd")
