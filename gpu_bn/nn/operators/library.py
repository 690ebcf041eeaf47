"""The operators ``torch.ops.gpu_bn``, with kernels and fakes; :mod:`gpu_bn.nn.operators.autograd` has the derivatives.

``train`` uses the batch's statistics and updates the running statistics; ``infer`` uses the running statistics;
``backward`` computes the gradients of both. A forward operator returns ``y`` and two tensors that ``backward`` needs in
addition to the inputs:

- ``statistics``, float64, rows of length C: the means, one row for each ghost batch; the variances, likewise; in
  training with a mask, the counts, likewise; with renormalisation, a row of ``r`` and a row of ``d``. They are copies:
  gradients do not depend on later updates of the running statistics, by other calls or by DistributedDataParallel.
- ``mask``, uint8: the sign bits that a GPU saves in place of the residual; length 0 if there are none.

Outputs share no memory with each other or with an argument.

The operators are entries of a ``torch.library.Library`` rather than ``custom_op``s: a ``custom_op`` that mutates its
arguments may have no gradient formula, and each call costs several times as much.
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
"""The second tag says that the operators accept any strides: a compiler need not restore those of eager mode."""
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # a tensor of torch.func, whose address cannot be read
LIBRARY = torch.library.Library("gpu_bn", "DEF")
NAMES = ("dx", "dweight", "dbias", "dresidual")
NEEDS = {need: frozenset(compress(NAMES, need)) for need in product((False, True), repeat=len(NAMES))}
"""The names of the gradients to compute, by the flags ``need`` of the operator ``backward``."""
TRACKED = ("running_mean", "running_var", "num_batches_tracked")
"""The tensors that a call in training writes."""


# ----------------------------------------------------------------------------------------------------------- kernels
def forward(engine: Backend, call: Call, spec: BatchNormSpec, keep: bool = True) -> tuple[Tensor, Saved]:
    """Compute ``y`` and what the backward call needs, by a backend; write the running statistics and the counter last.

    If one call or launch of the backend writes all three, no error or interrupt can come between them.

    Raises:
        ValueError: a tensor that is written shares memory with another argument.
    """
    tracked, read = (call.running_mean, call.running_var, call.counter), (call.x, call.weight, call.bias, call.residual)
    disjoint = not spec.batch_stats or _are_disjoint(tracked, read)
    if not disjoint:
        by_name = zip(("input", "weight", "bias", "residual"), read, strict=True)
        readable: dict[str, Any] = {name: one for name, one in by_name if one is not None and not is_wrapped(one)}
        aliasing.check_written(dict(zip(TRACKED, tracked, strict=True)), readable)
    at_once = vars(type(engine)).get("forward_at_once")  # not inherited: a subclass may override other methods
    if at_once is not None and disjoint and _is_plain(call, spec):
        result: tuple[Tensor, Saved] | None = at_once(engine, call, spec)
        if result is not None:
            if spec.batch_stats:
                mark_written(tracked)
            return result
    return algorithm.forward(engine, call, spec, keep=keep)


def stays_on_device(momentum: Tensor) -> bool:
    """Tell whether a momentum must not be read: that would wait for a GPU, and compiled code cannot read it."""
    return not momentum.is_cpu or torch.compiler.is_compiling()


def _is_plain(call: Call, spec: BatchNormSpec) -> bool:
    """Tell whether a call has neither mask, ghost batches nor renormalisation, is not empty, and can be counted."""
    plain = call.valid is None and spec.groups == 1 and spec.renorm is None and 0 not in call.x.shape
    return plain and is_countable(call.counter, call.x)


def _are_disjoint(tracked: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Tell whether the address ranges show that no tracked tensor overlaps itself or another tensor; False in doubt."""
    written = [tensor for tensor in tracked if tensor is not None]
    if not written:
        return True
    if not all(tensor.is_contiguous() for tensor in written):
        return False
    bounds = [_bounds(tensor) for tensor in written]
    bounds += {_bounds(tensor) for tensor in others if tensor is not None and not is_wrapped(tensor)}
    bounds.sort()
    return all(current[1] <= following[0] for current, following in pairwise(bounds))


def _bounds(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's address and the address behind its last element."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return start, start + (last + 1) * tensor.element_size()


def is_countable(counter: Tensor | None, x: Tensor) -> bool:
    """Tell whether a kernel on x's device can increment the counter: an aligned int64 there, or ``None``."""
    return counter is None or (
        counter.dtype is torch.int64
        and counter.device == x.device
        and counter.numel() == 1
        and counter.data_ptr() % 8 == 0
    )


def mark_written(tracked: Sequence[Tensor | None]) -> None:
    """Increment the versions of tensors that a kernel wrote, so that autograd rejects graphs that saved them."""
    increment_version([tensor for tensor in tracked if tensor is not None and not tensor.is_inference()])


_ONE = torch.ones((), dtype=torch.float64, device="cpu")


def batch_weight(
    momentum: float | None, momentum_at: Tensor | None, num_batches_tracked: Tensor | None
) -> float | Tensor:
    """Return the weight of this batch in the running update.

    It is ``momentum_at``, a 0-d tensor, else ``momentum``, else 1 / n for the n-th batch or 0 without a counter. A
    value on a GPU stays a tensor there.
    """
    if momentum_at is not None:
        return momentum_at.double() if stays_on_device(momentum_at) else momentum_at.item()
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        return 0.0
    if num_batches_tracked.is_cpu:
        return 1.0 / (num_batches_tracked.item() + 1)
    return torch.add(num_batches_tracked, _ONE).reciprocal()  # two launches; a third would convert the counter


def options(
    batch_stats: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    parameter: float,
    groups: int = 1,
    renorm: Sequence[float] = (),
) -> BatchNormSpec:
    """Return the options of a call; equal options are one object, unless the momentum is a tensor."""
    if isinstance(momentum, Tensor):
        return _options.__wrapped__(batch_stats, momentum, eps, activation, parameter, groups, tuple(renorm))
    return _options(batch_stats, float(momentum), float(eps), activation, float(parameter), groups, tuple(renorm))


@lru_cache(1024)
def _options(
    batch_stats: bool, momentum: Any, eps: float, activation: str, parameter: float, groups: int, renorm: Any
) -> BatchNormSpec:
    return BatchNormSpec(1, batch_stats, momentum, eps, Activation(activation, parameter), groups, renorm or None)


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
    weight_of_batch = batch_weight(momentum, momentum_at, num_batches_tracked)
    spec = options(True, weight_of_batch, eps, activation, parameter, groups, renorm)
    call = Call(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, valid)
    y, saved = forward(registry.backend_for(x), call, spec)
    return _results(x, y, replace(saved, valid=valid))  # saved.valid is None if every position is valid


def with_defaults(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Append the defaults of the arguments of ``train`` that a caller left out."""
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
    return with_promised_strides(y, x), pack_statistics(saved), mask


def pack_statistics(saved: Saved) -> Tensor:
    """Return the tensor ``statistics``, without a copy if it is just the mean and the variance, adjacent in memory."""
    mean, var, count = saved.moments.mean, saved.moments.var, saved.moments.count
    channels = saved.x.shape[saved.spec.axis]
    rows = [mean.double().view(-1, channels), var.double().view(-1, channels)]
    if saved.valid is not None and saved.spec.batch_stats:
        counts = count if isinstance(count, Tensor) else mean.new_full((saved.spec.groups,), count)
        rows.append(counts.view(-1, 1).expand(-1, channels).double())
    rows += [row.view(1, -1) for row in saved.renorm or ()]
    if len(rows) > 2 or torch.compiler.is_compiling():  # in compiled autograd, tensors have no address
        return torch.cat(rows)
    return stack_vectors(mean, var).view(-1, channels)


def stack_vectors(first: Tensor, second: Tensor) -> Tensor:
    """Return two float64 vectors of length L as (2, L), without a copy if they are adjacent in memory."""
    one_storage = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if one_storage and first.is_contiguous() and first.data_ptr() + 8 * len(first) == second.data_ptr():
        return torch.as_strided(first, (2, len(first)), (len(first), 1))
    return torch.stack((first.double(), second.double()))


def vector_for(engine: Backend, vector: Tensor | None) -> Any:
    """Convert weight or bias to the backend's dtype of accumulation, unless its kernels convert vectors themselves."""
    if vector is None or getattr(engine, "converts_vectors", False):
        return vector
    return engine.vector(vector)


def unpack_statistics(
    statistics: Tensor, positions: int, groups: int, counted: bool, renorm: bool
) -> tuple[Moments, tuple[Tensor, Tensor] | None]:
    """Undo :func:`pack_statistics`: return the moments and (r, d). The count is ``positions`` unless ``counted``."""
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
    moments, correction = unpack_statistics(statistics, positions, groups, valid is not None, renorm)
    saved = Saved(
        x=x,
        residual=None if activation == "identity" else residual,
        moments=moments,
        weight=vector_for(engine, weight),
        bias=vector_for(engine, bias),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=bias_dtype,
        has_residual=need[3] or residual is not None,
        spec=options(batch_stats, 0.0, eps, activation, parameter, groups),
        mask=mask if mask.numel() else None,
        valid=valid,
    )
    if correction is not None:
        saved = algorithm.renormalize(saved, *correction)
    dx, dweight, dbias, dresidual = algorithm.backward(engine, dy, saved, NEEDS[tuple(need)])
    return (
        x.new_empty(0) if dx is None else with_promised_strides(dx, x),
        x.new_empty(0) if dweight is None else dweight,
        x.new_empty(0) if dbias is None else dbias,
        x.new_empty(0) if dresidual is None else with_promised_strides(dresidual, x),
    )


def with_promised_strides(result: Tensor, x: Tensor) -> Tensor:
    """Return a result with the strides of ``torch.empty_like(x)``, which the fake operators promise to compilers.

    It is a copy only if ``x`` is expanded or has gaps, and a backend chose other strides.
    """
    if result.stride() == x.stride():
        return result
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


# ------------------------------------------------------------------------------------------------------------- fakes
def _train_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, activation = arguments[0], arguments[3], arguments[9]
    valid, groups, renorm = with_defaults(arguments)[11:14]
    rows = (2 if valid is None else 3) * groups + (2 if renorm else 0)
    return _forward_fake(x, rows, 0 if renorm else mask_length(x, residual, activation, groups))


def _infer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, activation = arguments[0], arguments[3], arguments[7]
    return _forward_fake(x, 2, mask_length(x, residual, activation))


def _forward_fake(x: Tensor, rows: int, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((rows, x.shape[1]), dtype=torch.float64)
    return torch.empty_like(x), statistics, x.new_empty(mask, dtype=torch.uint8)


def mask_length(x: Tensor, residual: Tensor | None, activation: str, groups: int = 1) -> int:
    """Return the number of bytes of the output ``mask``, computed as the backends do, without running a kernel."""
    if residual is None or (x.is_cpu and not getattr(registry.backend_for(x), "keeps_bits", False)):
        return 0
    order = tuple(range(x.dim()))
    if not x.is_contiguous():
        in_memory = memory_order(x.shape, x.stride())
        order = in_memory if groups == 1 or in_memory[0] == 0 else order
    return mask_bytes([x.shape[axis] for axis in order], order.index(1), x.element_size(), activation, groups)


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
    """Define an operator by its schema, its kernel for CPUs and GPUs, and its fake for compilers, and return it."""
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
