"""The choice of a backend, by the type of the arrays or by name.

A caller that passes an array has imported its library already, so its type tells the library. Of the backends for one
kind of array, the first whose packages are installed serves it: on a CPU ``cpu`` with Numba, else ``numpy``. Only the
module of a backend imports its library; it is loaded when the backend is first needed.
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
    """A backend for one kind of array.

    Attributes:
        name: the name of the backend.
        library: the array library.
        array: the type of the arrays.
        module: the module of the backend.
        device: the type of the devices that it serves, for a library with several.
        differentiable: for a library that differentiates, the module whose ``front_door`` serves ``batch_norm``.
        packages: the packages that it needs.
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
"""The extra that installs a package, where it has another name."""
BROKEN = (ImportError, OSError, RuntimeError, SystemError, AttributeError, ValueError)
"""The exceptions of an import if the installation or a setting of a library is broken."""
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
"""The first available row for a kind of array is its default; the others are used by name only."""
TORCH = "torch"
"""The name of whichever backend serves torch tensors on the CPU."""
NAMES = tuple(dict.fromkeys([*(row.name for row in ROWS), TORCH]))
NOT_PLAIN = {"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix"}
"""Subclasses that are refused: their masks would be ignored, or their shape is always 2-D."""


def select(backend: str | Backend | None, **arrays: Any) -> Backend:
    """Return the backend for the arrays of a call; all but the first may be ``None``.

    ``backend`` is a name from :data:`NAMES`, a :class:`~gpu_bn.backends.protocol.Backend`, or ``None`` for the one
    that serves the arrays' library.

    Raises:
        TypeError: an array is of no known library, or the arrays are of several libraries or on several devices.
        ValueError: the backend's name is unknown, or it does not serve these arrays.
        BackendUnavailableError: the backend is known but not available.
    """
    return resolve(backend, find_row(backend, **arrays))


def resolve(backend: Any, row: Row | None) -> Backend:
    """Return the backend of the row that :func:`find_row` returned; for ``None``, the given ``backend`` itself."""
    if row is not None:
        return load(row.name, row.library)
    given: Backend = backend
    return given


def find_row(backend: str | Backend | None, **arrays: Any) -> Row | None:
    """Return the row of the backend that :func:`select` returns, without loading it; ``None`` for a backend object.

    Raises:
        TypeError, ValueError: for the reasons given at :func:`select`.
    """
    required = next(iter(arrays))
    kinds = {name: _rows_for(name, array) for name, array in arrays.items() if array is not None or name == required}
    rows = kinds[required]
    for name, array_rows in kinds.items():
        if array_rows[0].device:  # a torch tensor
            spec.check_strided(name, arrays[name])
    devices = [arrays[name].device if rows[0].device else None for name, rows in kinds.items()]
    if any(other != rows for other in kinds.values()) or any(device != devices[0] for device in devices):
        got = ", ".join(
            f"{name} is a {rows[0].array}" + ("" if device is None else f" on {device}")
            for (name, rows), device in zip(kinds.items(), devices, strict=True)
        )
        raise TypeError(f"expected all arrays in one library and on one device, got: {got}")
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


def _interpreted(row: Row, default: Row) -> bool:
    """Tell whether Triton's interpreter runs the kernels of ``row`` on the CPU tensors of ``default``."""
    interprets = row.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interprets and (default.library, default.device) == (row.library, "cpu")


def backend_for(array: Any) -> Backend:
    """Return the default backend of an array."""
    row = _first(_rows_for("input", array))
    return load(row.name, row.library)


def is_known_by_type(array: Any) -> bool:
    """Tell whether the type of an array alone, without its device, determines its backend."""
    kind: Any = type(array)
    return not any(_rows_by_device(kind))


def default_name(array: Any) -> str:
    """Return the name of the default backend of an array."""
    return _first(_rows_for("input", array)).name


def differentiable(array: Any, backend: str | Backend | None) -> ModuleType | None:
    """Return the module that serves arrays of a library that differentiates; ``None`` for other libraries.

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
    """Return the backend of a name for an array library; ``None`` stands for the first library that it serves.

    Raises:
        ValueError: the name is unknown.
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
    """Return the command that installs the missing package of a backend, or its last one if none is named."""
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
    """Return the default of the rows for one kind of array: the first that is available, else the first."""
    return next((row for row in rows if not unavailable_reason(row)), rows[0])


@cache
def unavailable_reason(row: Row) -> str:
    """Return why a backend's packages cannot be used; empty if they can.

    Packages are looked up, not imported, except Numba, for it may refuse the installed NumPy.
    """
    absent = [package for package in row.packages if not _is_installed(package)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if "numba" in row.packages:
        try:
            import_module("numba")
        except BROKEN as error:
            return f"Numba cannot be imported: {error}"
    return ""


def _is_installed(package: str) -> bool:
    """Tell whether a package has been imported or can be found."""
    return sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None


def _rows_for(name: str, array: Any) -> tuple[Row, ...]:
    """Return the rows for the type and device of an array, or raise ``TypeError`` if one of them is unknown."""
    kind: Any = type(array)
    by_device = _rows_by_device(kind)
    if not by_device:
        kinds = ", ".join(dict.fromkeys(row.array for row in ROWS))
        raise TypeError(f"{name} should be an array ({kinds}), got {kind.__module__}.{kind.__qualname__}")
    if "" in by_device:
        return by_device[""]
    device = "cpu" if array.is_cpu else array.device.type  # is_cpu is faster than device.type
    if device not in by_device:
        raise TypeError(f"{name} should be on one of {', '.join(by_device)}, got {device}")
    return by_device[device]


def is_named(kind: Any) -> bool:
    """Tell whether a type is itself in the table, not a subclass; such types live as long as their libraries."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return any(row.array == name for row in ROWS)


_ROWS_BY_TYPE: dict[Any, dict[str, tuple[Row, ...]]] = {}


def _rows_by_device(kind: Any) -> dict[str, tuple[Row, ...]]:
    """Return the rows that serve a type, by device. They are kept for the types in the table only."""
    rows = _ROWS_BY_TYPE.get(kind)
    if rows is None:
        rows = _find_rows(kind)
        if is_named(kind):
            _ROWS_BY_TYPE[kind] = rows
    return rows


def _find_rows(kind: Any) -> dict[str, tuple[Row, ...]]:
    """Return the rows whose array type is the nearest base class of a type; none for the types in ``NOT_PLAIN``."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    if NOT_PLAIN.intersection(names):
        return {}
    nearest = next((name for name in names if any(row.array == name for row in ROWS)), None)
    rows = [row for row in ROWS if row.array == nearest]
    return {
        device: tuple(row for row in rows if row.device == device) for device in dict.fromkeys(r.device for r in rows)
    }
