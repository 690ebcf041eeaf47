"""Budgets for the machine code of the Triton kernels, its record, and the page with both.

``python tests/triton_budget.py`` compiles a covering set of kernels for every architecture, and writes the record
``tests/data/machine_code_triton.txt`` and the page ``docs/machine_code_triton.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cuda_budget import limiters
from support.gates import DATA, digest
from support.machine_code import Loop, blocks_per_sm, disassemble
from support.triton_budgets import BUDGETS, EARLIER, VECTOR, Budget, Found

RECORD = DATA / "machine_code_triton.txt"
PAGE = Path(__file__).parents[1] / "docs" / "machine_code_triton.md"
LAYERS = {
    "rows": ((32, 64, 3136), False, "split"),
    "columns": ((32, 3136, 256), True, "split"),
    "held rows": ((8, 256, 784), False, "cta"),
    "held columns": ((8, 49, 2048), True, "cta"),
    "ragged rows": ((256, 512, 49), False, "split"),
    "held ragged rows": ((64, 2048, 49), False, "cta"),
    "cluster rows": ((16, 64, 3136), False, "cluster"),
    "cluster columns": ((32, 49, 2048), True, "cluster"),
}
"""Layers of ResNet-50: shape, whether the channels are the last axis, and tier."""


class Covered(NamedTuple):
    """A call of the covering set, with ReLU: a layer, and the name of the dtype."""

    shape: tuple[int, int, int]
    columns: bool
    tier: str
    dtype: str


CALLS = {name: Covered(*layer, "float16") for name, layer in LAYERS.items()} | {
    f"{name}, float32": Covered(*layer, "float32") for name, layer in LAYERS.items()
}
"""The calls of the covering set, by the name of their rows in the table."""


def launches(call: str, arch: int) -> dict[str, Any]:
    """Return the launches of a call on an architecture, by kernel: the step and its specialisation."""
    from gpu_bn.gpu_model import FAST_DOUBLES

    if CALLS[call].tier == "cluster":
        return _launches(call, 90)
    return _launches(call, 80 if arch in FAST_DOUBLES else 89)


@cache
def _launches(call: str, arch: int) -> dict[str, Any]:
    import torch
    from support.triton_variants import record_launches

    covered = CALLS[call]
    x = torch.empty(covered.shape, dtype=getattr(torch, covered.dtype))
    x = x.permute(0, 2, 1) if covered.columns else x
    found = record_launches(x, arch, sms=128, tier=covered.tier, activation="relu")
    return {_label(step.kernel.__name__, special): (step, special) for step, special in found}


BEFORE, AFTER = ", before a merge", ", after a merge"
"""Suffixes for the kernels of the first and of the last launch of three."""


def _label(kernel: str, special: Any) -> str:
    if "merge" in kernel:
        return kernel
    if special.signature.get("table", "constexpr") != "constexpr":
        return kernel + AFTER
    return kernel + BEFORE if special.signature.get("partials") == "*fp32" else kernel


def architectures(call: str, kernel: str) -> list[int]:
    """Return the architectures on which the planner uses a kernel."""
    from emulator.compile import ARCHITECTURES

    from gpu_bn.gpu_model import FAST_DOUBLES

    if kernel in ("bn_forward_kernel", "bn_backward_kernel"):
        return [arch for arch in ARCHITECTURES if arch >= 90 or CALLS[call].tier != "cluster"]
    return [arch for arch in ARCHITECTURES if (arch in FAST_DOUBLES) != ("merge" in kernel)]


def measured(arch: int, step: Any, special: Any) -> Found:
    """Compile the kernel of a launch, and return its figures."""
    from emulator.compile import triton_cubin
    from support.triton_variants import compiler_options

    (machine,) = disassemble(triton_cubin(step.kernel, arch, **compiler_options(special))).values()
    found, threads = machine.figures(VECTOR), 32 * step.num_warps
    blocks = blocks_per_sm(arch, threads, found.registers, found.shared_bytes)
    instructions, double, in_flight = found.instructions, found.double, found.in_flight
    if "TILES" in special.constants:  # the kernel holds a channel: its tiles are unrolled, not a loop
        whole = Loop(machine.code, frozenset())
        vectors = whole.vectors(VECTOR)
        instructions = round(len(whole.code) / vectors, 1) if vectors else 0.0
        double, in_flight = sum(ins.is_double for ins in whole.code), whole.in_flight(VECTOR)
    return Found(instructions, double, in_flight, blocks, found.registers, found.local_bytes, threads)


def stamp() -> str:
    """Return a digest of the kernels' sources, without comments and docstrings."""
    from support.triton_variants import sources

    return digest(sources(), 12)


def recorded_rows() -> dict[tuple[str, str, int], Found]:
    """Return the figures in the record, by call, kernel and architecture."""
    found = {}
    for line in RECORD.read_text().splitlines()[1:]:
        call, kernel, arch, *numbers = line.split("\t")
        instructions, *counts = numbers
        found[call, kernel, int(arch)] = Found(float(instructions), *map(int, counts))
    return found


def header() -> str:
    """Return the first line of a record that is made now: the compiler's version and the digest of the sources."""
    from support.triton_variants import compiler

    return f"# {compiler()}, sources {stamp()}"


def budget(call: str, kernel: str) -> Budget:
    """Return the limits for a kernel with the Triton that is installed; clusters came with 3.9."""
    from gpu_bn.backends.triton.launch import CLUSTERS

    return (BUDGETS if CLUSTERS else BUDGETS | EARLIER)[call, kernel]


INTRODUCTION = """# Machine code of the Triton kernels

`python tests/triton_budget.py` writes this page, and `tests/backends/triton/test_budget.py` compares it with the
kernels. Nothing here was measured on a GPU: the table is read from the machine code that Triton's assembler makes.
[The page of the CUDA kernels](machine_code.md) explains the columns.

The table was made with Triton 3.9. Earlier versions have budgets of their own (`tests/support/triton_budgets.py`): with
3.6 to 3.8, kernels take up to a fifth more instructions, and the statistics in rows have 3 blocks on an SM, not 4.

The table has a covering set of kernels, with ReLU and vectors of 16 bytes, for sm_75 to sm_120; the dtype is float16
unless stated. A cell has the lowest and the highest figure of all architectures and, in brackets, the budget that a
test asserts. Kernels that hold a channel in registers ("held") have no loop over it: their figures are those of the
whole kernel. Ragged rows begin and end within vectors, such as those of 7 x 7 images.

On sm_80, 90 and 100, which are fast at double precision, each program of the last launch merges the partial results of
the blocks. On other GPUs a small launch between the two merges them once, with one warp for a few channels. If 8 warps
in each of 3 programs an SM did it instead, 60 instructions in double precision would take 9 us of an RTX 4090 by count
(an instruction of a warp takes 16 cycles of an SM). Before this merge, the partial results are float32 sums, unless the
sums are long; so the kernels of the statistics need no double precision. After it, the last launch reads float32
numbers. The double precision that remains there updates the running statistics, in one program of each strip; in the
backward sums it computes the scale and the shift of z.

| call | kernel | instructions | double | vectors in flight | KiB in flight | blocks | registers |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


LIMITERS = """
## What limits each shape

This table is like that on the other page, for the plans of this backend. They have no cooperative tier. Plans with
clusters need Triton 3.9 or later.

"""


def page() -> str:
    """Return the text of the page, from the record and the planner."""
    from gpu_bn.backends.triton.programs import training_plan

    rows: dict[tuple[str, str], list[Found]] = {}
    for (call, kernel, _), found in recorded_rows().items():
        rows.setdefault((call, kernel), []).append(found)
    lines = []
    for (call, kernel), found in rows.items():
        budget = BUDGETS[call, kernel]
        cells = [
            f"{_range(one.instructions for one in found)} (<= {budget.instructions:g})",
            f"{_range(one.double for one in found)} (<= {budget.double})",
            f"{_range(one.in_flight for one in found)} (>= {budget.in_flight})",
            _range(one.kib for one in found),
            f"{_range(one.blocks for one in found)} (>= {budget.blocks})",
            _range(one.registers for one in found),
        ]
        lines.append(f"| {' | '.join([call, kernel, *cells])} |\n")
    return INTRODUCTION + "".join(lines) + LIMITERS + limiters(lambda work, device: training_plan(work, device, None))


def _range(numbers: Iterable[float]) -> str:
    found = list(numbers)
    return f"{min(found):g}" if min(found) == max(found) else f"{min(found):g}-{max(found):g}"


def main() -> None:
    """Compile the covering set; write the record and the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from emulator.compile import ARCHITECTURES

    lines = [f"{header()}\n"]
    for call in CALLS:
        for arch in ARCHITECTURES:
            for kernel, launch in launches(call, arch).items():
                if arch in architectures(call, kernel):
                    lines.append("\t".join(map(str, (call, kernel, arch, *measured(arch, *launch)))) + "\n")
    RECORD.write_text("".join(lines))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
