"""Check compiled kernels against limits of registers, spills and shared memory (the gates), and record their figures.

A *group* is all kernels that calls of one kind can use, for one architecture, activation, dtype, vector and layout.
``tests/record_gates.py`` compiles them. The record has a cell for each group, with a digest of the names of its kernels
and of all source text that each can use. Tests read the record, and compile samples of it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from emulator.compile import ARCHITECTURES, Compiled
from emulator.parser import TYPE_BYTES

from gpu_bn.activations import ROWS
from gpu_bn.plan import VECTOR_BYTES
from support.paths import DATA

ALIGNMENT = 16
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Group(NamedTuple):
    """The kernels for calls of one kind. ``columns`` tells whether the layout is channels-last."""

    arch: int
    activation: str
    dtype: str
    vector: int
    columns: bool
    kind: str

    @property
    def width(self) -> int:
        """The bytes of a vector."""
        return self.vector * ITEMSIZE[self.dtype]

    @property
    def full(self) -> bool:
        """Whether vectors are as wide as possible."""
        return self.width == VECTOR_BYTES

    def __str__(self) -> str:
        layout = "columns" if self.columns else "rows"
        return f"sm_{self.arch} {self.activation} {self.dtype} x{self.vector} {layout} {self.kind}"


class Resources(NamedTuple):
    """The resources of a compiled kernel. ``loads`` and ``stores`` are the widths of global memory accesses in bytes.

    Shared memory is rounded up to ``ALIGNMENT``, as the gaps between variables depend on the other kernels in a module.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]

    @staticmethod
    def of(compiled: Compiled) -> Resources:
        """Return the resources of a compiled kernel."""
        shared = -(-(compiled.shared_bytes + compiled.dynamic_shared_bytes) // ALIGNMENT) * ALIGNMENT
        return Resources(
            compiled.registers, compiled.spill_bytes, compiled.stack_bytes, shared, *access_widths(compiled.ptx)
        )


@dataclass(frozen=True)
class Limits:
    """The most registers, shared memory and spilled bytes of a kernel, and whether it reads and writes tensors."""

    registers: int
    shared: int
    reads: bool = True
    writes: bool = True
    spilled: int = 0


@dataclass(frozen=True)
class Family:
    """The kernels in one language, described by functions.

    Attributes:
        name: the name of the family, which is a part of the record's file name.
        compiler: returns the name and version of the compiler.
        groups: returns the groups of an architecture.
        importance: returns the sort key of a group.
        variants: returns the names of the kernels of a group.
        build: compiles kernels of a group, with or without the cache.
        limits: returns the limits of a kernel of a group.
        stamp: returns a digest of all source text that a kernel of a group can use.
        sources: returns the source text of all kernels.
    """

    name: str
    compiler: Callable[[], str]
    groups: Callable[[int], Iterable[Group]]
    importance: Callable[[Group], Any]
    variants: Callable[[Group], Collection[str]]
    build: Callable[[Group, Collection[str], bool], dict[str, Resources]]
    limits: Callable[[Group, str], Limits]
    stamp: Callable[[Group, str], str]
    sources: Callable[[], str]

    def digest_of(self, group: Group) -> str:
        """Return a digest of the kernels of a group: of their names, and of all source text that they can use."""
        return digest(sorted((name, self.stamp(group, name)) for name in self.variants(group)), 6)

    def every_group(self) -> Iterator[Group]:
        """Yield the groups of all architectures."""
        for arch in ARCHITECTURES:
            yield from self.groups(arch)

    def covering(self) -> list[Group]:
        """Choose a pairwise covering set, the most important groups first.

        For each kind of call, dtype, vector and layout it has each architecture and each activation at least once.
        """
        calls: dict[Group, list[Group]] = {}
        for group in self.every_group():
            calls.setdefault(group._replace(arch=0, activation=""), []).append(group)
        chosen = []
        for shift, groups in enumerate(calls.values()):
            archs, activations = ({group[at]: None for group in groups} for at in (0, 1))
            for at in range(max(len(archs), len(activations))):
                arch = list(archs)[(at + shift) % len(archs)]
                chosen.append(groups[0]._replace(arch=arch, activation=list(activations)[at % len(activations)]))
        return sorted(chosen, key=self.importance)

    def outside(self, group: Group, kernels: Mapping[str, Resources]) -> list[str]:
        """Return a line for each limit that a kernel of a group exceeds."""
        lines = []
        for name, kernel in kernels.items():
            lines += [f"{group}: {name}: {why}" for why in _outside(group, self.limits(group, name), kernel)]
        return lines

    def check(self, group: Group) -> None:
        """Compile a group. Assert that it is within the gates, and equals its record if the sources are the same."""
        kernels = self.build(group, self.variants(group), True)
        outside = self.outside(group, kernels)
        assert not outside, "\n".join(outside)
        record = Record.read(self)
        cell = record.cells.get(group)
        if cell is None or cell.digest != self.digest_of(group):
            pytest.skip(f"within the gates; the record has nothing of these sources to compare with: {REMEDY}")
        if record.compiler != self.compiler():
            pytest.skip(f"within the gates; the record is from {record.compiler}, not from {self.compiler()}")
        assert Cell.of(self, group, kernels) == cell

    def changed(self) -> dict[Group, int]:
        """Return the groups of the covering set whose sources have changed since they were recorded.

        Each has the number of registers that it had to spare. The least come first.
        """
        record, covering = Record.read(self), self.covering()
        current = record.current(self, covering)
        spare = {}
        for group in covering:
            if group in record.cells and group not in current:
                most = max(self.limits(group, name).registers for name in self.variants(group))
                spare[group] = most - record.cells[group].registers
        return {group: spare[group] for group in sorted(spare, key=lambda group: (spare[group], str(group)))}

    def shuffled(self, groups: Iterable[Group]) -> list[Group]:
        """Return groups in an order that changes with each change of the sources."""
        seed = digest(self.sources(), 16)
        return sorted(groups, key=lambda group: digest([seed, *group], 16))

    def sample(self, count: int) -> list[Group]:
        """Return some groups, others after each change of the sources."""
        return self.shuffled(self.every_group())[:count]


REMEDY = "python tests/record_gates.py (see CONTRIBUTING.md)"


def _outside(group: Group, limits: Limits, kernel: Resources) -> Iterator[str]:
    """Yield a description of each limit that a kernel exceeds."""
    if max(kernel.spilled, kernel.stack) > limits.spilled:
        yield f"spills {kernel.spilled} bytes, {kernel.stack} bytes of stack"
    for what, limit in (("registers", limits.registers), ("shared", limits.shared)):
        if getattr(kernel, what) > limit:
            yield f"{what} {getattr(kernel, what)} > {limit}"
    for expected, kind in ((limits.reads, "loads"), (limits.writes, "stores")):
        widths = getattr(kernel, kind)
        widest = max(widths, default=0)
        if expected and group.width not in widths:
            yield f"no {kind} of {group.width} bytes, but of {widths}"
        elif expected and group.full and widest != VECTOR_BYTES:
            yield f"the widest {kind} have {widest} bytes"


ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)+)\s")
COPY = re.compile(r"\bcp\.async\.[\w.:]*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\d+)")


def access_widths(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths in bytes of the global loads and asynchronous copies of a kernel, and of its global stores."""
    widths: dict[str, set[int]] = {"ld": set(map(int, COPY.findall(ptx))), "st": set()}
    for kind, modifiers in ACCESS.findall(ptx):
        words = modifiers.split(".")[1:]
        if "global" in words:
            vector = next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1)
            widths[kind].add(vector * TYPE_BYTES[words[-1]])
    return tuple(sorted(widths["ld"])), tuple(sorted(widths["st"]))


def digest(value: object, digits: int) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:digits]


class Definitions:
    """The definitions in a source text, each with the names that it defines. All code uses those without names."""

    def __init__(self, definitions: Iterable[tuple[Iterable[str], str]]) -> None:
        self.parts = [(frozenset(names), text, frozenset(re.findall(r"\w+", text))) for names, text in definitions]
        self.names = frozenset(name for names, _, _ in self.parts for name in names)
        self._stamps: dict[frozenset[str], str] = {}

    def reachable(self, words: Iterable[str]) -> list[str]:
        """Return the texts of the definitions that code with some words can use, directly or indirectly."""
        known, taken, before = self.names.intersection(words), set[int](), -1
        while len(taken) > before:
            before = len(taken)
            for at, (names, _, used) in enumerate(self.parts):
                if at not in taken and not (names and names.isdisjoint(known)):
                    taken.add(at)
                    known |= used & self.names
        return [self.parts[at][1] for at in sorted(taken)]

    def stamp(self, words: Iterable[str]) -> str:
        """Return a digest of the definitions that code with some words can use."""
        known = self.names.intersection(words)
        if known not in self._stamps:
            self._stamps[known] = digest(self.reachable(known), 8)
        return self._stamps[known]


# ------------------------------------------------------------------------------------------------------- the record
class Cell(NamedTuple):
    """A group in the record.

    It has the number of kernels, the largest of their registers, stack and shared bytes, the sum of their spilled
    bytes, the narrowest of their accesses to tensors in bytes, and the digest of their names and sources.
    """

    kernels: int
    registers: int
    spilled: int
    stack: int
    shared: int
    load: int
    store: int
    digest: str

    @staticmethod
    def of(family: Family, group: Group, kernels: Mapping[str, Resources]) -> Cell:
        """Return the cell for the compiled kernels of a group."""
        limits = {name: family.limits(group, name) for name in kernels}
        widths = {"loads": [group.width], "stores": [group.width]}
        for name, kernel in kernels.items():
            for expected, kind in ((limits[name].reads, "loads"), (limits[name].writes, "stores")):
                if expected:
                    widths[kind].append(max((w for w in getattr(kernel, kind) if w <= group.width), default=0))
        return Cell(
            len(kernels),
            max(kernel.registers for kernel in kernels.values()),
            sum(kernel.spilled for kernel in kernels.values()),
            max(kernel.stack for kernel in kernels.values()),
            max(kernel.shared for kernel in kernels.values()),
            min(widths["loads"]),
            min(widths["stores"]),
            family.digest_of(group),
        )

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Cell:
        """Parse a cell in the text of a record."""
        *numbers, code = text.split(":")
        return Cell(*map(int, numbers), code)


@dataclass
class Record:
    """The record of a family: the compiler, the kernels outside the gates, and the cells."""

    compiler: str
    outside: list[str] = field(default_factory=list)
    cells: dict[Group, Cell] = field(default_factory=dict)

    @staticmethod
    def file(family: Family) -> Path:
        """Return the path of a family's record."""
        return DATA / f"gates_{family.name}.txt"

    @staticmethod
    def read(family: Family) -> Record:
        """Read a family's record."""
        record, file = Record(""), Record.file(family)
        for line in file.read_text().splitlines() if file.exists() else []:
            first, _, rest = line.partition(" ")
            if first == "compiler":
                record.compiler = rest
            elif first == "outside":
                record.outside.append(rest)
            elif first.startswith("sm_"):
                head, cells = line.split(" | ")
                arch, dtype, vector, layout, kind = head.split(" ", 4)
                for activation, text in zip(ROWS, cells.split(), strict=True):
                    if ":" in text:
                        group = Group(int(arch[3:]), activation, dtype, int(vector[1:]), layout == "columns", kind)
                        record.cells[group] = Cell.parse(text)
        return record

    def current(self, family: Family, groups: Iterable[Group] | None = None) -> dict[Group, Cell]:
        """Return the cells of some groups, or all, that were recorded from the present sources and variants."""
        wanted = family.every_group() if groups is None else groups
        cells = {group: self.cells[group] for group in wanted if group in self.cells}
        return {group: cell for group, cell in cells.items() if cell.digest == family.digest_of(group)}

    def text(self, family: Family) -> str:
        """Return the text of the record's file."""
        groups = list(family.every_group())
        missing = [group for group in groups if group not in self.cells]
        covering, current = family.covering(), self.current(family)
        renewed = [current[group] for group in covering if group in current]
        counts = Counter((group.kind, group.activation) for group in missing)
        lines = [
            f"# What the compiler makes of the kernels, by: python tests/record_gates.py write {family.name}",
            "# A cell is of a group's kernels: how many, most registers, bytes spilled, of stack, of shared memory,",
            "# their narrowest loads and stores of tensors, and a digest of what they are made of. Cells outside the",
            "# covering set may be of older sources: their digest then differs from the present one.",
            f"# By activation: {' '.join(ROWS)}. '-' is not compiled yet, '.' not a group.",
            f"compiler {self.compiler}",
            f"covered {len(groups) - len(missing)} of {len(groups)} groups, "
            f"{sum(cell.kernels for cell in self.cells.values())} kernels",
            f"renewed {len(renewed)} of {len(covering)} groups of the covering set, "
            f"{sum(cell.kernels for cell in renewed)} kernels",
            *(f"missing {count} of {kind}, {name}" for (kind, name), count in counts.items()),
            *(f"outside {why}" for why in self.outside),
        ]
        rows: dict[str, dict[str, str]] = {}
        for group in groups:
            layout = "columns" if group.columns else "rows"
            head = f"sm_{group.arch} {group.dtype} x{group.vector} {layout} {group.kind}"
            rows.setdefault(head, {})[group.activation] = str(self.cells.get(group, "-"))
        lines += [f"{head} | {' '.join(cells.get(name, '.') for name in ROWS)}" for head, cells in rows.items()]
        return "\n".join(lines) + "\n"
