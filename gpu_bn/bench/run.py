"""The benchmark: which cases, on what, and what becomes of the results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_bn import get_num_threads, set_num_threads
from gpu_bn.bench import gpus
from gpu_bn.bench.cases import Case, select
from gpu_bn.bench.implementations import Subject, chosen
from gpu_bn.bench.machine import clocks, cpu_copy_bandwidth, machine, smi
from gpu_bn.bench.measurement import Entry, Result, Tensors, trial
from gpu_bn.bench.model import model
from gpu_bn.bench.report import Report, layers_table, measured_table, model_tables, refusals, slower_with_threads, three
from gpu_bn.bench.tiers import crossovers
from gpu_bn.bench.timing import CpuTimer, GpuTimer, Timer, said
from gpu_bn.bench.verify import verify
from gpu_bn.cli.console import Table, progress, terminal_width
from gpu_bn.plan import THRESHOLDS, TIERS, Device

FEW_OPERATIONS = ("forward", "forward+relu", "backward", "backward+add+relu", "eval")
DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"shapes": ("few",), "dtypes": ("f32",), "layouts": ("nchw",), "operations": FEW_OPERATIONS},
    "cuda": {
        "shapes": ("few", "resnet50-32"), "dtypes": ("f16",), "layouts": ("nchw", "nhwc"),
        "operations": FEW_OPERATIONS,
    },
    "model": {
        "shapes": ("32x64x112x112", "32x64x56x56", "32x256x14x14", "32x512x7x7", "256x1024"), "dtypes": ("f16",),
        "layouts": ("nchw", "nhwc"), "operations": ("forward+relu", "backward", "backward+add+relu"),
    },
}  # fmt: skip
"""What is timed on each kind of device, and what is modelled where there is no GPU, unless something is asked for."""
SECONDS = {"cpu": 0.3, "cuda": 0.1}
"""Of samples for each call and regime, by default."""
CPU_COPIED_BYTES = 64 << 20
CPU_CACHED_BYTES = 128 << 10
"""Of a copy that stays in a core's own cache."""
MOST_MOVED = 1.25
"""Between the bandwidths of a copy before and after the cases."""


class BenchError(Exception):
    """What keeps the benchmark from running, in words for its user."""


@dataclass(frozen=True)
class Options:
    """What is asked for; ``None`` is the default.

    Attributes:
        shapes, dtypes, layouts, operations, only: as in :func:`gpu_bn.bench.cases.select`.
        peers: names of subjects.
        device: ``auto``, ``cpu`` or ``cuda``.
        seconds: of samples for each call and regime; 0 is one sample.
        threads: of the NumPy backend and of torch, on the CPU; ``None`` times one, then all.
        tiers, verify, train: the further parts.
        eager: leave torch.compile out of ``train``.
        out: the folder for ``report.json`` and the pictures.
        page: the results page to write.
        command: the command line.
    """

    shapes: list[str] | None = None
    dtypes: list[str] | None = None
    layouts: list[str] | None = None
    operations: list[str] | None = None
    only: str = ""
    peers: list[str] | None = None
    device: str = "auto"
    seconds: float | None = None
    threads: int | None = None
    tiers: bool = False
    verify: bool = False
    train: bool = False
    eager: bool = False
    out: Path = field(default_factory=lambda: Path("bench-report"))
    page: Path | None = None
    command: str = "gpu-bn bench"

    def cases(self, kind: str) -> list[Case]:
        """The cases for a kind of device: a key of ``DEFAULTS``."""
        usual = DEFAULTS[kind]
        return select(
            self.shapes or usual["shapes"], self.dtypes or usual["dtypes"], self.layouts or usual["layouts"],
            self.operations or usual["operations"], self.only,
        )  # fmt: skip


@dataclass
class Bench:
    """Where it runs.

    Attributes:
        gpu: the GPU, or ``None``; ``why_not`` there is none.
        timer: what times a call.
        copy_bandwidth: bytes per second of a copy on the device, measured.
        lost: since when and why the GPU does not answer any more; empty while it does.
    """

    options: Options
    gpu: gpus.AnyGpu | None
    why_not: str
    timer: Timer
    copy_bandwidth: float
    lost: str = ""

    @property
    def kind(self) -> str:
        """A key of ``DEFAULTS``."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def seconds(self) -> float:
        """Of samples for each call and regime."""
        return SECONDS[self.kind] if self.options.seconds is None else self.options.seconds

    @property
    def device(self) -> Device | None:
        """The GPU as the planner knows it, its bandwidth such that a copy reaches what was measured."""
        if self.gpu is None:
            return None
        return replace(self.gpu.device, bandwidth=self.copy_bandwidth / THRESHOLDS.copy_share)

    @property
    def threads(self) -> list[int | None]:
        """With how many threads each case is timed: ``None`` is what the libraries choose."""
        if self.gpu is not None or not self.seconds or self.options.threads:
            return [self.options.threads]
        return [*sorted({1, get_num_threads()})]

    def timed(self, case: Case, tensors: Tensors, entries: list[Entry]) -> list[Result]:
        """Prove and time a case with each number of threads."""
        results = []
        for threads in self.threads:
            with use_threads(threads):
                found = trial(case, tensors, entries, self.timer, self.seconds)
            results += [replace(result, threads=threads) for result in found]
        return results

    def moved_copy(self, facts: dict[str, Any]) -> list[str]:
        """Measure the copy again and say so if it is another than at the start; no measurement if seconds are 0."""
        if not self.seconds:
            return []
        after = cpu_copy_bandwidth(CPU_COPIED_BYTES) if self.gpu is None else self.gpu.copy_bandwidth()
        facts["copy_bandwidth_after"] = after
        if 1 / MOST_MOVED <= after / self.copy_bandwidth <= MOST_MOVED:
            return []
        return [
            f"UNSTEADY: a copy had {three(self.copy_bandwidth / 1e9)} GB/s before and {three(after / 1e9)} GB/s after "
            "the cases: the machine was busy with something else, and no time here should be trusted."
        ]

    def each(self, cases: list[Case], run: Callable[[Case, Tensors], list[Result]], results: list[Result]) -> None:
        """Run cases, those of one tensor with the same data, and add to ``results``; up to one that breaks the GPU."""
        what = f"Timing {len(cases)} cases on the {'CPU' if self.gpu is None else 'GPU'}"
        with progress(what, len(cases), about=self.about(len(cases))) as tick:
            for _, group in groupby(cases, lambda case: case.tensor):
                members = list(group)
                tensors = Tensors(members[0])
                for case in members:
                    results += run(case, tensors)
                    tick(1)
                    if not self._answers(case):
                        return
                del tensors
                if self.gpu is not None:
                    self.gpu.free()

    def about(self, cases: int) -> float:
        """Seconds that so many cases take at least: the samples of three calls, and half a second to prove each."""
        return cases * len(self.threads) * (3 * self.seconds * len(self.timer.regimes) + 0.5)

    def _answers(self, case: Case) -> bool:
        """Whether the GPU still does: after an access out of bounds every later call would fail, whoever makes it."""
        try:
            if self.gpu is not None:
                self.gpu.synchronize()
        except Exception as error:
            self.lost = f"the GPU does not answer since {case}: {said(error)}"
        return not self.lost


def start(options: Options) -> Bench:
    """Find the device.

    Raises:
        BenchError: a GPU was asked for, and there is none.
    """
    gpu, why_not = (None, "the CPU was asked for") if options.device == "cpu" else gpus.find()
    if gpu is None and options.device == "cuda":
        raise BenchError(f"--device cuda needs a GPU: {why_not}")
    if gpu is not None:
        try:
            return Bench(options, gpu, "", GpuTimer(gpu), gpu.copy_bandwidth())
        except Exception as error:  # of a driver, or another process that has taken the memory
            raise BenchError(f"nothing can be copied on {gpu.device.name}: {said(error)}") from error
    timer = CpuTimer() if options.seconds is None or options.seconds else CpuTimer(batch=0, pause=0)
    return Bench(options, None, why_not, timer, cpu_copy_bandwidth(CPU_COPIED_BYTES))


def bench(options: Options) -> bool:
    """Run the benchmark, print and write the report.

    Returns:
        Whether all of ours gave the right results.

    Raises:
        BenchError: it cannot run here.
        ValueError: options make no sense.
        KeyboardInterrupt: it was interrupted; the report is of what was measured until then.
    """
    here = start(options)
    subjects, left_out = without_torch(here, *chosen(here.kind, options.peers))
    cases = options.cases(here.kind)
    imagined = options.cases("model") if here.gpu is None else []
    if not cases:
        raise ValueError("no case is left by --shapes, --dtype, --layout, --ops and --only")
    if any(case.dtype == "bfloat16" for case in cases) and find_spec("ml_dtypes") is None:
        raise BenchError("bf16 needs ml_dtypes: pip install -e '.[bench]'")
    if options.train and find_spec("torch") is None:
        raise BenchError("--train needs torch: pip install -e '.[bench]'")
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.command, machine(here.gpu, here.copy_bandwidth), left_out=left_out)
    if here.gpu is None and options.device == "auto":
        report.left_out.append(f"No GPU was timed: {here.why_not}.")
    entries = [Entry(subject) for subject in subjects]
    report.modelled = model(imagined)
    interrupted: KeyboardInterrupt | None = None
    try:
        here.each(cases, lambda case, data: here.timed(case, data, entries), report.results)
        further(here, report, cases, [subject for subject in subjects if subject.ours])
    except KeyboardInterrupt as interrupt:  # what was measured on a rented GPU is worth keeping
        report.failed.append("interrupted: the report is of what was measured until then")
        interrupted = interrupt
    report.failed += [here.lost] if here.lost else []
    if here.gpu is not None:
        report.machine["gpu"]["after"] = smi(here.gpu.smi_id)
    if not here.lost and not interrupted:
        report.warnings += [*slower_with_threads(report.results), *here.moved_copy(report.machine)]
    report.write(options.out / "report.json")  # first: what is printed may have nowhere to go
    show(report, here)
    draw_pictures(report, here)
    if interrupted:
        raise interrupted
    return not (report.wrong or report.failed)


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Give the NumPy backend and torch so many threads; ``None`` leaves them as they are."""
    if threads is None:
        yield
        return
    torch: Any = importlib.import_module("torch") if find_spec("torch") is not None else None
    before, torch_before = get_num_threads(), torch.get_num_threads() if torch else None
    try:
        set_num_threads(threads)
        if torch:
            torch.set_num_threads(threads)
        yield
    finally:
        set_num_threads(before)
        if torch:
            torch.set_num_threads(torch_before)


def without_torch(here: Bench, subjects: list[Subject], left_out: list[str]) -> tuple[list[Subject], list[str]]:
    """Without those that need torch on a GPU that only CuPy sees: torch would serve them on the CPU."""
    if not isinstance(here.gpu, gpus.CupyGpu):
        return subjects, left_out
    served = [subject for subject in subjects if "torch" not in subject.modules]
    refused = [f"{subject.name}: torch does not see the GPU" for subject in subjects if subject not in served]
    return served, [*left_out, *refused]


def further(here: Bench, report: Report, cases: list[Case], ours: list[Subject]) -> None:
    """The parts that have to be asked for; ``cases`` are those that were timed. One that fails is left out."""
    options, torch_missing = here.options, "torch does not see the GPU" if isinstance(here.gpu, gpus.CupyGpu) else ""
    no_gpu = f"needs a GPU: {here.why_not}" if here.gpu is None else ""
    parts: list[tuple[bool, str, str, Callable[[], None]]] = [
        (options.tiers, "--tiers", no_gpu, lambda: race(here, report, cases, ours)),
        (options.verify, "--verify-model", no_gpu, lambda: compare_with_plan(here, report)),
        (options.train, "--train", torch_missing, lambda: train_steps(here, report)),
    ]
    for asked, name, why_not, part in parts:
        try:
            if asked and not why_not and not here.lost:
                part()
        except Exception as error:  # of any library: what was measured before is worth more than a traceback
            why_not = said(error)
        if asked and (why_not or here.lost):
            report.left_out.append(f"{name}: {why_not or here.lost}")


def race(here: Bench, report: Report, cases: list[Case], ours: list[Subject]) -> None:
    """``--tiers all``."""
    assert isinstance(here.timer, GpuTimer)
    assert here.device is not None
    forced = [Entry(subject, tier) for subject in ours for tier in TIERS]
    cold = replace(here.timer, regimes=("cold",))
    training = [case for case in cases if case.operation.training]
    here.each(training, lambda case, data: trial(case, data, forced, cold, here.seconds), report.raced)
    texts, report.extra["crossovers"] = crossovers(report.results, report.raced, here.device)
    report.texts += texts


def compare_with_plan(here: Bench, report: Report) -> None:
    """``--verify-model``."""
    assert here.device is not None
    text, report.extra["verification"] = verify(report.results, here.copy_bandwidth, here.device.l2_bytes)
    report.texts.append(text)


def train_steps(here: Bench, report: Report) -> None:
    """``--train``."""
    from gpu_bn.bench.training import failures, train, training_table

    trained = train(here.kind, here.seconds, here.options.eager)
    report.failed += failures(trained)
    text, report.extra["training"] = training_table(trained, here.kind)
    report.texts.append(text)


def show(report: Report, here: Bench) -> None:
    """Print the report."""
    facts, width = report.machine, terminal_width()
    where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['processor']}, {facts['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    print(f"gpu_bn {facts['gpu_bn']} ({facts['commit'] or 'no checkout'}), {where}\n{packages}")
    if facts["gpu"]:
        print(clocks(facts["gpu"]))
    notes = [*report.left_out, *report.warnings, *(f"FAILED {failure}" for failure in report.failed)]
    print(*notes, sep="\n", end="\n\n" if notes else "\n")
    for text in (
        *measured_table(report.results, here.copy_bandwidth),
        *layers_table(report.with_all_threads),
        refusals([*report.results, *report.raced]),
        *report.texts,
        *model_tables(report.modelled),
    ):
        if text:
            print(text.text(width) if isinstance(text, Table) else text)


def caption(report: Report) -> str:
    """The machine and the threads of what the pictures show."""
    facts = report.machine
    if facts["gpu"]:
        return f"{facts['gpu']['name']}, gpu_bn {facts['gpu_bn']}, {facts['date']}"
    most = max((result.threads or 0 for result in report.results), default=0) or facts["threads"]["numpy backend"]
    return f"{facts['processor']}, {most} thread{'s' * (most > 1)}, gpu_bn {facts['gpu_bn']}, {facts['date']}"


def draw_pictures(report: Report, here: Bench) -> None:
    """Write pictures and the page, and say which files there are."""
    options = here.options
    written = [options.out / "report.json"]
    if find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed; pip install -e '.[bench]' installs what it needs.")
    else:
        from gpu_bn.bench.figures import Ceiling, draw

        try:
            ceilings = [Ceiling("a copy, beyond the caches", here.copy_bandwidth)]
            if here.gpu is None:
                ceilings.append(Ceiling("a copy, in the cache", cpu_copy_bandwidth(CPU_CACHED_BYTES)))
            written += draw(report.with_all_threads, ceilings, options.out, report.raced, caption(report))
        except Exception as error:  # of matplotlib
            print(f"No pictures: {said(error)}")
    if options.page is not None:
        from gpu_bn.bench.page import page

        options.page.write_text(page(report))
        written.append(options.page)
    print("Written:", ", ".join(str(path) for path in written))
