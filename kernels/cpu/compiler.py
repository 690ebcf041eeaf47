"""How kernels are compiled, and the folder that keeps what has been compiled.

:func:`kernel` is for what Python calls, ``inlined`` for what kernels call, ``cold`` for what they rarely call.

Compiled kernels are kept in ``$GPU_BN_CACHE_DIR``, else in ``$XDG_CACHE_HOME/gpu_bn``, else in ``~/.cache/gpu_bn``. The
folder may be deleted at any time. One that can only be read is read; without one, each process compiles for itself.
Numba's own cache is not used: it notices a change in a kernel's own file only, never finds a kernel that closes over
another, and two processes that compile at once can give one signature's code the name of another's.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

import gpu_bn

__all__ = ["cache_folder", "cold", "inlined", "kernel", "supports_float16"]

OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
ENVIRONMENT = "GPU_BN_CACHE_DIR"
DIGEST = hashlib.sha256().digest_size

inlined: Any = numba.njit(**OPTIONS, forceinline=True)
cold: Any = numba.njit(**OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what Python calls, or take it from the cache.

    Raises:
        TypeError: the function closes over more than numbers, strings, and functions that do not.
    """
    dispatcher = cold(function)
    dispatcher._cache = Cache(described(function))
    return dispatcher


@cache
def supports_float16() -> bool:
    """Whether float16 kernels may be compiled: where the CPU cannot convert, LLVM ends the process."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    convert = "define half @f(half %x) {\n%y = fpext half %x to float\n%z = fmul float %y, %y\n"
    module = llvm.parse_assembly(f"{convert}%w = fptrunc float %z to half\nret half %w\n}}")
    text: str = machine.emit_assembly(module)
    return not any(name in text for name in ("extendhfsf2", "truncsfhf2", "gnu_h2f", "gnu_f2h"))


# --------------------------------------------------------------------------------------------------------- the cache
def cache_folder() -> Path | None:
    """Where compiled kernels of these sources are kept; ``None`` if no place is named and there is no home."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).absolute() / STAMP
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (it may fail)
    return base / "gpu_bn" / STAMP if base.is_absolute() else None


def _stamp() -> str:
    """A digest of the versions and of all sources that kernels are made of."""
    package = files("gpu_bn")
    names = ("activation_values.py", "activations.py", "spec.py")
    sources = [*(package / "kernels" / "cpu").iterdir(), *(package / name for name in names)]
    digest = hashlib.sha256(f"{gpu_bn.__version__} {numba.__version__} {llvm.llvm_version_info}".encode())
    for source in sorted(sources, key=lambda source: source.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


STAMP = _stamp()


def described(value: Any) -> str:
    """A text that is equal in all processes, and for equal constants, functions and compiled functions only."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    function = getattr(value, "py_func", value)
    if not isinstance(function, FunctionType):
        raise TypeError(f"a kernel may close over numbers, strings and functions, got {type(value).__name__}")
    code, cells = function.__code__, function.__closure__ or ()
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    body = code.co_firstlineno, code.co_code, code.co_names, constants, function.__defaults__
    closure = described(tuple(cell.cell_contents for cell in cells))
    return f"{function.__module__}.{function.__qualname__} {body} {closure}"


class Cache(NullCache):
    """The cache of one kernel, in the form that Numba asks for: a file for each signature and kind of CPU.

    Files are complete or absent, and say what they hold; what is damaged counts as absent.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        path = self._path(sig, target_context.codegen())
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data[DIGEST:]))

    def save_overload(self, sig: Any, data: Any) -> None:
        path = self._path(sig, data.codegen)
        if path is None or data.library.has_dynamic_globals:
            return
        payload = dumps(data._reduce())
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = Path(file.name)
                try:
                    file.write(hashlib.sha256(payload).digest() + payload)
                    file.flush()
                    temporary.replace(path)
                except BaseException:
                    temporary.unlink()
                    raise

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        folder = cache_folder()
        key = f"{self._text}\n{sig}\n{codegen.magic_tuple()}"
        return folder and folder / hashlib.sha256(key.encode()).hexdigest()[:32]
