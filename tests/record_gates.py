"""Compile every variant of the kernels, and write the record that tests/test_gates.py judges.

    python tests/record_gates.py sweep cuda --work DIRECTORY [--processes 2]
    python tests/record_gates.py write cuda --work DIRECTORY

``sweep`` appends a row for each group to files in the directory: of what neither the record nor a row has of the
present sources yet, so that it goes on where it was stopped, and after a change compiles what that concerns. ``write``
adds the rows there are to what still holds of the record. ``stamp`` marks rows that another program has left there as
made of the sources that are imported now. The kernels are those for ``cuda`` or ``triton``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gates import Cell, Family, Group, Record, Resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("sweep", "write", "stamp"))
    parser.add_argument("family", choices=("cuda", "triton"))
    parser.add_argument("--work", type=Path, required=True, help="directory of the rows")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    family = family_of(given.family)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.action == "write":
        write(family, given.work)
    elif given.action == "stamp":
        stamp(family, given.work)
    elif given.processes == 1 or given.part is not None:
        sweep(family, given.work, given.part or 0, given.processes)
    else:
        parts = [subprocess.Popen([sys.executable, *sys.argv, f"--part={part}"]) for part in range(given.processes)]
        sys.exit(max(part.wait() for part in parts))


def family_of(name: str) -> Family:
    """Imported by need: Triton may be absent."""
    if name == "cuda":
        from cuda_variants import FAMILY
    else:
        from triton_variants import FAMILY
    return FAMILY


# ----------------------------------------------------------------------------------------------------------- rows
KEYS = ("arch", "act", "dtype", "vector", "columns", "batch")


class Rows:
    """The rows of a directory: of each group, what is known of kernels as they are now.

    A row is of one group, and says by which compiler (``by``) and of what (``of``, stamps) its kernels were made.
    """

    def __init__(self, family: Family, work: Path) -> None:
        self.family = family
        self.known: dict[Group, dict[str, Resources]] = {}
        for row in read(work):
            if row.get("by") != family.compiler():
                continue
            group, known = group_of(row), self.known.setdefault(group_of(row), {})
            for name, kernel in row["kernels"].items():
                if row["of"][name] == family.stamp(group, name):
                    known[name] = Resources(*kernel[:4], tuple(kernel[4]), tuple(kernel[5]))

    def missing(self, group: Group) -> list[str]:
        """The variants of a group of which nothing is known."""
        return [name for name in self.family.variants(group) if name not in self.known.get(group, {})]

    def kernels(self, group: Group) -> dict[str, Resources] | None:
        """All variants of a group, if they are known."""
        known = self.known.get(group, {})
        return None if self.missing(group) else {name: known[name] for name in self.family.variants(group)}


def read(work: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(work.glob("rows.*.jsonl")):
        for line in file.read_text().splitlines():
            yield json.loads(line)


def group_of(row: dict[str, Any]) -> Group:
    return Group(*(row[key] for key in KEYS))


def marked(family: Family, group: Group, kernels: dict[str, Any], seconds: float) -> str:
    """A row's line."""
    of = {name: family.stamp(group, name) for name in kernels}
    made = {"by": family.compiler(), "seconds": round(seconds, 2), "of": of, "kernels": kernels}
    return json.dumps({**dict(zip(KEYS, group, strict=True)), **made}) + "\n"


# -------------------------------------------------------------------------------------------------------- actions
def sweep(family: Family, work: Path, part: int, parts: int) -> None:
    """Compile what is not known yet, and say which kernels are outside the gates."""
    known, recorded = Rows(family, work), standing(family).cells
    wanted = [group for group in family.every_group() if group not in recorded and known.missing(group)]
    todo = sorted(wanted, key=family.importance)[part::parts]
    print(f"{len(todo)} groups to compile", flush=True)
    with (work / f"rows.{part}.jsonl").open("a") as file:
        for group in todo:
            start = time.monotonic()
            kernels = family.build(group, known.missing(group), False)
            file.write(marked(family, group, kernels, time.monotonic() - start))
            file.flush()
            for why in family.outside(group, kernels):
                print(why, flush=True)


def write(family: Family, work: Path) -> None:
    """Write the record."""
    record, known = standing(family), Rows(family, work)
    for group in family.every_group():
        if group not in record.cells and (kernels := known.kernels(group)) is not None:
            record.cells[group] = Cell.of(family, group, kernels)
            record.outside += family.outside(group, kernels)
    Record.file(family).write_text(record.text(family))
    print(f"{Record.file(family)}: {len(record.cells)} groups, {len(record.outside)} kernels outside the gates")


def standing(family: Family) -> Record:
    """What still holds of the record; nothing, if something in it was outside the gates."""
    record = Record.read(family)
    same = record.compiler == family.compiler() and not record.outside
    return Record(family.compiler(), cells=record.current(family) if same else {})


def stamp(family: Family, work: Path) -> None:
    """Mark the rows that do not say what they are of, after compiling three of them again."""
    files = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in work.glob("rows.*.jsonl")}
    unmarked = [row for found in files.values() for row in found if not isinstance(row.get("of"), dict)]
    for row in unmarked[:: max(1, len(unmarked) // 3)]:
        again = family.build(group_of(row), list(row["kernels"]), False)
        assert json.loads(json.dumps(again)) == row["kernels"], f"{group_of(row)} is of other sources"
    for file, found in files.items():
        with file.open("w") as lines:
            for row in found:
                new = row in unmarked
                group, kernels, seconds = group_of(row), row["kernels"], row["seconds"]
                lines.write(marked(family, group, kernels, seconds) if new else json.dumps(row) + "\n")
    print(f"{len(unmarked)} rows marked")


if __name__ == "__main__":
    main()
