"""The operators ``torch.ops.gpu_bn``: what they compute and what they would return; ``_autograd`` differentiates them.

``train`` uses the batch's statistics and updates running ones; ``infer`` uses running ones; ``backward`` serves both.
A forward operator returns ``y`` and what ``backward`` needs besides its inputs: the mean and variance used, in
float64, and a mask of bits that a backend may keep in place of a residual (of length 0 on the CPU). The statistics
are copies: nothing that is done to the running statistics later, by another forward call or by DistributedDataParallel,
changes a gradient.

The operators are plain entries of a ``torch.library.Library`` rather than ``custom_op``s: those that mutate their
arguments may have no gradient formula there, and each call costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import compress, product
from typing import Any

import torch
from torch import Tensor

from gpu_bn import dispatch, ops
from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.spec import BatchNormSpec

LIBRARY = torch.library.Library("gpu_bn", "DEF")
for _schema in (
    "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
    "float parameter) -> (Tensor y, Tensor mean, Tensor var, Tensor mask)",
    "infer(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "
    "float eps, str activation, float parameter) -> (Tensor y, Tensor mean, Tensor var, Tensor mask)",
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, "
    "Tensor mask, ScalarType bias_dtype, bool batch_stats, float eps, str activation, float parameter, "
    "bool[] need) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

train = torch.ops.gpu_bn.train.default
infer = torch.ops.gpu_bn.infer.default
backward = torch.ops.gpu_bn.backward.default

NAMES = ("dx", "dweight", "dbias", "dresidual")
_NEEDS = {need: frozenset(compress(NAMES, need)) for need in product((False, True), repeat=len(NAMES))}


# ------------------------------------------------------------------------------------------------- what they compute
# Tensors that are not needed are None here; the operators return empty ones in their places.
Forward = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    keep: bool = True,
) -> Forward:
    weighs = _momentum(momentum, num_batches_tracked)
    vectors = (weight, bias, residual, running_mean, running_var)
    numbers = (weighs, eps, activation, parameter)
    return counted(num_batches_tracked, _forward, x, *vectors, True, *numbers, keep)  # type: ignore[no-any-return]


def counted(counter: Tensor | None, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, which is counted, unless it fails; first, for if it cannot be, nothing may change."""
    if counter is None:
        return call(*arguments)
    counter.add_(1)
    try:
        return call(*arguments)
    except BaseException:
        counter.sub_(1)
        raise


def _infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    parameter: float,
    keep: bool = True,
) -> Forward:
    vectors = (weight, bias, residual, running_mean, running_var)
    return _forward(x, *vectors, False, 0.0, eps, activation, parameter, keep)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_stats: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    parameter: float,
    keep: bool,
) -> Forward:
    """``keep``: whether a gradient may be asked for."""
    engine = dispatch.serving(x)
    direct = getattr(engine, "direct_forward", None)
    if direct is not None and x.numel():
        vectors = (weight, bias, residual, running_mean, running_var)
        return *direct(x, *vectors, batch_stats, float(momentum), eps, activation, parameter), None
    spec = _spec(batch_stats, momentum, eps, activation, parameter)
    tensors = (running_mean, running_var, weight, bias, residual)
    y, saved = ops.forward(engine, x, spec, *tensors, None, False, keep=keep)
    mean, var = saved.moments.mean, saved.moments.var
    if mean.dtype is not torch.float64:
        mean, var = mean.double(), var.double()
    # the sign keeps Moments.wide, which only the CPU has
    return y, mean, -var if saved.moments.wide else var, saved.mask


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    bias_dtype: torch.dtype,
    batch_stats: bool,
    eps: float,
    activation: str,
    parameter: float,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    engine = dispatch.serving(x)
    direct = getattr(engine, "direct_backward", None)
    if direct is not None and x.numel():
        vectors = (weight, bias, residual, mean, var)
        results: tuple[Tensor | None, ...] = direct(
            dy, x, *vectors, bias_dtype, batch_stats, eps, activation, parameter, need
        )
        return results
    wide = batch_stats and var.is_cpu and bool(var.signbit().any())
    saved = Saved(
        x=x,
        residual=residual,
        moments=Moments(x.numel() // max(x.shape[1], 1), mean, -var if wide else var, wide),
        weight=None if weight is None else engine.vector(weight),
        bias=None if bias is None else engine.vector(bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=bias_dtype,
        has_residual=need[3] or residual is not None,
        spec=_spec(batch_stats, 0.0, eps, activation, parameter),
        mask=mask if mask is not None and mask.numel() else None,
    )
    return ops.backward(engine, dy, saved, _NEEDS[tuple(need)])


def _momentum(momentum: float | None, num_batches_tracked: Tensor | None) -> float | Tensor:
    """What this batch weighs; for a counter on a GPU a tensor there, so that nothing waits for the device."""
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        return 0.0
    if num_batches_tracked.is_cpu:
        return 1.0 / (int(num_batches_tracked) + 1)
    return (num_batches_tracked + 1).double().reciprocal()


def _spec(batch_stats: bool, momentum: float | Tensor, eps: float, activation: str, parameter: float) -> BatchNormSpec:
    if isinstance(momentum, Tensor):
        return BatchNormSpec(1, batch_stats, momentum, eps, Activation(activation, parameter))
    return _known_spec(batch_stats, momentum, eps, activation, parameter)


@lru_cache(1024)
def _known_spec(batch_stats: bool, momentum: float, eps: float, activation: str, parameter: float) -> BatchNormSpec:
    return BatchNormSpec(1, batch_stats, momentum, eps, Activation(activation, parameter))


KERNELS: dict[Any, Callable[..., Any]] = {train: _train, infer: _infer, backward: _backward}


def _complete(kernel: Callable[..., tuple[Tensor | None, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """An operator's results: empty tensors where the kernel has ``None``."""
    x, dtype = (arguments[1], arguments[1].dtype) if kernel is _backward else (arguments[0], torch.uint8)
    return tuple([x.new_empty(0, dtype=dtype) if result is None else result for result in kernel(*arguments)])


for _operator, _kernel in KERNELS.items():
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_operator, partial(_complete, _kernel), _key)


# ------------------------------------------------------------------------------------------ what they would return
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, activation = arguments[0], arguments[3], arguments[-2]
    mean = x.new_empty(x.shape[1], dtype=torch.float64)
    mask = x.new_empty(_mask_length(x, residual, activation), dtype=torch.uint8)
    return torch.empty_like(x), mean, torch.empty_like(mean), mask


def _mask_length(x: Tensor, residual: Tensor | None, activation: str) -> int:
    """How many bytes of mask the backend keeps; it has ``mask_length`` if it ever keeps any."""
    if x.device.type != "cuda" or residual is None or activation == "identity":
        return 0
    length = getattr(dispatch.serving(x), "mask_length", None)
    return 0 if length is None else length(x, activation)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(arguments[1], arguments[2], arguments[8], arguments[-1])


def empty_gradients(
    x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward operator returns, of those gradients that are needed; the others have length 0."""
    channels = x.shape[1]
    return (
        torch.empty_like(x) if need[0] else x.new_empty(0),
        weight.new_empty(channels) if weight is not None and need[1] else x.new_empty(0),
        x.new_empty(channels, dtype=bias_dtype) if need[2] else x.new_empty(0),
        torch.empty_like(x) if need[3] else x.new_empty(0),
    )


torch.library.register_fake("gpu_bn::train", _forward_fake, lib=LIBRARY)
torch.library.register_fake("gpu_bn::infer", _forward_fake, lib=LIBRARY)
torch.library.register_fake("gpu_bn::backward", _backward_fake, lib=LIBRARY)
