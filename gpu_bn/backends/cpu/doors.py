"""Doors: builtin functions that take torch tensors and run the kernel, all in one call from Python.

:mod:`gpu_bn.kernels.cpu.doors` compiles them. Where a call has no door, or its door refuses the arguments,
:mod:`gpu_bn.backends.cpu.launch` serves it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_bn.backends.cpu import launch, pages, plans, team, threads
from gpu_bn.backends.cpu.entries import FLOATS, builtin
from gpu_bn.backends.cpu.tensors import TENSORS
from gpu_bn.kernels.cpu import activations
from gpu_bn.kernels.cpu import doors as compiled
from gpu_bn.spec import MAX_RANK, MIN_RANK

scratch_address = launch.scratch_address
OF_Y: str = activations.OF_Y
RELEASE_BYTES = 1 << 16
"""Bytes of input from which on a call releases the interpreter's lock, so that other Python threads may run."""
DLPACK_TYPES = {torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.float64: (2, 64)}
"""The code and bits in DLPack of each dtype."""
BYTES_PER_THREAD = 1 << 18
"""Bytes of input that justify one thread of torch's team, which is awake while torch computes."""
type_word: Any = compiled.type_word
DOORS: Any = compiled.forward, compiled.backward


class Door(NamedTuple):
    """The data that similar calls share. Callers unpack the first four fields, which is faster than attributes."""

    function: Callable[..., int] | None
    """``None`` where it depends on the number of threads: see :func:`with_function`."""
    record: int
    """The address of ``words``."""
    threads: int
    """The number of threads that share the call."""
    huge: bool
    """Whether new outputs ask for huge pages."""
    words: Any
    """The record, an array of int64: the fields, the kernel's known arguments, the shape."""
    nbytes: int
    """Bytes of the input."""
    kind: tuple[Any, ...]
    """The arguments that select the function: its direction, and how many of the kernel's arguments are known."""
    by_threads: dict[Any, Door | None]
    """The door with its function, by the numbers of threads allowed."""


_doors: dict[Any, Door | None] = {}
"""The doors by layouts and options; ``None`` for calls that have no door."""


def forward(x: Tensor, residual: Tensor | None, trains: bool, activation: str) -> Door | None:
    """Return the door for forward calls like this one; ``None`` if there is none."""
    if residual is not None and residual.layout is not torch.strided:
        return None
    key = x.dtype, x.shape, x.stride(), None if residual is None else residual.stride(), trains, activation
    try:
        return _doors[key]
    except KeyError:
        if not _are_supported(x, residual):
            return None
        tensors = x, residual, torch.empty_like(x)
        prepared = launch.prepare_forward(TENSORS, tensors, 1, trains, activation, False)
        return _build(key, prepared, True, trains, tensors)


def backward(
    x: Tensor, residual: Tensor | None, dy: Tensor, dx: bool, dresidual: bool, sums: bool, trains: bool, activation: str
) -> Door | None:
    """Return the door for backward calls like this one; ``dx`` and ``dresidual`` tell whether to write them."""
    key = (
        x.dtype, x.shape, x.stride(), None if residual is None else residual.stride(), dy.stride(), dx, dresidual, sums,
        trains, activation,
    )  # fmt: skip
    try:
        return _doors[key]
    except KeyError:
        if not (_are_supported(x, residual) and _are_supported(x, dy)):
            return None
        new = torch.empty_like(x)
        tensors = x, residual, dy, new if dx else None, new if dresidual else None
        prepared = launch.prepare_backward(TENSORS, tensors, 1, sums, activation)
        return _build(key, prepared, False, trains and sums, tensors)


def compile_for(shapes: Sequence[tuple[int, ...]], activation: str) -> None:
    """Compile the functions for calls with tensors of these shapes; they serve all dtypes and activations."""
    for x in map(torch.ones, shapes):
        for door in (forward(x, None, True, activation), backward(x, None, x, True, False, True, True, activation)):
            if door is not None and team.address() is not None:
                _builtin(True, *door.kind)


def _are_supported(x: Tensor, other: Tensor | None) -> bool:
    """Tell whether doors take tensors of x's shape and dtype, and ``other``, if given, has both."""
    if other is not None and (other.dtype, other.shape) != (x.dtype, x.shape):
        return False
    return x.dtype in DLPACK_TYPES and MIN_RANK <= x.dim() <= MAX_RANK and 0 not in x.shape


def advise(one: Tensor) -> None:
    """Ask for huge pages for a new output."""
    pages.advise(one.data_ptr(), one.nbytes)


def with_function(door: Door) -> Door | None:
    """Return the door with the function for the number of threads to use; ``None`` if torch's team cannot serve it."""
    if door.function is not None:
        return door
    allowed = threads.get_num_threads(), torch.get_num_threads() if team.address() else 1
    try:
        return door.by_threads[allowed]
    except KeyError:
        count = min(threads.threads_for(door.nbytes, BYTES_PER_THREAD), allowed[1])
        needs_pool = count == 1 and threads.threads_for(door.nbytes, threads.BYTES_PER_THREAD) > 1
        chosen = None if needs_pool else door._replace(function=_builtin(count > 1, *door.kind), threads=count)
        return door.by_threads.setdefault(allowed, chosen)


def _build(key: Any, prepared: launch.Prepared | None, forward: bool, trains: bool, tensors: Any) -> Door | None:
    threads.get_num_threads()  # raises for a bad environment variable, even where one thread does the work
    reader = _dlpack_reader()
    x, residual = tensors[:2]
    door = None
    if (
        reader
        and prepared is not None
        and prepared.scratch + 16 * prepared.channels <= plans.KEPT
        and (prepared.positions > 1 or not trains)
    ):
        rank, (code, bits) = x.dim(), DLPACK_TYPES[x.dtype]
        kind = forward, len(prepared.head), len(prepared.shape), len(prepared.tail)
        fields = (
            reader, id(None), type_word(rank, code, bits), prepared.channels, bits // 8 - 1, _extent(x),
            0 if residual is None else _extent(residual), int(prepared.nbytes >= RELEASE_BYTES), int(trains),
            prepared.positions, prepared.scratch, plans.address(prepared.kernel, FLOATS), prepared.all_phases,
            *(team.address() or (0, 0)),
        )  # fmt: skip
        words = array("q", (*fields, *prepared.head, *prepared.shape, *prepared.tail, *x.shape))
        function = _builtin(False, *kind) if prepared.nbytes < 2 * BYTES_PER_THREAD else None
        door = Door(function, words.buffer_info()[0], 1, prepared.huge, words, prepared.nbytes, kind, {})
    if len(_doors) >= launch.MAX_PREPARED:
        _doors.clear()
    _doors[key] = door
    return door


def _extent(one: Tensor) -> int:
    """Return the bytes from the start of a tensor's first element to the end of its last."""
    last = sum([(size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True)])
    return (last + 1) * one.element_size()


@cache
def _builtin(parallel: bool, forward: bool, *counts: int) -> Callable[..., int]:
    return builtin(DOORS[not forward](parallel, *counts))


@cache
def _dlpack_reader() -> int:
    """Return the address of the function that reads a tensor in DLPack's exchange interface; 0 if torch has none."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    interface = ctypes.cast(get(capsule, b"dlpack_exchange_api"), ctypes.POINTER(ctypes.c_size_t))
    version = ctypes.cast(interface, ctypes.POINTER(ctypes.c_uint32))[0]
    return interface[5] if version == 1 else 0
