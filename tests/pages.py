"""Write the generated parts of the pages. With ``--check``, only print the pages whose parts are not current.

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. It is made from the code, or from a record of
a measurement. This script measures and compiles nothing. The records, and the scripts that write them:

- ``bench/data/cpu.json``: ``bench/cpu.py --json``
- ``tests/data/versions.json``: ``tests/versions.py --write``
- ``tests/data/models.jsonl``: ``tests/model_proof.py``
- ``tests/data/container_*.txt``: ``docker/check``
- ``tests/data/machine_code_cuda.txt``: ``tests/cuda_budget.py``
- ``tests/data/machine_code_triton.txt``: ``tests/triton_budget.py``
- ``tests/data/gates_*.txt``: ``tests/record_gates.py``
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_budget
import model_proof
import numpy as np
import triton_budget
import versions
from support import cuda_faults, cuda_masked_faults, gpu_sync_faults, registers, triton_bugs, triton_variants
from support.gates import DATA

from gpu_bn.activations import ROWS
from gpu_bn.bench.model import model
from gpu_bn.bench.report import model_page
from gpu_bn.bench.run import cases_of
from gpu_bn.cli.check import covering
from gpu_bn.plan import DEVICES
from gpu_bn.testing import Case, build, cases, extended_cases, run, unavailable_cases

ROOT = Path(__file__).parents[1]
CPU = ROOT / "bench" / "data" / "cpu.json"
CPU_PICTURE = ROOT / "docs" / "images" / "cpu.png"
README_CASES = ("32x64x56x56", "32x256x14x14", "32x64x56x56 channels-last", "256x1024", "2x3x4x4")
PART = re.compile(r"(<!-- ([a-z][^\n]*?) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)


# ------------------------------------------------------------------------------------------------------ parts
def kernel_count(family: str, line: str) -> str:
    """Return the number of recorded kernels: ``covered`` are all, ``renewed`` those compiled from present sources."""
    record = (DATA / f"gates_{family}.txt").read_text()
    (count,) = re.findall(rf"^{line} \d+ of \d+ groups.*, (\d+) kernels$", record, re.M)
    return f"{int(count):,}"


def every_case() -> list[Case]:
    """Return the cases of ``gpu-bn check``, also those that need a package that is not installed."""
    return [*cases(), *extended_cases(), *unavailable_cases()]


def quick_cuda_kernels() -> str:
    """Return the number of CUDA kernels that ``gpu-bn check --quick`` compiles for an H100.

    They are counted in another process, because the stand-in for CuPy would stay in this one.
    """
    command = [sys.executable, str(ROOT / "bench" / "compile_times.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (count,) = re.findall(r"--quick: (\d+) kernels", done.stdout)
    return str(count)


def quick_triton_kernels(device: str) -> str:
    """Return the number of Triton kernels that ``gpu-bn check --quick`` compiles for one of ``plan.DEVICES``.

    Plans are those of Triton 3.9, with clusters, whatever version is installed.
    """
    from support.triton_backends import RecordingBackend

    backend = RecordingBackend(DEVICES[device])
    backend.builder.clusters = True
    with np.errstate(all="ignore"):  # outputs hold any numbers, because launches do nothing
        for case in covering(every_case()):
            run(build(case), backend)
    return str(len({(step.kernel.__name__, special.key) for step, special in backend.launches}))


def planted_cuda() -> str:
    """Return the numbers of faults that tests plant into the CUDA kernels, as text."""
    masked, offsets = len(cuda_masked_faults.FAULTS), len(cuda_faults.GEOMETRIES)
    whole = len(cuda_faults.PLANTED) + masked + len(gpu_sync_faults.CUDA)
    return f"{whole}, of which {masked} with masks and ghost batches, and {offsets} cut offsets"


def code(place: str) -> str:
    """Return the source of a function as a block of code; ``place`` is ``FILE FUNCTION``."""
    file, name = place.split()
    source = (ROOT / file).read_text()
    (node,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    assert isinstance(node, ast.FunctionDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return f'\n```python title="{file}"\n{text}\n```\n'


def cpu_record() -> tuple[str, dict[str, dict[str, dict[str, float]]]]:
    """Return the environment of the CPU record and its ratios: our time over torch's, by threads, row and operation."""
    record = json.loads(CPU.read_text())
    ratios = {
        threads: {row: {name: cell[0] for name, cell in cells.items()} for row, cells in rows.items()}
        for threads, rows in record["results"].items()
    }
    return record["environment"], ratios


def cpu_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of ratios with two decimals; a ratio below 0.01 is shown as ``<0.01``."""
    names = list(next(iter(rows.values())))
    lines = [["float32 unless stated", *names], ["---"] * (len(names) + 1)]
    lines += [
        [row, *(f"{ratio:.2f}" if ratio >= 0.01 else "<0.01" for ratio in cells.values())]
        for row, cells in rows.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_all() -> str:
    """Return a table of all cases for each number of threads."""
    environment, ratios = cpu_record()
    parts = [f"Measured with {environment}."]
    for threads, rows in ratios.items():
        named = {row.removesuffix(" / torch"): cells for row, cells in rows.items()}
        parts += [f"{threads} thread{'s' * (threads != '1')} each:", cpu_table(named)]
    return "\n" + "\n\n".join(parts) + "\n"


def cpu_short() -> str:
    """Return README's table: some cases on one thread, for each backend that was measured."""
    environment, ratios = cpu_record()
    threads = min(ratios, key=int)
    names = [f"{case}, {backend}" for case in README_CASES for backend in ("cpu", "numpy")]
    rows = {name: ratios[threads][f"{name} / torch"] for name in names if f"{name} / torch" in ratios[threads]}
    return f"\n{cpu_table(rows)}\n\nMeasured with {environment}, {threads} thread{'s' * (threads != '1')} each.\n"


def container(target: str) -> str:
    """Return the recorded output of ``docker/check`` for an image."""
    return f"\n```text\n{(DATA / f'container_{target}.txt').read_text()}```\n"


PARTS: dict[str, Callable[[], str]] = {
    "activations": lambda: ", ".join(ROWS),
    "container bench": lambda: container("bench"),
    "container test": lambda: container("test"),
    "cases": lambda: str(len(every_case())),
    "cpu": cpu_all,
    "cpu short": cpu_short,
    "gates_cuda": lambda: kernel_count("cuda", "covered"),
    "gates_cuda_renewed": lambda: kernel_count("cuda", "renewed"),
    "gates_triton": lambda: kernel_count("triton", "covered"),
    "gates_triton_renewed": lambda: kernel_count("triton", "renewed"),
    "install": lambda: re.findall(r"<!-- install -->(.*?)<!--", (ROOT / "README.md").read_text(), re.S)[0],
    "model": lambda: "\n" + model_page(model(cases_of("model"))) + "\n",
    "planted_cuda": planted_cuda,
    "planted_triton": lambda: str(len(triton_bugs.BUGS) + len(gpu_sync_faults.TRITON)),
    "quick_cuda_kernels": quick_cuda_kernels,
    "quick_triton_kernels 4090": lambda: quick_triton_kernels("4090"),
    "quick_triton_kernels h100": lambda: quick_triton_kernels("h100"),
    "quick_cases": lambda: str(len(covering(every_case()))),
    "registers_triton": lambda: registers.table(triton_variants.FAMILY),
    "versions": lambda: f"\n{versions.table(json.loads(versions.DATA.read_text()))}\n",
}


# ------------------------------------------------------------------------------------------------------ pages
def part(name: str) -> str:
    """Return the text of a generated part."""
    if name.startswith("code "):
        return code(name.removeprefix("code "))
    return PARTS[name]()


def update_parts(text: str) -> str:
    """Return a page with all its generated parts up to date."""
    return PART.sub(lambda found: f"{found[1]}{part(found[2])}{found[4]}", text)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page that has a generated part, and the text that it should have."""
    yield cuda_budget.PAGE, cuda_budget.page()
    yield triton_budget.PAGE, triton_budget.page()
    yield ROOT / "docs" / "models.md", model_proof.table((DATA / "models.jsonl").read_text().splitlines())
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "bench" / "results.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        text = path.read_text()
        if PART.search(text):
            yield path, update_parts(text)


def stale() -> list[str]:
    """Return the paths of the pages and pictures that are not up to date."""
    found = [path for path, text in pages() if path.read_text() != text]
    if not CPU_PICTURE.exists() or record_digest().encode() not in CPU_PICTURE.read_bytes():
        found.append(CPU_PICTURE)
    return [str(path.relative_to(ROOT)) for path in found]


def record_digest() -> str:
    """Return the digest of the CPU record, which the picture holds in its metadata."""
    return hashlib.sha256(CPU.read_bytes()).hexdigest()


def draw() -> None:
    """Draw the measured ratios: a panel for each number of threads, a row for each case, a mark for each operation."""
    from matplotlib.figure import Figure

    environment, ratios = cpu_record()
    figure = Figure(figsize=(7, 5.2), dpi=140, layout="constrained")  # the text is legible at a width of 400 pixels
    panels = figure.subplots(1, len(ratios), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (threads, rows) in zip(panels, ratios.items(), strict=True):
        shown = {
            row.partition(", cpu / torch")[0]: cells for row, cells in rows.items() if row.endswith(", cpu / torch")
        }
        for marker, name in zip("osD^vPX", next(iter(shown.values())), strict=False):
            face = {"markerfacecolor": "none"} if name.startswith("backward") else {}  # for readers in grey
            panel.plot([cells[name] for cells in shown.values()], range(len(shown)), marker, label=name, **face)
        panel.axvline(1, color="#555555", linewidth=1.2)
        panel.text(1, -0.75, " equal", fontsize=9, color="#555555", va="center")
        panel.set(xscale="log", title=f"{threads} thread{'s' * (threads != '1')} each", ylim=(len(shown) - 0.5, -1.1))
        panel.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        panel.minorticks_off()
        panel.set_yticks(range(len(shown)), list(shown))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("our time / torch's, measured; left of the line gpu_bn is faster", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(CPU_PICTURE, metadata={"Description": f"{environment}; record {record_digest()}"})


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a part is not current")
    if parser.parse_args().check:
        print("\n".join(found := stale()))
        return bool(found)
    for path in map(ROOT.joinpath, stale()):
        print(path.relative_to(ROOT))
        if path == CPU_PICTURE:
            draw()
    for path, text in list(pages()):
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
