"""Check families of kernels against the gates for compiling them, and record what the compiler made of every variant.

A *group* is all kernels that calls of one kind can use, with one architecture, activation, dtype, vector and
layout. ``tests/record_gates.py`` compiles them; the record has a cell for each group, and says what it was made of: the
compiler, the kernels' names, and a stamp of all text that each can use. Tests read the record, and compile
samples of it again.
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
    """Name the kernels for calls of one kind; ``columns``: channels-last."""

    arch: int
    activation: str
    dtype: str
    vector: int
    columns: bool
    kind: str

    @property
    def width(self) -> int:
        """Return the bytes of a vector."""
        return self.vector * ITEMSIZE[self.dtype]

    @property
    def full(self) -> bool:
        """Tell whether vectors are as wide as they can be."""
        return self.width == VECTOR_BYTES

    def __str__(self) -> str:
        layout = "columns" if self.columns else "rows"
        return f"sm_{self.arch} {self.activation} {self.dtype} x{self.vector} {layout} {self.kind}"


class Resources(NamedTuple):
    """Hold what the compiler made of a kernel; ``loads`` and ``stores``: the widths of accesses to global memory.

    Shared memory is rounded up to ``ALIGNMENT``: how closely variables lie depends on what is compiled with a kernel.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]

    @staticmethod
    def of(compiled: Compiled) -> Resources:
        """Return what the compiler made of a kernel."""
        shared = -(-(compiled.shared_bytes + compiled.dynamic_shared_bytes) // ALIGNMENT) * ALIGNMENT
        return Resources(
            compiled.registers, compiled.spill_bytes, compiled.stack_bytes, shared, *access_widths(compiled.ptx)
        )


@dataclass(frozen=True)
class Limits:
    """Hold what a kernel of a group may take (spilled bytes too), and whether it reads and writes tensors."""

    registers: int
    shared: int
    reads: bool = True
    writes: bool = True
    spilled: int = 0


@dataclass(frozen=True)
class Family:
    """Describe the kernels in one language.

    Attributes:
        name: of the record's file.
        compiler: its name and version.
        groups: of an architecture.
        importance: of a group, to sort by.
        variants: the kernels of a group.
        build: compiles kernels of a group; with or without the cache.
        limits: of a kernel of a group.
        stamp: a digest of all text that a kernel of a group is made of.
        sources: all text that kernels are made of.
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

    def made_of(self, group: Group) -> str:
        """Return a digest of a group's kernels: of their names, and of all text that they are made of."""
        return digest(sorted((name, self.stamp(group, name)) for name in self.variants(group)), 6)

    def every_group(self) -> Iterator[Group]:
        """Return the groups of all architectures."""
        for arch in ARCHITECTURES:
            yield from self.groups(arch)

    def covering(self) -> list[Group]:
        """Choose a pairwise covering set, the most important groups first.

        It has each architecture and each activation for every kind of call, with its dtype, vector and layout.
        """
        calls: dict[Group, list[Group]] = {}
        for group in self.every_group():
            calls.setdefault(group._replace(arch=0, activation=""), []).append(group)
        found = []
        for shift, groups in enumerate(calls.values()):
            archs, activations = ({group[at]: None for group in groups} for at in (0, 1))
            for at in range(max(len(archs), len(activations))):
                arch = list(archs)[(at + shift) % len(archs)]
                found.append(groups[0]._replace(arch=arch, activation=list(activations)[at % len(activations)]))
        return sorted(found, key=self.importance)

    def outside(self, group: Group, kernels: Mapping[str, Resources]) -> list[str]:
        """Say why kernels of a group are outside the gates."""
        found = []
        for name, kernel in kernels.items():
            found += [f"{group}: {name}: {why}" for why in _outside(group, self.limits(group, name), kernel)]
        return found

    def check(self, group: Group) -> None:
        """Compile a group; assert that it is within the gates, and what a record of these sources says of it."""
        kernels = self.build(group, self.variants(group), True)
        outside = self.outside(group, kernels)
        assert not outside, "\n".join(outside)
        record = Record.read(self)
        cell = record.cells.get(group)
        if cell is None or cell.made_of != self.made_of(group):
            pytest.skip(f"within the gates; the record has nothing of these sources to compare with: {REMEDY}")
        if record.compiler != self.compiler():
            pytest.skip(f"within the gates; the record is of {record.compiler}, not of {self.compiler()}")
        assert Cell.of(self, group, kernels) == cell

    def changed(self) -> dict[Group, int]:
        """Return groups of the covering set that changed since they were recorded, by their registers to spare."""
        record, covering = Record.read(self), self.covering()
        current = record.current(self, covering)
        found = {}
        for group in covering:
            if group in record.cells and group not in current:
                most = max(self.limits(group, name).registers for name in self.variants(group))
                found[group] = most - record.cells[group].registers
        return {group: found[group] for group in sorted(found, key=lambda group: (found[group], str(group)))}

    def shuffled(self, groups: Iterable[Group]) -> list[Group]:
        """Shuffle groups; the order is another one with each change of the sources."""
        seed = digest(self.sources(), 16)
        return sorted(groups, key=lambda group: digest([seed, *group], 16))

    def drawn(self, count: int) -> list[Group]:
        """Draw some groups, others with each change of the sources."""
        return self.shuffled(self.every_group())[:count]


REMEDY = "python tests/record_gates.py (see CONTRIBUTING.md)"


def _outside(group: Group, limits: Limits, kernel: Resources) -> Iterator[str]:
    if max(kernel.spilled, kernel.stack) > limits.spilled:
        yield f"spills {kernel.spilled} bytes, {kernel.stack} bytes of stack"
    for what, limit in (("registers", limits.registers), ("shared", limits.shared)):
        if getattr(kernel, what) > limit:
            yield f"{what} {getattr(kernel, what)} > {limit}"
    for there, kind in ((limits.reads, "loads"), (limits.writes, "stores")):
        widths = getattr(kernel, kind)
        widest = max(widths, default=0)
        if there and group.width not in widths:
            yield f"no {kind} of {group.width} bytes, but of {widths}"
        elif there and group.full and widest != VECTOR_BYTES:
            yield f"the widest {kind} have {widest} bytes"


ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)+)\s")
COPY = re.compile(r"\bcp\.async\.[\w.:]*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\d+)")


def access_widths(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths in bytes of a kernel's global loads (and asynchronous copies) and of its stores."""
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
    """Split a source text into definitions, each with its names; one without names belongs to everything."""

    def __init__(self, found: Iterable[tuple[Iterable[str], str]]) -> None:
        self.found = [(frozenset(names), text, frozenset(re.findall(r"\w+", text))) for names, text in found]
        self.names = frozenset(name for names, _, _ in self.found for name in names)
        self._stamps: dict[frozenset[str], str] = {}

    def reachable(self, words: Iterable[str]) -> list[str]:
        """Return the texts of the definitions that a text of some words can reach, by the words in them."""
        known, taken, before = self.names.intersection(words), set[int](), -1
        while len(taken) > before:
            before = len(taken)
            for at, (names, _, used) in enumerate(self.found):
                if at not in taken and not (names and names.isdisjoint(known)):
                    taken.add(at)
                    known |= used & self.names
        return [self.found[at][1] for at in sorted(taken)]

    def stamp(self, words: Iterable[str]) -> str:
        """Return a digest of the texts that a text of some words can reach."""
        known = self.names.intersection(words)
        if known not in self._stamps:
            self._stamps[known] = digest(self.reachable(known), 8)
        return self._stamps[known]


# ------------------------------------------------------------------------------------------------------- the record
class Cell(NamedTuple):
    """Hold a group in the record: the number of its kernels, their most registers, spilled, stack and shared bytes, the
    narrowest of their accesses to tensors, and a digest of what they were made of."""

    kernels: int
    registers: int
    spilled: int
    stack: int
    shared: int
    load: int
    store: int
    made_of: str

    @staticmethod
    def of(family: Family, group: Group, kernels: Mapping[str, Resources]) -> Cell:
        """Make the cell of a group's kernels."""
        limits = {name: family.limits(group, name) for name in kernels}
        widths = {"loads": [group.width], "stores": [group.width]}
        for name, kernel in kernels.items():
            for there, kind in ((limits[name].reads, "loads"), (limits[name].writes, "stores")):
                if there:
                    widths[kind].append(max((w for w in getattr(kernel, kind) if w <= group.width), default=0))
        return Cell(
            len(kernels),
            max(kernel.registers for kernel in kernels.values()),
            sum(kernel.spilled for kernel in kernels.values()),
            max(kernel.stack for kernel in kernels.values()),
            max(kernel.shared for kernel in kernels.values()),
            min(widths["loads"]),
            min(widths["stores"]),
            family.made_of(group),
        )

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Cell:
        """Read cells from a record's text."""
        *numbers, made_of = text.split(":")
        return Cell(*map(int, numbers), made_of)


@dataclass
class Record:
    """Hold cells, and what they were made of."""

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
        """Return the cells of all groups, or some, that were made of the present sources and variants."""
        wanted = family.every_group() if groups is None else groups
        cells = {group: self.cells[group] for group in wanted if group in self.cells}
        return {group: cell for group, cell in cells.items() if cell.made_of == family.made_of(group)}

    def text(self, family: Family) -> str:
        """Return the text of the whole file."""
        groups = list(family.every_group())
        missing = [group for group in groups if group not in self.cells]
        covering, current = family.covering(), self.current(family)
        renewed = [current[group] for group in covering if group in current]
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
            *(f"missing {count} of {kind}, {name}" for (kind, name), count in _counted(missing)),
            *(f"outside {why}" for why in self.outside),
        ]
        rows: dict[str, dict[str, str]] = {}
        for group in groups:
            layout = "columns" if group.columns else "rows"
            head = f"sm_{group.arch} {group.dtype} x{group.vector} {layout} {group.kind}"
            rows.setdefault(head, {})[group.activation] = str(self.cells.get(group, "-"))
        lines += [f"{head} | {' '.join(cells.get(name, '.') for name in ROWS)}" for head, cells in rows.items()]
        return "\n".join(lines) + "\n"


def _counted(groups: Iterable[Group]) -> Iterable[tuple[tuple[str, str], int]]:
    return Counter((group.kind, group.activation) for group in groups).items()
