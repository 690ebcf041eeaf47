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

RECORD = DATA / "machine_code_triton.txt"
PAGE = Path(__file__).parents[1] / "docs" / "machine_code_triton.md"
VECTOR = 16
"""Bytes of a vector."""
CALLS = {
    "rows": ((32, 64, 3136), False, "split"),
    "columns": ((32, 3136, 256), True, "split"),
    "held rows": ((8, 256, 784), False, "cta"),
    "held columns": ((8, 49, 2048), True, "cta"),
    "ragged rows": ((256, 512, 49), False, "split"),
    "held ragged rows": ((64, 2048, 49), False, "cta"),
    "cluster rows": ((16, 64, 3136), False, "cluster"),
    "cluster columns": ((32, 49, 2048), True, "cluster"),
}
"""Layers of ResNet-50 in half precision with ReLU: shape, whether the channels are the last axis, and tier."""


class Budget(NamedTuple):
    """The limits for a kernel on every architecture.

    Attributes:
        instructions: the most instructions for each vector of 16 bytes, in the loops over tensors; for kernels that
            hold a channel, in the whole kernel; 0 for kernels that read no tensor.
        double: the most instructions in double precision outside of the loops over tensors.
        in_flight: the fewest vectors that a thread requests from memory before it uses one.
        blocks: the fewest blocks on an SM.
    """

    instructions: float
    double: int
    in_flight: int
    blocks: int

    def over(self, found: Found) -> list[str]:
        """Return a message for each figure that is outside of the budget."""
        least = {"instructions": float(self.instructions > 0), "in_flight": self.in_flight, "blocks": self.blocks}
        most = {"instructions": self.instructions, "double": self.double, "local_bytes": 0}
        numbers = found._asdict()
        under = [f"{what} {numbers[what]} < {limit}" for what, limit in least.items() if numbers[what] < limit]
        return under + [f"{what} {numbers[what]} > {limit}" for what, limit in most.items() if numbers[what] > limit]


class Found(NamedTuple):
    """The figures of a kernel; see :class:`Budget`."""

    instructions: float
    double: int
    in_flight: int
    blocks: int
    registers: int
    local_bytes: int
    threads: int

    @property
    def kib(self) -> int:
        """The KiB that the blocks of an SM request from memory at a time."""
        return self.in_flight * VECTOR * self.threads * self.blocks >> 10


BUDGETS = {
    ("rows", "bn_stats_kernel"): Budget(60, 22, 4, 4),
    ("rows", "bn_stats_kernel, before a merge"): Budget(60, 0, 4, 4),
    ("rows", "bn_merge_moments_kernel"): Budget(0, 101, 0, 25),
    ("rows", "bn_normalize_kernel"): Budget(68, 67, 2, 8),
    ("rows", "bn_normalize_kernel, after a merge"): Budget(76, 12, 2, 4),
    ("rows", "bn_backward_reduce_kernel"): Budget(48, 28, 2, 4),
    ("rows", "bn_backward_reduce_kernel, before a merge"): Budget(48, 26, 2, 3),
    ("rows", "bn_merge_sums_kernel"): Budget(0, 64, 0, 32),
    ("rows", "bn_backward_input_kernel"): Budget(57, 47, 2, 6),
    ("rows", "bn_backward_input_kernel, after a merge"): Budget(61, 0, 4, 4),
    ("columns", "bn_stats_kernel"): Budget(54, 39, 4, 2),
    ("columns", "bn_stats_kernel, before a merge"): Budget(53, 0, 4, 2),
    ("columns", "bn_merge_moments_kernel"): Budget(0, 108, 0, 25),
    ("columns", "bn_normalize_kernel"): Budget(60, 85, 2, 4),
    ("columns", "bn_normalize_kernel, after a merge"): Budget(68, 12, 1, 4),
    ("columns", "bn_backward_reduce_kernel"): Budget(45, 33, 3, 2),
    ("columns", "bn_backward_reduce_kernel, before a merge"): Budget(45, 31, 4, 2),
    ("columns", "bn_merge_sums_kernel"): Budget(0, 70, 0, 32),
    ("columns", "bn_backward_input_kernel"): Budget(53, 57, 2, 3),
    ("columns", "bn_backward_input_kernel, after a merge"): Budget(57, 0, 2, 3),
    ("held rows", "bn_forward_kernel"): Budget(227, 68, 4, 2),
    ("held rows", "bn_backward_kernel"): Budget(103, 39, 6, 2),
    ("held columns", "bn_forward_kernel"): Budget(525, 78, 4, 2),
    ("held columns", "bn_backward_kernel"): Budget(128, 44, 8, 2),
    ("ragged rows", "bn_stats_kernel"): Budget(84, 23, 4, 3),
    ("ragged rows", "bn_stats_kernel, before a merge"): Budget(84, 0, 4, 4),
    ("ragged rows", "bn_merge_moments_kernel"): Budget(0, 57, 0, 32),
    ("ragged rows", "bn_normalize_kernel"): Budget(111, 106, 2, 8),
    ("ragged rows", "bn_normalize_kernel, after a merge"): Budget(112, 12, 2, 4),
    ("ragged rows", "bn_backward_reduce_kernel"): Budget(65, 28, 2, 3),
    ("ragged rows", "bn_backward_reduce_kernel, before a merge"): Budget(64, 26, 2, 3),
    ("ragged rows", "bn_merge_sums_kernel"): Budget(0, 43, 0, 32),
    ("ragged rows", "bn_backward_input_kernel"): Budget(83, 55, 2, 6),
    ("ragged rows", "bn_backward_input_kernel, after a merge"): Budget(83, 0, 4, 4),
    ("held ragged rows", "bn_forward_kernel"): Budget(425, 66, 2, 2),
    ("held ragged rows", "bn_backward_kernel"): Budget(143, 39, 4, 3),
    ("cluster rows", "bn_forward_kernel"): Budget(207, 67, 4, 2),
    ("cluster rows", "bn_backward_kernel"): Budget(107, 40, 7, 2),
    ("cluster columns", "bn_forward_kernel"): Budget(354, 65, 4, 2),
    ("cluster columns", "bn_backward_kernel"): Budget(148, 44, 8, 2),
}
"""By call and kernel: the worst figures on sm_75 to sm_120, with a twentieth more instructions."""
EARLIER = {
    ("rows", "bn_stats_kernel"): Budget(60, 22, 4, 3),
    ("rows", "bn_stats_kernel, before a merge"): Budget(60, 0, 4, 3),
    ("rows", "bn_normalize_kernel"): Budget(82, 67, 2, 8),
    ("rows", "bn_normalize_kernel, after a merge"): Budget(82, 12, 2, 4),
    ("rows", "bn_merge_moments_kernel"): Budget(0, 107, 0, 25),
    ("rows", "bn_merge_sums_kernel"): Budget(0, 76, 0, 32),
    ("rows", "bn_backward_reduce_kernel"): Budget(48, 28, 2, 3),
    ("rows", "bn_backward_input_kernel"): Budget(62, 47, 2, 6),
    ("columns", "bn_stats_kernel"): Budget(54, 65, 4, 2),
    ("columns", "bn_normalize_kernel"): Budget(65, 85, 2, 4),
    ("columns", "bn_normalize_kernel, after a merge"): Budget(76, 12, 1, 4),
    ("columns", "bn_backward_reduce_kernel"): Budget(50, 33, 2, 2),
    ("columns", "bn_backward_reduce_kernel, before a merge"): Budget(50, 31, 2, 2),
    ("columns", "bn_merge_sums_kernel"): Budget(0, 78, 0, 32),
    ("columns", "bn_backward_input_kernel"): Budget(58, 57, 2, 3),
    ("held rows", "bn_backward_kernel"): Budget(103, 40, 6, 2),
    ("held columns", "bn_backward_kernel"): Budget(137, 44, 3, 2),
    ("ragged rows", "bn_stats_kernel"): Budget(84, 24, 2, 3),
    ("ragged rows", "bn_stats_kernel, before a merge"): Budget(84, 0, 2, 3),
    ("ragged rows", "bn_merge_moments_kernel"): Budget(0, 58, 0, 32),
    ("ragged rows", "bn_normalize_kernel"): Budget(123, 106, 2, 5),
    ("ragged rows", "bn_normalize_kernel, after a merge"): Budget(123, 12, 2, 4),
    ("ragged rows", "bn_backward_input_kernel"): Budget(91, 55, 2, 6),
    ("ragged rows", "bn_backward_input_kernel, after a merge"): Budget(90, 0, 2, 4),
    ("held ragged rows", "bn_backward_kernel"): Budget(143, 40, 4, 3),
}
"""The limits with Triton 3.6 to 3.8, where they differ. Their compilers keep fewer loads in flight and need more
registers: that costs the statistics in rows one block in four on an SM."""


def launches(call: str, arch: int) -> dict[str, Any]:
    """Return the launches of a call on an architecture, by kernel: the step and its specialisation."""
    from gpu_bn.gpu_model import FAST_DOUBLES

    if CALLS[call][2] == "cluster":
        return _launches(call, 90)
    return _launches(call, 80 if arch in FAST_DOUBLES else 89)


@cache
def _launches(call: str, arch: int) -> dict[str, Any]:
    import torch
    from support.triton_variants import record_launches

    shape, columns, tier = CALLS[call]
    x = torch.empty(shape, dtype=torch.float16)
    found = record_launches(x.permute(0, 2, 1) if columns else x, arch, sms=128, tier=tier, activation="relu")
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
        return [arch for arch in ARCHITECTURES if arch >= 90 or CALLS[call][2] != "cluster"]
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

The table was made with Triton 3.9. Earlier versions have budgets of their own (`EARLIER` in `tests/triton_budget.py`):
with 3.6 to 3.8, kernels take up to a fifth more instructions, and the statistics in rows have 3 blocks on an SM, not 4.

The table has a covering set of kernels, with float16, ReLU and vectors of 16 bytes, for sm_75 to sm_120. A cell has the
lowest and the highest figure of all architectures and, in brackets, the budget that a test asserts. Kernels that hold a
channel in registers ("held") have no loop over it: their figures are those of the whole kernel. Ragged rows begin and
end within vectors, such as those of 7 x 7 images.

On sm_80, 90 and 100, which are fast at double precision, each program of the last launch merges the partial results of
the blocks. On other GPUs a small launch between the two merges them once, with one warp for a few channels. If 8 warps
in each of 4 programs an SM did it instead, 60 instructions in double precision would take 12 us of an RTX 4090 by count
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
