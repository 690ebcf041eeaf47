"""How kernels are compiled, and the folder that keeps what has been compiled.

:func:`kernel` is for what Python calls, ``inlined`` for what kernels call, ``cold`` for what they rarely call. They are
written in a small part of Python, of which :mod:`gpu_bn.kernels.cpu.translate` makes LLVM's code. Numba's own compiler
would take ten times as long: it infers types, and compiles each function by itself before it inlines it.

Compiled kernels are kept in ``$GPU_BN_CACHE_DIR``, else in ``$XDG_CACHE_HOME/gpu_bn``, else in ``~/.cache/gpu_bn``. The
folder may be deleted at any time. One that can only be read is read; without one, each process compiles for itself.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property, partial
from importlib.resources import files
from itertools import count
from pathlib import Path
from threading import RLock
from types import CodeType, FunctionType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core.codegen import JITCPUCodegen

import gpu_bn
from gpu_bn.kernels.cpu.expressions import FLOAT, INT
from gpu_bn.kernels.cpu.translate import Unit

__all__ = ["cache_folder", "cold", "inlined", "kernel", "stores_by_mask", "supports_float16"]

ENVIRONMENT = "GPU_BN_CACHE_DIR"
DIGEST = hashlib.sha256().digest_size
_lock, _numbers = RLock(), count()


class Kernel:
    """A function that is compiled when its address is asked for."""

    def __init__(self, function: Callable[..., Any], inlines: bool = False, kept: bool = False) -> None:
        self.py_func: Any = function
        self.inlines = inlines
        """Whether it becomes part of what calls it."""
        self._text = described(function) if kept else f"{next(_numbers)}"
        self._kept = kept
        self._addresses: dict[tuple[str, ...], int] = {}
        self.misses = 0
        """How often it was not found in the cache."""

    @property
    def parameters(self) -> tuple[str, ...]:
        code = self.py_func.__code__
        return code.co_varnames[: code.co_argcount]  # type: ignore[no-any-return]

    @cached_property
    def tree(self) -> ast.FunctionDef:
        """Its text, parsed."""
        code = self.py_func.__code__
        text = "".join(linecache.getlines(code.co_filename, self.py_func.__globals__))
        tree, same = _functions(text, code.co_filename).get(code.co_firstlineno, (None, None))
        if tree is None or same != code:
            raise RuntimeError(f"{code.co_filename} is missing, or has changed since {code.co_qualname} was imported")
        return tree

    def address(self, floats: tuple[str, ...] = ()) -> int:
        """Where the machine code is, called as C does; all parameters but ``floats`` are int64."""
        with _lock:
            if floats not in self._addresses:
                key = f"{self._text}\n{floats}\n{codegen().magic_tuple()}"
                name = f"k{hashlib.sha256(key.encode()).hexdigest()[:32]}"
                folder = cache_folder() if self._kept else None
                found = None if folder is None else _read(folder / name)
                if found is None:
                    self.misses += 1
                    found = codegen()._tm.emit_object(self.module(floats, name))
                    if folder is not None:
                        _write(folder / name, found)
                engine = codegen()._engine._ee
                engine.add_object_file(llvm.ObjectFileRef.from_data(found))
                engine.finalize_object()
                self._addresses[floats] = engine.get_function_address(name)
            return self._addresses[floats]

    def module(self, floats: tuple[str, ...] = (), name: str = "kernel") -> Any:
        """LLVM's code, optimised."""
        unit = Unit(codegen())
        unit.add(self, tuple([FLOAT if one in floats else INT for one in self.parameters]), name)
        module = llvm.parse_assembly(str(unit.module))
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False  # vectors are written as such
        passes = llvm.create_pass_builder(codegen()._tm, options)
        passes.getModulePassManager().run(module, passes)
        return module


kernel: Callable[[Callable[..., Any]], Any] = partial(Kernel, kept=True)
inlined: Callable[[Callable[..., Any]], Any] = partial(Kernel, inlines=True)
cold: Callable[[Callable[..., Any]], Any] = Kernel


@cache
def codegen() -> Any:
    """LLVM for this CPU, as Numba sets it up: also for the one that ``$NUMBA_CPU_NAME`` names."""
    return JITCPUCodegen("gpu_bn")


@cache
def _functions(text: str, name: str) -> dict[int, tuple[ast.FunctionDef, CodeType | None]]:
    """The functions of a source, by their first lines, and what Python's compiler makes of them."""
    tree = ast.parse(text)
    codes, ahead = {}, [compile(tree, name, "exec", dont_inherit=True)]
    while ahead:
        code = ahead.pop()
        codes[code.co_firstlineno, code.co_name] = code
        ahead += [one for one in code.co_consts if isinstance(one, CodeType)]
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *[one.lineno for one in node.decorator_list]])
            found[first] = node, codes.get((first, node.name))
    return found


@cache
def supports_float16() -> bool:
    """Whether float16 kernels may be compiled: where the CPU cannot convert, LLVM ends the process."""
    convert = "define half @f(half %x) {\n%y = fpext half %x to float\n%z = fmul float %y, %y\n"
    text = _assembly(f"{convert}%w = fptrunc float %z to half\nret half %w\n}}")
    return not any(name in text for name in ("extendhfsf2", "truncsfhf2", "gnu_h2f", "gnu_f2h"))


def stores_by_mask() -> bool:
    """Whether the CPU has AVX-512's masks, by which vectors are stored in one instruction."""
    store = "void @llvm.masked.store.v16f32.p0(<16 x float> %x, ptr %at, i32 4, <16 x i1> %m)"
    declared = "declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)"
    code = f"define void @f(<16 x float> %x, ptr %at, <16 x i1> %m) {{\ncall {store}\nret void\n}}\n{declared}"
    return "{%k" in _assembly(code)


def _assembly(code: str) -> str:
    """What LLVM makes of some code for this CPU."""
    triple, cpu, features = codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return machine.emit_assembly(llvm.parse_assembly(code))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- the cache
def cache_folder() -> Path | None:
    """Where compiled kernels of these sources are kept; ``None`` if no place is named and there is no home."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(os.path.expanduser(named)).absolute() / STAMP  # noqa: PTH111 (it may fail)
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (it may fail)
    return base / "gpu_bn" / STAMP if base.is_absolute() else None


def _stamp() -> str:
    """A digest of the versions and of all sources that kernels are made of."""
    package = files("gpu_bn")
    names = ("activation_values.py", "activations.py", "spec.py")
    sources = [*(package / "kernels" / "cpu").iterdir(), *(package / name for name in names)]
    versions = gpu_bn.__version__, numba.__version__, llvmlite.__version__, llvm.llvm_version_info
    digest = hashlib.sha256(" ".join(map(str, versions)).encode())
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


def _read(path: Path) -> bytes | None:
    """What a file keeps; what is damaged counts as absent."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[DIGEST:] if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST] else None


def _write(path: Path, kept: bytes) -> None:
    """Keep it, if there is room: files are complete or absent."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(hashlib.sha256(kept).digest() + kept)
                file.flush()
                temporary.replace(path)
            except BaseException:
                temporary.unlink()
                raise
