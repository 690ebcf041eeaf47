"""Prepare the calls of the CuPy backend: what each allocates, copies and launches, from its signature alone.

Calls of one signature (:mod:`gpu_bn.backends.cupy.signatures`) differ in addresses and numbers only, so that the steps
built for the first serve all. Each function here builds one kind of call; the arguments of a launch stand in the order
of the kernel's in ``kernels/cuda``.
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
"""The vectors that a forward call saves: rows of one array."""
SAVED = GIVEN.weight, GIVEN.bias, GIVEN.mean, GIVEN.var
"""The registers of these vectors in later calls."""


# ----------------------------------------------------------------------------------------------------- forward
class ForwardTensors(NamedTuple):
    """Hold the tensors of a forward kernel in the order of its arguments."""

    x: Pointer
    y: Pointer
    residual: Pointer
    sign_bits: Pointer

    @property
    def variant(self) -> tuple[bool, bool]:
        """The kernels' RESIDUAL and MASK."""
        return self.residual is not None, self.sign_bits is not None


def forward(
    signature: Signature, batch_stats: bool, residual: TensorSignature | None, out: TensorSignature | None,
    vectors: VectorSignatures, sign_bits: bool,
) -> PreparedCall:  # fmt: skip
    """Prepare a forward call, which returns ``y``, the saved rows, the sign bits and the counts.

    ``sign_bits``: whether bits may take the place of the residual.
    """
    call = TensorBuilder(signature, sign_bits and residual is not None)
    added = call.read(GIVEN.residual, residual)
    y = call.write(GIVEN.out, out) if out else call.output()
    given = call.vectors((GIVEN.weight, GIVEN.bias, GIVEN.running_mean, GIVEN.running_var), vectors)
    adds, keeps_bits = residual is not None, call.sign_bytes > 0
    if batch_stats:
        plan = call.plan("forward", (adds, keeps_bits), reads=1 + adds, sign_bits=keeps_bits)
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
        saved = _saved(call, rows)
        if call.groups > 1 and given.mean != ABSENT:
            _launch_track(call, saved[2:], given[2:], call.counts, call.groups, call.count)
        _launch_normalize(call, plan, tensors, saved)
    result = call.result(y)
    if batch_stats:
        for running in given.mean, given.var:
            call.result(running.register)
    keeps_residual = adds and signature.activation != "identity" and not keeps_bits
    return call.build(result, rows, tensors.sign_bits, call.counts, keeps_residual=keeps_residual, count=call.count)


def stats(signature: Signature) -> PreparedCall:
    """Prepare statistics alone, in the ``rows`` given; the call returns the counts."""
    call = TensorBuilder(signature)
    call.count_positions()
    _launch_stats(call, call.plan_once(), Vectors(ABSENT, ABSENT, ABSENT, ABSENT), GIVEN.rows)
    return call.build(call.counts, count=call.count)


def normalize(
    signature: Signature, residual: TensorSignature | None, out: TensorSignature, saved: VectorSignatures
) -> PreparedCall:
    """Prepare ``y`` from statistics, written to the ``out`` given."""
    call = TensorBuilder(signature)
    added, y = call.read(GIVEN.residual, residual), call.write(GIVEN.out, out)
    tensors = ForwardTensors(call.x, y, added, None)
    _launch_normalize(call, call.plan_once(), tensors, call.vectors(SAVED, saved))
    call.result(y)
    return call.build()


def track(device: int, channels: int, groups: int, count: int | None, vectors: VectorSignatures) -> PreparedCall:
    """Prepare the update of ``running_mean`` and ``running_var`` from ``mean`` and ``var``, group after group.

    ``count`` is how many positions each has, or ``None`` for the ``counts`` given.
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
    """Compute statistics, running update and ``y`` in one launch."""
    kernel = call.on_chip_kernel("forward", plan, *tensors.variant)
    partials, counters = call.exchange(plan)
    call.launch(
        kernel, plan, *tensors, *registers(*vectors), GIVEN.momentum_at, rows, partials, counters,
        codes(*vectors), *geometry(plan, call.groups), GIVEN.momentum, GIVEN.eps, GIVEN.parameter,
    )  # fmt: skip


def _launch_stats(call: TensorBuilder, plan: LaunchPlan, given: Vectors, rows: Register) -> None:
    """Compute statistics into ``rows``; save the parameters there; update the running statistics of a single group.

    A launch meets groups in any order; the running statistics of several are updated by :func:`_launch_track`.
    """
    vectors = given if call.groups == 1 else given._replace(mean=ABSENT, var=ABSENT)
    partials, counters = call.exchange(plan)
    call.launch(
        call.kernel("bn_stats_kernel", plan), plan, call.x, *registers(*vectors), GIVEN.momentum_at, rows, partials,
        counters, codes(*vectors), *geometry(plan, call.groups), GIVEN.momentum, *call.selection,
    )  # fmt: skip


def _saved(call: TensorBuilder, rows: Register) -> Vectors:
    """Return the vectors that ``rows`` hold."""
    addresses = (rows, *(call.address(rows, row * call.statistics) for row in range(1, len(ROWS))))
    found = {name: Vector(address, FLOAT64.name) for name, address in zip(ROWS, addresses, strict=True)}
    return Vectors(**found)


def _launch_track(
    call: Builder, moments: Sequence[Vector], running: Sequence[Vector], counts: Pointer, groups: int, count: int
) -> None:
    """Update the running statistics from groups in order, with their ``counts`` or one ``count``."""
    call.launch_channels(
        "bn_track_kernel", *registers(*moments, *running), GIVEN.momentum_at, counts,
        codes(*running), np.uint32(call.channels), np.uint32(groups), np.float64(count),
        GIVEN.momentum,
    )  # fmt: skip


def _launch_normalize(
    call: TensorBuilder, plan: LaunchPlan, tensors: ForwardTensors, vectors: Vectors, saves: Pointer = None
) -> None:
    """Compute ``y`` from statistics, and copy these and the parameters to the rows ``saves``."""
    call.launch(
        call.kernel("bn_normalize_kernel", plan, *tensors.variant), plan, *tensors, *registers(*vectors), saves,
        codes(*vectors), *geometry(plan, call.groups), GIVEN.eps, GIVEN.parameter, *call.selection,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- backward
class BackwardTensors(NamedTuple):
    """Hold the tensors of a backward kernel in the order of its arguments; it writes the last two."""

    x: Pointer
    dy: Pointer
    residual: Pointer
    sign_bits: Pointer
    dx: Pointer = None
    dresidual: Pointer = None

    def source(self, activation: str) -> str:
        """Return what the kernel takes the activation's gradient from."""
        if activation == "identity":
            return "DY"
        return "FROM_MASK" if self.sign_bits is not None else "FROM_X" if self.residual is None else "FROM_RESIDUAL"


Gradients = tuple[Vector, Vector]
"""Of weight and bias; absent if nobody asks for them."""
NO_GRADIENTS = ABSENT, ABSENT


def backward(
    signature: Signature, batch_stats: bool, dy: TensorSignature, residual: TensorSignature | None, sign_bits: bool,
    saved: VectorSignatures, need: frozenset[str], dtypes: tuple[Any, Any],
) -> PreparedCall:  # fmt: skip
    """Prepare a backward call, which returns those of ``dx``, ``dweight``, ``dbias``, ``dresidual`` in ``need``."""
    call = TensorBuilder(signature, sign_bits)
    tensors = _read(call, dy, residual, sign_bits)
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
    """Prepare the sums of ``dz`` and ``dz * xhat``, which it returns, and ``dz`` in the ``dresidual`` given."""
    call = TensorBuilder(signature)
    tensors = _read(call, dy, residual)
    dresidual = None if dz is None else call.write(GIVEN.dresidual, dz)
    vectors = call.vectors(SAVED, saved)
    sums = _launch_reduce(call, call.plan_once(), tensors._replace(dresidual=dresidual), vectors)
    call.result(dresidual)
    return call.build(sums)


def backward_input(
    signature: Signature, dy: TensorSignature, residual: TensorSignature | None, saved: VectorSignatures,
    batch_stats: bool, out: TensorSignature,
) -> PreparedCall:  # fmt: skip
    """Prepare ``dx`` in the array given: from the ``sums`` given, or with frozen statistics from none."""
    call = TensorBuilder(signature)
    tensors = _read(call, dy, residual)._replace(dx=call.write(GIVEN.dx, out))
    vectors = call.vectors(SAVED, saved)
    _launch_input(call, call.plan_once(), tensors, vectors, GIVEN.sums if batch_stats else None)
    call.result(tensors.dx)
    return call.build()


def _read(
    call: TensorBuilder, dy: TensorSignature, residual: TensorSignature | None, sign_bits: bool = False
) -> BackwardTensors:
    """Return the tensors that a backward kernel reads."""
    bits = GIVEN.sign_bits if sign_bits else None
    return BackwardTensors(call.x, call.read(GIVEN.dy, dy), call.read(GIVEN.residual, residual), bits)


def _launch_backward(
    call: TensorBuilder, plan: LaunchPlan, tensors: BackwardTensors, vectors: Vectors, gradients: Gradients
) -> None:
    """Compute all gradients in one launch."""
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
    """Compute the gradients of the parameters, and with frozen statistics ``dx``; return the sums.

    A launch meets groups in any order; the gradients of several are added up by a launch of its own.
    """
    size = 2 * call.statistics
    sums = call.allocate(size + call.partial_size(plan))
    partials, counters = call.address(sums, size), call.counters(plan)
    own = gradients if call.groups == 1 else NO_GRADIENTS
    call.launch(
        call.kernel("bn_backward_reduce_kernel", plan, tensors.source(call.activation)), plan, *tensors,
        *registers(*vectors), *registers(*own), sums, partials, counters, codes(*vectors, *own),
        *geometry(plan, call.groups), GIVEN.eps, GIVEN.parameter, *call.selection,
    )  # fmt: skip
    if own != gradients:
        call.launch_channels(
            "bn_add_groups_kernel", sums, *registers(*gradients), codes(*gradients),
            np.uint32(call.channels), np.uint32(call.groups),
        )  # fmt: skip
    return sums


def _launch_input(
    call: TensorBuilder, plan: LaunchPlan, tensors: BackwardTensors, vectors: Vectors, sums: Pointer = None
) -> None:
    """Compute ``dx`` from the sums, or without them for frozen statistics."""
    call.launch(
        call.kernel("bn_backward_input_kernel", plan, tensors.source(call.activation)), plan, *tensors,
        *registers(*vectors), sums, codes(*vectors), *geometry(plan, call.groups), GIVEN.count, GIVEN.eps,
        GIVEN.parameter, *call.selection,
    )  # fmt: skip
