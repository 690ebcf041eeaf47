"""Prepare the calls of the CuPy backend: what each kind of call allocates, copies and launches.

Calls with one signature (:mod:`gpu_bn.backends.cupy.signatures`) differ only in addresses and numbers, so the steps of
the first call serve all of them. Each public function prepares one kind of call. The arguments of a launch are in the
order of the kernel's parameters in ``kernels/cuda``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_bn.backends.cupy.builder import (
    ABSENT,
    Builder,
    Pointer,
    TensorBuilder,
    Vector,
    Vectors,
    codes,
    geometry,
    registers,
)
from gpu_bn.backends.cupy.signatures import FLOAT64, Signature, TensorSignature, VectorSignatures
from gpu_bn.backends.cupy.steps import GIVEN, PreparedCall, Register
from gpu_bn.plan import LaunchPlan

ROWS = ("mean", "var", "weight", "bias")
"""The vectors that a forward call saves, as rows of one array."""
SAVED = GIVEN.weight, GIVEN.bias, GIVEN.mean, GIVEN.var
"""The registers of the saved vectors in later calls."""


# ----------------------------------------------------------------------------------------------------- forward
class ForwardTensors(NamedTuple):
    """The tensors of a forward kernel, in the order of its parameters."""

    x: Pointer
    y: Pointer
    residual: Pointer
    sign_bits: Pointer

    @property
    def variant(self) -> tuple[bool, bool]:
        """The kernel's template arguments RESIDUAL and MASK."""
        return self.residual is not None, self.sign_bits is not None


def forward(
    signature: Signature, batch_stats: bool, residual: TensorSignature | None, out: TensorSignature | None,
    vectors: VectorSignatures, sign_bits: bool,
) -> PreparedCall:  # fmt: skip
    """Prepare a forward call, which returns ``y``, the saved rows, the sign bits and the counts.

    ``sign_bits``: whether sign bits may replace the residual.
    """
    call = TensorBuilder(signature, sign_bits and residual is not None)
    added = call.read(GIVEN.residual, residual)
    y = call.write(GIVEN.out, out) if out else call.output()
    given = call.vectors((GIVEN.weight, GIVEN.bias, GIVEN.running_mean, GIVEN.running_var), vectors)
    has_residual, keeps_bits = residual is not None, call.sign_bytes > 0
    if batch_stats:
        plan = call.plan("forward", (has_residual, keeps_bits), reads=1 + has_residual, sign_bits=keeps_bits)
    else:
        plan = call.plan_once()
    tensors = ForwardTensors(call.x, y, added, call.allocate(call.sign_bytes, np.uint8) if keeps_bits else None)
    call.count_positions()
    rows = call.allocate((len(ROWS), call.statistics))
    if not batch_stats:
        _launch_normalize(call, plan, tensors, given, saves=rows)
    elif plan.tier != "split":
        _launch_forward(call, plan, tensors, given, rows)
    else:
        _launch_stats(call, plan, given, rows)
        saved = _vectors_in(call, rows)
        if call.groups > 1 and given.mean != ABSENT:
            _launch_track(call, saved[2:], given[2:], call.counts, call.groups, call.count)
        _launch_normalize(call, plan, tensors, saved)
    result = call.result(y)
    if batch_stats:
        for running in given.mean, given.var:
            call.result(running.register)
    keeps_residual = has_residual and signature.activation != "identity" and not keeps_bits
    return call.build(result, rows, tensors.sign_bits, call.counts, keeps_residual=keeps_residual, count=call.count)


def stats(signature: Signature) -> PreparedCall:
    """Prepare a call that writes statistics to the given ``rows`` and returns the counts."""
    call = TensorBuilder(signature)
    call.count_positions()
    _launch_stats(call, call.plan_once(), Vectors(ABSENT, ABSENT, ABSENT, ABSENT), GIVEN.rows)
    return call.build(call.counts, count=call.count)


def normalize(
    signature: Signature, residual: TensorSignature | None, out: TensorSignature, saved: VectorSignatures
) -> PreparedCall:
    """Prepare a call that writes ``y`` to the given ``out``, from given statistics."""
    call = TensorBuilder(signature)
    added, y = call.read(GIVEN.residual, residual), call.write(GIVEN.out, out)
    tensors = ForwardTensors(call.x, y, added, None)
    _launch_normalize(call, call.plan_once(), tensors, call.vectors(SAVED, saved))
    call.result(y)
    return call.build()


def track(device: int, channels: int, groups: int, count: int | None, vectors: VectorSignatures) -> PreparedCall:
    """Prepare the update of ``running_mean`` and ``running_var`` by ``mean`` and ``var`` of ghost batches, in order.

    ``count`` is the number of positions of each ghost batch, or ``None`` if ``counts`` are given.
    """
    call = Builder(device, channels)
    given = GIVEN.mean, GIVEN.var, GIVEN.running_mean, GIVEN.running_var
    mean, var, *running = map(call.vector, given, vectors)
    _launch_track(call, (mean, var), running, GIVEN.counts if count is None else None, groups, count or 0)
    for vector in running:
        call.result(vector.register)
    return call.build()


def _launch_forward(
    call: TensorBuilder, plan: LaunchPlan, tensors: ForwardTensors, vectors: Vectors, rows: Register
) -> None:
    """Add the launch that computes statistics, running update and ``y``."""
    kernel = call.on_chip_kernel("forward", plan, *tensors.variant)
    partials, counters = call.exchange(plan)
    call.launch(
        kernel, plan, *tensors, *registers(*vectors), GIVEN.momentum_at, rows, partials, counters,
        codes(*vectors), *geometry(plan, call.groups), GIVEN.momentum, GIVEN.eps, GIVEN.parameter,
    )  # fmt: skip


def _launch_stats(call: TensorBuilder, plan: LaunchPlan, given: Vectors, rows: Register) -> None:
    """Add the launch that writes statistics and parameters to ``rows``, and updates the running statistics.

    With several ghost batches :func:`_launch_track` updates them, because this launch visits them in any order.
    """
    vectors = given if call.groups == 1 else given._replace(mean=ABSENT, var=ABSENT)
    partials, counters = call.exchange(plan)
    call.launch(
        call.kernel("bn_stats_kernel", plan), plan, call.x, *registers(*vectors), GIVEN.momentum_at, rows, partials,
        counters, codes(*vectors), *geometry(plan, call.groups), GIVEN.momentum, *call.selection,
    )  # fmt: skip


def _vectors_in(call: TensorBuilder, rows: Register) -> Vectors:
    """Return the vectors in the saved rows."""
    addresses = (rows, *(call.address(rows, row * call.statistics) for row in range(1, len(ROWS))))
    return Vectors(**{name: Vector(address, FLOAT64.name) for name, address in zip(ROWS, addresses, strict=True)})


def _launch_track(
    call: Builder, moments: Sequence[Vector], running: Sequence[Vector], counts: Pointer, groups: int, count: int
) -> None:
    """Add the launch that updates running statistics by ghost batches in order, with their ``counts`` or ``count``."""
    call.launch_channels(
        "bn_track_kernel", *registers(*moments, *running), GIVEN.momentum_at, counts,
        codes(*running), np.uint32(call.channels), np.uint32(groups), np.float64(count),
        GIVEN.momentum,
    )  # fmt: skip


def _launch_normalize(
    call: TensorBuilder, plan: LaunchPlan, tensors: ForwardTensors, vectors: Vectors, saves: Pointer = None
) -> None:
    """Add the launch that computes ``y`` from statistics, and copies them and the parameters to the rows ``saves``."""
    call.launch(
        call.kernel("bn_normalize_kernel", plan, *tensors.variant), plan, *tensors, *registers(*vectors), saves,
        codes(*vectors), *geometry(plan, call.groups), GIVEN.eps, GIVEN.parameter, *call.selection,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- backward
class BackwardTensors(NamedTuple):
    """The tensors of a backward kernel, in the order of its parameters; it writes the last two."""

    x: Pointer
    dy: Pointer
    residual: Pointer
    sign_bits: Pointer
    dx: Pointer = None
    dresidual: Pointer = None

    def source(self, activation: str) -> str:
        """Return the kernel's template argument FROM: the source of the activation's gradient."""
        if activation == "identity":
            return "DY"
        return "FROM_MASK" if self.sign_bits is not None else "FROM_X" if self.residual is None else "FROM_RESIDUAL"


Gradients = tuple[Vector, Vector]
"""The gradients of weight and bias; absent if they are not needed."""
NO_GRADIENTS = ABSENT, ABSENT


def backward(
    signature: Signature, batch_stats: bool, dy: TensorSignature, residual: TensorSignature | None, sign_bits: bool,
    saved: VectorSignatures, need: frozenset[str], dtypes: tuple[Any, Any],
) -> PreparedCall:  # fmt: skip
    """Prepare a backward call, which returns ``dx``, ``dweight``, ``dbias``, ``dresidual``: ``None`` if not needed."""
    call = TensorBuilder(signature, sign_bits)
    tensors = _read_tensors(call, dy, residual, sign_bits)
    vectors = call.vectors(SAVED, saved)
    dx, dresidual = (call.output() if name in need else None for name in ("dx", "dresidual"))
    weight, bias = (
        Vector(call.allocate(call.channels, dtype), dtype.name) if name in need else ABSENT
        for name, dtype in zip(("dweight", "dbias"), dtypes, strict=True)
    )
    source, gradients = tensors.source(signature.activation), (weight, bias)
    if batch_stats and dx is not None:
        reads, writes = 2 + (residual is not None), 1 + (dresidual is not None)
        plan = call.plan(
            "backward", (source,), backward=True, reads=reads, staged=reads, writes=writes, sign_bits=sign_bits
        )
        if plan.tier == "split":
            sums = _launch_reduce(call, plan, tensors._replace(dresidual=dresidual), vectors, gradients)
            _launch_input(call, plan, tensors._replace(dx=dx), vectors, sums)
        else:
            _launch_backward(call, plan, tensors._replace(dx=dx, dresidual=dresidual), vectors, gradients)
    else:
        tensors, plan = tensors._replace(dx=dx, dresidual=dresidual), call.plan_once()
        if dx is None or gradients != NO_GRADIENTS:
            _launch_reduce(call, plan, tensors, vectors, gradients)
        else:
            _launch_input(call, plan, tensors, vectors)
    return call.build(call.result(dx), weight.register, bias.register, call.result(dresidual))


def backward_reduce(
    signature: Signature, dy: TensorSignature, residual: TensorSignature | None, saved: VectorSignatures,
    dz: TensorSignature | None,
) -> PreparedCall:  # fmt: skip
    """Prepare a call that returns the sums of ``dz`` and ``dz * xhat``, and writes ``dz`` to ``dresidual`` if given."""
    call = TensorBuilder(signature)
    tensors = _read_tensors(call, dy, residual)
    dresidual = None if dz is None else call.write(GIVEN.dresidual, dz)
    vectors = call.vectors(SAVED, saved)
    sums = _launch_reduce(call, call.plan_once(), tensors._replace(dresidual=dresidual), vectors)
    call.result(dresidual)
    return call.build(sums)


def backward_input(
    signature: Signature, dy: TensorSignature, residual: TensorSignature | None, saved: VectorSignatures,
    batch_stats: bool, out: TensorSignature,
) -> PreparedCall:  # fmt: skip
    """Prepare a call that writes the given ``dx``: from the given ``sums``, or without sums for frozen statistics."""
    call = TensorBuilder(signature)
    tensors = _read_tensors(call, dy, residual)._replace(dx=call.write(GIVEN.dx, out))
    vectors = call.vectors(SAVED, saved)
    _launch_input(call, call.plan_once(), tensors, vectors, GIVEN.sums if batch_stats else None)
    call.result(tensors.dx)
    return call.build()


def _read_tensors(
    call: TensorBuilder, dy: TensorSignature, residual: TensorSignature | None, sign_bits: bool = False
) -> BackwardTensors:
    """Return the tensors that a backward kernel reads."""
    bits = GIVEN.sign_bits if sign_bits else None
    return BackwardTensors(call.x, call.read(GIVEN.dy, dy), call.read(GIVEN.residual, residual), bits)


def _launch_backward(
    call: TensorBuilder, plan: LaunchPlan, tensors: BackwardTensors, vectors: Vectors, gradients: Gradients
) -> None:
    """Add the launch that computes all gradients."""
    kernel = call.on_chip_kernel("backward", plan, tensors.source(call.activation))
    partials, counters = call.exchange(plan)
    call.launch(
        kernel, plan, *tensors, *registers(*vectors), *registers(*gradients), partials, counters,
        codes(*vectors, *gradients), *geometry(plan, call.groups), GIVEN.count, GIVEN.eps, GIVEN.parameter,
    )  # fmt: skip


def _launch_reduce(
    call: TensorBuilder,
    plan: LaunchPlan,
    tensors: BackwardTensors,
    vectors: Vectors,
    gradients: Gradients = NO_GRADIENTS,
) -> Register:
    """Add the launch of the sums, the parameters' gradients, and for frozen statistics ``dx``; return the sums.

    With several ghost batches a second launch adds up the parameters' gradients, because the first one visits ghost
    batches in any order.
    """
    size = 2 * call.statistics
    sums = call.allocate(size + call.partial_size(plan))
    partials, counters = call.address(sums, size), call.counters(plan)
    written = gradients if call.groups == 1 else NO_GRADIENTS
    call.launch(
        call.kernel("bn_backward_reduce_kernel", plan, tensors.source(call.activation)), plan, *tensors,
        *registers(*vectors), *registers(*written), sums, partials, counters, codes(*vectors, *written),
        *geometry(plan, call.groups), GIVEN.eps, GIVEN.parameter, *call.selection,
    )  # fmt: skip
    if written != gradients:
        call.launch_channels(
            "bn_add_groups_kernel", sums, *registers(*gradients), codes(*gradients),
            np.uint32(call.channels), np.uint32(call.groups),
        )  # fmt: skip
    return sums


def _launch_input(
    call: TensorBuilder, plan: LaunchPlan, tensors: BackwardTensors, vectors: Vectors, sums: Pointer = None
) -> None:
    """Add the launch that computes ``dx`` from the sums, or without them for frozen statistics."""
    call.launch(
        call.kernel("bn_backward_input_kernel", plan, tensors.source(call.activation)), plan, *tensors,
        *registers(*vectors), sums, codes(*vectors), *geometry(plan, call.groups), GIVEN.count, GIVEN.eps,
        GIVEN.parameter, *call.selection,
    )  # fmt: skip
