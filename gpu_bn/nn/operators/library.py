"""The operators ``torch.ops.gpu_bn``: their kernels and fakes; :mod:`gpu_bn.nn.operators.autograd` differentiates them.

``train`` uses the batch's statistics and updates running ones; ``infer`` uses running ones; ``backward`` serves both.
A forward operator returns ``y`` and what ``backward`` needs besides its inputs:

- ``statistics``, float64, rows of C: the means used and the variances, a row for each ghost batch; with a mask the
  counts of the ghost batches; with renormalisation ``r`` and ``d``. They are copies: nothing that is done to the
  running statistics later, by another forward call or by DistributedDataParallel, changes a gradient.
- ``mask``, bits that a GPU keeps in place of a residual; of length 0 where it keeps none, as on a CPU.

Outputs share no memory with each other or with an argument.

The operators are plain entries of a ``torch.library.Library`` rather than ``custom_op``s: those that mutate their
arguments may have no gradient formula there, and each call costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import compress, pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gpu_bn import algorithm, aliasing, registry
from gpu_bn.activations import Activation
from gpu_bn.backends.layout import memory_order
from gpu_bn.backends.protocol import Backend, Moments, Saved
from gpu_bn.backends.sign_bits import mask_bytes
from gpu_bn.call import Call
from gpu_bn.spec import BatchNormSpec

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
"""The second: any strides serve, so that a compiler need not copy arguments into those of eager code."""
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # it has left torch.func; its memory is not to be seen
LIBRARY = torch.library.Library("gpu_bn", "DEF")
NAMES = ("dx", "dweight", "dbias", "dresidual")
NEEDS = {need: frozenset(compress(NAMES, need)) for need in product((False, True), repeat=len(NAMES))}
TRACKED = ("running_mean", "running_var", "num_batches_tracked")
"""The tensors that a call in training writes."""


# ------------------------------------------------------------------------------------------------- what they compute
def forward(engine: Backend, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Tensor, Saved]:
    """Compute ``y`` and what the backward call needs, by a backend; the statistics and the counter are written last.

    Where one call or launch of a backend writes all three, no error or interrupt comes between them.

    Raises:
        ValueError: what is written shares memory with another argument.
    """
    tracked, read = (call.running_mean, call.running_var, call.counter), (call.x, call.weight, call.bias, call.residual)
    apart = not spec.batch_stats or _are_apart(tracked, read)
    if not apart:
        named = zip(("input", "weight", "bias", "residual"), read, strict=True)
        seen: dict[str, Any] = {name: one for name, one in named if one is not None and not is_wrapped(one)}
        aliasing.check_written(dict(zip(TRACKED, tracked, strict=True)), seen)
    at_once = vars(type(engine)).get("forward_at_once")  # not inherited: a subclass may have a forward of its own
    if at_once is not None and apart and _is_plain(call, spec):
        found: tuple[Tensor, Saved] | None = at_once(engine, call, spec)
        if found is not None:
            if spec.batch_stats:
                mark_written(tracked)
            return found
    return algorithm.forward(engine, call, spec, keep=keep)


def unread(momentum: Tensor) -> bool:
    """Tell whether a momentum must not be read: a GPU would be waited for, and compiled code has no number of it."""
    return not momentum.is_cpu or torch.compiler.is_compiling()


def _is_plain(call: Call, spec: BatchNormSpec) -> bool:
    usual = call.valid is None and spec.groups == 1 and spec.renorm is None and 0 not in call.x.shape
    return usual and countable(call.counter, call.x)


def _are_apart(tracked: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Tell quickly whether bounds show that nothing tracked overlaps itself or other tensors, as in most calls."""
    written = [one for one in tracked if one is not None]
    if not written:
        return True
    if not all(one.is_contiguous() for one in written):
        return False
    bounds = [_bounds(one) for one in written]
    bounds += {_bounds(one) for one in others if one is not None and not is_wrapped(one)}
    bounds.sort()
    return all(one[1] <= after[0] for one, after in pairwise(bounds))


def _bounds(one: Tensor) -> tuple[int, int]:
    start = one.data_ptr()
    if one.is_contiguous():
        return start, start + one.nbytes
    last = sum([(size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True)])
    return start, start + (last + 1) * one.element_size()


def countable(counter: Tensor | None, like: Tensor) -> bool:
    """Tell whether a kernel that runs where a tensor is can count batches."""
    return counter is None or (
        counter.dtype is torch.int64
        and counter.device == like.device
        and counter.numel() == 1
        and counter.data_ptr() % 8 == 0
    )


def mark_written(tracked: Sequence[Tensor | None]) -> None:
    """Tell autograd what a kernel has written, so that a graph that has saved it refuses to go backward."""
    increment_version([one for one in tracked if one is not None and not one.is_inference()])


def batch_weight(
    momentum: float | None, momentum_at: Tensor | None, num_batches_tracked: Tensor | None
) -> float | Tensor:
    """Return the weight of this batch in the running update; a tensor on a GPU that alone knows it: nothing waits."""
    if momentum_at is not None:
        return momentum_at.double() if unread(momentum_at) else momentum_at.item()
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        return 0.0
    if num_batches_tracked.is_cpu:
        return 1.0 / (num_batches_tracked.item() + 1)
    return (num_batches_tracked + 1).double().reciprocal()


def options(
    batch_stats: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    parameter: float,
    groups: int = 1,
    renorm: Sequence[float] = (),
) -> BatchNormSpec:
    """Return the options of a call; equal calls share one object."""
    if isinstance(momentum, Tensor):
        return _options.__wrapped__(batch_stats, momentum, eps, activation, parameter, groups, tuple(renorm))
    return _options(batch_stats, float(momentum), float(eps), activation, float(parameter), groups, tuple(renorm))


@lru_cache(1024)
def _options(
    batch_stats: bool, momentum: Any, eps: float, activation: str, parameter: float, groups: int, renorm: Any
) -> BatchNormSpec:
    chosen = Activation(activation, parameter)
    return BatchNormSpec(1, batch_stats, momentum, eps, chosen, groups, renorm or None)


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
    valid: Tensor | None = None,
    groups: int = 1,
    renorm: Sequence[float] = (),
    momentum_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    momentum_of_batch = batch_weight(momentum, momentum_at, num_batches_tracked)
    spec = options(True, momentum_of_batch, eps, activation, parameter, groups, renorm)
    call = Call(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, valid)
    y, saved = forward(registry.backend_for(x), call, spec)
    return _results(x, y, replace(saved, valid=valid))  # saved has no mask that leaves nothing out


def completed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of ``train`` with the defaults of those that a caller left out."""
    return arguments + (None, 1, (), None)[len(arguments) - 11 :]


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
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(x, weight, bias, residual, running_mean, running_var)
    spec = options(False, 0.0, eps, activation, parameter)
    return _results(x, *forward(registry.backend_for(x), call, spec))


def _results(x: Tensor, y: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    mask = x.new_empty(0, dtype=torch.uint8) if saved.mask is None else saved.mask
    return as_promised(y, x), packed(saved), mask


def packed(saved: Saved) -> Tensor:
    """Return the rows of ``statistics``, without a copy if the mean and the variance lie so in memory."""
    mean, var, count = saved.moments.mean, saved.moments.var, saved.moments.count
    channels = saved.x.shape[saved.spec.axis]
    rows = [mean.double().view(-1, channels), var.double().view(-1, channels)]
    if saved.valid is not None and saved.spec.batch_stats:
        counts = count if isinstance(count, Tensor) else mean.new_full((saved.spec.groups,), count)
        rows.append(counts.view(-1, 1).expand(-1, channels).double())
    rows += [row.view(1, -1) for row in saved.renorm or ()]
    if len(rows) > 2 or torch.compiler.is_compiling():  # compiled autograd, where nothing has an address
        return torch.cat(rows)
    return adjacent(mean, var).view(-1, channels)


def adjacent(first: Tensor, second: Tensor) -> Tensor:
    """Stack two float64 vectors to (2, L), without a copy if one lies behind the other."""
    together = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if together and first.is_contiguous() and first.data_ptr() + 8 * len(first) == second.data_ptr():
        return torch.as_strided(first, (2, len(first)), (len(first), 1))
    return torch.stack((first.double(), second.double()))


def as_read(engine: Backend, vector: Tensor | None) -> Any:
    """Return weight or bias in the dtype that a backend's phases read: that of accumulation, unless they convert it."""
    if vector is None or getattr(engine, "converts_vectors", False):
        return vector
    return engine.vector(vector)


def unpacked(
    statistics: Tensor, positions: int, groups: int, counted: bool, renorm: bool
) -> tuple[Moments, tuple[Tensor, Tensor] | None]:
    """Undo :func:`packed`; ``positions`` is the count if there is no row of counts."""
    mean, var = statistics[: 2 * groups].view(2, -1)
    count: Any = statistics[2 * groups : 3 * groups, 0] if counted else positions
    return Moments(count, mean, var), (statistics[-2], statistics[-1]) if renorm else None


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    statistics: Tensor,
    mask: Tensor,
    bias_dtype: torch.dtype,
    batch_stats: bool,
    eps: float,
    activation: str,
    parameter: float,
    groups: int,
    renorm: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    engine = registry.backend_for(x)
    positions = x.numel() // max(x.shape[1], 1) // groups
    moments, limited = unpacked(statistics, positions, groups, valid is not None, renorm)
    saved = Saved(
        x=x,
        residual=None if activation == "identity" else residual,
        moments=moments,
        weight=as_read(engine, weight),
        bias=as_read(engine, bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=bias_dtype,
        has_residual=need[3] or residual is not None,
        spec=options(batch_stats, 0.0, eps, activation, parameter, groups),
        mask=mask if mask.numel() else None,
        valid=valid,
    )
    if limited is not None:
        saved = algorithm.renormalize(saved, *limited)
    dx, dweight, dbias, dresidual = algorithm.backward(engine, dy, saved, NEEDS[tuple(need)])
    return (
        x.new_empty(0) if dx is None else as_promised(dx, x),
        x.new_empty(0) if dweight is None else dweight,
        x.new_empty(0) if dbias is None else dbias,
        x.new_empty(0) if dresidual is None else as_promised(dresidual, x),
    )


def as_promised(result: Tensor, x: Tensor) -> Tensor:
    """Return a result like ``x`` with the strides of ``empty_like``, which the fake operators promise.

    It is a copy only if ``x`` is expanded or has gaps, and a backend chose other strides.
    """
    if result.stride() == x.stride():
        return result
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


# ------------------------------------------------------------------------------------------ what they would return
def _train_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, activation = arguments[0], arguments[3], arguments[9]
    valid, groups, renorm = completed(arguments)[11:14]
    rows = (2 if valid is None else 3) * groups + (2 if renorm else 0)
    return _forward_fake(x, rows, 0 if renorm else mask_length(x, residual, activation, groups))


def _infer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, activation = arguments[0], arguments[3], arguments[7]
    return _forward_fake(x, 2, mask_length(x, residual, activation))


def _forward_fake(x: Tensor, rows: int, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((rows, x.shape[1]), dtype=torch.float64)
    return torch.empty_like(x), statistics, x.new_empty(mask, dtype=torch.uint8)


def mask_length(x: Tensor, residual: Tensor | None, activation: str, groups: int = 1) -> int:
    """Return how many bytes of mask a call keeps, by the backends' own rule, from what is known in advance."""
    if residual is None or (x.is_cpu and not getattr(registry.backend_for(x), "keeps_bits", False)):
        return 0
    order = tuple(range(x.dim()))
    if not x.is_contiguous():
        found = memory_order(x.shape, x.stride())
        order = found if groups == 1 or found[0] == 0 else order
    at = order.index(1)
    return mask_bytes([x.shape[axis] for axis in order], at, x.element_size(), activation, groups)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias_dtype, need = arguments[1], arguments[2], arguments[8], arguments[-1]
    channels = x.shape[1]
    return (
        torch.empty_like(x) if need[0] else x.new_empty(0),
        weight.new_empty(channels) if weight is not None and need[1] else x.new_empty(0),
        x.new_empty(channels, dtype=bias_dtype) if need[2] else x.new_empty(0),
        torch.empty_like(x) if need[3] else x.new_empty(0),
    )


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator by its kernel for CPUs and GPUs, and by its fake, which tells compilers of its outputs."""
    LIBRARY.define(schema, tags=TAGS)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"gpu_bn::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gpu_bn, name).default


train = register(
    "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
    "float parameter, Tensor? valid=None, int groups=1, float[] renorm=[], Tensor? momentum_at=None) "
    "-> (Tensor y, Tensor statistics, Tensor mask)",
    _train,
    _train_fake,
)
infer = register(
    "infer(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "
    "float eps, str activation, float parameter) -> (Tensor y, Tensor statistics, Tensor mask)",
    _infer,
    _infer_fake,
)
backward = register(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? valid, Tensor statistics, "
    "Tensor mask, ScalarType bias_dtype, bool batch_stats, float eps, str activation, float parameter, int groups, "
    "bool renorm, bool[] need) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _backward,
    _backward_fake,
)
