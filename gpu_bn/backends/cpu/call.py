"""One call of kernels: what its arguments are as addresses, and the phases that threads share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpu_bn.activations import ROWS
from gpu_bn.backends.cpu import plans, threads
from gpu_bn.backends.cpu.arrays import Arrays
from gpu_bn.backends.protocol import BackendUnavailableError, Moments, Saved, Sums
from gpu_bn.kernels.cpu import calls_channels, calls_rows
from gpu_bn.kernels.cpu.calls import BIAS, END, FINISH, RUNNING_MEAN, RUNNING_VAR, START, SUM, WEIGHT, WRITE
from gpu_bn.kernels.cpu.compiler import supports_float16
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT32, FLOAT64, SIZES
from gpu_bn.spec import BatchNormSpec

Array = Any
WHICH = {name: at for at, name in enumerate(ROWS)}
Phases = tuple[tuple[int, bool], ...]
IN_TURN: Phases = ((START, False), (SUM, True), (FINISH, False), (WRITE, True), (END, False))
"""The phases of a call, and which of them threads share."""
FUSED: Phases = ((SUM, True), (END, False))
LINE = 64


class Operand(NamedTuple):
    """A tensor as kernels take it; ``given`` is what the caller passed: another array if this is a copy of it."""

    array: Array
    address: int
    step: int
    given: Array


NOTHING = Operand(None, 0, 0, None)


class Parameter(NamedTuple):
    """A per-channel vector as kernels take it."""

    array: Array
    address: int
    double: bool
    given: Array


class Call:
    """A call on a tensor."""

    def __init__(self, arrays: Arrays, x: Array, spec: BatchNormSpec) -> None:
        self.arrays, self.spec = arrays, spec
        self.code = arrays.code(x.dtype)
        if self.code == FLOAT16 and not supports_float16():
            raise BackendUnavailableError("float16 with backend 'cpu' needs a processor that converts it (F16C)")
        self.seen = plans.geometry(tuple(x.shape), arrays.strides(x) or arrays.spacing(x), spec.axis)
        self.x = self._operand(x, read=True)
        self.bytes = SIZES[self.code] * self.seen.runs * self.seen.channels * self.seen.length
        self.past = 2 * self.bytes >= plans.last_cache() * 3 // 4

    def forward(
        self,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        y: Array | None,
        in_place: bool = False,
    ) -> Moments:
        """Write y, if it is given, move the running statistics, and return the statistics used."""
        arrays, spec, seen, code = self.arrays, self.spec, self.seen, self.code
        residual, out = self._operand(residual, read=True), self._operand(y, read=False)
        plan = self._plan((self.x, residual, out), evaluates=not spec.batch_stats)
        kernels = plans.forward_kernels(
            plan.by_rows, code, WHICH[spec.activation.name], residual.array is not None, spec.batch_stats, y is not None
        )
        vectors = [self._parameter(one, read=True) for one in (weight, bias, running_mean, running_var)]
        mean, var = (arrays.empty((seen.channels,), arrays.float64) for _ in range(2))
        arguments = (
            *[one.address for one in (self.x, residual, out)], *[one.step for one in (self.x, residual, out)],
            SIZES[code], *seen[:3], *((plan.folded,) if plan.by_rows else ()), *[one.address for one in vectors],
            _bits(vectors, (WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR)), arrays.address(mean), arrays.address(var),
            int(spec.batch_stats), float(spec.momentum), spec.eps, spec.activation.parameter, int(code == FLOAT64),
            int(self.past and not in_place),
        )  # fmt: skip
        fused = spec.batch_stats and y is not None and plan.group > 0
        self._run(plan, calls_rows.forward if plan.by_rows else calls_channels.forward, fused, kernels, arguments)
        self._copy_back((out, *(vectors[2:] if spec.batch_stats else ())))
        return Moments(seen.runs * seen.length, mean, var)

    def backward(
        self,
        dy: Array,
        saved: Saved,
        sums: bool,
        dx: Array | None,
        dresidual: Array | None,
        dweight: Array | None,
        dbias: Array | None,
        given: Sums | None = None,
    ) -> Sums:
        """Write the gradients that are given, and return the sums, which are computed if ``sums``."""
        arrays, spec, seen, code = self.arrays, self.spec, self.seen, self.code
        residual = self._operand(saved.residual, read=True)
        operands = (
            self.x, residual, self._operand(dy, read=True), self._operand(dx, read=False),
            self._operand(dresidual, read=False),
        )  # fmt: skip
        plan = self._plan(operands, evaluates=False)
        kernels = plans.backward_kernels(
            plan.by_rows, code, WHICH[spec.activation.name], residual.array is not None, sums, dx is not None,
            dresidual is not None,
        )  # fmt: skip
        vectors = [self._parameter(one, read=True) for one in (saved.weight, saved.bias)]
        gradients = [self._parameter(one, read=False) for one in (dweight, dbias)]
        mean, var = (self._parameter(self._double(one), read=True) for one in (saved.moments.mean, saved.moments.var))
        found = arrays.empty((2, seen.channels), arrays.float64)
        if given is not None:
            arrays.assign(found[0], given.dz)
            arrays.assign(found[1], given.dz_xhat)
        at = arrays.address(found)
        arguments = (
            *[one.address for one in operands], *[one.step for one in operands], SIZES[code], *seen[:3],
            *((plan.folded,) if plan.by_rows else ()), *[one.address for one in (*vectors, *gradients)],
            _bits(vectors, (WEIGHT, BIAS)), _bits(gradients, (WEIGHT, BIAS)), mean.address, var.address, at,
            at + 8 * seen.channels, int(spec.batch_stats and (sums or given is not None)),
            as_float(saved.positions), spec.eps, spec.activation.parameter, int(code == FLOAT64),
            int(self.past and dx is not None),
        )  # fmt: skip
        fused = sums and plan.group > 0
        self._run(plan, calls_rows.backward if plan.by_rows else calls_channels.backward, fused, kernels, arguments)
        self._copy_back((*operands[3:], *gradients))
        return Sums(found[0], found[1])

    # -------------------------------------------------------------------------------------------------------- operands
    def _operand(self, array: Array | None, read: bool) -> Operand:
        """A tensor in the input's geometry: a copy if its strides do not fit, or room for one that is written."""
        if array is None:
            return NOTHING
        strides = self.arrays.strides(array)
        step = None if strides is None else plans.step(tuple(array.shape), strides, self.seen)
        if step is not None:
            return Operand(array, self.arrays.address(array), step, array)
        dense = self.arrays.dense(array, self.seen.order)
        if read:
            self.arrays.assign(dense, array)
        return Operand(dense, self.arrays.address(dense), self.seen.channels * self.seen.length, array)

    def _parameter(self, vector: Array | None, read: bool) -> Parameter:
        """A vector of parameters, in float64 if it is not a dense one of float32 or float64."""
        if vector is None:
            return Parameter(None, 0, False, None)
        found, code = vector, self.arrays.code(vector.dtype)
        if code < FLOAT32 or self.arrays.strides(vector) != (1,):
            found, code = self._double(vector, read), FLOAT64
        return Parameter(found, self.arrays.address(found), code == FLOAT64, vector)

    def _double(self, vector: Array, read: bool = True) -> Array:
        """A vector in float64."""
        if self.arrays.code(vector.dtype) == FLOAT64 and self.arrays.strides(vector) == (1,):
            return vector
        found = self.arrays.empty(tuple(vector.shape), self.arrays.float64)
        if read:
            self.arrays.assign(found, vector)
        return found

    def _copy_back(self, written: tuple[Operand | Parameter, ...]) -> None:
        for one in written:
            if one.array is not one.given:
                self.arrays.assign(one.given, one.array)

    # ------------------------------------------------------------------------------------------------------ the kernel
    def _plan(self, operands: tuple[Operand, ...], evaluates: bool) -> plans.Plan:
        runs, channels, length = self.seen[:3]
        dense = runs == 1 or all(one.step == channels * length for one in operands if one.array is not None)
        return plans.plan(runs, channels, length, self.code, dense, evaluates)

    def _run(
        self, plan: plans.Plan, kernel: Any, fused: bool, kernels: tuple[int, ...], arguments: tuple[Any, ...]
    ) -> None:
        """Run a kernel's phases, on several threads if that pays."""
        scratch = np.empty(plan.scratch + 2 * LINE, np.uint8)  # counters first
        counters = -(-int(scratch.__array_interface__["data"][0]) // LINE) * LINE
        scratch[: 2 * LINE] = 0
        if plan.by_rows:
            cut: tuple[int, ...] = (plan.chunks, plan.width)
            head = kernels
        else:
            cut = (plan.group, plan.part_runs, plan.part_channels, plan.part_length)
            head = (int(fused), *kernels)
        arguments = (*head, *arguments, *cut, counters + LINE, counters)
        phases = FUSED if fused else IN_TURN
        count = threads.threads_for(self.bytes)
        if count == 1:
            kernel(sum(phase for phase, _ in phases), *arguments)
            return
        for phase, shared in phases:
            if shared:
                threads.run(lambda phase=phase: kernel(phase, *arguments), count)  # type: ignore[misc]
            else:
                kernel(phase, *arguments)


def as_float(count: Any) -> float:
    """A count, which may be an array of one."""
    return float(count if isinstance(count, int) else count.item())


def _bits(vectors: list[Parameter], bits: tuple[int, ...]) -> int:
    """Which vectors are float64."""
    return sum(bit for bit, one in zip(bits, vectors, strict=True) if one.double)
