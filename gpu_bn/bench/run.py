"""The benchmark: it chooses cases and a device, measures, and writes the report."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from typing import Any

from gpu_bn import get_num_threads
from gpu_bn.bench import timing
from gpu_bn.bench.cases import Case, select
from gpu_bn.bench.implementations import Implementation, choose
from gpu_bn.bench.machine import cpu_copy_bandwidth, machine, smi
from gpu_bn.bench.measurement import Result, Tensors, measure
from gpu_bn.bench.model import model
from gpu_bn.bench.report import Report, slower_with_threads
from gpu_bn.bench.tiers import crossovers
from gpu_bn.bench.timing import CpuTimer, GpuTimer, Timer, in_words
from gpu_bn.bench.verify import verify
from gpu_bn.cli.console import Table, progress, three_digits
from gpu_bn.cli.info import cores
from gpu_bn.cli.values import CommandError
from gpu_bn.plan import THRESHOLDS, TIERS

FEW_OPERATIONS = ("forward", "forward+relu", "backward", "backward+add+relu", "eval")
DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"shapes": ("few",), "dtype": ("f32",), "layout": ("nchw",), "ops": FEW_OPERATIONS},
    "cuda": {
        "shapes": ("few", "resnet50-32"), "dtype": ("f16",), "layout": ("nchw", "nhwc"), "ops": FEW_OPERATIONS,
    },
    "model": {
        "shapes": ("32x64x112x112", "32x64x56x56", "32x256x14x14", "32x512x7x7", "256x1024"), "dtype": ("f16",),
        "layout": ("nchw", "nhwc"), "ops": ("forward+relu", "backward", "backward+add+relu"),
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


def cases_of(kind: str, options: Namespace | None = None) -> list[Case]:
    """Return the cases for a kind of device, a key of :data:`DEFAULTS`: those that the user asks for, or the usual."""
    asked = vars(options) if options else {}
    shapes, dtypes, layouts, operations = (asked.get(name) or usual for name, usual in DEFAULTS[kind].items())
    return select(shapes, dtypes, layouts, operations, asked.get("only", ""))


def check(options: Namespace, cases: list[Case]) -> None:
    """Check that the cases for the device can be run; raise ``ValueError``, or ``CommandError`` without a package."""
    if not cases:
        raise ValueError("no case is left by --shapes, --dtype, --layout, --ops and --only")
    if options.threads is not None and options.threads > cores():
        raise ValueError(f"--threads: this process has {cores()} cores, got {options.threads}")
    if any(case.dtype == "bfloat16" for case in cases) and find_spec("ml_dtypes") is None:
        raise CommandError("bf16 needs ml_dtypes: pip install -e '.[bench]'")
    if options.train and find_spec("torch") is None:
        raise CommandError("--train needs torch: pip install -e '.[bench]'")


class Session:
    """A device, and how calls are timed on it.

    Attributes:
        kind: the device's, a key of :data:`DEFAULTS`.
        why_not: why there is no GPU.
        seconds: of samples for each call and regime.
        threads: the numbers of threads that each case is timed with; ``None`` is what the libraries choose.
        copy_bandwidth: that of a copy on the device, measured, in bytes per second.
        lost: since when and why the GPU does not answer any more; empty while it does.
    """

    def __init__(self, options: Namespace) -> None:
        """Find the device and measure a copy on it; raise ``CommandError`` if the GPU is missing or cannot be used."""
        gpu, self.why_not = (None, "the CPU was asked for") if options.device == "cpu" else timing.find_gpu()
        if gpu is None and options.device == "cuda":
            raise CommandError(f"--device cuda needs a GPU: {self.why_not}")
        self.gpu, self.kind, self.lost = gpu, "cuda" if gpu else "cpu", ""
        self.seconds: float = SECONDS[self.kind] if options.seconds is None else options.seconds
        self.timer: Timer = GpuTimer(gpu) if gpu else CpuTimer() if self.seconds else CpuTimer(batch=0, pause=0)
        both = gpu is None and self.seconds and not options.threads
        self.threads: list[int | None] = [*sorted({1, get_num_threads()})] if both else [options.threads]
        try:
            self.copy_bandwidth = self.copy()
        except Exception as error:  # a driver's error, or another process has taken the memory
            what = gpu.device.name if gpu else "the CPU"
            raise CommandError(f"nothing can be copied on {what}: {in_words(error)}") from error

    @property
    def no_torch(self) -> str:
        """Why torch cannot be timed on the device."""
        return "torch does not see the GPU" if self.gpu and self.gpu.library != "torch" else ""

    def copy(self) -> float:
        """Measure the bandwidth of a copy on the device."""
        return self.gpu.copy_bandwidth() if self.gpu else cpu_copy_bandwidth(CPU_COPIED_BYTES)

    def run_cases(
        self, cases: list[Case], implementations: list[Implementation], timer: Timer, results: list[Result]
    ) -> None:
        """Check and time cases with each number of threads, up to one that breaks the GPU; add to ``results``."""
        what = f"Timing {len(cases)} cases on the {'CPU' if self.gpu is None else 'GPU'}"
        least = len(cases) * len(self.threads) * (3 * self.seconds * len(timer.regimes) + 0.5)  # 0.5 s for the check
        with progress(what, len(cases), least) as advance:
            for _, group in groupby(cases, lambda case: case.tensor):
                members = list(group)
                tensors = Tensors(members[0])
                for case in members:
                    for threads in self.threads:
                        with use_threads(threads):
                            found = measure(case, tensors, implementations, timer, self.seconds)
                        results += [replace(result, threads=threads) for result in found]
                    advance(1)
                    try:
                        if self.gpu is not None:  # after an access out of bounds every later call fails
                            self.gpu.synchronize()
                    except Exception as error:
                        self.lost = f"the GPU does not answer since {case}: {in_words(error)}"
                        return
                del tensors
                if self.gpu is not None:
                    self.gpu.free()

    def compare_copies(self, facts: dict[str, Any]) -> list[str]:
        """Measure the copy again, and return a warning if it differs from that at the start."""
        if not self.seconds:
            return []
        facts["copy_bandwidth_after"] = now = self.copy()
        if 1 / MOST_MOVED <= now / self.copy_bandwidth <= MOST_MOVED:
            return []
        before, after = (three_digits(bandwidth / 1e9) for bandwidth in (self.copy_bandwidth, now))
        return [
            f"UNSTEADY: a copy had {before} GB/s before and {after} GB/s after the cases: the machine was busy with "
            "something else, and no time here should be trusted."
        ]


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Give our CPU backends and torch so many threads; ``None`` leaves them as they are."""
    modules = ["gpu_bn", "torch"] if find_spec("torch") is not None else ["gpu_bn"]
    with ExitStack() as restore:
        for module in map(importlib.import_module, modules if threads else []):
            restore.callback(module.set_num_threads, module.get_num_threads())
            module.set_num_threads(threads)
        yield


def bench(options: Namespace) -> bool:
    """Run the benchmark, print and write the report; return whether all results of ours were right.

    Raises:
        CommandError: it cannot run here.
        ValueError: the options make no sense.
        KeyboardInterrupt: it was interrupted; the report has what was measured until then.
    """
    session = Session(options)
    chosen, left_out = choose(session.kind, options.peers, torch_sees_it=not session.no_torch)
    cases = cases_of(session.kind, options)
    modelled = [] if session.gpu else model(cases_of("model", options))
    check(options, cases)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine(session.gpu, session.copy_bandwidth)
    report = Report(options.line, facts, left_out=left_out, modelled=modelled)
    if session.gpu is None and options.device == "auto":
        report.left_out.append(f"No GPU was timed: {session.why_not}.")
    try:
        session.run_cases(cases, chosen, session.timer, report.results)
        further_parts(options, session, report, cases, [each for each in chosen if each.ours])
        if not session.lost:
            report.warnings += [*slower_with_threads(report.results), *session.compare_copies(facts)]
    except KeyboardInterrupt:
        report.failed.append("interrupted: the report is of what was measured until then")
        raise
    finally:  # what was measured on a rented GPU is worth keeping
        report.failed += [session.lost] if session.lost else []
        if session.gpu is not None:
            facts["gpu"]["after"] = smi(session.gpu.smi_id)  # lower clocks than before show a GPU that slowed down
        report.write(options.out / "report.json")  # before printing, which may fail
        report.show()
        write_pictures(options, session, report)
    wrong = any(result.ours and result.refused for result in [*report.results, *report.forced])
    return not (wrong or report.failed)


# ------------------------------------------------------------------------------------------------ further parts
def further_parts(
    options: Namespace, session: Session, report: Report, cases: list[Case], ours: list[Implementation]
) -> None:
    """Run the parts that were asked for, on the ``cases`` that were timed. One that fails is left out."""
    no_gpu = f"needs a GPU: {session.why_not}" if session.gpu is None else ""

    def time_tiers() -> tuple[list[Table | str], Any]:
        assert isinstance(session.timer, GpuTimer)
        forced = [implementation.forced(tier) for implementation in ours for tier in TIERS]
        timer = replace(session.timer, regimes=("cold",))
        training = [case for case in cases if case.operation.training]
        session.run_cases(training, forced, timer, report.forced)
        # With this bandwidth the planner's copy takes the measured time.
        device = replace(session.timer.gpu.device, bandwidth=session.copy_bandwidth / THRESHOLDS.copy_share)
        return crossovers(report.results, report.forced, device)

    def verify_model() -> tuple[list[Table | str], Any]:
        assert session.gpu is not None
        return verify(report.results, session.copy_bandwidth, session.gpu.device.l2_bytes)

    def time_training() -> tuple[list[Table | str], Any]:
        from gpu_bn.bench.training import failures, train, training_table

        with use_threads(options.threads):
            rows = train(session.kind, session.seconds, options.eager)
        report.failed += failures(rows)
        return [training_table(rows, session.kind)], rows

    for asked, flag, why_not, name, part in (
        (options.tiers, "--tiers", no_gpu, "crossovers", time_tiers),
        (options.verify_model, "--verify-model", no_gpu, "verification", verify_model),
        (options.train, "--train", session.no_torch, "training", time_training),
    ):
        if not asked:
            continue
        try:
            if not why_not and not session.lost:
                texts, report.extra[name] = part()
                report.texts += texts
        except Exception as error:  # any library may raise; what was measured before is worth more than a traceback
            why_not = in_words(error)
        if why_not or session.lost:
            report.left_out.append(f"{flag}: {why_not or session.lost}")


def write_pictures(options: Namespace, session: Session, report: Report) -> None:
    """Write pictures and the page, and say which files there are."""
    written = [options.out / "report.json"]
    if find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed; pip install -e '.[bench]' installs what it needs.")
    else:
        from gpu_bn.bench import figures

        try:
            ceilings = {"a copy, beyond the caches": session.copy_bandwidth}
            if session.gpu is None:
                ceilings["a copy, in the cache"] = cpu_copy_bandwidth(CPU_CACHED_BYTES)
            results = [*report.summed_up, *report.forced]
            written += figures.draw(results, ceilings, options.out, report.caption)
        except Exception as error:  # matplotlib raises errors of many types
            print(f"No pictures: {in_words(error)}")
    if options.page is not None:
        options.page.write_text(report.page())
        written.append(options.page)
    print("Written:", ", ".join(str(path) for path in written))
