"""Which backend serves a call: by the type of the arrays, or by name.

Whoever passes an array has imported its library already, so the type tells which library it is. Of the backends for one
kind of array the first whose packages are there serves it: on a CPU ``cpu`` where Numba is, else ``numpy``. A backend's
module, which alone imports its library, is loaded when the backend is first asked for.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from gpu_bn import spec
from gpu_bn.backends.protocol import Backend, BackendUnavailableError

__all__ = [
    "NAMES",
    "ROWS",
    "BackendUnavailableError",
    "backend_for",
    "default_name",
    "differentiable",
    "load",
    "select",
    "unavailable_reason",
]


@dataclass(frozen=True, slots=True, eq=False)
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


EXTRAS = {"numba": "cpu", "triton": "torch"}
"""What installs a package, where that is not called like it."""
BROKEN = (ImportError, OSError, RuntimeError, SystemError, AttributeError, ValueError)
"""What an import raises where an installation, or a setting of a library's, is broken."""
_TENSOR = {"library": "torch", "array": "torch.Tensor", "differentiable": "gpu_bn.nn.functional"}
ROWS = (
    Row("cpu", "numpy", "numpy.ndarray", "gpu_bn.backends.cpu.backend", packages=("numba",)),
    Row("numpy", "numpy", "numpy.ndarray", "gpu_bn.backends.numpy"),
    Row("cupy", "cupy", "cupy.ndarray", "gpu_bn.backends.cupy.backend", packages=("cupy",)),
    Row("cpu", module="gpu_bn.backends.cpu.tensors", device="cpu", packages=("torch", "numba"), **_TENSOR),
    Row("numpy", module="gpu_bn.backends.torch_cpu", device="cpu", packages=("torch",), **_TENSOR),
    Row("triton", module="gpu_bn.backends.triton.backend", device="cuda", packages=("torch", "triton"), **_TENSOR),
    Row("cupy", module="gpu_bn.backends.cupy.tensors", device="cuda", packages=("torch", "cupy"), **_TENSOR),
)
"""The first available row for a kind of array serves it; the others serve when they are asked for."""
TORCH = "torch"
"""This name stands for whichever backend serves torch's tensors on the CPU."""
NAMES = tuple(dict.fromkeys([*(row.name for row in ROWS), TORCH]))
NOT_PLAIN = {"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix"}
"""Kinds of array whose mask would be ignored, or whose shape cannot be changed."""


def select(backend: str | Backend | None, **arrays: Any) -> Backend:
    """Return the backend for a call's arrays; the first must be there, the others do not count if they are ``None``.

    ``backend`` is a name from :data:`NAMES`, a :class:`~gpu_bn.backends.protocol.Backend`, or ``None`` for the one
    that serves the arrays' library.

    Raises:
        TypeError: an array of no known library, or arrays of several, or on several devices.
        ValueError: an unknown backend name, or a backend that does not serve these arrays.
        BackendUnavailableError: the backend is known but not available.
    """
    return resolve(backend, find_row(backend, **arrays))


def resolve(backend: Any, row: Row | None) -> Backend:
    """Return the backend that was asked for, which is ``row``'s if :func:`find_row` has found one."""
    if row is not None:
        return load(row.name, row.library)
    given: Backend = backend
    return given


def find_row(backend: str | Backend | None, **arrays: Any) -> Row | None:
    """Return the row of :func:`select`'s backend, which is not loaded; ``None`` for one that is given itself.

    Raises:
        TypeError, ValueError: as :func:`select`.
    """
    required = next(iter(arrays))
    kinds = {name: _rows_for(name, array) for name, array in arrays.items() if array is not None or name == required}
    rows = kinds[required]
    for name, each in kinds.items():
        if each[0].device:  # torch's
            spec.check_strided(name, arrays[name])
    places = [arrays[name].device if rows[0].device else None for name, rows in kinds.items()]
    if any(other != rows for other in kinds.values()) or any(place != places[0] for place in places):
        found = ", ".join(
            f"{name} is a {rows[0].array}" + ("" if place is None else f" on {place}")
            for (name, rows), place in zip(kinds.items(), places, strict=True)
        )
        raise TypeError(f"expected all arrays in one library and on one device, got: {found}")
    if backend is not None and not isinstance(backend, str):
        if not hasattr(backend, "normalize"):
            raise TypeError(f"backend should be a name or a Backend, got {type(backend).__name__}")
        return None
    if backend is None:
        return _first(rows)
    named = _rows(backend)
    for row in named:
        if row in rows or _interpreted(row, rows[0]):
            return row
    served = " or ".join(map(str, named))
    raise ValueError(f"backend {backend!r} serves arrays of type {served}, got {rows[0]}")


def _interpreted(row: Row, given: Row) -> bool:
    """Tell whether Triton's interpreter runs a backend's kernels, which it does where the tensors of ``given`` are."""
    interprets = row.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interprets and (given.library, given.device) == (row.library, "cpu")


def backend_for(array: Any) -> Backend:
    """Return the backend for an array of a known library."""
    row = _first(_rows_for("input", array))
    return load(row.name, row.library)


def is_known_by_type(array: Any) -> bool:
    """Tell whether an array's type tells which backend serves it, wherever it is."""
    kind: Any = type(array)
    return not any(_rows_by_device(kind))


def default_name(array: Any) -> str:
    """Return the name of the backend that serves an array of a known library unless another is asked for."""
    return _first(_rows_for("input", array)).name


def differentiable(array: Any, backend: str | Backend | None) -> ModuleType | None:
    """Return the module whose ``batch_norm`` serves an array of a library that differentiates; ``None`` for others.

    A :class:`~gpu_bn.backends.protocol.Backend` given as an object is used as it is, without gradients.
    """
    if backend is not None and not isinstance(backend, str):
        return None
    kind: Any = type(array)
    for rows in _rows_by_device(kind).values():
        return import_module(rows[0].differentiable) if rows[0].differentiable else None
    return None


@cache
def load(name: str, library: str | None = None) -> Backend:
    """Return the backend of a name, for an array library; ``None`` is the first that it serves.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the backend is not available; the message says why.
    """
    rows = _rows(name)
    row = next((row for row in rows if row.library == library), rows[0])
    if (row.name, row.library) != (name, library):
        return load(row.name, row.library)
    try:
        backend: Backend = import_module(row.module).backend()
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        raise BackendUnavailableError(
            f"backend {name!r} cannot be used: {error}; install it with {install(row, missing)} in a clone"
        ) from error
    except BROKEN as error:
        raise BackendUnavailableError(f"backend {name!r} cannot be used: {error}") from error
    return backend


def install(row: Row, missing: str = "") -> str:
    """Return the command that installs what a backend needs: the package that is missing, or all."""
    extra = missing if missing in row.packages else row.packages[-1]
    return f"pip install -e '.[{EXTRAS.get(extra, extra)}]'"


def _rows(name: str) -> list[Row]:
    if name == TORCH:
        return [_first(tuple(row for row in ROWS if (row.library, row.device) == ("torch", "cpu")))]
    rows = [row for row in ROWS if row.name == name]
    if not rows:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return rows


@cache
def _first(rows: tuple[Row, ...]) -> Row:
    """Return the row that serves a kind of array unless another is asked for."""
    return next((row for row in rows if not unavailable_reason(row)), rows[0])


@cache
def unavailable_reason(row: Row) -> str:
    """Say why a backend's packages are not there; empty if they are.

    Only Numba is imported, not just looked for: an installed one may refuse the installed NumPy.
    """
    absent = [package for package in row.packages if not _is_there(package)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if "numba" in row.packages:
        try:
            import_module("numba")
        except BROKEN as error:
            return f"Numba cannot be imported: {error}"
    return ""


def _is_there(package: str) -> bool:
    """Tell whether a package has been imported or can be found."""
    return sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None


def _rows_for(name: str, array: Any) -> tuple[Row, ...]:
    """Return the rows for an array's type and device: the one place where a device decides."""
    kind: Any = type(array)
    by_device = _rows_by_device(kind)
    if not by_device:
        kinds = ", ".join(dict.fromkeys(row.array for row in ROWS))
        raise TypeError(f"{name} should be an array ({kinds}), got {kind.__module__}.{kind.__qualname__}")
    if "" in by_device:
        return by_device[""]
    device = "cpu" if array.is_cpu else array.device.type  # the device's text takes longer to make
    if device not in by_device:
        raise TypeError(f"{name} should be on one of {', '.join(by_device)}, got {device}")
    return by_device[device]


def is_named(kind: Any) -> bool:
    """Tell whether a type is one of the rows' own, which live as long as their libraries."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return any(row.array == name for row in ROWS)


_FOUND: dict[Any, dict[str, tuple[Row, ...]]] = {}


def _rows_by_device(kind: Any) -> dict[str, tuple[Row, ...]]:
    """Return the rows that serve a type. Those of the libraries' own types are remembered; other types may go away."""
    rows = _FOUND.get(kind)
    if rows is None:
        rows = _find_rows(kind)
        if is_named(kind):
            _FOUND[kind] = rows
    return rows


def _find_rows(kind: Any) -> dict[str, tuple[Row, ...]]:
    """Find the rows whose array type is the nearest of a type's bases. Another base may change what an array means."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    if NOT_PLAIN.intersection(names):
        return {}
    nearest = next((name for name in names if any(row.array == name for row in ROWS)), None)
    rows = [row for row in ROWS if row.array == nearest]
    return {
        device: tuple(row for row in rows if row.device == device) for device in dict.fromkeys(r.device for r in rows)
    }
