"""The benchmark: it chooses cases and a device, measures, and writes the report."""

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
from gpu_bn.bench.implementations import Implementation, choose
from gpu_bn.bench.machine import clocks, cpu_copy_bandwidth, describe, machine, smi
from gpu_bn.bench.measurement import Result, Tensors, measure
from gpu_bn.bench.model import model
from gpu_bn.bench.report import Report, model_tables, slower_with_threads
from gpu_bn.bench.tiers import crossovers
from gpu_bn.bench.timing import CpuTimer, GpuTimer, Timer, in_words
from gpu_bn.bench.verify import verify
from gpu_bn.cli.console import Table, progress, terminal_width, three_digits
from gpu_bn.cli.info import cores
from gpu_bn.cli.values import CommandError
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
"""The cases by default: those timed on each kind of device, and those modelled where there is no GPU."""
SECONDS = {"cpu": 0.3, "cuda": 0.1}
"""Seconds of samples for each call and regime, by default."""
CPU_COPIED_BYTES = 64 << 20
CPU_CACHED_BYTES = 128 << 10
"""Size of a copy that stays in a core's own cache."""
MOST_MOVED = 1.25
"""The largest ratio between a copy's bandwidths before and after the cases that counts as steady."""


@dataclass(frozen=True)
class Options:
    """What the user asks for; ``None`` is the default.

    Attributes:
        shapes, dtypes, layouts, operations, only: as in :func:`gpu_bn.bench.cases.select`.
        device: ``auto``, ``cpu`` or ``cuda``.
        seconds: the time for samples of each call and regime; 0 is one sample.
        threads: how many our CPU backends and torch get; ``None`` times one, then all.
        tiers, verify, train: the further parts; ``eager`` leaves torch.compile out of the last.
        out, page: the folder for ``report.json`` and the pictures, and the results page.
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
        """Return the cases for a kind of device: a key of ``DEFAULTS``."""
        usual = DEFAULTS[kind]
        return select(
            self.shapes or usual["shapes"], self.dtypes or usual["dtypes"], self.layouts or usual["layouts"],
            self.operations or usual["operations"], self.only,
        )  # fmt: skip

    def check(self, cases: list[Case]) -> None:
        """Check that the cases for the device can be run.

        Raises:
            ValueError: there is none, or there are fewer cores than threads.
            CommandError: a package is missing.
        """
        if not cases:
            raise ValueError("no case is left by --shapes, --dtype, --layout, --ops and --only")
        if self.threads is not None and self.threads > cores():
            raise ValueError(f"--threads: this process has {cores()} cores, got {self.threads}")
        if any(case.dtype == "bfloat16" for case in cases) and find_spec("ml_dtypes") is None:
            raise CommandError("bf16 needs ml_dtypes: pip install -e '.[bench]'")
        if self.train and find_spec("torch") is None:
            raise CommandError("--train needs torch: pip install -e '.[bench]'")


@dataclass
class Session:
    """A device, and how calls are timed on it.

    Attributes:
        options: what the user asks for.
        gpu: the GPU, or ``None``; ``why_not`` says why there is none.
        timer: what times a call.
        copy_bandwidth: the measured bandwidth of a copy on the device, in bytes per second.
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
        """The kind of device: a key of ``DEFAULTS``."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def seconds(self) -> float:
        """Seconds of samples for each call and regime."""
        return SECONDS[self.kind] if self.options.seconds is None else self.options.seconds

    @property
    def device(self) -> Device:
        """The GPU as the planner knows it, with the bandwidth at which the planner's copy takes the measured time."""
        assert self.gpu is not None
        return replace(self.gpu.device, bandwidth=self.copy_bandwidth / THRESHOLDS.copy_share)

    @property
    def threads(self) -> list[int | None]:
        """The numbers of threads that each case is timed with; ``None`` is what the libraries choose."""
        if self.gpu is not None or not self.seconds or self.options.threads:
            return [self.options.threads]
        return [*sorted({1, get_num_threads()})]

    def measure(self, case: Case, tensors: Tensors, implementations: list[Implementation]) -> list[Result]:
        """Check and time a case with each number of threads."""
        results = []
        for threads in self.threads:
            with use_threads(threads):
                found = measure(case, tensors, implementations, self.timer, self.seconds)
            results += [replace(result, threads=threads) for result in found]
        return results

    def run_cases(self, cases: list[Case], run: Callable[[Case, Tensors], list[Result]], results: list[Result]) -> None:
        """Run cases and add to ``results``, up to a case that breaks the GPU. Cases of one tensor share its data."""
        what = f"Timing {len(cases)} cases on the {'CPU' if self.gpu is None else 'GPU'}"
        with progress(what, len(cases), least=self.expected_seconds(len(cases))) as advance:
            for _, group in groupby(cases, lambda case: case.tensor):
                members = list(group)
                tensors = Tensors(members[0])
                for case in members:
                    results += run(case, tensors)
                    advance(1)
                    if self._lost_after(case):
                        return
                del tensors
                if self.gpu is not None:
                    self.gpu.free()

    def expected_seconds(self, cases: int) -> float:
        """Estimate the least time of so many cases: samples of three calls, and half a second to check each."""
        return cases * len(self.threads) * (3 * self.seconds * len(self.timer.regimes) + 0.5)

    def _lost_after(self, case: Case) -> str:
        """Ask the GPU to answer: after an access out of bounds every later call fails, whoever makes it."""
        try:
            if self.gpu is not None:
                self.gpu.synchronize()
        except Exception as error:
            self.lost = f"the GPU does not answer since {case}: {in_words(error)}"
        return self.lost

    def compare_copies(self, facts: dict[str, Any]) -> list[str]:
        """Measure the copy again, and return a warning if it differs from that at the start."""
        if not self.seconds:
            return []
        after = cpu_copy_bandwidth(CPU_COPIED_BYTES) if self.gpu is None else self.gpu.copy_bandwidth()
        facts["copy_bandwidth_after"] = after
        if 1 / MOST_MOVED <= after / self.copy_bandwidth <= MOST_MOVED:
            return []
        before, after_ = (three_digits(bandwidth / 1e9) for bandwidth in (self.copy_bandwidth, after))
        return [
            f"UNSTEADY: a copy had {before} GB/s before and {after_} GB/s after the cases: the machine was busy with "
            "something else, and no time here should be trusted."
        ]


def start(options: Options) -> Session:
    """Find the device and measure a copy on it.

    Raises:
        CommandError: a GPU was asked for and there is none, or it cannot be used.
    """
    gpu, why_not = (None, "the CPU was asked for") if options.device == "cpu" else gpus.find()
    if gpu is None and options.device == "cuda":
        raise CommandError(f"--device cuda needs a GPU: {why_not}")
    if gpu is not None:
        try:
            return Session(options, gpu, "", GpuTimer(gpu), gpu.copy_bandwidth())
        except Exception as error:  # of a driver, or because another process has taken the memory
            raise CommandError(f"nothing can be copied on {gpu.device.name}: {in_words(error)}") from error
    timer = CpuTimer() if options.seconds is None or options.seconds else CpuTimer(batch=0, pause=0)
    return Session(options, None, why_not, timer, cpu_copy_bandwidth(CPU_COPIED_BYTES))


def bench(options: Options) -> bool:
    """Run the benchmark, print and write the report.

    Returns:
        Whether all results of ours were right.

    Raises:
        CommandError: it cannot run here.
        ValueError: the options make no sense.
        KeyboardInterrupt: it was interrupted; the report has what was measured until then.
    """
    session = start(options)
    chosen, left_out = without_torch(session, *choose(session.kind, options.peers))
    cases = options.cases(session.kind)
    modelled = [] if session.gpu else model(options.cases("model"))
    options.check(cases)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine(session.gpu, session.copy_bandwidth)
    report = Report(options.command, facts, left_out=left_out, modelled=modelled)
    if session.gpu is None and options.device == "auto":
        report.left_out.append(f"No GPU was timed: {session.why_not}.")
    interrupted: KeyboardInterrupt | None = None
    try:
        session.run_cases(cases, lambda case, tensors: session.measure(case, tensors, chosen), report.results)
        further_parts(session, report, cases, [each for each in chosen if each.ours])
    except KeyboardInterrupt as interrupt:  # what was measured on a rented GPU is worth keeping
        report.failed.append("interrupted: the report is of what was measured until then")
        interrupted = interrupt
    report.failed += [session.lost] if session.lost else []
    if session.gpu is not None:
        facts["gpu"]["after"] = smi(session.gpu.smi_id)  # it shows a GPU that slowed down
    if not session.lost and not interrupted:
        report.warnings += [*slower_with_threads(report.results), *session.compare_copies(facts)]
    report.write(options.out / "report.json")  # before printing, which may fail
    show(report)
    write_pictures(report, session)
    if interrupted:
        raise interrupted
    return not (report.wrong or report.failed)


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Give our CPU backends and torch so many threads; ``None`` leaves them as they are."""
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


def without_torch(
    session: Session, chosen: list[Implementation], left_out: list[str]
) -> tuple[list[Implementation], list[str]]:
    """Leave out those that need torch if only CuPy sees the GPU: torch would run them on the CPU."""
    if not isinstance(session.gpu, gpus.CupyGpu):
        return chosen, left_out
    refused = [f"{each.name}: torch does not see the GPU" for each in chosen if "torch" in each.modules]
    return [each for each in chosen if "torch" not in each.modules], [*left_out, *refused]


# ------------------------------------------------------------------------------------------------ further parts
def further_parts(session: Session, report: Report, cases: list[Case], ours: list[Implementation]) -> None:
    """Run the parts that were asked for, on the ``cases`` that were timed. One that fails is left out."""
    options = session.options
    no_gpu = f"needs a GPU: {session.why_not}" if session.gpu is None else ""
    no_torch = "torch does not see the GPU" if isinstance(session.gpu, gpus.CupyGpu) else ""
    parts: list[tuple[bool, str, str, Callable[[], None]]] = [
        (options.tiers, "--tiers", no_gpu, lambda: time_tiers(session, report, cases, ours)),
        (options.verify, "--verify-model", no_gpu, lambda: verify_model(session, report)),
        (options.train, "--train", no_torch, lambda: time_training(session, report)),
    ]
    for asked, name, why_not, part in parts:
        try:
            if asked and not why_not and not session.lost:
                part()
        except Exception as error:  # of any library: what was measured before is worth more than a traceback
            why_not = in_words(error)
        if asked and (why_not or session.lost):
            report.left_out.append(f"{name}: {why_not or session.lost}")


def time_tiers(session: Session, report: Report, cases: list[Case], ours: list[Implementation]) -> None:
    """Run ``--tiers all``."""
    assert isinstance(session.timer, GpuTimer)
    forced = [implementation.forced(tier) for implementation in ours for tier in TIERS]
    cold = replace(session.timer, regimes=("cold",))
    training = [case for case in cases if case.operation.training]
    session.run_cases(
        training, lambda case, tensors: measure(case, tensors, forced, cold, session.seconds), report.forced
    )
    texts, report.extra["crossovers"] = crossovers(report.results, report.forced, session.device)
    report.texts += texts


def verify_model(session: Session, report: Report) -> None:
    """Run ``--verify-model``."""
    text, report.extra["verification"] = verify(report.results, session.copy_bandwidth, session.device.l2_bytes)
    report.texts.append(text)


def time_training(session: Session, report: Report) -> None:
    """Run ``--train``."""
    from gpu_bn.bench.training import failures, train, training_table

    rows = train(session.kind, session.seconds, session.options.eager)
    report.failed += failures(rows)
    text, report.extra["training"] = training_table(rows, session.kind)
    report.texts.append(text)


# ------------------------------------------------------------------------------------------------------ outputs
def show(report: Report) -> None:
    """Print the report."""
    facts, width = report.machine, terminal_width()
    device, packages = describe(facts)
    print(f"gpu_bn {facts['gpu_bn']} ({facts['commit'] or 'no checkout'}), {device}\n{packages}")
    if facts["gpu"]:
        print(clocks(facts["gpu"]))
    notes = [*report.left_out, *report.warnings, *(f"FAILED {failure}" for failure in report.failed)]
    print(*notes, sep="\n", end="\n\n" if notes else "\n")
    for text in [*report.measured_texts(), *model_tables(report.modelled)]:
        if text:
            print(text.text(width) if isinstance(text, Table) else text)


def picture_caption(report: Report) -> str:
    """Return the machine and the threads of what the pictures show."""
    facts = report.machine
    threads = report.threads or facts["threads"]["numpy backend"]
    device = facts["gpu"]["name"] if facts["gpu"] else f"{facts['processor']}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, gpu_bn {facts['gpu_bn']}, {facts['date']}"


def write_pictures(report: Report, session: Session) -> None:
    """Write pictures and the page, and say which files there are."""
    options = session.options
    written = [options.out / "report.json"]
    if find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed; pip install -e '.[bench]' installs what it needs.")
    else:
        from gpu_bn.bench.figures import draw

        try:
            ceilings = {"a copy, beyond the caches": session.copy_bandwidth}
            if session.gpu is None:
                ceilings["a copy, in the cache"] = cpu_copy_bandwidth(CPU_CACHED_BYTES)
            results = [*report.summed_up, *report.forced]
            written += draw(results, ceilings, options.out, picture_caption(report))
        except Exception as error:  # of matplotlib
            print(f"No pictures: {in_words(error)}")
    if options.page is not None:
        from gpu_bn.bench.page import page

        options.page.write_text(page(report))
        written.append(options.page)
    print("Written:", ", ".join(str(path) for path in written))
