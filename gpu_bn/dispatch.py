"""Which backend serves a call: by the type of the arrays, or by name.

Whoever passes an array has imported its library already, so the type tells which library it is; nothing is probed by
importing. A backend's module, which alone imports its library, is loaded when the backend is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from gpu_bn.backends.protocol import Backend


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One backend: its name, the array library it serves, its module, and why it cannot be had (if it cannot)."""

    name: str
    library: str
    array: str
    module: str | None = None
    why_not: str = ""


ROWS = (
    Row("numpy", "numpy", "numpy.ndarray", "gpu_bn.backends.numpy"),
    Row("cupy", "cupy", "cupy.ndarray", why_not="this version of gpu_bn has no CUDA kernels yet"),
    Row("triton", "torch", "torch.Tensor", why_not="this version of gpu_bn has no Triton kernels yet"),
)
NAMES = tuple(row.name for row in ROWS)
NOT_PLAIN = {"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix"}
"""Kinds of array whose mask would be ignored, or whose shape cannot be changed."""


def select(backend: str | Backend | None, **arrays: Any) -> Backend:
    """The backend for a call's arrays (those that are ``None`` do not count).

    ``backend`` is a name from :data:`NAMES`, a :class:`~gpu_bn.backends.protocol.Backend`, or ``None`` for the one
    that serves the arrays' library.

    Raises:
        TypeError: an array of no known library, or arrays of several.
        ValueError: an unknown backend name, or a backend that does not serve these arrays.
        BackendUnavailableError: the backend is known but cannot be had.
    """
    libraries = {name: _library(name, array) for name, array in arrays.items() if array is not None}
    library = next(iter(libraries.values()))
    if any(other is not library for other in libraries.values()):
        found = ", ".join(f"{name} is a {row.array}" for name, row in libraries.items())
        raise TypeError(f"expected all arrays in one library and on one device, got: {found}")
    if backend is not None and not isinstance(backend, str):
        if not hasattr(backend, "normalize"):
            raise TypeError(f"backend should be a name or a Backend, got {type(backend).__name__}")
        return backend
    row = library if backend is None else _row(backend)
    if row.library != library.library:
        raise ValueError(f"backend {row.name!r} serves arrays of type {row.array}, got {library.array}")
    return load(row.name)


@cache
def load(name: str) -> Backend:
    """The backend of a name.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the backend cannot be had; the message says why.
    """
    row = _row(name)
    if row.module is None:
        raise BackendUnavailableError(f"backend {name!r} cannot be used: {row.why_not}")
    backend: Backend = import_module(row.module).backend()
    return backend


def _row(name: str) -> Row:
    for row in ROWS:
        if row.name == name:
            return row
    raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}")


def _library(name: str, array: Any) -> Row:
    kind: Any = type(array)
    row = _row_of_type(kind)
    if row is None:
        kinds = ", ".join(row.array for row in ROWS)
        raise TypeError(f"{name} should be an array ({kinds}), got {kind.__module__}.{kind.__qualname__}")
    return row


@cache
def _row_of_type(kind: Any) -> Row | None:
    """The row whose array type is among a type's bases, unless another base changes what an array means."""
    names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    if names & NOT_PLAIN:
        return None
    return next((row for row in ROWS if row.array in names), None)
