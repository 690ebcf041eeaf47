"""Which backend serves a call: by the type of the arrays, or by name.

Whoever passes an array has imported its library already, so the type tells which library it is; nothing is probed by
importing. A backend's module, which alone imports its library, is loaded when the backend is first asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from gpu_bn.backends.protocol import Backend, BackendUnavailableError

__all__ = ["NAMES", "ROWS", "BackendUnavailableError", "default", "differentiable", "load", "select", "serving"]


@dataclass(frozen=True, slots=True)
class Row:
    """One backend for one kind of array: its name, the array's library, and its module.

    ``device`` is the type of the devices it serves, for a library with arrays on several. ``differentiable`` is a
    module whose ``front_door`` takes the front door's calls, for a library that differentiates. ``packages`` are
    those that it needs beside a GPU.
    """

    name: str
    library: str
    array: str
    module: str
    device: str = ""
    differentiable: str = ""
    packages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.array} on {self.device}" if self.device else self.array


ROWS = (
    Row("numpy", "numpy", "numpy.ndarray", "gpu_bn.backends.numpy"),
    Row("cpu", "numpy", "numpy.ndarray", "gpu_bn.backends.cpu.backend", packages=("numba",)),
    Row("cupy", "cupy", "cupy.ndarray", "gpu_bn.backends.cupy", packages=("cupy",)),
    Row(
        "torch",
        "torch",
        "torch.Tensor",
        "gpu_bn.nn._cpu",
        device="cpu",
        differentiable="gpu_bn.nn.functional",
        packages=("torch",),
    ),
    Row(
        "cpu",
        "torch",
        "torch.Tensor",
        "gpu_bn.backends.cpu.tensors",
        device="cpu",
        differentiable="gpu_bn.nn.functional",
        packages=("numba", "torch"),
    ),
    Row(
        "triton",
        "torch",
        "torch.Tensor",
        "gpu_bn.backends.triton",
        device="cuda",
        differentiable="gpu_bn.nn.functional",
        packages=("torch", "triton"),
    ),
    Row(
        "cupy",
        "torch",
        "torch.Tensor",
        "gpu_bn.backends.cupy_torch",
        device="cuda",
        differentiable="gpu_bn.nn.functional",
        packages=("cupy", "torch"),
    ),
)
"""Of several rows for one kind of array the first serves it, the others when they are asked for by name."""
NAMES = tuple(dict.fromkeys(row.name for row in ROWS))
NOT_PLAIN = {"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix"}
"""Kinds of array whose mask would be ignored, or whose shape cannot be changed."""


def select(backend: str | Backend | None, **arrays: Any) -> Backend:
    """The backend for a call's arrays; the first must be there, those after it do not count if they are ``None``.

    ``backend`` is a name from :data:`NAMES`, a :class:`~gpu_bn.backends.protocol.Backend`, or ``None`` for the one
    that serves the arrays' library.

    Raises:
        TypeError: an array of no known library, or arrays of several, or on several devices.
        ValueError: an unknown backend name, or a backend that does not serve these arrays.
        BackendUnavailableError: the backend is known but cannot be had.
    """
    return loaded(backend, row_of(backend, **arrays))


def loaded(backend: Any, row: Row | None) -> Backend:
    """The backend that was asked for, which is ``row``'s if :func:`row_of` has found one."""
    if row is not None:
        return load(row.name, row.library)
    given: Backend = backend
    return given


def row_of(backend: str | Backend | None, **arrays: Any) -> Row | None:
    """The row of :func:`select`'s backend, which is not loaded; ``None`` for one that is given itself.

    Raises:
        TypeError, ValueError: as :func:`select`.
    """
    required = next(iter(arrays))
    libraries = {name: _library(name, array) for name, array in arrays.items() if array is not None or name == required}
    library = libraries[required]
    places = [arrays[name].device if row.device else None for name, row in libraries.items()]
    if any(other is not library for other in libraries.values()) or any(place != places[0] for place in places):
        found = ", ".join(
            f"{name} is a {row.array}" + ("" if place is None else f" on {place}")
            for (name, row), place in zip(libraries.items(), places, strict=True)
        )
        raise TypeError(f"expected all arrays in one library and on one device, got: {found}")
    if backend is not None and not isinstance(backend, str):
        if not hasattr(backend, "normalize"):
            raise TypeError(f"backend should be a name or a Backend, got {type(backend).__name__}")
        return None
    if backend is None:
        return library
    rows = _rows(backend)
    for row in rows:
        if (row.library, row.device) == (library.library, library.device) or _interpreted(row, library):
            return row
    served = " or ".join(map(str, rows))
    raise ValueError(f"backend {backend!r} serves arrays of type {served}, got {library}")


def _interpreted(row: Row, given: Row) -> bool:
    """Whether Triton's interpreter runs a backend's kernels, which it does where the tensors of ``given`` are."""
    interprets = row.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interprets and (given.library, given.device) == (row.library, "cpu")


def serving(array: Any, name: str = "input") -> Backend:
    """The backend for an array of a known library."""
    row = _library(name, array)
    return load(row.name, row.library)


def told_by_type(array: Any) -> bool:
    """Whether an array's type tells which backend serves it, wherever it is."""
    kind: Any = type(array)
    return not any(row.device for row in _rows_of_type(kind))


def default(array: Any) -> str:
    """The name of the backend that serves an array of a known library unless another is asked for."""
    return _library("input", array).name


def differentiable(array: Any, backend: str | Backend | None) -> ModuleType | None:
    """The module whose ``batch_norm`` serves an array of a library that differentiates; ``None`` for other arrays.

    A :class:`~gpu_bn.backends.protocol.Backend` given as an object is used as it is, without gradients.
    """
    if backend is not None and not isinstance(backend, str):
        return None
    kind: Any = type(array)
    rows = _rows_of_type(kind)
    return import_module(rows[0].differentiable) if rows and rows[0].differentiable else None


@cache
def load(name: str, library: str | None = None) -> Backend:
    """The backend of a name, for an array library; ``None`` is the first that it serves.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the backend cannot be had; the message says why.
    """
    rows = _rows(name)
    if library is None:
        return load(name, rows[0].library)
    row = next(row for row in rows if row.library == library)
    try:
        backend: Backend = import_module(row.module).backend()
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        extra = {"triton": "torch"}.get(missing, missing if missing in row.packages else row.packages[0])
        raise BackendUnavailableError(
            f"backend {name!r} cannot be used: {error}; install it with pip install -e '.[{extra}]' in a clone"
        ) from error
    except RuntimeError as error:
        raise BackendUnavailableError(f"backend {name!r} cannot be used: {error}") from None
    return backend


def _rows(name: str) -> list[Row]:
    rows = [row for row in ROWS if row.name == name]
    if not rows:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return rows


def _library(name: str, array: Any) -> Row:
    """The row that serves an array's type and device: the one place where a device decides."""
    kind: Any = type(array)
    rows = _rows_of_type(kind)
    if not rows:
        kinds = ", ".join(dict.fromkeys(row.array for row in ROWS))
        raise TypeError(f"{name} should be an array ({kinds}), got {kind.__module__}.{kind.__qualname__}")
    if not rows[0].device:
        return rows[0]
    device = array.device.type
    for row in rows:
        if row.device == device:
            return row
    raise TypeError(f"{name} should be on one of {', '.join(dict.fromkeys(row.device for row in rows))}, got {device}")


def is_named(kind: Any) -> bool:
    """Whether a type is one of the rows' own, which live as long as their libraries."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return any(row.array == name for row in ROWS)


_FOUND: dict[Any, tuple[Row, ...]] = {}


def _rows_of_type(kind: Any) -> tuple[Row, ...]:
    """The rows that serve a type; remembered of the libraries' own, for others may go away."""
    rows = _FOUND.get(kind)
    if rows is None:
        rows = _find_rows(kind)
        if is_named(kind):
            _FOUND[kind] = rows
    return rows


def _find_rows(kind: Any) -> tuple[Row, ...]:
    """The rows whose array type is the nearest of a type's bases, unless another base changes what an array means."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    if NOT_PLAIN.intersection(names):
        return ()
    nearest = next((name for name in names if any(row.array == name for row in ROWS)), None)
    return tuple(row for row in ROWS if row.array == nearest)
