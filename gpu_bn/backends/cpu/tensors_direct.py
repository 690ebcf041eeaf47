"""The compiled backend for torch's tensors on the CPU, by their addresses and strides.

A call of an operator, forward or backward, is put together once for its shapes, strides, dtypes and options. Later ones
fill in addresses.
"""

from __future__ import annotations

from functools import lru_cache, partial
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_bn.backends.cpu import plans, threads
from gpu_bn.backends.cpu.backend import CpuBackend
from gpu_bn.backends.cpu.call import FUSED, IN_TURN, LINE, WHICH, Phases, as_float
from gpu_bn.backends.cpu.tensors import TorchTensors
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.kernels.cpu import calls_channels, calls_rows
from gpu_bn.kernels.cpu.calls import BIAS, RUNNING_MEAN, RUNNING_VAR, WEIGHT
from gpu_bn.kernels.cpu.compiler import supports_float16
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT64, SIZES
from gpu_bn.spec import FLOAT_DTYPES, BatchNormSpec

CODES = {getattr(torch, name): code for code, name in enumerate(FLOAT_DTYPES)}
EVERY = sum(phase for phase, _ in IN_TURN)


def backend() -> TensorBackend:
    """The backend of torch's tensors, for :func:`gpu_bn.dispatch.load`."""
    return TensorBackend(TorchTensors())


class TensorBackend(CpuBackend):
    """The backend, with a shorter way for calls without ``out``, masks and ghost batches."""

    def forward(
        self,
        x: Tensor,
        spec: BatchNormSpec,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None,
        valid: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Saved]:
        given = (weight, bias, running_mean, running_var)
        known = None
        if out is None and valid is None and spec.groups == 1:
            known = _forward_call(
                x.shape, _strides(x), x.dtype, _strides(residual), spec.axis, spec.batch_stats, spec.activation.name,
                *map(_kind, given),
            )  # fmt: skip
        if known is None:
            return super().forward(x, spec, running_mean, running_var, weight, bias, residual, out, valid, keep)
        y = torch.empty_like(x, requires_grad=False)
        mean, var = (torch.empty(known.channels, dtype=torch.float64) for _ in range(2))
        known.run(
            *map(_address, (x, residual, y)), *known.geometry, *map(_address, given), *known.doubles, mean.data_ptr(),
            var.data_ptr(), known.batch_stats, float(spec.momentum), spec.eps, spec.activation.parameter,
        )  # fmt: skip
        dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        if keep:
            weight, bias = (None if one is None else self.vector(one) for one in (weight, bias))
        return y, Saved(
            x,
            None if spec.activation.is_identity else residual,
            Moments(known.positions, mean, var),
            weight,
            bias,
            *dtypes,
            residual is not None,
            spec,
        )

    def backward(self, dy: Tensor, saved: Saved, need: frozenset[str]) -> tuple[Tensor | None, ...]:
        x, residual, spec = saved.x, saved.residual, saved.spec
        known = None
        if saved.valid is None and spec.groups == 1:
            known = _backward_call(
                x.shape, _strides(x), x.dtype, _strides(residual), _strides(dy), spec.axis, spec.batch_stats,
                spec.activation.name, _kind(saved.weight), _kind(saved.bias), saved.weight_dtype, saved.bias_dtype,
                need,
            )  # fmt: skip
        if known is None:
            return super().backward(dy, saved, need)
        dx, dresidual = (torch.empty_like(x) if name in need else None for name in ("dx", "dresidual"))
        dweight = torch.empty(known.channels, dtype=saved.weight_dtype) if "dweight" in need else None
        dbias = torch.empty(known.channels, dtype=saved.bias_dtype) if "dbias" in need else None
        sums = torch.empty(2 * known.channels, dtype=torch.float64)  # it must live as long as the kernel runs
        at = sums.data_ptr()
        moments = saved.moments
        known.run(
            *map(_address, (x, residual, dy, dx, dresidual)), *known.geometry,
            *map(_address, (saved.weight, saved.bias, dweight, dbias)), *known.doubles, moments.mean.data_ptr(),
            moments.var.data_ptr(), at, at + 8 * known.channels, known.batch_stats, as_float(saved.positions),
            spec.eps, spec.activation.parameter,
        )  # fmt: skip
        return dx, dweight, dbias, dresidual


# --------------------------------------------------------------------------------------------------- operators' calls
KEPT = 1 << 16
"""Bytes of scratch memory that a thread keeps."""


class _Scratch(local):
    """A thread's scratch memory, which begins with the kernels' counters."""

    def __init__(self) -> None:
        self.memory = np.empty(KEPT + 3 * LINE, np.uint8)
        self.at = -(-self.memory.ctypes.data // LINE) * LINE
        first = self.at - self.memory.ctypes.data
        self.counters = self.memory.data[first : first + 2 * LINE]


_scratch = _Scratch()
_ZEROS = bytes(2 * LINE)


class _Call(NamedTuple):
    """All of a call but addresses and numbers."""

    kernel: Any
    head: tuple[int, ...]
    phases: Phases
    geometry: tuple[int, ...]
    doubles: tuple[int, ...]
    batch_stats: int
    positions: int
    channels: int
    last: tuple[int, ...]
    nbytes: int
    scratch: int

    def run(self, *arguments: Any) -> None:
        """Call the kernel, on several threads if that pays."""
        count = threads.threads_for(self.nbytes)
        if count == 1 and self.scratch <= KEPT:
            own = _scratch
            own.counters[:] = _ZEROS
            self.kernel(EVERY, *self.head, *arguments, *self.last, own.at + LINE, own.at)
            return
        scratch = np.empty(self.scratch + 3 * LINE, np.uint8)
        at = -(-scratch.ctypes.data // LINE) * LINE
        scratch[: 3 * LINE] = 0
        arguments = (*self.head, *arguments, *self.last, at + LINE, at)
        for phase, shared in self.phases if count > 1 else ((EVERY, False),):
            if shared:
                threads.run(partial(self.kernel, phase, *arguments), count)
            else:
                self.kernel(phase, *arguments)


def _kind(vector: Tensor | None) -> Any:
    """What matters of a vector of parameters."""
    return None if vector is None else vector.dtype if _strides(vector) == (1,) else "apart"


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """A tensor's strides; none if its memory does not hold its numbers."""
    return None if tensor is None else TorchTensors.strides(tensor) or ()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(1024)
def _forward_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    residual: tuple[int, ...] | None,
    axis: int,
    batch_stats: bool,
    activation: str,
    *vectors: Any,
) -> _Call | None:
    seen = _seen(shape, strides, dtype, axis, (strides, residual, _like(shape, strides)), vectors)
    if seen is None:
        return None
    geometry, steps, code, dense = seen
    plan = plans.plan(*geometry[:3], code, dense, not batch_stats)
    kernels = plans.forward_kernels(plan.by_rows, code, WHICH[activation], residual is not None, batch_stats, True)
    fused = batch_stats and plan.group > 0
    doubles = _bits(vectors, (WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR))
    kernel = calls_rows.forward if plan.by_rows else calls_channels.forward
    return _made(kernel, kernels, fused, plan, geometry, steps, code, (doubles,), batch_stats)


@lru_cache(1024)
def _backward_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    residual: tuple[int, ...] | None,
    dy: tuple[int, ...],
    axis: int,
    batch_stats: bool,
    activation: str,
    weight: Any,
    bias: Any,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    need: frozenset[str],
) -> _Call | None:
    dx, dresidual = (_like(shape, strides) if name in need else None for name in ("dx", "dresidual"))
    tensors = (strides, residual, dy, dx, dresidual)
    gradients = (weight_dtype if "dweight" in need else None, bias_dtype if "dbias" in need else None)
    seen = _seen(shape, strides, dtype, axis, tensors, (weight, bias, *gradients))
    if seen is None or not need or (dresidual is not None and activation == "identity"):
        return None
    geometry, steps, code, dense = seen
    plan = plans.plan(*geometry[:3], code, dense, False)
    sums = "dweight" in need or "dbias" in need or (dx is not None and batch_stats)
    kernels = plans.backward_kernels(
        plan.by_rows, code, WHICH[activation], residual is not None, sums, dx is not None, dresidual is not None
    )
    fused = sums and plan.group > 0
    doubles = _bits((weight, bias), (WEIGHT, BIAS)), _bits(gradients, (WEIGHT, BIAS))
    kernel = calls_rows.backward if plan.by_rows else calls_channels.backward
    return _made(kernel, kernels, fused, plan, geometry, steps, code, doubles, batch_stats and sums)


def _like(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of what torch makes like a tensor."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride() if strides else strides


def _seen(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    axis: int,
    tensors: tuple[tuple[int, ...] | None, ...],
    vectors: tuple[Any, ...],
) -> tuple[plans.Geometry, tuple[int, ...], int, bool] | None:
    """How kernels see the tensors of a call, if they can without copies."""
    code = CODES[dtype]
    if 0 in shape or () in tensors or (code == FLOAT16 and not supports_float16()):
        return None
    if any(vector not in (None, torch.float32, torch.float64) for vector in vectors):
        return None
    seen = plans.geometry(tuple(shape), strides, axis)
    found = [0 if one is None else plans.step(tuple(shape), one, seen) for one in tensors]
    steps = tuple([step for step in found if step is not None])
    if len(steps) < len(found):
        return None
    row = seen.channels * seen.length
    dense = seen.runs == 1 or all(step == row for step, one in zip(steps, tensors, strict=True) if one is not None)
    return seen, steps, code, dense


def _bits(vectors: tuple[Any, ...], bits: tuple[int, ...]) -> int:
    return sum(bit for bit, one in zip(bits, vectors, strict=True) if one is torch.float64)


def _made(
    kernel: Any,
    kernels: tuple[int, ...],
    fused: bool,
    plan: plans.Plan,
    seen: plans.Geometry,
    steps: tuple[int, ...],
    code: int,
    doubles: tuple[int, ...],
    batch_stats: bool,
) -> _Call:
    size = SIZES[code]
    nbytes = size * seen.runs * seen.channels * seen.length
    past = 2 * nbytes >= plans.last_cache() * 3 // 4
    cut: tuple[int, ...] = (plan.group, plan.part_runs, plan.part_channels, plan.part_length)
    if plan.by_rows:
        cut = (plan.chunks, plan.width)
    return _Call(
        kernel=kernel,
        head=kernels if plan.by_rows else (int(fused), *kernels),
        phases=FUSED if fused else IN_TURN,
        geometry=(*steps, size, *seen[:3], *([plan.folded] if plan.by_rows else [])),
        doubles=doubles,
        batch_stats=int(batch_stats),
        positions=seen.runs * seen.length,
        channels=seen.channels,
        last=(int(code == FLOAT64), int(past), *cut),
        nbytes=nbytes,
        scratch=plan.scratch,
    )
