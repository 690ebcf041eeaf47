"""The arguments of a call as two objects: its tensors, and its options before they are checked."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class Call(NamedTuple):
    """The tensors of a forward call.

    Attributes:
        x: the input.
        weight, bias: (C,), or ``None``.
        residual: like ``x``; added before the activation.
        running_mean, running_var: (C,); written in training.
        counter: 0-d; incremented when the running statistics are written.
        valid: which positions count: first the mask as it was given, after the checks a contiguous bool array of
            ``x``'s shape with one channel.
        out: the array for the output; like ``x``.
    """

    x: Array
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    counter: Array | None = None
    valid: Array | None = None
    out: Array | None = None


class Options(NamedTuple):
    """The options of a forward call, not yet checked; :func:`gpu_bn.batch_norm` describes each.

    ``activation`` is a name, an ``Activation`` or ``None``; inside :mod:`gpu_bn.nn` it is an ``Activation``.
    """

    training: bool = False
    momentum: Any = 0.1
    eps: float = 1e-5
    activation: Any = None
    channel_axis: int = 1
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None
