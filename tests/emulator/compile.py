"""Compile CUDA and Triton kernels without a GPU or a driver; read their resources from the assembler's log.

Results are kept in a cache directory under a hash of all inputs, so that a second test run compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .accesses import space_of
from .cache import cached_path, write_whole
from .nvrtc import CompileError, cuda_headers, nvrtc
from .parser import TYPE_BYTES, Kernel, parse, separate

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
NOT_REPORTED = -1
"""The resources of a kernel that was compiled to PTX only."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: its PTX, and its resources as the assembler reports them."""

    name: str
    arch: int
    ptx: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    # What a launch needs beyond the PTX: Triton's threads per block and its dynamic shared memory.
    threads: int = 0
    dynamic_shared_bytes: int = 0
    log: str = ""

    @property
    def kernel(self) -> Kernel:
        return _parsed(self.ptx, self.name)

    def global_widths(self, kind: str) -> Counter[int]:
        """Count the global loads ("ld") or stores ("st") in the PTX by their width in bytes."""
        widths: Counter[int] = Counter()
        for ins in self.kernel.code:
            copies = kind == "ld" and ins.opcode == "cp" and len(ins.operands) > 2
            if copies:
                widths[ins.operands[2].value] += 1
            elif ins.opcode == kind and space_of(ins) == "global":
                widths[TYPE_BYTES[ins.type] * ins.vector_length] += 1
        return widths

    def require(
        self, *, registers: int | None = None, spill_bytes: int = 0, shared_bytes: int | None = None,
        load_bytes: int | None = None, store_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Assert upper limits, and that the widest global load and store have the given widths."""
        found = f"{self.name} for sm_{self.arch}: "
        assert self.registers != NOT_REPORTED, f"{found}compiled with resources=False, so there is nothing to judge"
        assert self.spill_bytes <= spill_bytes, f"{found}spills {self.spill_bytes} bytes"
        assert registers is None or self.registers <= registers, f"{found}{self.registers} registers > {registers}"
        total = self.shared_bytes + self.dynamic_shared_bytes
        assert shared_bytes is None or total <= shared_bytes, f"{found}{total} bytes of shared memory > {shared_bytes}"
        for kind, width in (("ld", load_bytes), ("st", store_bytes)):
            widest = max(self.global_widths(kind), default=0)
            assert width is None or widest == width, f"{found}widest global {kind} is {widest} bytes, not {width}"


@functools.lru_cache(512)
def _parsed(ptx: str, name: str) -> Kernel:
    """Return a kernel that can be launched; it is parsed once for all tests of a process."""
    return parse(ptx, name)


# -------------------------------------------------------------------- cache


def _load(path: Path) -> dict[str, Compiled] | None:
    try:
        return {name: Compiled(**entry) for name, entry in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError):  # absent, cut short, or of another version
        return None


def _save(path: Path, kernels: Mapping[str, Compiled]) -> None:
    write_whole(path, json.dumps({name: asdict(kernel) for name, kernel in kernels.items()}).encode())


# -------------------------------------------------------------------- CUDA C++


def compile_cuda(
    source: str,
    arch: int,
    options: Sequence[str] = (),
    *,
    expressions: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    resources: bool = True,
) -> dict[str, Compiled]:
    """Compile CUDA C++ for sm_<arch>; return every kernel of the source by name.

    `expressions` instantiates templates, such as "gpu_bn::forward<float, 4>"; the name of such a kernel is its
    expression. `headers` are the texts of files that the source includes. Without `resources` only PTX is made, which
    is several times faster: such a kernel can be run, but `require` raises an error.
    """
    flags = _flags(arch, options, resources)
    headers = dict(headers or {})
    path = cached_path(["cuda", nvrtc().version, flags, source, headers, list(expressions)])
    if (cached := _load(path)) is None:
        cached = build_cuda(source, arch, options, expressions=expressions, headers=headers, resources=resources)
        _save(path, cached)
    return cached


def build_cuda(
    source: str, arch: int, options: Sequence[str] = (), *, expressions: Sequence[str] = (),
    headers: Mapping[str, str] | None = None, resources: bool = True,
) -> dict[str, Compiled]:  # fmt: skip
    """Do what :func:`compile_cuda` does, without the cache."""
    flags = _flags(arch, options, resources)
    if include := cuda_headers():
        flags.append(f"--include-path={include}")
    module, log, lowered, _ = nvrtc().compile(source, flags, headers or {}, expressions)
    found = {}
    for name, ptx in separate(module).items():
        report = _resources(log, name) if resources else _NOT_ASSEMBLED
        for key in [key for key in lowered if lowered[key] == name] or [name]:
            found[key] = Compiled(name, arch, ptx, **report, log=log)
    return found


def cuda_cubin(source: str, arch: int, options: Sequence[str] = (), *, expressions: Sequence[str] = ()) -> bytes:
    """Return the machine code for sm_<arch>, from the cache if it has it."""
    flags = _flags(arch, options, True)
    path = cached_path(["cubin", nvrtc().version, flags, source, list(expressions)]).with_suffix(".cubin")
    if not path.exists():
        cubin = nvrtc().compile(source, flags, {}, expressions)[3]
        write_whole(path, cubin)
    return path.read_bytes()


def _flags(arch: int, options: Sequence[str], resources: bool) -> list[str]:
    target = [f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v"] if resources else [f"-arch=compute_{arch}"]
    return [*target, "--std=c++17", *options]


_RESOURCES = {
    "registers": [r"Used (\d+) registers"],
    "spill_bytes": [r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"],
    "stack_bytes": [r"(\d+) bytes stack frame"],
    "shared_bytes": [r"(\d+) bytes smem"],
}
_NOT_ASSEMBLED = dict.fromkeys(_RESOURCES, NOT_REPORTED)


def _resources(log: str, name: str) -> dict[str, int]:
    """Return what ptxas -v reports for a kernel."""
    section = re.search(rf"Compiling entry function '{re.escape(name)}'(.*?)(?=Compiling entry function|\Z)", log, re.S)
    if section is None:
        raise CompileError(f"the assembler's log has no entry for {name}:\n{log}")
    return {
        resource: sum(int(found[1]) for pattern in patterns if (found := re.search(pattern, section[1])))
        for resource, patterns in _RESOURCES.items()
    }


# -------------------------------------------------------------------- Triton


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    except importlib.metadata.PackageNotFoundError:
        return None


def compile_triton(
    function: Any,
    arch: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    aligned: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    num_ctas: int = 1,
    fp_fusion: bool = True,
    maxnreg: int | None = None,
    resources: bool = True,
) -> Compiled:
    """Compile a @triton.jit function ahead of time for sm_<arch>.

    `signature` gives the types of the run-time arguments ("*fp16", "i32", "fp32"); `aligned` names those that are
    divisible by 16. The PTX takes the run-time arguments in order, then pointers that Triton adds: see
    `triton_arguments`. A cluster of `num_ctas` blocks counts as one program: launch num_ctas times the grid.
    `resources` is as in `compile_cuda`.
    """
    options = _triton_options(num_warps, num_stages, num_ctas, fp_fusion, maxnreg)
    constants = dict(constants or {})
    key = _triton_key(function, arch, signature, constants, aligned, options)
    path = cached_path(["triton", triton_version(), *key, resources])
    if (cached := _load(path)) is None:
        cached = {"kernel": _compile_triton(function, arch, signature, constants, aligned, options, resources)}
        _save(path, cached)
    return cached["kernel"]


def build_triton(
    function: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any] | None = None, *,
    aligned: Sequence[str] = (), num_warps: int = 4, num_stages: int = 3, num_ctas: int = 1, fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> Compiled:  # fmt: skip
    """Do what :func:`compile_triton` does, without the cache."""
    options = _triton_options(num_warps, num_stages, num_ctas, fp_fusion, maxnreg)
    return _compile_triton(function, arch, signature, dict(constants or {}), aligned, options, True)


def triton_cubin(
    function: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any] | None = None, *,
    aligned: Sequence[str] = (), num_warps: int = 4, num_stages: int = 3, num_ctas: int = 1, fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> bytes:  # fmt: skip
    """Return the machine code for sm_<arch>, from the cache if it has it."""
    options = _triton_options(num_warps, num_stages, num_ctas, fp_fusion, maxnreg)
    constants = dict(constants or {})
    key = _triton_key(function, arch, signature, constants, aligned, options)
    path = cached_path(["triton cubin", triton_version(), *key]).with_suffix(".cubin")
    if not path.exists():
        write_whole(path, _triton_binary(function, arch, signature, constants, aligned, options, True)[0].asm["cubin"])
    return path.read_bytes()


def _triton_key(
    function: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any],
    aligned: Sequence[str], options: dict[str, int],
) -> list[Any]:  # fmt: skip
    texts = {name: getattr(value, "cache_key", value) for name, value in constants.items()}  # functions: a hash
    return [function.cache_key, arch, dict(signature), texts, list(aligned), options]


def _triton_options(
    num_warps: int, num_stages: int, num_ctas: int, fp_fusion: bool, maxnreg: int | None
) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages, "num_ctas": num_ctas, "enable_fp_fusion": fp_fusion}
    return options if maxnreg is None else {**options, "maxnreg": maxnreg}


def _compile_triton(
    function: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any],
    aligned: Sequence[str], options: dict[str, int], resources: bool,
) -> Compiled:  # fmt: skip
    binary, log = _triton_binary(function, arch, signature, constants, aligned, options, resources)
    name = binary.metadata.name
    return Compiled(
        name, arch, binary.asm["ptx"],
        **_resources(log, name) if resources else _NOT_ASSEMBLED,
        threads=32 * options["num_warps"],
        dynamic_shared_bytes=binary.metadata.shared,
        log=log,
    )  # fmt: skip


def _triton_binary(
    function: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any],
    aligned: Sequence[str], options: dict[str, int], resources: bool,
) -> tuple[Any, str]:  # fmt: skip
    """Return the compiled kernel as Triton's object, and the assembler's log."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=types, constexprs=dict(constants), attrs=hints)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), knobs.runtime.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # Triton's own cache keeps no log
        knobs.nvidia.dump_ptxas_log = True
        knobs.runtime.add_stages_inspection_hook = None if resources else _stop_at_ptx
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return binary, log.getvalue()


def _stop_at_ptx(*call: Any) -> tuple[str, str] | None:
    """Make a compilation end at PTX.

    Triton calls this without arguments for a part of its cache key, then with the stages of a compilation.
    """
    if not call:
        return "ptx only", "ptx only"
    _, stages, *_ = call
    stages["cubin"] = lambda *_: b""
    return None


def triton_arguments(compiled: Compiled, args: Sequence[Any]) -> list[Any]:
    """Return the run-time arguments, followed by null pointers for the scratch memory that Triton's kernels ask for."""
    return [*args, *[None] * (len(compiled.kernel.parameters) - len(args))]
