"""Run the benchmark: choose a device and cases, measure, and write the report."""

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
from gpu_bn.bench.report import Report, thread_warnings
from gpu_bn.bench.tiers import crossovers
from gpu_bn.bench.timing import CpuTimer, GpuTimer, Timer, describe_error
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
"""The default cases: those timed on each kind of device, and those modelled if there is no GPU."""
SECONDS = {"cpu": 0.3, "cuda": 0.1}
"""The default seconds of samples for each call and regime."""
CPU_COPIED_BYTES = 64 << 20
CPU_CACHED_BYTES = 128 << 10
"""Bytes of a copy that stays in the private cache of a core."""
MOST_DRIFT = 1.25
"""The largest ratio of a copy's bandwidths before and after the cases that counts as steady."""


def cases_of(kind: str, options: Namespace | None = None) -> list[Case]:
    """Return the cases for ``kind``, a key of :data:`DEFAULTS`; where an option is not given, its default is used."""
    given = vars(options) if options else {}
    shapes, dtypes, layouts, operations = (given.get(name) or default for name, default in DEFAULTS[kind].items())
    return select(shapes, dtypes, layouts, operations, given.get("only", ""))


def check_options(options: Namespace, cases: list[Case]) -> None:
    """Raise ``ValueError`` if the options make no sense here, ``CommandError`` if a package is missing."""
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
        kind: ``cpu`` or ``cuda``.
        why_not: why there is no GPU.
        seconds: the seconds of samples for each call and regime.
        threads: the numbers of threads with which each case is timed; ``None`` leaves the choice to the libraries.
        copy_bandwidth: the measured bandwidth of a copy on the device, in bytes per second.
        lost: the case after which the GPU failed, and the error; empty as long as it works.
    """

    def __init__(self, options: Namespace) -> None:
        """Find the device and measure a copy; raise ``CommandError`` if the GPU is missing or cannot be used."""
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
        except Exception as error:  # such as a driver's error, or memory that another process has taken
            device = gpu.device.name if gpu else "the CPU"
            raise CommandError(f"nothing can be copied on {device}: {describe_error(error)}") from error

    @property
    def no_torch(self) -> str:
        """The reason why torch cannot be timed on the device; empty if it can."""
        return "torch does not see the GPU" if self.gpu and self.gpu.library != "torch" else ""

    def copy(self) -> float:
        """Measure the bandwidth of a copy on the device, in bytes per second."""
        return self.gpu.copy_bandwidth() if self.gpu else cpu_copy_bandwidth(CPU_COPIED_BYTES)

    def run_cases(
        self, cases: list[Case], implementations: list[Implementation], timer: Timer, results: list[Result]
    ) -> None:
        """Check and time cases with each number of threads and append to ``results``; stop if a case breaks the GPU."""
        what = f"Timing {len(cases)} cases on the {'CPU' if self.gpu is None else 'GPU'}"
        least = len(cases) * len(self.threads) * (3 * self.seconds * len(timer.regimes) + 0.5)  # 0.5 s for the check
        with progress(what, len(cases), least) as advance:
            for _, group in groupby(cases, lambda case: case.tensor):
                members = list(group)
                tensors = Tensors(members[0])
                for case in members:
                    for threads in self.threads:
                        with use_threads(threads):
                            measured = measure(case, tensors, implementations, timer, self.seconds)
                        results += [replace(result, threads=threads) for result in measured]
                    advance(1)
                    try:
                        if self.gpu is not None:  # after an access out of bounds all later calls fail
                            self.gpu.synchronize()
                    except Exception as error:
                        self.lost = f"the GPU has not answered since {case}: {describe_error(error)}"
                        return
                del tensors
                if self.gpu is not None:
                    self.gpu.free()

    def compare_copies(self, facts: dict[str, Any]) -> list[str]:
        """Measure the copy again, note it in ``facts``, and return a warning if it differs much from the first one."""
        if not self.seconds:
            return []
        facts["copy_bandwidth_after"] = now = self.copy()
        if 1 / MOST_DRIFT <= now / self.copy_bandwidth <= MOST_DRIFT:
            return []
        before, after = (three_digits(bandwidth / 1e9) for bandwidth in (self.copy_bandwidth, now))
        return [
            f"UNSTEADY: a copy had {before} GB/s before and {after} GB/s after the cases: the machine was busy with "
            "something else, and no time here should be trusted."
        ]


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Set the number of threads of our CPU backends and of torch within the context; ``None`` changes nothing."""
    modules = ["gpu_bn", "torch"] if find_spec("torch") is not None else ["gpu_bn"]
    with ExitStack() as restore:
        for module in map(importlib.import_module, modules if threads else []):
            restore.callback(module.set_num_threads, module.get_num_threads())
            module.set_num_threads(threads)
        yield


def bench(options: Namespace) -> bool:
    """Run the benchmark, print and write the report; return whether all our results are correct.

    Raises:
        CommandError: the benchmark cannot run here.
        ValueError: the options make no sense.
        KeyboardInterrupt: it was interrupted, after the report of what was measured has been written.
    """
    session = Session(options)
    chosen, left_out = choose(session.kind, options.peers, torch_sees_it=not session.no_torch)
    cases = cases_of(session.kind, options)
    modelled = [] if session.gpu else model(cases_of("model", options))
    check_options(options, cases)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine(session.gpu, session.copy_bandwidth)
    report = Report(options.line, facts, left_out=left_out, modelled=modelled)
    if session.gpu is None and options.device == "auto":
        report.left_out.append(f"No GPU was timed: {session.why_not}.")
    try:
        session.run_cases(cases, chosen, session.timer, report.results)
        further_parts(options, session, report, cases, [each for each in chosen if each.ours])
        if not session.lost:
            report.warnings += [*thread_warnings(report.results), *session.compare_copies(facts)]
    except KeyboardInterrupt:
        report.failed.append("interrupted: the report is of what was measured until then")
        raise
    finally:  # keep the measurements of a rented GPU
        report.failed += [session.lost] if session.lost else []
        if session.gpu is not None:
            facts["gpu"]["after"] = smi(session.gpu.smi_id)  # lower clocks than before show that the GPU slowed down
        report.write(options.out / "report.json")  # before printing, which may fail
        report.show()
        write_pictures(options, session, report)
    wrong = any(result.ours and result.refused for result in [*report.results, *report.forced])
    return not (wrong or report.failed)


# ------------------------------------------------------------------------------------------------ further parts
def further_parts(
    options: Namespace, session: Session, report: Report, cases: list[Case], ours: list[Implementation]
) -> None:
    """Run the parts that the options ask for on the timed ``cases``; a part that fails is left out of the report."""
    no_gpu = f"needs a GPU: {session.why_not}" if session.gpu is None else ""

    def time_tiers() -> tuple[list[Table | str], Any]:
        assert isinstance(session.timer, GpuTimer)
        forced = [implementation.forced(tier) for implementation in ours for tier in TIERS]
        timer = replace(session.timer, regimes=("cold",))
        training = [case for case in cases if case.operation.training]
        session.run_cases(training, forced, timer, report.forced)
        # with this bandwidth, the planner predicts the measured time for a copy
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

    for wanted, flag, why_not, name, part in (
        (options.tiers, "--tiers", no_gpu, "crossovers", time_tiers),
        (options.verify_model, "--verify-model", no_gpu, "verification", verify_model),
        (options.train, "--train", session.no_torch, "training", time_training),
    ):
        if not wanted:
            continue
        try:
            if not why_not and not session.lost:
                texts, report.extra[name] = part()
                report.texts += texts
        except Exception as error:  # any library may raise; the report of the earlier parts is still written
            why_not = describe_error(error)
        if why_not or session.lost:
            report.left_out.append(f"{flag}: {why_not or session.lost}")


def write_pictures(options: Namespace, session: Session, report: Report) -> None:
    """Write the pictures and the page, and print the paths of all written files."""
    written = [options.out / "report.json"]
    if find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed; pip install -e '.[bench]' installs what it needs.")
    else:
        from gpu_bn.bench import figures

        try:
            ceilings = {"a copy, beyond the caches": session.copy_bandwidth}
            if session.gpu is None:
                ceilings["a copy, in the cache"] = cpu_copy_bandwidth(CPU_CACHED_BYTES)
            results = [*report.drawn, *report.forced]
            written += figures.draw(results, ceilings, options.out, report.caption)
        except Exception as error:  # matplotlib raises errors of many types
            print(f"No pictures: {describe_error(error)}")
    if options.page is not None:
        options.page.write_text(report.page())
        written.append(options.page)
    print("Written:", ", ".join(str(path) for path in written))
