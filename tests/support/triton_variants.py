"""List the Triton kernels that calls can use. The backend plans calls of every kind, and its launches are recorded.

The dtype, vector, layout, activation and kind of call determine a kernel, and the positions and tiles of a program.
With full vectors, these kernels are listed:

- Of the kernels that hold a channel, in blocks and in clusters, those with the largest share that the plan gives them,
  for every activation (clusters: for ``HEAVY`` ones), and the smaller shares (``sizes``) for the longest activation.
- Of the kernels that stream a channel, all kinds for ``HEAVY`` activations. They need about half of the registers, and
  the kernels of other activations are shorter.
- Both for ragged rows, which begin and end within vectors.

With narrower vectors, the kernels for tensors without masks and groups are listed. Options that change only a few
per-channel instructions are not varied: the dtypes of parameters, which parameters and gradients are present, and the
number of ghost batches. ``tests/backends/triton/test_gates.py`` takes samples of all that is left out.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from emulator.compile import build_triton, compile_triton, triton_version

import gpu_bn
from gpu_bn.activations import ROWS
from gpu_bn.backends.triton.launch import CLUSTERS, Specialisation, Step, free_registers
from gpu_bn.gpu_model import FAST_DOUBLES
from gpu_bn.kernels.triton import forward as forward_kernels
from gpu_bn.plan import DEVICES, STRIP_BYTES, VECTOR_BYTES
from gpu_bn.tiling import RAGGED_BYTES
from support.gates import ITEMSIZE, Definitions, Family, Group, Limits, Resources, digest
from support.triton_backends import RecordingBackend

Launch = tuple[Step, Specialisation]

CEILINGS = {
    "bn_stats_kernel": (64 if CLUSTERS else 72, 128, 72),  # 72 with Triton 3.6 to 3.8, which have no clusters
    "bn_normalize_kernel": (72, 96, 48),
    "bn_backward_reduce_kernel": (88, 112, 104),
    "bn_backward_input_kernel": (80, 112, 88),
}
"""The most registers of a thread in streaming kernels for rows, channels-last and ragged rows, in half precision with
ReLU. With more than 128, an SM runs only one block of 8 warps at a time."""
EXCEEDED = {
    ("bn_backward_reduce_kernel", 120, "float16"): 128,
    ("bn_backward_reduce_kernel", 120, "bfloat16"): 128,
}
"""Exceptions to the table above for channels-last."""
MOST_REGISTERS = 255
MOST_SHARED = 16 << 10
MOST_SPILLED = 52
"""The most spilled bytes. The compiler spills a few where more registers would mean fewer blocks per SM."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
HEAVY = ("relu", "gelu", "gelu_tanh")
"""The activation whose gradient a sign bit decides, and those with the longest expressions."""
STREAMED = {
    "masked": {"mask": True},
    "groups": {"groups": 3},
    "masked groups": {"mask": True, "groups": 3},
    "frozen": {"training": False},
    "phases": {"phases": True},
    "long": {"long": True},
    "wide": {"wide": True},
    "ragged long": {"long": True, "wide": True},
}
"""The kinds of calls in two launches. ``long``: sums are split into chains; ``wide``: offsets have 64 bits."""
ACTIVATIONS = {
    "held": tuple(ROWS), "split": ("identity", *HEAVY), "cluster": ("identity", *HEAVY), "sizes": HEAVY[1:2],
    "ragged held": HEAVY, "ragged split": HEAVY[:2], "ragged cluster": HEAVY[:2], **dict.fromkeys(STREAMED, HEAVY[:2]),
}  # fmt: skip
"""The activations that are listed for each kind of call, with full vectors."""


def groups(arch: int) -> Iterator[Group]:
    """Yield all groups of an architecture."""
    for kind, activations in ACTIVATIONS.items():
        if kind.endswith("cluster") and arch < 90:
            continue
        for dtype, itemsize in ITEMSIZE.items():
            if _is_ragged(kind) and itemsize > RAGGED_BYTES:
                continue
            most = VECTOR_BYTES // itemsize
            for vector in (size for size in (8, 4, 2, 1) if size == most or (size < most and _has_narrow(kind))):
                for activation in activations if vector == most else HEAVY[:2]:
                    for columns in (False,) if _is_ragged(kind) else (False, True):
                        yield Group(arch, activation, dtype, vector, columns, kind)


def importance(group: Group) -> int:
    """Return the rank of a group. Those that hold a channel in full vectors need the most registers and come first."""
    if holds(group.kind):
        return (0 if group.activation in HEAVY else 2) if group.full else 4
    return (1 if group.kind.endswith("split") else 3) if group.full else 4


def _has_narrow(kind: str) -> bool:
    return kind in ("held", "split", "cluster")


def _is_ragged(kind: str) -> bool:
    return kind.startswith("ragged")


def holds(kind: str) -> bool:
    """Tell whether the kernels for a kind of call hold a channel."""
    return kind.removeprefix("ragged ") in ("held", "cluster", "sizes")


def variants(group: Group) -> dict[str, Launch]:
    """Return the launches of the kernels of a group by name."""
    return _variants(group._replace(arch=_planned_as(group.arch)))


def _planned_as(arch: int) -> int:
    """Return an architecture with the same plans. They depend only on clusters and on the speed of double precision."""
    if arch in FAST_DOUBLES:
        return min(arch, 90)
    return 120 if arch >= 90 else 89


@cache
def _variants(group: Group) -> dict[str, Launch]:
    x = Tensors(group.dtype, group.vector, group.columns, _is_ragged(group.kind))
    kind = group.kind.removeprefix("ragged ")
    launches: list[Launch] = []
    for residual in (False, True) if _has_narrow(kind) else (True,):
        options = {"activation": group.activation, "residual": residual}
        if holds(kind):
            launches += _held(group.arch, x, kind, **options)
        else:
            launches += _streamed(group.arch, x, **options, **STREAMED.get(group.kind, {}))
    return {kernel_name(*launch): launch for launch in launches}


def kernel_name(step: Step, special: Specialisation) -> str:
    """Return a name with everything that a kernel is compiled from, except the source text of its functions."""
    types: dict[str, list[str]] = {}
    for name, kind in special.signature.items():
        types.setdefault(kind, []).append(name)
    constants = [f"{name}={getattr(value, '__name__', value)}" for name, value in special.constants.items()]
    arguments = [f"{kind} {' '.join(names)}" for kind, names in types.items() if kind != "constexpr"]
    aligned = f"aligned {' '.join(special.aligned)}" if special.aligned else "not aligned"
    options = f"{step.num_warps} warps, {step.num_ctas} blocks"
    if step.most_registers is not None:
        options += f", {step.most_registers} registers"
    return f"{step.kernel.__name__}<{', '.join(constants)}>({'; '.join(arguments)}; {aligned}; {options})"


# --------------------------------------------------------------------------------------------------------- calls
TILES = (1 / 64, 1 / 16, 1 / 4, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 128, 160)
"""Sizes of a channel in tiles of a block. They include the largest size that each cluster and strip can hold."""


@dataclass(frozen=True)
class Tensors:
    """A factory of tensors whose shape allows vectors of the given size but no wider ones.

    With ``ragged``, rows begin and end within vectors.
    """

    dtype: str
    vector: int
    columns: bool
    ragged: bool = False

    @property
    def tile(self) -> int:
        """The positions of the largest tile."""
        elements = 2048 if self.dtype == "float64" else 4096
        return elements * DTYPES[self.dtype].itemsize // STRIP_BYTES if self.columns else elements // self.vector

    def __call__(self, positions: int, channels: int = 2) -> torch.Tensor:
        if self.columns:
            return torch.empty(max(positions, 2), 33 * self.vector, dtype=DTYPES[self.dtype])
        if self.ragged:  # rows of 6 vectors and an element span 7
            shape = max(positions // 7, 2), max(channels, self.vector), 6 * self.vector + 1
            return torch.empty(shape, dtype=DTYPES[self.dtype])
        return torch.empty(max(positions // 3, 2), channels, 3 * self.vector, dtype=DTYPES[self.dtype])


class Phases:
    """A backend without the methods that fuse its phases."""

    def __init__(self, backend: RecordingBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in ("forward", "backward"):
            raise AttributeError(name)
        return getattr(self._backend, name)


def record_launches(
    x: torch.Tensor, arch: int, *, sms: int = 1, tier: str = "split", wide: bool = False, phases: bool = False,
    residual: bool = False, need: set[str] | None = None, parameters: torch.dtype = torch.float32, affine: bool = True,
    tracked: bool = True, **options: Any,
) -> list[Launch]:  # fmt: skip
    """Return the launches of a forward and a backward call on a device with ``sms`` multiprocessors."""
    backend = RecordingBackend(replace(DEVICES["h100"], arch=arch, sms=sms), tier=tier, wide=wide)
    engine: Any = Phases(backend) if phases else backend
    present = (tracked, tracked, affine, affine)
    vectors = [torch.ones(x.shape[1], dtype=parameters) if each else None for each in present]
    options = {"training": True, "residual": torch.empty_like(x) if residual else None, "backend": engine, **options}
    _, saved = gpu_bn.batch_norm_forward(x, *vectors, **options)
    gpu_bn.batch_norm_backward(torch.empty_like(x), saved, need=need, backend=engine)
    return backend.launches


def _streamed(
    arch: int, tensors: Tensors, *, mask: bool = False, groups: int = 1, long: bool = False, **options: Any
) -> list[Launch]:
    """Return the launches of a call that streams, with the most blocks per strip, or with one block if ``long``."""
    x = tensors(65 * tensors.tile, 16) if long else tensors(groups * (1 << 14 if tensors.columns else 1 << 19))
    if groups > 1:
        x = x[: x.shape[0] // groups * groups]
        options["virtual_batch_size"] = x.shape[0] // groups
    if mask:
        options["mask"] = torch.ones((x.shape[0], *[1] * (x.dim() - 1)), dtype=torch.bool)
    launches = record_launches(x, arch, sms=1 if long else 1024, **options)
    if options.get("training") is False:  # without gradients of the parameters, dx needs no sums
        launches += record_launches(x, arch, sms=1024, need={"dx"}, **options)
    return launches


def _held(arch: int, tensors: Tensors, kind: str, activation: str, residual: bool) -> list[Launch]:
    """Return the launches that hold a channel of the largest size in each cluster, or of smaller ``sizes``."""
    similar = "identity" if activation == "identity" else "relu" if ROWS[activation].device.drop else "gelu"
    sizes = replace(tensors, dtype="float16") if tensors.dtype == "bfloat16" else tensors
    launches: dict[str, Launch] = {}
    for positions, sms, tier, kernel in _of_kind(kind, _programs(arch >= 90, sizes, similar, residual)):
        for step, special in record_launches(
            tensors(positions), arch, sms=sms, tier=tier, activation=activation, residual=residual
        ):
            if step.kernel.__name__ == kernel:
                launches[kernel_name(step, special)] = step, special
    return list(launches.values())


Program = tuple[str, int, int, int, int]
"""A kernel that holds a channel: its name, blocks of a cluster, tiles, positions, lanes."""
Size = tuple[int, int, str, str]
"""A call that uses it: positions, multiprocessors, tier, the name of the kernel."""


@cache
def _programs(clusters: bool, tensors: Tensors, activation: str, residual: bool) -> dict[Program, Size]:
    """Return the programs that calls of all sizes use, each with one of the calls."""
    programs: dict[Program, Size] = {}
    tiers = ("cta", "cluster") if clusters else ("cta",)
    for tier, sms, size in product(tiers, (1, 1024) if tensors.columns else (1,), TILES):
        positions = int(size * tensors.tile)
        for step, special in record_launches(
            tensors(positions), 90 if clusters else 80, sms=sms, tier=tier, activation=activation, residual=residual
        ):
            if "TILES" in special.constants:
                tiles, at_once, lanes = (special.constants[name] for name in ("TILES", "POSITIONS", "LANES"))
                name = step.kernel.__name__
                programs[name, step.num_ctas, tiles, at_once, lanes] = positions, sms, tier, name
    return programs


def _of_kind(kind: str, programs: dict[Program, Size]) -> list[Size]:
    """Return for each kernel and size of cluster the widest of the largest programs; for ``sizes`` the others."""
    most: dict[tuple[str, int], Program] = {}
    for program in sorted(programs, key=lambda program: (program[2] * program[3] * program[4], program[4])):
        most[program[:2]] = program
    if kind == "sizes":
        return [size for program, size in programs.items() if program[1] == 1 and program not in most.values()]
    return [programs[program] for program in most.values() if (program[1] == 1) == (kind == "held")]


# -------------------------------------------------------------------------------------------------------- compiling
def compiler_options(special: Specialisation) -> dict[str, Any]:
    """Return the arguments of the compiler beside the function and the architecture."""
    options = dict(special.options)
    options["fp_fusion"] = options.pop("enable_fp_fusion")
    return {"signature": special.signature, "constants": special.constants, "aligned": special.aligned, **options}


def build(group: Group, names: Collection[str], cached: bool) -> dict[str, Resources]:
    """Compile kernels of a group."""
    launches = variants(group)
    return {name: compile_launch(group.arch, *launches[name], cached) for name in names}


_COMPILED: dict[tuple[int, str], Resources] = {}
"""The kernels compiled so far. Groups have kernels in common."""


def compile_launch(arch: int, step: Step, special: Specialisation, cached: bool = True) -> Resources:
    """Compile the kernel of a launch, and again with more registers if it spills, as the backend does."""
    key = arch, kernel_name(step, special)
    if key not in _COMPILED:
        compiler = compile_triton if cached else build_triton
        kernel = compiler(step.kernel, arch, **compiler_options(special))
        more = free_registers(kernel.registers, step.num_warps)
        if (kernel.spill_bytes or kernel.stack_bytes) and more > kernel.registers:
            kernel = compiler(step.kernel, arch, **compiler_options(special) | {"maxnreg": more})
        _COMPILED[key] = Resources.of(kernel)
    return _COMPILED[key]


def limits(group: Group, name: str) -> Limits:
    """Return the limits of a kernel: registers for at least one block per SM, usually more.

    Accesses to tensors must be by full vectors if each thread has one.
    """
    kernel = name.partition("<")[0]
    usual = (
        kernel in CEILINGS
        and group.kind.endswith("split")
        and group.activation == "relu"
        and group.full
        and ITEMSIZE[group.dtype] == 2
    )
    registers = CEILINGS[kernel][2 if _is_ragged(group.kind) else group.columns] if usual else MOST_REGISTERS
    if usual and group.columns:
        registers = EXCEEDED.get((kernel, group.arch, group.dtype), registers)
    merges = "merge" in kernel
    writes = not merges and "stats" not in kernel and "dz=None, dx=None" not in name
    numbers = dict(re.findall(r"(POSITIONS|LANES)=(\d+)", name))
    vectors = int(numbers.get("POSITIONS", 0)) * int(numbers["LANES"])
    warps, blocks = re.findall(r"(\d+) warps, (\d+) blocks", name)[0]
    enough = vectors >= 32 * int(warps) * int(blocks)
    return Limits(registers, MOST_SHARED, enough and not merges, enough and writes, MOST_SPILLED)


def compiler() -> str:
    """Return the version of Triton, which contains the assembler."""
    return f"Triton {triton_version()}"


def stamp(group: Group, name: str) -> str:
    """Return a digest of the functions that a kernel can use, without comments, and of the activation."""
    kernel, constants = name.partition("(")[0].split("<")
    activated = "VALUE" in constants or "GRADIENT" in constants
    code = _definitions().stamp([kernel, *(MATHS if activated else ())])
    if "TILES=" in constants:  # a kernel that spills is compiled again with more registers
        code = digest([code, code_of(inspect.getsource(free_registers))], 8)
    return digest([code, astuple(ROWS[group.activation].device)], 8) if activated else code


def code_of(source: str) -> str:
    """Return the source of a function without its docstring and comments."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return _text(function)


def _text(node: ast.AST) -> str:
    """Return the source of a node; Python 3.12 and later write other quotes into f-strings than 3.11."""
    return ast.unparse(node).replace('"', "'")


KERNELS = Path(forward_kernels.__file__).parent
MATHS = ("where", "abs", "exp", "expm1", "tanh", "sigmoid", "sigmoid_slope", "normal_cdf")
"""The functions that the expression of an activation may call."""


@cache
def _definitions() -> Definitions:
    """Return the definitions in the files of the kernels."""
    definitions: list[tuple[list[str], str]] = []
    for file in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if ast.get_docstring(node) is not None and len(node.body) > 1:
                    del node.body[0]
                definitions.append(([node.name], _text(node)))
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                definitions.append((names, _text(node)))
    return Definitions(definitions)


def sources() -> str:
    """Return the text of the sources for all activations."""
    return repr([[text for _, text, _ in _definitions().parts], [astuple(row.device) for row in ROWS.values()]])


FAMILY = Family("triton", compiler, groups, importance, variants, build, limits, stamp, sources)
