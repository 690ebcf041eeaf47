"""Compiled functions as builtin functions, which Python calls directly."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from gpu_bn.backends.cpu import plans
from gpu_bn.kernels.cpu import doors

METH_FASTCALL = 0x80
FLOATS = ("momentum", "count", "eps", "p")
"""The parameters of a whole call's kernel that are float64; the others are int64."""


class _Method(ctypes.Structure):
    """The structure ``PyMethodDef`` of CPython."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_methods: list[_Method] = []
"""The definitions of all builtin functions, which must live as long as these."""


def builtin(compiled: Any) -> Callable[..., int]:
    """Return a compiled function, of the signature for ``METH_FASTCALL``, as a builtin function."""
    _methods.append(_Method(b"door", plans.address(compiled, ()), METH_FASTCALL, None))
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function: Callable[..., int] = make(ctypes.addressof(_methods[-1]), None, None)
    return function


@cache
def entry(kernel: Any) -> Callable[..., int]:
    """Return a whole call's kernel as a function of ints and floats that runs without the interpreter's lock."""
    floats = sum(1 << bit for bit, name in enumerate(kernel.parameters) if name in FLOATS)
    entry_kernel: Any = doors.entry_kernel
    return partial(builtin(entry_kernel(len(kernel.parameters), floats)), plans.address(kernel, FLOATS))
