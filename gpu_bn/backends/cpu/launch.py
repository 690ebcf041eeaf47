"""Launch the kernel of a call: convert its arguments to addresses, and run its phases, which threads share.

Whatever depends on shapes, strides and options only is prepared once for all similar calls. Per-channel vectors that
are not contiguous float32 or float64 are converted to float64.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from gpu_bn.backends.cpu import pages, plans, threads
from gpu_bn.backends.cpu.arrays import LARGE, Arrays
from gpu_bn.backends.cpu.entries import entry
from gpu_bn.backends.protocol import BackendUnavailableError, Grads, Moments, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.kernels.cpu import calls_channels, calls_rows
from gpu_bn.kernels.cpu.activations import NAMES, OF_Y
from gpu_bn.kernels.cpu.calls import END, FINISH, LINE, START, SUM, WRITE
from gpu_bn.kernels.cpu.compiler import supports_float16
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT16, FLOAT64, SIZES
from gpu_bn.spec import BatchNormSpec

Array = Any
ACTIVATION_CODES = {name: code for code, name in enumerate(NAMES)}
Phases = tuple[tuple[int, bool], ...]
SEPARATE: Phases = ((START, False), (SUM, True), (FINISH, False), (WRITE, True), (END, False))
"""The phases of a call, each with whether threads share it."""
FUSED: Phases = ((START, False), (SUM, True), (END, False))
"""The phases of a fused call, which also writes in ``SUM``."""
MAX_PREPARED = 512
"""The most prepared calls that are kept."""


class Prepared(NamedTuple):
    """The data that similar calls share."""

    kernel: Any
    phases: Phases
    all_phases: int
    """The bits of all phases."""
    head: tuple[int, ...]
    """The kernel's arguments before the addresses of tensors."""
    shape: tuple[int, ...]
    """Its arguments after them: strides between runs, the item size, runs, channels, length."""
    tail: tuple[int, ...]
    """Its arguments before the scratch memory: the dtype, the kind of stores, the division of the tensors."""
    channels: int
    positions: int
    scratch: int
    nbytes: int
    huge: bool
    """Whether new outputs ask for huge pages."""


_prepared: dict[Any, Prepared | None] = {}
"""Prepared calls, by layouts and options; ``None`` for tensors that kernels cannot read by strides."""
_local = threading.local()


def forward(
    arrays: Arrays, call: Call, spec: BatchNormSpec, in_place: bool = False, at_once: bool = False, fresh: bool = False
) -> Moments | None:
    """Write ``call.out`` if it is given, update the running statistics, and return the float64 moments.

    ``call.counter``, an int64, is incremented. With ``at_once``, the last call into C writes all tracked values.
    ``fresh`` tells that the output is new and laid out like x. Do nothing and return ``None`` where kernels cannot do
    this or cannot read the tensors by strides, and in evaluation where memory runs out.
    """
    x, residual, y, counter = call.x, call.residual, call.out, call.counter
    vectors = (call.weight, call.bias, call.running_mean, call.running_var)
    axis, batch_stats, activation = spec.axis, spec.batch_stats, spec.activation.name
    tensors, layout, address = (x, residual, y), arrays.layout, arrays.address
    try:
        key = (
            axis, batch_stats, activation, in_place, layout(x), None if residual is None else layout(residual),
            fresh or (None if y is None else layout(y)),
        )  # fmt: skip
        try:
            prepared = _prepared[key]
        except KeyError:
            prepared = _remember(key, prepare_forward(arrays, tensors, axis, batch_stats, activation, in_place))
        if prepared is None:
            return None
        parameters = [0 if one is None else arrays.tagged_address(one) for one in vectors]
        if at_once and batch_stats and -1 in parameters[2:]:
            return None
        wide = _widen(arrays, vectors, parameters, True) if -1 in parameters else vectors
        mean, var = arrays.empty_float64(prepared.channels), arrays.empty_float64(prepared.channels)
        if prepared.huge:
            pages.advise(address(y), prepared.nbytes)
        scratch = _allocate_scratch(prepared)
        arguments = (
            address(x), 0 if residual is None else address(residual), 0 if y is None else address(y),
            *prepared.shape, *parameters, 0 if counter is None else address(counter), address(mean), address(var),
            int(batch_stats), float(spec.momentum), spec.eps, spec.activation.parameter, *prepared.tail,
        )  # fmt: skip
    except MemoryError:
        if batch_stats:
            raise
        return None
    _run(prepared, scratch, *arguments)
    if batch_stats and wide is not vectors:
        _copy_back(arrays, vectors[2:], wide[2:])
    return Moments(prepared.positions, mean, var)


def backward(
    arrays: Arrays, saved: Saved, dy: Array, grads: Grads, sums: bool, given: Sums | None = None, fresh: bool = False
) -> Sums | None:
    """Write the gradients whose arrays are given, and return the float64 sums of dz and dz * xhat.

    ``given`` are the sums if they are known; ``sums`` tells to compute them. The saved statistics are contiguous
    float64 vectors. ``fresh`` tells that dx and dresidual are new and laid out like x. Do nothing and return ``None``
    where kernels cannot read the tensors by strides.
    """
    x, residual, spec, (dx, dweight, dbias, dresidual) = saved.x, saved.residual, saved.spec, grads
    axis, activation, vectors, gradients = spec.axis, spec.activation.name, (saved.weight, saved.bias), (dweight, dbias)
    if saved.mask is not None:
        residual, activation = saved.mask, activation + OF_Y
    tensors, layout, address = (x, residual, dy, dx, dresidual), arrays.layout, arrays.address
    key = (
        axis, sums, activation, layout(x), None if residual is None else layout(residual), layout(dy),
        None if dx is None else fresh or layout(dx), None if dresidual is None else fresh or layout(dresidual),
    )  # fmt: skip
    try:
        prepared = _prepared[key]
    except KeyError:
        prepared = _remember(key, prepare_backward(arrays, tensors, axis, sums, activation))
    if prepared is None:
        return None
    parameters = [0 if one is None else arrays.tagged_address(one) for one in vectors]
    written = [0 if one is None else arrays.tagged_address(one) for one in gradients]
    wide = _widen(arrays, vectors, parameters, True) if -1 in parameters else None
    results = _widen(arrays, gradients, written, False) if -1 in written else gradients
    totals = given or Sums(arrays.empty_float64(prepared.channels), arrays.empty_float64(prepared.channels))
    if prepared.huge:
        for one in (dx, dresidual):
            if one is not None:
                pages.advise(address(one), prepared.nbytes)
    scratch = _allocate_scratch(prepared)
    _run(
        prepared, scratch, *[0 if one is None else address(one) for one in tensors], *prepared.shape,
        *parameters, *written, address(saved.moments.mean), address(saved.moments.var), *map(address, totals),
        int(spec.batch_stats and (sums or given is not None)), count_value(saved.positions), spec.eps,
        spec.activation.parameter, *prepared.tail,
    )  # fmt: skip
    del wide  # kept until here, for the kernel reads it
    if results is not gradients:
        _copy_back(arrays, gradients, results)
    return totals


# --------------------------------------------------------------------------------------------------------- arguments
def count_value(count: Any) -> float:
    """Return a count, an int or an array with one element, as a float."""
    return float(count if isinstance(count, int) else count.item())


def _widen(arrays: Arrays, vectors: tuple[Any, ...], addresses: list[int], read: bool) -> tuple[Any, ...]:
    """Return the vectors, with new float64 ones where the address is -1, and set these addresses.

    ``read`` tells whether the kernel reads the vectors, so that their values must be copied.
    """
    wide = list(vectors)
    for i, vector in enumerate(vectors):
        if addresses[i] == -1:
            wide[i] = arrays.empty_float64(vector.shape[0])
            if read:
                arrays.assign(wide[i], vector)
            addresses[i] = arrays.tagged_address(wide[i])
    return tuple(wide)


def _copy_back(arrays: Arrays, vectors: tuple[Any, ...], written: tuple[Any, ...]) -> None:
    for vector, source in zip(vectors, written, strict=True):
        if source is not vector:
            arrays.assign(vector, source)


# ------------------------------------------------------------------------------------------------------- preparations
def _remember(key: Any, prepared: Prepared | None) -> Prepared | None:
    if len(_prepared) >= MAX_PREPARED:
        _prepared.clear()
    parts: dict[Any, Any] = {}
    _prepared[tuple([parts.setdefault(part, part) for part in key])] = prepared  # keep one object of equal layouts
    return prepared


def prepare_forward(
    arrays: Arrays, tensors: tuple[Any, ...], axis: int, batch_stats: bool, activation: str, in_place: bool
) -> Prepared | None:
    """Prepare calls of :func:`forward` with tensors like x, residual and y; ``None`` if kernels cannot read them."""
    code, geometry, strides, dense = _inspect(arrays, tensors, axis)
    if strides is None:
        return None
    plan = plans.plan(geometry, code, dense, not batch_stats)
    writes = tensors[2] is not None
    which = ACTIVATION_CODES[activation]
    kernels = plans.forward_kernels(plan.by_rows, code, which, tensors[1] is not None, batch_stats, writes)
    fused = batch_stats and plan.group > 0
    kernel = calls_rows.forward if plan.by_rows else calls_channels.forward
    return _prepare(kernel, kernels, plan, fused, code, geometry, strides, writes and not in_place)


def prepare_backward(
    arrays: Arrays, tensors: tuple[Any, ...], axis: int, sums: bool, activation: str
) -> Prepared | None:
    """Prepare calls of :func:`backward`; ``tensors`` are x, residual, dy, dx and dresidual. ``None`` if unreadable."""
    code, geometry, strides, dense = _inspect(arrays, tensors, axis)
    if strides is None:
        return None
    plan = plans.plan(geometry, code, dense, False)
    _, residual, _, dx, dresidual = [one is not None for one in tensors]
    kernels = plans.backward_kernels(plan.by_rows, code, ACTIVATION_CODES[activation], residual, sums, dx, dresidual)
    kernel = calls_rows.backward if plan.by_rows else calls_channels.backward
    fused = sums and plan.group > 0
    return _prepare(kernel, kernels, plan, fused, code, geometry, strides, dx)


def _inspect(arrays: Arrays, tensors: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """Return the code of the dtype, the geometry, each tensor's stride between runs, and whether none has gaps.

    An absent tensor has the stride 0. The strides are ``None`` if kernels cannot read one of the tensors.
    """
    x = tensors[0]
    code = arrays.code(x.dtype)
    if code == FLOAT16 and not supports_float16():
        raise BackendUnavailableError("float16 with backend 'cpu' needs a processor that converts it (F16C)")
    geometry = plans.geometry_of(tuple(x.shape), arrays.strides(x) or arrays.byte_strides(x), axis)
    run_strides = []
    for one in tensors:
        strides = None if one is None else arrays.strides(one)
        run_stride = None if strides is None else plans.run_stride(tuple(x.shape), strides, geometry)
        if one is not None and run_stride is None:
            return code, geometry, None, False
        run_strides.append(run_stride or 0)
    period = geometry.channels * geometry.length
    present = [stride for stride, one in zip(run_strides, tensors, strict=True) if one is not None]
    return code, geometry, tuple(run_strides), geometry.runs == 1 or all(stride == period for stride in present)


def _prepare(
    kernel: Any,
    kernels: tuple[int, ...],
    plan: plans.Plan,
    fused: bool,
    code: int,
    geometry: plans.Geometry,
    run_strides: tuple[int, ...],
    writes: bool,
) -> Prepared:
    tail: tuple[int, ...] = (plan.group, plan.part_runs, plan.part_channels, plan.part_length)
    head: tuple[int, ...] = (int(fused), *kernels)
    runs, channels, length = geometry[:3]
    shape = (*run_strides, SIZES[code], runs, channels, length)
    if plan.by_rows:
        tail, head, shape = (plan.chunks, plan.width), kernels, (*shape, plan.folded)
    nbytes = SIZES[code] * runs * channels * length
    # Stores past the caches pay off only if x and y do not fit in the last-level cache; else they take twice as long.
    # They need addresses that are multiples of BYTES: large new outputs begin at one, and so does each of their rows if
    # its length in bytes is a multiple.
    nontemporal = writes and nbytes >= LARGE and 2 * nbytes > plans.last_cache()
    nontemporal = nontemporal and not (plan.by_rows and SIZES[code] * plan.folded * channels * length % BYTES)
    phases = FUSED if fused else SEPARATE
    return Prepared(
        kernel=kernel, phases=phases, all_phases=sum(phase for phase, _ in phases), head=head, shape=shape,
        tail=(int(code == FLOAT64), int(nontemporal), *tail), channels=channels, positions=runs * length,
        scratch=plan.scratch, nbytes=nbytes, huge=writes and nbytes >= pages.LARGE,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the call
def _allocate_scratch(prepared: Prepared) -> tuple[int, int, Any]:
    """Return the number of threads for a call, the address of its scratch memory, and the object that owns that."""
    count = threads.threads_for(prepared.nbytes, threads.BYTES_PER_THREAD)
    if count == 1 and prepared.scratch <= plans.KEPT:
        return 1, scratch_address(), None
    scratch = np.empty(prepared.scratch + 3 * LINE, np.uint8)  # the counters of parts come first
    return count, -(-scratch.__array_interface__["data"][0] // LINE) * LINE, scratch


def _run(prepared: Prepared, scratch: tuple[int, int, Any], *arguments: Any) -> None:
    """Run the phases of a kernel on the given number of threads."""
    kernel, head, (count, address, _) = entry(prepared.kernel), prepared.head, scratch
    arguments = (*arguments, address + LINE, address)
    if count == 1:
        kernel(prepared.all_phases, *head, *arguments)
        return
    for phase, shared in prepared.phases:
        if shared:
            threads.run(lambda phase=phase: kernel(phase, *head, *arguments), count)  # type: ignore[misc]
        else:
            kernel(phase, *head, *arguments)


def scratch_address() -> int:
    """Return the address of scratch memory that this thread keeps; a call on one thread has it to itself."""
    try:
        return _local.address  # type: ignore[no-any-return]
    except AttributeError:
        pass
    _local.scratch = np.empty(plans.KEPT + 3 * LINE, np.uint8)
    _local.address = -(-_local.scratch.__array_interface__["data"][0] // LINE) * LINE
    return int(_local.address)
