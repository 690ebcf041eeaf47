"""Run the Triton backend and the torch layers with other versions of torch and Triton, and record the outcomes.

    python tests/versions.py --work DIRECTORY 3.6.0 3.7.1 3.8.0              # with the installed torch
    python tests/versions.py --work DIRECTORY --write 2.11=3.6.0 2.14=3.8.0  # with other versions of torch (GB)

The script makes an environment in DIRECTORY for each pair of versions; all other packages come from this environment.
There it compiles kernels that cover the kinds of calls, dtypes, layouts, activations and architectures, runs some
cases on the emulator, and holds the machine code to its budget. With another torch it also runs the tests of the
layers. ``--write`` puts the outcomes into ``data/versions.json``, from which ``tests/pages.py`` makes the table in
``docs/install.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import cycle, product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "data" / "versions.json"
LAYERS = (
    "modules", "direct", "convert", "operators", "graph", "folding", "masks", "statistics", "fusing", "fused_changes",
    "fusing_control", "merging", "refusals",
)  # fmt: skip
SLICE = "(test_case and triton and not reference or launches or masked or merge_to) and not cupy"
PARTS = {
    "kernels": ["tests/versions.py", "--compile"],
    "emulator": [
        "-m",
        "pytest",
        "-q",
        "tests/conformance/test_conformance.py",
        "tests/backends/triton/test_emulator.py",
        "tests/backends/triton/test_backend.py",
        "tests/backends/test_gpu_sync.py",
        "-k",
        SLICE,
    ],
    "budget": ["-m", "pytest", "-q", "tests/backends/triton/test_budget.py"],
    "layers": [
        "-m",
        "pytest",
        "-q",
        "tests/conformance/test_torch.py",
        *(f"tests/nn/test_{name}.py" for name in LAYERS),
    ],
}


# ----------------------------------------------------------------------------------------------------- compiling
def covering() -> Iterator[tuple[int, Any, Any]]:
    """Yield launches that cover the kinds of calls: one launch of each kernel for each kind and dtype."""
    from support.gates import ARCHITECTURES, ITEMSIZE, Group
    from support.triton_variants import ACTIVATIONS, variants

    from gpu_bn.activations import ROWS

    archs, activations, layouts = cycle(ARCHITECTURES), cycle(ROWS), cycle((False, True, True, False, True))
    for kind, dtype in product(ACTIVATIONS, ITEMSIZE):
        ragged = kind.startswith("ragged")
        if ragged and dtype == "float64":
            continue
        arch, columns = next(archs), not ragged and next(layouts)
        arch = max(arch, 90) if kind.endswith("cluster") else arch
        yield from _one_of_each(
            variants(Group(arch, next(activations), dtype, 16 // ITEMSIZE[dtype], columns, kind)), arch
        )
    for activation, dtype in product(ROWS, ("float16", "float32")):  # kernels with which Triton 3.8 crashed
        arch = next(archs)
        launches = variants(Group(arch, activation, dtype, 16 // ITEMSIZE[dtype], False, "split"))
        yield from _one_of_each({name: one for name, one in launches.items() if "reduce" in name}, arch)

    yield from ((next(archs), *launch) for launch in shared_statistics())


def shared_statistics() -> list[Any]:
    """Return the launches of kernels that share statistics between three processes."""
    import torch
    from support.triton_backends import RecordingBackend

    from gpu_bn.nn.distributed.wire import HEADER, ROOM, UNKNOWN
    from gpu_bn.plan import DEVICES

    backend = RecordingBackend(DEVICES["h100"])
    packets = [torch.zeros(3, HEADER + ROOM, dtype=torch.float64)]
    found = backend.merge_packets(packets, 40, HEADER, ROOM, UNKNOWN)
    backend.sum_packets(packets, 80, HEADER, ROOM, UNKNOWN)
    for momentum, dtype in ((None, torch.float32), (0.1, torch.bfloat16)):
        running = torch.zeros(2, 40, dtype=dtype)
        backend.update_shared(*running, torch.tensor(0), momentum, None, *found)
    return backend.launches


def _one_of_each(launches: dict[str, Any], arch: int) -> Iterator[tuple[int, Any, Any]]:
    first = {name.partition("<")[0]: launch for name, launch in reversed(launches.items())}
    return ((arch, *launch) for launch in first.values())


def attempt(arch: int, step: Any, special: Any) -> str:
    """Compile a kernel to PTX; return an error message, empty if there is no error."""
    from emulator.compile import compile_triton
    from support.triton_variants import compiler_options

    try:
        compile_triton(step.kernel, arch, **compiler_options(special), resources=False)
    except Exception as error:
        return f"{step.kernel.__name__} for sm_{arch}: {type(error).__name__}: {error}".replace("\0", " ")
    return ""


def compile_all() -> int:
    """Compile the covering set in child processes, which a crash of the compiler ends; return 1 if a kernel fails."""
    items, results = list(covering()), list[str]()
    while len(results) < len(items):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            for item in items[len(results) :]:
                os.write(writer, attempt(*item).encode() + b"\0")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            results += [text.decode() for text in said.read().split(b"\0")[:-1]]
        if status := os.waitpid(child, 0)[1]:
            arch, step, _ = items[len(results)]
            results.append(f"{step.kernel.__name__} for sm_{arch}: the compiler's process ended with {status}")
    failed = [text for text in results if text]
    print(*failed, f"{len(results) - len(failed)} passed, {len(failed)} failed", sep="\n")
    return bool(failed)


# -------------------------------------------------------------------------------------------------- environments
def environment(work: Path, torch: str, triton: str) -> Path:
    """Return the Python of an environment with these versions, made if missing; an empty ``torch`` is this one's."""
    home = work / f"torch{torch}-triton{triton}"
    python = home / "bin" / "python"
    done = home / "made"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        install = python, "-m", "pip", "install", "-q"
        if torch:
            subprocess.run([*install, f"torch=={torch}.*"], check=True)
        subprocess.run([*install, "--no-deps", f"triton=={triton}"], check=True)  # torch may ask for another one
        site = home / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        behind = [path for path in sys.path if path.endswith("site-packages")]
        (site / "behind.pth").write_text("\n".join(behind) + "\n")
        done.touch()
    return python


def environ() -> dict[str, str]:
    """Return the environment variables that let a Python import this package and its tests' modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}


def outcome(python: Path, what: str) -> dict[str, Any]:
    """Run one part of the checks; return whether it succeeded, and how many tests passed, failed and were skipped."""
    done = subprocess.run(
        [python, *PARTS[what]], cwd=HERE.parent, env=environ(), capture_output=True, text=True, check=False
    )
    counts = {
        name: int(found) for found, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])
    }
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
    return {"ok": done.returncode == 0, **counts}


def row(python: Path, parts: list[str]) -> dict[str, Any]:
    """Run parts in an environment; return a row of the record."""
    said = "import platform, torch, triton, numpy as n, triton_budget as t; "
    said += "print(platform.python_version(), torch.__version__, triton.__version__, n.__version__, t.stamp())"
    done = subprocess.run([python, "-c", said], env=environ(), capture_output=True, text=True, check=True)
    names = ("python", "torch", "triton", "numpy", "kernels_stamp")
    found: dict[str, Any] = dict(zip(names, done.stdout.split(), strict=True))
    found["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    if "kernels" not in parts:
        del found["kernels_stamp"]
    return found | {what: outcome(python, what) for what in parts}


# -------------------------------------------------------------------------------------------------------- page
def table(record: dict[str, Any]) -> str:
    """Return the table in docs/install.md, which ``tests/pages.py`` writes."""
    from triton_budget import stamp

    names = (
        "torch", "Triton", "kernels compiled", "cases on the emulator", "machine code's budget", "tests of layers",
        "Python", "date",
    )  # fmt: skip
    lines = [names, ("---",) * len(names)]
    for found in record["rows"]:
        outcomes = [_cell(found.get(what)) for what in PARTS]
        stale = "" if found.get("kernels_stamp") == stamp() else ", of earlier kernels"
        lines.append((found["torch"], found["triton"], *outcomes, found["python"], found["date"] + stale))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows into the record; a row replaces that of the same versions, part by part."""
    record = json.loads(DATA.read_text()) if DATA.exists() else {"rows": []}
    names = "triton", "torch", "python"
    known = {tuple(found[name] for name in names): found for found in record["rows"]}
    for found in rows:
        key = tuple(found[name] for name in names)
        known[key] = known.get(key, {}) | found
    ordered = sorted(known.values(), key=lambda found: [_numbers(found[name]) for name in names])
    DATA.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "error", "skipped") if found.get(name))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="[TORCH=]TRITON")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part; the record keeps the others")
    parser.add_argument("--compile", action="store_true", help="compile the covering set in this environment")
    options = parser.parse_args()
    if options.compile:
        return compile_all()
    if options.work is None or not options.pairs:
        parser.error("expected --work and pairs of versions")
    rows = []
    for pair in options.pairs:
        torch, _, triton = pair.rpartition("=")
        parts = options.only or (list(PARTS) if torch else ["kernels", "emulator", "budget"])
        rows.append(row(environment(options.work.resolve(), torch, triton), parts))
        print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write(rows)
    return not all(found[what]["ok"] for found in rows for what in PARTS if what in found)


if __name__ == "__main__":
    sys.exit(main())
