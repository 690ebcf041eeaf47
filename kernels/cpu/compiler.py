"""Compile kernels, and cache the machine code on disk.

Three decorators mark functions to compile: ``kernel`` an entry point, whose address Python takes; ``inlined`` a
function that is inlined where kernels call it; ``cold`` a function that kernels call without inlining. They are written
in a subset of Python, which :mod:`gpu_bn.kernels.cpu.translate` translates to LLVM IR. Numba's own compiler would take
ten times as long: it infers types, and compiles each function separately before it inlines it.

The cache is in ``$GPU_BN_CACHE_DIR``, else in ``$XDG_CACHE_HOME/gpu_bn``, else in ``~/.cache/gpu_bn``. The folder may
be deleted at any time. If it cannot be written, it is only read; if there is none, each process compiles its kernels.
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
    """A function that is compiled when its address is first asked for."""

    def __init__(self, function: Callable[..., Any], inlines: bool = False, cached: bool = False) -> None:
        self.py_func: Any = function
        self.inlines = inlines
        """True if calls of the function are inlined."""
        self._key = describe(function) if cached else f"{next(_numbers)}"
        self._cached = cached
        self._addresses: dict[tuple[str, ...], int] = {}
        self.misses = 0
        """The number of times that the kernel was not in the cache."""

    @property
    def parameters(self) -> tuple[str, ...]:
        code = self.py_func.__code__
        return code.co_varnames[: code.co_argcount]  # type: ignore[no-any-return]

    @cached_property
    def tree(self) -> ast.FunctionDef:
        """The syntax tree of the function."""
        code = self.py_func.__code__
        text = "".join(linecache.getlines(code.co_filename, self.py_func.__globals__))
        tree, current = _functions(text, code.co_filename).get(code.co_firstlineno, (None, None))
        if tree is None or current != code:
            raise RuntimeError(f"{code.co_filename} is missing, or has changed since {code.co_qualname} was imported")
        return tree

    def address(self, floats: tuple[str, ...] = ()) -> int:
        """Return the address of the C function; the parameters named in ``floats`` are float64, all others int64."""
        with _lock:
            if floats not in self._addresses:
                key = f"{self._key}\n{floats}\n{codegen().magic_tuple()}"
                name = f"k{hashlib.sha256(key.encode()).hexdigest()[:32]}"
                folder = cache_folder() if self._cached else None
                machine_code = None if folder is None else _read(folder / name)
                if machine_code is None:
                    self.misses += 1
                    machine_code = codegen()._tm.emit_object(self.module(floats, name))
                    if folder is not None:
                        _write(folder / name, machine_code)
                engine = codegen()._engine._ee
                engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
                engine.finalize_object()
                self._addresses[floats] = engine.get_function_address(name)
            return self._addresses[floats]

    def module(self, floats: tuple[str, ...] = (), name: str = "kernel") -> Any:
        """Return the kernel as an optimised LLVM module."""
        unit = Unit(codegen())
        unit.add(self, tuple([FLOAT if one in floats else INT for one in self.parameters]), name)
        module = llvm.parse_assembly(str(unit.module))
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False  # kernels use vectors explicitly
        passes = llvm.create_pass_builder(codegen()._tm, options)
        passes.getModulePassManager().run(module, passes)
        return module


kernel: Callable[[Callable[..., Any]], Any] = partial(Kernel, cached=True)
inlined: Callable[[Callable[..., Any]], Any] = partial(Kernel, inlines=True)
cold: Callable[[Callable[..., Any]], Any] = Kernel


@cache
def codegen() -> Any:
    """Return the LLVM code generator that Numba sets up for this CPU, or for the one in ``$NUMBA_CPU_NAME``."""
    return JITCPUCodegen("gpu_bn")


@cache
def _functions(text: str, name: str) -> dict[int, tuple[ast.FunctionDef, CodeType | None]]:
    """Return the syntax tree and the code object of each function in a source, by the number of its first line."""
    tree = ast.parse(text)
    codes, pending = {}, [compile(tree, name, "exec", dont_inherit=True)]
    while pending:
        code = pending.pop()
        codes[code.co_firstlineno, code.co_name] = code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    functions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            functions[first] = node, codes.get((first, node.name))
    return functions


@cache
def supports_float16() -> bool:
    """Tell whether the CPU can convert float16. If not, LLVM would end the process that compiles such a kernel."""
    convert = "define half @f(half %x) {\n%y = fpext half %x to float\n%z = fmul float %y, %y\n"
    text = _assembly(f"{convert}%w = fptrunc float %z to half\nret half %w\n}}")
    return not any(name in text for name in ("extendhfsf2", "truncsfhf2", "gnu_h2f", "gnu_f2h"))


def stores_by_mask() -> bool:
    """Tell whether the CPU stores a part of a vector in one instruction, by a mask of AVX-512."""
    store = "void @llvm.masked.store.v16f32.p0(<16 x float> %x, ptr %at, i32 4, <16 x i1> %m)"
    declared = "declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)"
    code = f"define void @f(<16 x float> %x, ptr %at, <16 x i1> %m) {{\ncall {store}\nret void\n}}\n{declared}"
    return "{%k" in _assembly(code)


def _assembly(code: str) -> str:
    """Return the assembly that LLVM generates for this CPU."""
    triple, cpu, features = codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return machine.emit_assembly(llvm.parse_assembly(code))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- the cache
def cache_folder() -> Path | None:
    """Return the folder for kernels compiled from these sources; ``None`` if no variable and no home names one."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(os.path.expanduser(named)).absolute() / STAMP  # noqa: PTH111 (it may fail)
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (it may fail)
    return base / "gpu_bn" / STAMP if base.is_absolute() else None


def _stamp() -> str:
    """Return a digest of the library versions and of all source files that the machine code depends on."""
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


def describe(value: Any) -> str:
    """Return a text that identifies a constant or a function with its closure, and is the same in all processes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    function = getattr(value, "py_func", value)
    if not isinstance(function, FunctionType):
        raise TypeError(f"a kernel may close over numbers, strings and functions, got {type(value).__name__}")
    code, cells = function.__code__, function.__closure__ or ()
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    body = code.co_firstlineno, code.co_code, code.co_names, constants, function.__defaults__
    closure = describe(tuple(cell.cell_contents for cell in cells))
    return f"{function.__module__}.{function.__qualname__} {body} {closure}"


def _read(path: Path) -> bytes | None:
    """Return the machine code in a cache file; ``None`` if the file is absent or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[DIGEST:] if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST] else None


def _write(path: Path, machine_code: bytes) -> None:
    """Write a cache file atomically; do nothing if that fails, for example because the disk is full."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(hashlib.sha256(machine_code).digest() + machine_code)
                file.flush()
                temporary.replace(path)
            except BaseException:
                temporary.unlink()
                raise
