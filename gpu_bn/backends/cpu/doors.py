"""torch's tensors to their kernel in one call of a builtin function; see :mod:`gpu_bn.kernels.cpu.doors`.

Where there is no such function for a call, or it refuses, :mod:`gpu_bn.backends.cpu.launch` serves it.
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
RELEASES = 1 << 16
"""Bytes from which on other threads of Python's may run during a call."""
KINDS = {torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.float64: (2, 64)}
"""DLPack's codes and bits of dtypes."""
SHARE = 1 << 18
"""Bytes of input that pay for a thread of torch's team, which is awake while torch computes."""
KIND: Any = compiled.kind
DOORS: Any = compiled.forward, compiled.backward


class Door(NamedTuple):
    """What calls alike have in common; callers take the first four together, for attributes cost more."""

    function: Callable[..., int] | None
    """``None`` where it depends on the number of threads: see :func:`usable`."""
    record: int
    """The address of ``words``."""
    threads: int
    huge: bool
    """Whether new outputs ask for huge pages."""
    words: Any
    nbytes: int
    kind: tuple[Any, ...]
    """What tells the function from others: its direction, and the kernel's arguments known in advance."""
    for_threads: dict[Any, Door | None]
    """The door with its function, by the numbers of threads allowed."""


_doors: dict[Any, Door | None] = {}
"""``None`` for calls that go another way."""


def forward(x: Tensor, residual: Tensor | None, trains: bool, activation: str) -> Door | None:
    """The door of forward calls like this one."""
    if residual is not None and residual.layout is not torch.strided:
        return None
    key = x.dtype, x.shape, x.stride(), None if residual is None else residual.stride(), trains, activation
    try:
        return _doors[key]
    except KeyError:
        if not _fits(x, residual):
            return None
        tensors = x, residual, torch.empty_like(x)
        prepared = launch.prepare_forward(TENSORS, tensors, 1, trains, activation, False)
        return _remember(key, prepared, True, trains, tensors)


def backward(
    x: Tensor, residual: Tensor | None, dy: Tensor, dx: bool, dresidual: bool, sums: bool, trains: bool, activation: str
) -> Door | None:
    """The door of backward calls like this one, which write ``dx`` and ``dresidual`` or not."""
    key = (
        x.dtype, x.shape, x.stride(), None if residual is None else residual.stride(), dy.stride(), dx, dresidual, sums,
        trains, activation,
    )  # fmt: skip
    try:
        return _doors[key]
    except KeyError:
        if not (_fits(x, residual) and _fits(x, dy)):
            return None
        new = torch.empty_like(x)
        tensors = x, residual, dy, new if dx else None, new if dresidual else None
        prepared = launch.prepare_backward(TENSORS, tensors, 1, sums, activation)
        return _remember(key, prepared, False, trains and sums, tensors)


def compile_for(shapes: Sequence[tuple[int, ...]], activation: str) -> None:
    """Compile what calls of such tensors take; the functions are the same for all dtypes and activations."""
    for x in map(torch.ones, shapes):
        for door in (forward(x, None, True, activation), backward(x, None, x, True, False, True, True, activation)):
            if door is not None and team.address() is not None:
                _builtin(True, *door.kind)


def _fits(x: Tensor, other: Tensor | None) -> bool:
    """Whether kernels read tensors of x's shape and dtype, and the other has both."""
    mine, its = (None if one is None else (one.dtype, one.shape) for one in (x, other))
    return x.dtype in KINDS and MIN_RANK <= x.dim() <= MAX_RANK and 0 not in x.shape and (other is None or mine == its)


def advise(one: Tensor) -> None:
    """Ask for huge pages for a new output."""
    pages.advise(one.data_ptr(), one.nbytes)


def usable(door: Door) -> Door | None:
    """A door, for as many threads as are to do the work; ``None`` if these are not torch's."""
    if door.function is not None:
        return door
    most = threads.get_num_threads(), torch.get_num_threads() if team.address() else 1
    try:
        return door.for_threads[most]
    except KeyError:
        count = min(threads.threads_for(door.nbytes, SHARE), most[1])
        alone = count == 1 and threads.threads_for(door.nbytes) > 1
        found = None if alone else door._replace(function=_builtin(count > 1, *door.kind), threads=count)
        return door.for_threads.setdefault(most, found)


def _remember(key: Any, prepared: launch.Prepared | None, forward: bool, trains: bool, tensors: Any) -> Door | None:
    threads.get_num_threads()  # which refuses what the environment says, also where one thread does the work
    look = _look()
    x, residual = tensors[:2]
    door = None
    if (
        look
        and prepared is not None
        and prepared.scratch + 16 * prepared.channels <= plans.KEPT
        and (prepared.positions > 1 or not trains)
    ):
        rank, (code, bits) = x.dim(), KINDS[x.dtype]
        kind = forward, len(prepared.head), len(prepared.shape), len(prepared.cut)
        fields = (
            look, id(None), KIND(rank, code, bits), prepared.channels, bits // 8 - 1, _extent(x),
            0 if residual is None else _extent(residual), int(prepared.nbytes >= RELEASES), int(trains),
            prepared.positions, prepared.scratch, plans.address(prepared.kernel, FLOATS), prepared.every,
            *(team.address() or (0, 0)),
        )  # fmt: skip
        words = array("q", (*fields, *prepared.head, *prepared.shape, *prepared.cut, *x.shape))
        function = _builtin(False, *kind) if prepared.nbytes < 2 * SHARE else None
        door = Door(function, words.buffer_info()[0], 1, prepared.huge, words, prepared.nbytes, kind, {})
    if len(_doors) >= launch.PREPARED:
        _doors.clear()
    _doors[key] = door
    return door


def _extent(one: Tensor) -> int:
    """The bytes from a tensor's first element to behind its last."""
    last = sum([(size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True)])
    return (last + 1) * one.element_size()


@cache
def _builtin(shares: bool, forward: bool, *counts: int) -> Callable[..., int]:
    return builtin(DOORS[not forward](shares, *counts))


@cache
def _look() -> int:
    """The address of the function that looks at a tensor, of DLPack's exchange interface; 0 if torch has none."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    interface = ctypes.cast(get(capsule, b"dlpack_exchange_api"), ctypes.POINTER(ctypes.c_size_t))
    version = ctypes.cast(interface, ctypes.POINTER(ctypes.c_uint32))[0]
    return interface[5] if version == 1 else 0
