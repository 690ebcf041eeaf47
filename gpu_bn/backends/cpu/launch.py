"""One call of kernels: its arguments as addresses, and the phases that threads share.

What follows from shapes, strides and options is prepared once for all calls alike. Per-channel vectors that are not
dense ones of float32 or float64 are copied.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from gpu_bn.backends.cpu import pages, plans, threads
from gpu_bn.backends.cpu.arrays import LARGE, Arrays
from gpu_bn.backends.cpu.entries import entry
from gpu_bn.backends.protocol import BackendUnavailableError, Grads, Saved, Sums
from gpu_bn.call import Call
from gpu_bn.kernels.cpu import calls_channels, calls_rows
from gpu_bn.kernels.cpu.activations import NAMES, OF_Y
from gpu_bn.kernels.cpu.calls import END, FINISH, LINE, START, SUM, WRITE
from gpu_bn.kernels.cpu.compiler import supports_float16
from gpu_bn.kernels.cpu.vector import BYTES, FLOAT16, FLOAT64, SIZES
from gpu_bn.spec import BatchNormSpec

Array = Any
WHICH = {name: at for at, name in enumerate(NAMES)}
Phases = tuple[tuple[int, bool], ...]
IN_TURN: Phases = ((START, False), (SUM, True), (FINISH, False), (WRITE, True), (END, False))
"""The phases of a call, and which of them threads share."""
FUSED: Phases = ((START, False), (SUM, True), (END, False))
PREPARED = 512


class Prepared(NamedTuple):
    """What calls alike have in common."""

    kernel: Any
    phases: Phases
    every: int
    """All phases."""
    head: tuple[int, ...]
    """The kernel's arguments before addresses."""
    shape: tuple[int, ...]
    """Those from the tensors' steps on."""
    cut: tuple[int, ...]
    channels: int
    positions: int
    scratch: int
    nbytes: int
    huge: bool
    """Whether new outputs ask for huge pages."""


_prepared: dict[Any, Prepared | None] = {}
"""``None`` for tensors that kernels cannot follow."""
_local = threading.local()


def forward(
    arrays: Arrays,
    call: Call,
    spec: BatchNormSpec,
    in_place: bool = False,
    at_once: bool = False,
    fresh: bool = False,
) -> tuple[Array, Array, int] | None:
    """Write ``call.out``, if it is given, move the running statistics, and return mean and variance, and their count.

    The two are float64. ``call.counter``, of int64, is incremented. ``at_once``: all that is tracked is to be written
    by the last call into C. ``fresh``: the output is new, like x. ``None``, and nothing done, where kernels cannot do
    so or cannot follow the strides, and in evaluation where memory does not suffice.
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
        parameters = [0 if one is None else arrays.tagged(one) for one in vectors]
        if at_once and batch_stats and -1 in parameters[2:]:
            return None
        wide = _widened(arrays, vectors, parameters, True) if -1 in parameters else vectors
        mean, var = arrays.double(prepared.channels), arrays.double(prepared.channels)
        if prepared.huge:
            pages.advise(address(y), prepared.nbytes)
        room = _room(prepared)
        arguments = (
            address(x), 0 if residual is None else address(residual), 0 if y is None else address(y),
            *prepared.shape, *parameters, 0 if counter is None else address(counter), address(mean), address(var),
            int(batch_stats), float(spec.momentum), spec.eps, spec.activation.parameter, *prepared.cut,
        )  # fmt: skip
    except MemoryError:
        if batch_stats:
            raise
        return None
    _run(prepared, room, *arguments)
    if batch_stats and wide is not vectors:
        _give_back(arrays, vectors[2:], wide[2:])
    return mean, var, prepared.positions


def backward(
    arrays: Arrays,
    saved: Saved,
    dy: Array,
    grads: Grads,
    sums: bool,
    given: Sums | None = None,
    fresh: bool = False,
) -> tuple[Array, Array] | None:
    """Write the gradients that are given, and return the sums of dz and dz * xhat, float64: computed, or those given.

    The statistics saved are dense vectors of float64. ``fresh``: dx and dresidual are new, like x. ``None`` as of
    :func:`forward`.
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
    parameters = [0 if one is None else arrays.tagged(one) for one in vectors]
    written = [0 if one is None else arrays.tagged(one) for one in gradients]
    wide = _widened(arrays, vectors, parameters, True) if -1 in parameters else None
    results = _widened(arrays, gradients, written, False) if -1 in written else gradients
    found = given or (arrays.double(prepared.channels), arrays.double(prepared.channels))
    if prepared.huge:
        for one in (dx, dresidual):
            if one is not None:
                pages.advise(address(one), prepared.nbytes)
    _run(
        prepared, _room(prepared), *[0 if one is None else address(one) for one in tensors], *prepared.shape,
        *parameters, *written, address(saved.moments.mean), address(saved.moments.var), *map(address, found),
        int(spec.batch_stats and (sums or given is not None)), number(saved.positions), spec.eps,
        spec.activation.parameter, *prepared.cut,
    )  # fmt: skip
    del wide  # until here
    if results is not gradients:
        _give_back(arrays, gradients, results)
    return found


# --------------------------------------------------------------------------------------------------------- arguments
def number(count: Any) -> float:
    """A count, which may be an array of one."""
    return float(count if isinstance(count, int) else count.item())


def _widened(arrays: Arrays, vectors: tuple[Any, ...], addresses: list[int], read: bool) -> tuple[Any, ...]:
    """The vectors, in float64 where the address is -1, and is put right."""
    found = list(vectors)
    for at, vector in enumerate(vectors):
        if addresses[at] == -1:
            found[at] = arrays.double(vector.shape[0])
            if read:
                arrays.assign(found[at], vector)
            addresses[at] = arrays.tagged(found[at])
    return tuple(found)


def _give_back(arrays: Arrays, vectors: tuple[Any, ...], written: tuple[Any, ...]) -> None:
    for vector, where in zip(vectors, written, strict=True):
        if where is not vector:
            arrays.assign(vector, where)


# ------------------------------------------------------------------------------------------------------- preparations
def _remember(key: Any, prepared: Prepared | None) -> Prepared | None:
    if len(_prepared) >= PREPARED:
        _prepared.clear()
    parts: dict[Any, Any] = {}
    _prepared[tuple([parts.setdefault(part, part) for part in key])] = prepared  # of equal layouts one is kept
    return prepared


def prepare_forward(
    arrays: Arrays, tensors: tuple[Any, ...], axis: int, batch_stats: bool, activation: str, in_place: bool
) -> Prepared | None:
    """What calls of :func:`forward` alike have in common; ``tensors`` are x, residual and y."""
    code, seen, steps, dense = _seen(arrays, tensors, axis)
    if steps is None:
        return None
    plan = plans.plan(seen, code, dense, not batch_stats)
    writes = tensors[2] is not None
    kernels = plans.forward_kernels(plan.by_rows, code, WHICH[activation], tensors[1] is not None, batch_stats, writes)
    fused = batch_stats and plan.group > 0
    kernel = calls_rows.forward if plan.by_rows else calls_channels.forward
    return _prepared_call(kernel, kernels, plan, fused, code, seen, steps, writes and not in_place)


def prepare_backward(
    arrays: Arrays, tensors: tuple[Any, ...], axis: int, sums: bool, activation: str
) -> Prepared | None:
    """As :func:`prepare_forward`; ``tensors`` are x, residual, dy, dx and dresidual."""
    code, seen, steps, dense = _seen(arrays, tensors, axis)
    if steps is None:
        return None
    plan = plans.plan(seen, code, dense, False)
    _, residual, _, dx, dresidual = tensors
    kernels = plans.backward_kernels(
        plan.by_rows, code, WHICH[activation], residual is not None, sums, dx is not None, dresidual is not None
    )
    kernel = calls_rows.backward if plan.by_rows else calls_channels.backward
    fused = sums and plan.group > 0
    return _prepared_call(kernel, kernels, plan, fused, code, seen, steps, dx is not None)


def _seen(arrays: Arrays, tensors: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """The dtype's code, the geometry, each tensor's step, or ``None`` if kernels cannot follow one, and whether all
    are dense."""
    x = tensors[0]
    code = arrays.code(x.dtype)
    if code == FLOAT16 and not supports_float16():
        raise BackendUnavailableError("float16 with backend 'cpu' needs a processor that converts it (F16C)")
    seen = plans.geometry(tuple(x.shape), arrays.strides(x) or arrays.byte_strides(x), axis)
    period = seen.channels * seen.length
    steps = []
    for one in tensors:
        strides = None if one is None else arrays.strides(one)
        step = None if strides is None else plans.step(tuple(x.shape), strides, seen)
        if one is not None and step is None:
            return code, seen, None, False
        steps.append(0 if step is None else step)
    dense = seen.runs == 1 or all(step == period for step, one in zip(steps, tensors, strict=True) if one is not None)
    return code, seen, tuple(steps), dense


def _prepared_call(
    kernel: Any,
    kernels: tuple[int, ...],
    plan: plans.Plan,
    fused: bool,
    code: int,
    seen: plans.Geometry,
    steps: tuple[int, ...],
    writes: bool,
) -> Prepared:
    cut: tuple[int, ...] = (plan.group, plan.part_runs, plan.part_channels, plan.part_length)
    head: tuple[int, ...] = (int(fused), *kernels)
    shape = (*steps, SIZES[code], *seen[:3])
    if plan.by_rows:
        cut, head, shape = (plan.chunks, plan.width), kernels, (*shape, plan.folded)
    nbytes = SIZES[code] * seen.runs * seen.channels * seen.length
    # Where x and y stay in the last cache, such stores take twice as long. They need addresses that are multiples of
    # BYTES: large new outputs begin at one, and so do their rows if each has a multiple of BYTES.
    past = writes and nbytes >= LARGE and 2 * nbytes > plans.last_cache()
    past = past and not (plan.by_rows and SIZES[code] * plan.folded * seen.channels * seen.length % BYTES)
    phases = FUSED if fused else IN_TURN
    return Prepared(
        kernel=kernel, phases=phases, every=sum(phase for phase, _ in phases), head=head, shape=shape,
        cut=(int(code == FLOAT64), int(past), *cut), channels=seen.channels, positions=seen.runs * seen.length,
        scratch=plan.scratch, nbytes=nbytes, huge=writes and nbytes >= pages.LARGE,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the call
def _room(prepared: Prepared) -> tuple[int, int, Any]:
    """On how many threads a call runs, where its scratch memory is, and what keeps that."""
    count = threads.threads_for(prepared.nbytes)
    if count == 1 and prepared.scratch <= plans.KEPT:
        return 1, scratch_address(), None
    scratch = np.empty(prepared.scratch + 3 * LINE, np.uint8)  # counters first
    return count, -(-scratch.__array_interface__["data"][0] // LINE) * LINE, scratch


def _run(prepared: Prepared, room: tuple[int, int, Any], *arguments: Any) -> None:
    """Run a kernel's phases, on several threads if that pays."""
    kernel, head, (count, at, _) = entry(prepared.kernel), prepared.head, room
    if count == 1:
        kernel(prepared.every, *head, *arguments, at + LINE, at)
        return
    for phase, shared in prepared.phases:
        if shared:
            threads.run(lambda phase=phase: kernel(phase, *head, *arguments, at + LINE, at), count)  # type: ignore[misc]
        else:
            kernel(phase, *head, *arguments, at + LINE, at)


def scratch_address() -> int:
    """The address of memory that this thread keeps: a call that runs by itself has it to itself."""
    try:
        return _local.address  # type: ignore[no-any-return]
    except AttributeError:
        pass
    _local.scratch = np.empty(plans.KEPT + 3 * LINE, np.uint8)
    _local.address = -(-_local.scratch.__array_interface__["data"][0] // LINE) * LINE
    return int(_local.address)
