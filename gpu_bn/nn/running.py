"""Running statistics: how they are updated by the statistics of a batch, and how updates are turned off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import local
from typing import Any

import torch
from torch import Tensor

from gpu_bn.interrupts import deferred
from gpu_bn.merge import Pool

Tracked = Sequence[Tensor | None]
"""A running mean, a running variance and a counter of batches; each may be ``None``."""


class _Updates(local):
    """The thread's switch for updates of running statistics; ``off`` is true inside :func:`no_tracking`."""

    off = False


updates = _Updates()


@contextmanager
def no_tracking() -> Iterator[None]:
    """Turn off updates of running statistics and batch counters in training, in eager mode only.

    Returns:
        A context manager, for the calls of this thread.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(4)
        >>> with nn.no_tracking():
        ...     y = layer(torch.randn(8, 4))
        >>> layer.num_batches_tracked.item()
        0
    """
    before = updates.off
    updates.off = True
    try:
        yield
    finally:
        updates.off = before


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts for activation checkpointing: the recomputed forward pass updates no statistics.

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


def untracked_statistics(
    mean: Tensor | None, var: Tensor | None, renorm: tuple[float, float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the running statistics of a call that must not update them: copies if it renormalises, else none."""
    return (None, None) if renorm is None or mean is None or var is None else (mean.clone(), var.clone())


@torch.no_grad()
def update_running(tracked: Tracked, momentum: Any, batch: Pool) -> None:
    """Move running statistics towards those of a batch, unless it is empty, and count the batch, without a GPU sync."""
    write(moved_statistics(tracked, momentum, batch))


def moved_statistics(tracked: Tracked, momentum: Any, batch: Pool) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a tracked tensor and its new value; ``momentum`` of ``None`` averages over all batches."""
    mean, var, counter = tracked
    counted = None if counter is None else counter + 1
    pairs = [] if counter is None or counted is None else [(counter, counted)]
    if momentum is None:
        momentum = 0.0 if counted is None else counted.double().reciprocal()
    for running, value in ((mean, batch.mean), (var, batch.unbiased)):
        if running is not None:
            old = running.double()
            new = torch.where(batch.count > 0, (1 - momentum) * old + momentum * value, old)
            pairs.append((running, new.to(running.dtype)))
    return pairs


def write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write new values to tensors, all or none: nothing can interrupt it."""
    targets, values = [old for old, _ in pairs], [new for _, new in pairs]
    if _are_transformed(targets):  # vmap does not support _foreach_copy_
        with nullcontext() if torch.compiler.is_compiling() else deferred():
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
    elif pairs:
        torch._foreach_copy_(targets, values)


def _are_transformed(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a transform of ``torch.func`` wraps some of the tensors."""
    if torch.compiler.is_compiling():  # compiled code cannot inspect wrappers
        return bool(torch._C._are_functorch_transforms_active())
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
