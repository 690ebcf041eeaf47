"""Compile variants of the kernels, and write the record that tests/project/test_gates.py judges.

    python tests/record_gates.py sweep cuda --work DIRECTORY [--processes 2] [--all]
    python tests/record_gates.py write cuda --work DIRECTORY

``sweep`` compiles the covering set of the ``cuda`` or ``triton`` kernels, or with ``--all`` every variant. It appends a
row for each group of kernels to a file in the directory. It skips kernels that the record or a row already has for the
present sources. So it continues where it was stopped, and after a change it compiles the changed kernels only.
``write`` puts the rows into the record, where they replace cells of older sources.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from support.gates import Cell, Family, Group, Record, Resources


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("sweep", "write"))
    parser.add_argument("family", choices=("cuda", "triton"))
    parser.add_argument("--work", type=Path, required=True, help="the directory of the rows")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="every variant, not only the covering set")
    given = parser.parse_args()
    family = family_of(given.family)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.action == "write":
        write(family, given.work)
    else:
        sweep(family, given.work, given.processes, given.all)


def family_of(name: str) -> Family:
    """Return a family of kernels. It is imported here because Triton may not be installed."""
    if name == "cuda":
        from support.cuda_variants import FAMILY
    else:
        from support.triton_variants import FAMILY
    return FAMILY


# ----------------------------------------------------------------------------------------------------------- rows
KEYS = ("arch", "act", "dtype", "vector", "columns", "batch")


Kernel = tuple[int, str, str]
"""The key of a kernel: architecture, name, and the stamp of its sources. Several groups may have the same kernel."""


class Rows:
    """The resources of kernels, read from the rows of a directory.

    A row has the kernels of one group, with their compiler (``by``) and the stamps of their sources (``of``).
    """

    def __init__(self, family: Family, work: Path) -> None:
        self.family = family
        self.known: dict[Kernel, Resources] = {}
        for row in read(work):
            if row.get("by") == family.compiler():
                for name, kernel in row["kernels"].items():
                    found = Resources(*kernel[:4], tuple(kernel[4]), tuple(kernel[5]))
                    self.known[row["arch"], name, row["of"][name]] = found

    def key(self, group: Group, name: str) -> Kernel:
        """Return the key of a variant of a group, with its present sources."""
        return group.arch, name, self.family.stamp(group, name)

    def missing(self, group: Group) -> list[str]:
        """Return the names of the variants of a group that no row has."""
        return [name for name in self.family.variants(group) if self.key(group, name) not in self.known]

    def kernels(self, group: Group) -> dict[str, Resources] | None:
        """Return the resources of all variants of a group by name; ``None`` if one is missing."""
        kernels = {name: self.known.get(self.key(group, name)) for name in self.family.variants(group)}
        found = {name: kernel for name, kernel in kernels.items() if kernel is not None}
        return found if len(found) == len(kernels) else None


def read(work: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a directory."""
    for file in sorted(work.glob("rows*.jsonl")):
        for line in file.read_text().splitlines():
            yield json.loads(line)


def row_line(family: Family, group: Group, kernels: dict[str, Any], seconds: float) -> str:
    """Return a row as a line of JSON."""
    of = {name: family.stamp(group, name) for name in kernels}
    made = {"by": family.compiler(), "seconds": round(seconds, 2), "of": of, "kernels": kernels}
    return json.dumps({**dict(zip(KEYS, group, strict=True)), **made}) + "\n"


# -------------------------------------------------------------------------------------------------------- actions
def sweep(family: Family, work: Path, processes: int, every: bool = False) -> None:
    """Compile the kernels that are missing, and print those that are outside the gates."""
    rows, recorded = Rows(family, work), usable_record(family).current(family)
    wanted = sorted(family.every_group(), key=family.importance) if every else family.covering()
    groups = [group for group in wanted if group not in recorded]
    batches: dict[Group, list[Group]] = {}
    for group in groups:  # groups that differ in the activation only have kernels in common
        batches.setdefault(group._replace(activation=""), []).append(group)
    print(f"{len(groups)} groups of {len(wanted)} are not in the record for these sources", flush=True)
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=_start, initargs=(rows,)) as pool:
        for lines, outside in pool.map(_compile, batches.values()):
            with (work / "rows.jsonl").open("a") as file:
                file.writelines(lines)
            for why in outside:
                print(why, flush=True)


_rows: Rows
"""The rows, in a process of the pool."""


def _start(rows: Rows) -> None:
    global _rows
    _rows = rows


def _compile(groups: list[Group]) -> tuple[list[str], list[str]]:
    """Compile the missing kernels of some groups; return the rows, and messages for kernels outside the gates."""
    family, lines, outside = _rows.family, [], []
    for group in groups:
        if missing := _rows.missing(group):
            start = time.monotonic()
            kernels = family.build(group, missing, False)
            _rows.known |= {_rows.key(group, name): kernel for name, kernel in kernels.items()}
            lines.append(row_line(family, group, kernels, time.monotonic() - start))
            outside += family.outside(group, kernels)
    return lines, outside


def write(family: Family, work: Path) -> None:
    """Write the record, with the rows of a directory."""
    record, known = usable_record(family), Rows(family, work)
    current = record.current(family)
    for group in family.every_group():
        if group not in current and (kernels := known.kernels(group)) is not None:
            record.cells[group] = Cell.of(family, group, kernels)
            record.outside += family.outside(group, kernels)
    Record.file(family).write_text(record.text(family))
    print(f"{Record.file(family)}: {len(record.cells)} groups, {len(record.outside)} kernels outside the gates")


def usable_record(family: Family) -> Record:
    """Return the record; an empty one if another compiler made it, or if a kernel in it was outside the gates."""
    record = Record.read(family)
    same = record.compiler == family.compiler() and not record.outside
    return record if same else Record(family.compiler())


if __name__ == "__main__":
    main()
