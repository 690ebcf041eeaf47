"""Budgets for the machine code of the CUDA kernels, its record, and the page with both.

``python tests/cuda_budget.py`` compiles a covering set of kernels for every architecture, and writes the record
``tests/data/machine_code_cuda.txt`` and the page ``docs/machine_code.md``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from emulator.compile import ARCHITECTURES, cuda_cubin
from plan_snapshot import calls
from support import registers
from support.cuda_variants import FAMILY, on_chip_tiers, stamp
from support.gates import DATA, Group
from support.machine_code import Figures, blocks_per_sm, figures_of

from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.explanation import ITEMSIZES
from gpu_bn.gpu_model import FAST_DOUBLES
from gpu_bn.plan import DEVICES, THREADS, VECTOR_BYTES, Device, LaunchPlan, Tiling, Work, plan

RECORD = DATA / "machine_code_cuda.txt"
PAGE = Path(__file__).parents[1] / "docs" / "machine_code.md"
CHAIN = 16
"""The number of vectors that a thread adds up in float32 before it adds their sum in double precision (sums.cuh)."""
LAYOUTS = ("columns", "rows", "ragged")
DTYPES = ("float16", "float32")
STREAMING = (
    ("bn_stats_kernel",),
    ("bn_normalize_kernel", False, False),
    ("bn_normalize_kernel", True, True),
    ("bn_backward_reduce_kernel", "FROM_X"),
    ("bn_backward_input_kernel", "FROM_X"),
)


class Budget(NamedTuple):
    """The limits for a kind of kernel on every architecture.

    Attributes:
        instructions: the most instructions for each vector of 16 bytes.
        double: the most instructions in double precision outside of the loops over tensors.
        double_slow: the most of these on architectures that are slow at double precision.
        double_rolled: the most of these in other loops, which run longer with more blocks.
        in_flight: the fewest KiB that the blocks of an SM have requested from memory at a time.
        blocks: the fewest blocks on an SM, by registers.
    """

    instructions: float
    double: int
    double_slow: int
    double_rolled: int
    in_flight: int
    blocks: int


class Row(NamedTuple):
    """The figures of a kernel for one architecture; ``made_of`` is the stamp of its sources."""

    arch: int
    layout: str
    dtype: str
    name: str
    made_of: str
    figures: Figures

    @property
    def kind(self) -> tuple[str, str, str]:
        """The name, layout and dtype by which ``BUDGETS`` has the kernel."""
        name = self.name.partition("_kernel")[0].removeprefix("bn_").replace("_cluster", "")
        return name, self.layout, self.dtype

    @property
    def blocks(self) -> int:
        """The blocks that an SM holds, by registers and static shared memory."""
        return blocks_per_sm(self.arch, THREADS, self.figures.registers, self.figures.shared_bytes)

    @property
    def in_flight(self) -> int:
        """The bytes that the blocks of an SM have in flight, for kernels that do not copy to shared memory."""
        return self.blocks * THREADS * VECTOR_BYTES * self.figures.in_flight

    def over(self) -> Iterator[str]:
        """Yield a message for each figure that is outside of the budget."""
        budget, found = BUDGETS[self.kind], self.figures
        limits = budget._asdict() | ({} if self.arch in FAST_DOUBLES else {"double": budget.double_slow})
        for what in ("instructions", "double", "double_rolled"):
            if getattr(found, what) > limits[what]:
                yield f"{what} {getattr(found, what)} > {limits[what]}"
        if not found.asynchronous and self.in_flight < budget.in_flight << 10:
            yield f"{self.in_flight >> 10} KiB in flight < {budget.in_flight}"
        if self.blocks < budget.blocks:
            yield f"{self.blocks} blocks an SM < {budget.blocks}"
        if found.local_bytes:
            yield f"{found.local_bytes} bytes spilled"

    def __str__(self) -> str:
        head = f"sm_{self.arch} {self.layout} {self.dtype}"
        return f"{head} | {self.name} | {self.made_of} | {' '.join(map(str, self.figures))}"

    @staticmethod
    def parse(line: str) -> Row:
        """Read a row from the record."""
        head, name, made_of, figures = line.split(" | ")
        arch, layout, dtype = head.split()
        numbers = [float(text) if "." in text else text == "True" if text[0] in "TF" else int(text)
                   for text in figures.split()]  # fmt: skip
        return Row(int(arch[3:]), layout, dtype, name, made_of, Figures(*numbers))


def group(arch: int, layout: str, dtype: str) -> Group:
    """Return the group of kernels with full vectors and ReLU."""
    kind = cuda_sources.RAGGED if layout == "ragged" else cuda_sources.WHOLE
    return Group(arch, "relu", dtype, VECTOR_BYTES // ITEMSIZES[dtype], layout == "columns", kind)


def names(arch: int, layout: str, dtype: str) -> list[str]:
    """Return the names of the covering set's kernels; those for ragged rows have no sign bits."""
    vector = VECTOR_BYTES // ITEMSIZES[dtype]
    tiling = Tiling(layout == "columns", 1, 1, 1, vector, 1, 1, 1, layout == "ragged")
    streaming = [(name, *(flag and not (at and tiling.ragged) if isinstance(flag, bool) else flag
                          for at, flag in enumerate(flags))) for name, *flags in STREAMING]  # fmt: skip
    tiers = [tier for tier in on_chip_tiers(arch) if tier[1] in ("Cta", "Cooperative", "4")]
    on_chip = [(f"bn_{direction}{kind}_kernel", tier, *rest) for kind, tier in tiers
               for direction, rest in (("forward", (False, False)), ("backward", ("FROM_X",)))]  # fmt: skip
    return [cuda_sources.kernel(name, dtype, tiling, *arguments) for name, *arguments in (*streaming, *on_chip)]


def rows(arch: int, layout: str, dtype: str, source: str | None = None, only: Iterable[str] | None = None) -> list[Row]:
    """Compile kernels, one at a time (the assembler's names do not tell them apart), and return their figures."""
    found, source = [], source or cuda_sources.source("relu")
    for name in names(arch, layout, dtype) if only is None else only:
        cubin = cuda_cubin(re.sub("//.*", "", source), arch, cuda_sources.OPTIONS, expressions=[name])
        chain = 1 if "normalize" in name or "input" in name else CHAIN  # these sum nothing
        (figures,) = figures_of(cubin, VECTOR_BYTES, chain).values()
        found.append(Row(arch, layout, dtype, name, stamp(group(arch, layout, dtype), name), figures))
    return found


def recorded() -> list[Row]:
    """Return the rows of the record."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    return [Row.parse(line) for line in lines if line.startswith("sm_")]


def stale(row: Row) -> bool:
    """Tell whether a row was made from other sources than the present ones."""
    return row.made_of != stamp(group(row.arch, row.layout, row.dtype), row.name)


BUDGETS = {
    ("stats", "columns", "float16"): Budget(54, 325, 171, 100, 32, 2),
    ("normalize", "columns", "float16"): Budget(62, 40, 40, 0, 36, 3),
    ("backward_reduce", "columns", "float16"): Budget(73, 181, 92, 68, 32, 2),
    ("backward_input", "columns", "float16"): Budget(98, 80, 80, 0, 32, 2),
    ("forward", "columns", "float16"): Budget(127, 259, 202, 100, 32, 2),
    ("backward", "columns", "float16"): Budget(115, 191, 135, 68, 32, 2),
    ("stats", "rows", "float16"): Budget(54, 385, 308, 112, 48, 3),
    ("normalize", "rows", "float16"): Budget(65, 40, 40, 0, 64, 3),
    ("backward_reduce", "rows", "float16"): Budget(70, 115, 96, 44, 32, 2),
    ("backward_input", "rows", "float16"): Budget(102, 80, 80, 0, 48, 3),
    ("forward", "rows", "float16"): Budget(131, 430, 381, 106, 48, 2),
    ("backward", "rows", "float16"): Budget(115, 156, 148, 44, 128, 2),
    ("stats", "ragged", "float16"): Budget(114, 384, 384, 104, 24, 2),
    ("normalize", "ragged", "float16"): Budget(111, 40, 40, 0, 64, 3),
    ("backward_reduce", "ragged", "float16"): Budget(159, 115, 103, 44, 16, 2),
    ("backward_input", "ragged", "float16"): Budget(190, 80, 80, 0, 64, 4),
    ("forward", "ragged", "float16"): Budget(220, 400, 402, 98, 48, 2),
    ("backward", "ragged", "float16"): Budget(207, 156, 156, 44, 48, 2),
    ("stats", "columns", "float32"): Budget(28, 252, 171, 90, 32, 2),
    ("normalize", "columns", "float32"): Budget(27, 40, 40, 0, 48, 4),
    ("backward_reduce", "columns", "float32"): Budget(33, 141, 92, 60, 32, 2),
    ("backward_input", "columns", "float32"): Budget(39, 80, 80, 0, 64, 4),
    ("forward", "columns", "float32"): Budget(65, 235, 202, 92, 32, 2),
    ("backward", "columns", "float32"): Budget(55, 183, 135, 60, 64, 2),
    ("stats", "rows", "float32"): Budget(33, 225, 205, 84, 48, 3),
    ("normalize", "rows", "float32"): Budget(32, 40, 40, 0, 64, 3),
    ("backward_reduce", "rows", "float32"): Budget(35, 115, 96, 44, 48, 3),
    ("backward_input", "rows", "float32"): Budget(45, 80, 80, 0, 64, 4),
    ("forward", "rows", "float32"): Budget(74, 290, 278, 84, 48, 2),
    ("backward", "rows", "float32"): Budget(58, 160, 148, 44, 96, 2),
    ("stats", "ragged", "float32"): Budget(64, 221, 221, 76, 48, 3),
    ("normalize", "ragged", "float32"): Budget(70, 40, 40, 0, 64, 3),
    ("backward_reduce", "ragged", "float32"): Budget(66, 115, 103, 44, 48, 3),
    ("backward_input", "ragged", "float32"): Budget(86, 80, 80, 0, 64, 4),
    ("forward", "ragged", "float32"): Budget(155, 279, 279, 76, 48, 2),
    ("backward", "ragged", "float32"): Budget(112, 156, 156, 44, 96, 2),
}
"""By kind, layout and dtype: slightly more than the worst figures of all architectures."""

INTRODUCTION = """# Machine code of the CUDA kernels

`python tests/cuda_budget.py` writes this page, and `tests/backends/cupy/test_budget.py` compares it with the kernels
and with the planner. Nothing here was measured on a GPU: the first table is read from the machine code that NVRTC's
assembler makes, and the times are the planner's model (`gpu_bn/gpu_model.py`). [Terms](terms.md) defines the words.

## Budgets

The table has every kind of kernel, with float16 and float32, ReLU and vectors of 16 bytes, on sm_75 to sm_120. A cell
has the lowest and the highest figure of all architectures and, in brackets, the budget that a test asserts. Ragged rows
begin and end within vectors, such as those of 7 x 7 images.

- **instructions**: the number of instructions for each vector of 16 bytes, in all loops over the tensor together.
- **double**: the number of instructions in double precision outside of these loops, including those that the last few
  vectors may skip, on sm_80, 90 and 100. **slow**: the same on sm_75, 86, 89 and 120, which execute them at 1/32 or
  1/64 of the speed of single precision. Long sums are pairs of floats there (`PairSum` in `sums.cuh`), until a few
  threads keep one sum of each channel; with ghost batches, and in ragged rows on sm_120, they are doubles too.
  **rolled**: those of them that are in loops, which run longer if there are partial sums of more blocks.
- **KiB in flight**: the data that the blocks of an SM have requested from memory at a time. For its full bandwidth, an
  H100 needs about 18 KiB an SM (3.35 TB/s x 0.7 us / 132), and a B200 about 38 KiB. Kernels that copy to shared memory
  ("staged") request all of a block's share at once; on sm_75 as many loads as the assembler puts in a row.
- **blocks**: the number of blocks that an SM holds, by registers and static shared memory. **registers**: the number of
  registers of a thread.

"""
REGISTERS = """
## More than 128 registers

If a thread has more than 128 registers, an SM holds one block of 256 threads. The table has the kernels in the covering
set of `tests/data/gates_cuda.txt` of which some need that many, with all activations, and the reason. The first figure
is for vectors of 16 bytes. [The same for the Triton kernels](tested.md#triton-kernels-with-more-than-128-registers).
"""
LIMITERS = """
## What limits each shape

The calls are training calls in float16 with ReLU. A cell has the tier, the part of the call that takes longest by the
model, and the time of the floor as a share of the whole time. *memory* is the bytes divided by the bandwidth of a copy,
*launches* the starts of kernels, *idle* the loss from few blocks or few bytes in flight, *exchange* the time that
blocks wait for each other, and *merge* the time in which the last block of a strip adds up partial sums.

"""


def page() -> str:
    """Return the text of the page, from the record and the planner."""
    by_kind: dict[tuple[str, str, str], list[Row]] = {}
    for row in recorded():
        by_kind.setdefault(row.kind, []).append(row)
    header = ("kernel", "layout", "dtype", "instructions", "double", "slow", "rolled", "KiB in flight", "blocks",
              "registers")  # fmt: skip
    lines = [INTRODUCTION + _line(header), _line(["---"] * len(header))]
    for kind, found in by_kind.items():
        budget = BUDGETS[kind]
        flights = [row.in_flight >> 10 for row in found if not row.figures.asynchronous]
        staged = " staged" if len(flights) < len(found) else ""
        cells = [
            _range((row.figures.instructions for row in found), f"<= {budget.instructions:g}"),
            _range((row.figures.double for row in found if row.arch in FAST_DOUBLES), f"<= {budget.double}"),
            _range((row.figures.double for row in found if row.arch not in FAST_DOUBLES), f"<= {budget.double_slow}"),
            _range((row.figures.double_rolled for row in found), f"<= {budget.double_rolled}"),
            (_range(flights, f">= {budget.in_flight}") if flights else "") + staged,
            _range((row.blocks for row in found), f">= {budget.blocks}"),
            _range((row.figures.registers for row in found), ""),
        ]
        lines.append(_line([*kind, *cells]))
    return "\n".join(lines) + "\n" + REGISTERS + registers.table(FAMILY) + LIMITERS + limiters(plan)


def limiters(planned: Callable[[Work, Device], LaunchPlan]) -> str:
    """Return the table of the part that limits each shape, by the plans of a backend."""
    lines = [_line(["call", "", *(device.name for device in DEVICES.values())]), _line(["---"] * (len(DEVICES) + 2))]
    for name, works in calls():
        for direction, work in zip(("forward", "backward"), works, strict=True):
            plans = [planned(work, device) for device in DEVICES.values()]
            cells = [f"{p.tier}, {p.times.limiter} {p.floor_seconds / p.seconds:.0%}" for p in plans]
            lines.append(_line([name, direction, *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _range(numbers: Iterable[float], budget: str) -> str:
    found = list(numbers)
    text = f"{min(found):g}" if min(found) == max(found) else f"{min(found):g}-{max(found):g}"
    return f"{text} ({budget})" if budget else text


def main() -> None:
    """Compile the covering set; write the record and the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    everything = [row for which in product(ARCHITECTURES, LAYOUTS, DTYPES) for row in rows(*which)]
    RECORD.write_text("".join(f"{row}\n" for row in everything))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
