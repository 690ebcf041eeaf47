"""List the CUDA kernels that calls can use, and the gates for compiling them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterator
from functools import cache
from itertools import product

from emulator.compile import build_cuda, compile_cuda
from emulator.nvrtc import nvrtc_library

from gpu_bn.activations import ROWS
from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.plan import STATIC_SHARED, VECTOR_BYTES, Tiling
from gpu_bn.tiling import RAGGED_BYTES
from support.gates import ITEMSIZE, Definitions, Family, Group, Limits, Resources

REGISTERS = {"float32": 128, "float16": 128, "bfloat16": 128, "float64": 255}
"""The most registers of a thread: 65,536 are shared by two blocks of 256 threads. With float64 there is one block, and
255 is the most that a thread can have."""
SMALL = {
    "identity": ("bn_track_kernel<double>", "bn_add_groups_kernel<double>"),
    None: ("bn_sync_merge_kernel<double>", "bn_sync_sum_kernel<double>", "bn_sync_update_kernel<double>"),
}
"""The kernels with few threads per channel, by the activation that they are compiled with; ``None`` for none."""
BATCHES = (cuda_sources.WHOLE, cuda_sources.RAGGED, "GROUPS", "MASKED_GROUPS")
HEAVY = ("relu", "gelu", "gelu_tanh")
"""The activation whose gradient a sign bit decides, and those with the longest expressions."""


def groups(arch: int) -> Iterator[Group]:
    """Yield all groups of an architecture."""
    for activation, batch, dtype, columns in product(ROWS, BATCHES, ITEMSIZE, (True, False)):
        for vector in (8, 4, 2, 1):
            width = vector * ITEMSIZE[dtype]
            ragged = width == VECTOR_BYTES and not columns and ITEMSIZE[dtype] <= RAGGED_BYTES
            if ragged if batch == cuda_sources.RAGGED else width <= VECTOR_BYTES:
                yield Group(arch, activation, dtype, vector, columns, batch)


def importance(group: Group) -> tuple[int, bool]:
    """Return the rank of a group. Full vectors and whole batches come first."""
    return (group.kind != cuda_sources.WHOLE) + (not group.full), group.activation not in HEAVY


def on_chip_tiers(arch: int) -> list[tuple[str, str]]:
    """Return the tiers that hold a strip on chip: a part of the kernel's name, and its template argument."""
    clusters = [("_cluster", str(blocks)) for blocks in (2, 4, 8)] if arch >= 90 else []
    return [("", "Cta"), ("", "Cooperative"), *clusters]


def variants(group: Group) -> list[str]:
    """Return the name expressions of all kernels that a call with such tensors can use."""
    activation, columns = group.activation, group.columns
    ragged = group.kind == cuda_sources.RAGGED
    tiling = Tiling(columns, 1, 1, 1, group.vector, 1, 1, 1, ragged)
    masked = group.full and not ragged and cuda_sources.has_sign_bits(activation)
    # Flags for residual and sign bits. SyncBatchNorm writes no sign bits, so its kernels are needed without them, too.
    fused = [(False, False), (True, masked)]
    phases = sorted({*fused, (True, False)})
    if activation == "identity":
        sources = split_sources = ["DY"]
    else:
        sources = ["FROM_X", "FROM_MASK" if masked else "FROM_RESIDUAL"]
        split_sources = sorted({*sources, "FROM_RESIDUAL"})
    crowded = columns and group.vector == 8  # three tensors on chip: see plan.py
    resident = [source for source in sources if not (crowded and source == "FROM_RESIDUAL")]
    whole = ragged or group.kind == cuda_sources.WHOLE
    tiers = on_chip_tiers(group.arch) if whole else []
    calls = [
        ("bn_stats_kernel",),
        *(("bn_normalize_kernel", *flags) for flags in phases),
        *((f"bn_forward{kind}_kernel", tier, *flags) for (kind, tier), flags in product(tiers, fused)),
        *((f"bn_backward_{part}_kernel", source) for part, source in product(("reduce", "input"), split_sources)),
        *((f"bn_backward{kind}_kernel", tier, source) for (kind, tier), source in product(tiers, resident)),
    ]
    batch = cuda_sources.WHOLE if ragged else group.kind
    return [cuda_sources.kernel(name, group.dtype, tiling, *arguments, batch=batch) for name, *arguments in calls]


def build(group: Group, names: Collection[str], cached: bool) -> dict[str, Resources]:
    """Compile kernels of a group."""
    compiler = compile_cuda if cached else build_cuda
    compiled = compiler(
        cuda_sources.source(group.activation), group.arch, cuda_sources.OPTIONS, expressions=list(names)
    )
    return {name: Resources.of(compiled[name]) for name in names}


def limits(group: Group, name: str) -> Limits:
    """Return the limits of a kernel: registers for two blocks per SM, and accesses to tensors by full vectors."""
    return Limits(REGISTERS[group.dtype], STATIC_SHARED, writes="stats" not in name)


def compiler() -> str:
    """Return the version of NVRTC with its patch number. It contains the assembler."""
    library = nvrtc_library()
    package = "nvidia-cuda-nvrtc-cu12" if library and "cu13" not in str(library) else "nvidia-cuda-nvrtc"
    return f"NVRTC {importlib.metadata.version(package)}"


def stamp(group: Group, name: str) -> str:
    """Return a digest of the definitions that a kernel can use, preprocessed for the architecture, without comments."""
    return definitions(group.arch, group.activation).stamp(re.findall(r"\w+", name))


@cache
def definitions(arch: int, activation: str) -> Definitions:
    """Split a source into its definitions; the compiler's options are one of them."""
    text = re.sub(r"//.*", "", cuda_sources.source(activation)).replace("\\\n", " ")
    parts: list[tuple[list[str], str]] = [([], f"// {' '.join(cuda_sources.OPTIONS)}")]
    lines: list[str] = []
    depth = 0
    for line in for_architecture(text, arch):
        words = " ".join(line.split())
        depth += words.count("{") - words.count("}")
        if words:
            lines.append(words)
        if lines and depth == 0 and (words.endswith((";", "}")) or words.startswith("#")):
            parts.append((_names(" ".join(lines)), "\n".join(lines)))
            lines = []
    assert not lines, "a definition does not end"
    return Definitions(parts)


def _names(definition: str) -> list[str]:
    """Return the names that a definition defines. Without a name it counts as a part of every kernel."""
    head = re.sub(r"template <.*?> (?=struct|DEVICE|__global__)", "", definition)
    match head.split()[0]:
        case "#define":
            return re.findall(r"#define (\w+)", head)
        case "enum":
            return re.findall(r"\w+", head)[1:]
        case "constexpr":
            return re.findall(r"\w+(?= =)", head)
        case "typedef":
            return re.findall(r"\w+(?=;)", head)
        case "struct":
            return re.findall(r"struct (?:alignas\(.*?\)\) |__align__\(\w+\) )?(\w+)", head)[:1]
        case "extern":
            return re.findall(r"\w+(?=\[)", head)
        case _:  # a function
            head = re.sub(r"__launch_bounds__\(.*?\)+ |CLUSTER_OF\(\w+\)", "", head)
            return re.findall(r"\w+(?=\()", head)[:1]


def for_architecture(source: str, arch: int) -> Iterator[str]:
    """Yield the lines that ``#if __CUDA_ARCH__ >= ...`` leaves: a change for one architecture affects no other."""
    taken: list[tuple[bool, bool]] = []  # for each open #if: whether this branch is taken, and whether any was
    for line in source.splitlines():
        directive = re.match(r"\s*#(if|elif|else|endif)\b(?: __CUDA_ARCH__ (<|>=) (\d+)\s*$)?", line)
        if directive is None:
            if all(now for now, _ in taken):
                yield line
            continue
        kind, relation, number = directive.groups()
        assert bool(relation) == (kind in ("if", "elif")), line
        holds = not relation or (10 * arch >= int(number)) == (relation == ">=")
        done = kind != "if" and taken.pop()[1]
        if kind != "endif":
            taken.append((holds and not done, holds or done))


def sources() -> str:
    """Return the text of the sources for all activations."""
    return "".join(map(cuda_sources.source, ROWS))


FAMILY = Family("cuda", compiler, groups, importance, variants, build, limits, stamp, sources)
