"""Compile CUDA C++ kernels for the CPU with g++, under sanitizers. The emulator's cache directory keeps the results."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emulator.cache import cache_directory

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing")
"""``-ffp-contract=off`` rounds a product before it is added, unless the kernel calls ``fma``."""
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
"""The libraries that have to be preloaded, before Python."""


def compiler() -> str | None:
    """Return the path of g++, or ``None``."""
    return shutil.which("g++")


def runtime(sanitizer: str) -> Path | None:
    """Return the path of the sanitizer's library, or ``None`` if the compiler comes without it."""
    found = subprocess.run(
        ["g++", f"-print-file-name={RUNTIMES[sanitizer]}"], capture_output=True, text=True, check=True
    )
    path = Path(found.stdout.strip())
    return path if path.is_absolute() else None


def compile_kernels(source: str, names: Sequence[str], sanitizer: str) -> Path:
    """Compile the kernels ``names`` to a library with functions ``kernel_0``, ``kernel_1``, ...; return its path.

    Raises:
        RuntimeError: g++ fails; the message holds its output.
    """
    calls = [
        f'extern "C" void kernel_{i}(void** table) {{ shim::call(&{name}, table); }}' for i, name in enumerate(names)
    ]
    text = "\n".join(['#include "cuda.h"', translate(source), *calls])
    return _library(text, ("fibres.h", "cuda.h"), SANITIZERS[sanitizer])


def compile_scheduler() -> Path:
    """Compile the scheduler, which runs the threads of kernels; it must be loaded before the libraries of kernels."""
    return _library((HERE / "fibres.cpp").read_text(), ("fibres.h",), ())


def _library(text: str, headers: Sequence[str], flags: Sequence[str]) -> Path:
    """Compile a text to a shared library, unless the cache has it, and return its path."""
    parts = [text, *((HERE / name).read_text() for name in headers), *FLAGS, *flags]
    library = cache_directory() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, built = Path(folder) / "source.cpp", Path(folder) / "built.so"
            source.write_text(text)
            _run(["g++", *FLAGS, *flags, "-shared", f"-I{HERE}", source, "-o", built])
            built.replace(library)  # atomic, also with several processes
    return library


def _run(command: Sequence[str | Path]) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # without the sanitizer
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[:4000]}")


# ------------------------------------------------------------------------- CUDA syntax that g++ does not understand
SHARED = re.compile(r"(?<!extern )__shared__ ([^;{}=]+?) (\w+)((?:\[[^\]]*\])*);")
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([^;]*?) ?(\w+)\[\];")
CLUSTER = re.compile(r"(__global__ void (?:CLUSTER_OF|__cluster_dims__)\((\w+)[^{]*\{)")


def translate(source: str) -> str:
    """Return the source with shared memory, cluster sizes and inline PTX rewritten for the shim."""
    source = DYNAMIC.sub(r"#define \2 ((\1*)shim::dynamic_memory())\n", source)
    source = SHARED.sub(
        r"static const char \2_key = 0; typedef \1 \2_type\3; "
        r"\2_type& \2 = *(\2_type*)shim::variable(&\2_key, sizeof(\2_type), alignof(\2_type));",
        source,
    )
    source = CLUSTER.sub(r"\1 shim::cluster(\2);", source)
    return _without_asm(source)


def _without_asm(source: str) -> str:
    parts, at = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile\s*)?\(", source):
        end = _closing(source, found.end())
        parts += [source[at : found.start()], _calls(source[found.end() : end])]
        at = end + 1
    return "".join([*parts, source[at:]])


def _closing(source: str, at: int) -> int:
    """Return the index of the bracket that closes the one before ``at``; brackets in strings do not count."""
    depth = 1
    for token in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(source, at):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if not depth:
            return token.start()
    raise ValueError("an asm statement without an end")


def _calls(statement: str) -> str:
    """Rewrite an asm statement as calls of functions named after instructions: ``ptx::cvt_f32_f16(f, v)``."""
    template, *lists = _split(statement)
    code = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", " ").replace("\\t", " ")
    operands = [text for part in lists[:2] for text in _operands(part)]
    calls = []
    for instruction in filter(None, map(str.strip, code.split(";"))):
        opcode, _, rest = instruction.partition(" ")
        values = [
            re.sub(r"%(\d+)", lambda place: f"({operands[int(place[1])]})", value.strip(" []"))
            for value in filter(None, rest.split(","))
        ]
        calls.append(f"ptx::{re.sub(r'[.:]', '_', opcode)}({', '.join(values)})")
    return f"({', '.join(calls)})"


def _split(statement: str) -> list[str]:
    """Split an asm statement at the colons outside of strings; ``::`` is two colons."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|:|[^":]+', statement)
    parts = [""]
    for token in tokens:
        if token == ":":
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _operands(part: str) -> list[str]:
    """Return the expressions in operands such as ``"=f"(f), "r"(v)``: here ``f`` and ``v``."""
    found = []
    for constraint in re.finditer(r'"[^"]*"\s*\(', part):
        found.append(part[constraint.end() : _closing(part, constraint.end())])
    return found
