"""Training with a mask, in ghost batches or with renormalisation: operators beside ``train`` and ``backward``.

They are apart so that plain calls stay as light as they are. ``valid`` is what :func:`gpu_bn.ops.positions` makes of a
mask; ``mean`` and ``var`` are (groups * C,); ``count`` (groups,), ``r`` and ``d`` (C,) are of length 0 where there are
none. Second derivatives are those of the same transform composed of torch's operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.graph import increment_version

from gpu_bn import dispatch, ops, spec
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.nn import _autograd, _composed, _library

LIBRARY = _library.LIBRARY
for _schema in (
    "train_masked(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
    "float parameter, int groups, float[] renorm) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor count, Tensor r, Tensor d)",
    "backward_masked(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor mean, "
    "Tensor var, Tensor count, Tensor r, Tensor d, ScalarType bias_dtype, float eps, str activation, float parameter, "
    "int groups, bool[] need) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

train = torch.ops.gpu_bn.train_masked.default
backward = torch.ops.gpu_bn.backward_masked.default


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
    num_batches_tracked: Tensor | None,
    mask: Tensor | None,
    groups: int,
    renorm: tuple[float, float] | None,
) -> Tensor:
    """A checked call of :func:`gpu_bn.nn.functional.batch_norm` with any of the last three."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError("mask, virtual_batch_size and renorm do not work under torch.func or in forward mode")
    valid = None if mask is None else ops.positions(mask, input.shape, 1)
    options = (eps, activation.name, activation.parameter)
    if training:
        if not torch.compiler.is_compiling() and _autograd._tracing() is not None:
            raise NotImplementedError(
                "torch.jit.trace and torch.onnx cannot record training with mask, virtual_batch_size or renorm: call "
                "model.eval() first, or use torch.export"
            )
        running = (running_mean, running_var, num_batches_tracked)
        limits = [] if renorm is None else list(renorm)
        y: Tensor = train(input, weight, bias, residual, valid, *running, momentum, *options, groups, limits)[0]
        return y
    assert valid is not None
    valid = torch.empty_like(input[:, :1], dtype=torch.bool).copy_(valid)  # torch.where takes the order of its axes
    if torch.is_grad_enabled():  # the sums of the parameters' gradients must not meet what is hidden
        input = torch.where(valid, input, 0)
        residual = None if residual is None else torch.where(valid, residual, 0)
    if torch.compiler.is_compiling() or _autograd._tracing() is not None:
        y = _composed.batch_norm(input, running_mean, running_var, weight, bias, residual, eps, activation)
    else:
        y = _autograd.call(_library.infer, input, weight, bias, residual, running_mean, running_var, *options)
    return torch.where(valid, y, 0)


# ------------------------------------------------------------------------------------------------- what they compute
def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    groups: int,
    renorm: list[float],
) -> tuple[Tensor, ...]:
    weighs = _library._momentum(momentum, num_batches_tracked)
    options = _spec(weighs, eps, activation, parameter, groups)
    options = replace(options, renorm=spec.check_renorm(tuple(renorm), True, groups)) if renorm else options  # type: ignore[arg-type]
    tensors = (running_mean, running_var, weight, bias, residual)
    y, saved = _library.counted(
        num_batches_tracked, ops.forward, dispatch.serving(x), x, options, *tensors, None, False, valid
    )
    moments = saved.moments
    mean, var = moments.mean.double(), moments.var.double()
    nothing = x.new_empty(0, dtype=torch.float64)
    count = moments.count if isinstance(moments.count, Tensor) else nothing
    r, d = saved.renorm or (nothing, nothing.clone())
    return y, mean, -var if moments.wide else var, count, r, d  # the sign is as in _library


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    r: Tensor,
    d: Tensor,
    bias_dtype: torch.dtype,
    eps: float,
    activation: str,
    parameter: float,
    groups: int,
    need: list[bool],
) -> tuple[Tensor, ...]:
    engine = dispatch.serving(x)
    wide = var.is_cpu and bool(var.signbit().any())
    positions = x.numel() // max(x.shape[1], 1) // groups
    saved = Saved(
        x=x,
        residual=None if activation == "identity" else residual,
        moments=Moments(count if count.numel() else positions, mean, -var if wide else var, wide),
        weight=None if weight is None else engine.vector(weight),
        bias=None if bias is None else engine.vector(bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=bias_dtype,
        has_residual=need[3] or residual is not None,
        spec=_spec(0.0, eps, activation, parameter, groups),
        valid=valid,
    )
    if r.numel():
        saved = ops.renormalized(saved, r, d)
    grads = ops.backward(engine, dy, saved, _library._NEEDS[tuple(need)])
    return tuple([x.new_empty(0) if gradient is None else gradient for gradient in grads])


def _spec(momentum: float | Tensor, eps: float, activation: str, parameter: float, groups: int) -> spec.BatchNormSpec:
    return replace(_library._spec(True, momentum, eps, activation, parameter), groups=groups)


for _operator, _kernel in ((train, _train), (backward, _backward)):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_operator, _kernel, _key)


# ------------------------------------------------------------------------------------------ what they would return
def _train_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, valid, groups, renorm = arguments[0], arguments[4], arguments[-2], arguments[-1]
    sizes = (groups * x.shape[1],) * 2 + (0 if valid is None else groups,) + (x.shape[1] if renorm else 0,) * 2
    return torch.empty_like(x), *(x.new_empty(size, dtype=torch.float64) for size in sizes)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _library.empty_gradients(arguments[1], arguments[2], arguments[11], arguments[-1])


torch.library.register_fake("gpu_bn::train_masked", _train_fake, lib=LIBRARY)
torch.library.register_fake("gpu_bn::backward_masked", _backward_fake, lib=LIBRARY)


# ------------------------------------------------------------------------------------------------------- derivatives
class _Train(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _autograd.require_savable(arguments[:2] if arguments[10] == "identity" else arguments[:4])
        with _autograd._BelowAutograd():
            y, *kept = train(*arguments)
        x, weight, bias, residual, valid = arguments[:5]
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.options = arguments[9:13]
        if ctx.options[1] == "identity":  # whose gradient reads neither
            bias = residual = None
        ctx.save_for_backward(x, weight, bias, residual, valid, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 14
        need = list(ctx.needs_input_grad[:4])
        if dy is not None and any(need):
            result = backward(dy, *ctx.saved_tensors, ctx.bias_dtype, *ctx.options, need)
            gradients[:4] = [gradient if needed else None for gradient, needed in zip(result, need, strict=True)]
        return tuple(gradients)


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.save_for_backward(*arguments[:11])
        ctx.options = arguments[11:]
        ctx.set_materialize_grads(False)
        with _autograd._BelowAutograd():
            return backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, valid, _, _, _, r, d = ctx.saved_tensors
        bias_dtype, eps, activation, parameter, groups, need = ctx.options
        results: list[Tensor | None] = [None] * 17
        wanted = [i for i, gradient in enumerate(incoming) if gradient is not None and need[i]]
        if not wanted:
            return tuple(results)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            if bias is None and need[2]:
                bias = x.new_zeros(x.shape[1], dtype=bias_dtype)
            if residual is None and need[3]:
                residual = torch.zeros_like(x)
            given: list[Any] = [
                None if tensor is None else _autograd._stand_in(tensor, again)
                for tensor in (dy, x, weight, bias, residual)
            ]
            _, x, weight, bias, residual = given
            chosen = Activation(activation, parameter)
            y = _composed.masked_batch_norm(x, weight, bias, residual, eps, chosen, valid, groups, r, d)
            firsts = torch.autograd.grad(y, [given[1 + i] for i in wanted], given[0], create_graph=True)
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


def _enter(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and _autograd._any_requires_grad(*arguments[:4]):
        result = _Train.apply(*arguments)
    else:
        with _autograd._BelowAutograd():
            result = train(*arguments)
    for mutated in arguments[5:8]:
        if mutated is not None and not mutated.is_inference():
            increment_version(mutated)
    return result


def _enter_backward(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and _autograd._any_requires_grad(*arguments[:5]):
        return _Backward.apply(*arguments)
    with _autograd._BelowAutograd():
        return backward(*arguments)


LIBRARY.impl(train, _enter, "Autograd")
LIBRARY.impl(backward, _enter_backward, "Autograd")
