"""Call NVRTC through ctypes: compile CUDA C++ to PTX and machine code."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class CompileError(Exception):
    """A compilation failed; the message has the compiler's log."""


def package_file(package: str, pattern: str) -> Path | None:
    """Find a file in an installed namespace package such as nvidia.cuda_nvrtc; ``None`` if it is not there."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if found := sorted(Path(directory).glob(pattern)):
            return found[0]
    return None


def nvrtc_library() -> Path | None:
    """Return the path of NVRTC in the pip packages: that of CUDA 12, or else of CUDA 13; ``None`` without either."""
    twelve = package_file("nvidia.cuda_nvrtc", "lib/libnvrtc.so.*[0-9]")
    return twelve or package_file("nvidia.cu13", "lib/libnvrtc.so.*[0-9]")


def cuda_headers() -> Path | None:
    header = package_file("nvidia.cuda_runtime", "include/cuda_fp16.h") or package_file(
        "nvidia.cu13", "include/cuda_fp16.h"
    )
    return header.parent if header else None


class _Nvrtc:
    def __init__(self, library: Path) -> None:
        # NVRTC opens this library by name, and finds it because it is loaded already.
        for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self.library = ctypes.CDLL(str(library))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def call(self, name: str, *args: Any) -> None:
        if status := getattr(self.library, name)(*args):
            raise CompileError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def cubin(self, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self.call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if size.value:
            self.call("nvrtcGetCUBIN", program, buffer)
        return buffer.raw

    def compile(
        self, source: str, options: Sequence[str], headers: Mapping[str, str], expressions: Sequence[str]
    ) -> tuple[str, str, dict[str, str], bytes]:
        """Return PTX, log, the name in the PTX of each name expression, and the cubin if the target is sm_<arch>."""

        def strings(values: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
            encoded = [value.encode() for value in values]
            return (ctypes.c_char_p * len(encoded))(*encoded)

        program = ctypes.c_void_p()
        files = (len(headers), strings(headers.values()), strings(headers))
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", *files)
        try:
            for expression in expressions:
                self.call("nvrtcAddNameExpression", program, expression.encode())
            try:
                self.call("nvrtcCompileProgram", program, len(options), strings(options))
            except CompileError as error:
                raise CompileError(f"{error}\n{self.text(program, 'ProgramLog')}") from None
            lowered = {}
            for expression in expressions:
                name = ctypes.c_char_p()
                self.call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(name))
                lowered[expression] = (name.value or b"").decode()
            return self.text(program, "PTX"), self.text(program, "ProgramLog"), lowered, self.cubin(program)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def nvrtc(library: Path | None = None) -> _Nvrtc:
    found = library or nvrtc_library()
    if found is None:
        raise CompileError("NVRTC is not installed")
    return _Nvrtc(found)
