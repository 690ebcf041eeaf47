"""The command ``gpu-bn``: info, check, explain, warm-up, bench, demo."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from gpu_bn import __version__, registry
from gpu_bn.cli import values
from gpu_bn.cli.console import Table, microseconds, terminal_width
from gpu_bn.cli.values import CommandError, UsageError
from gpu_bn.explanation import DTYPES, MODEL, Direction, Explanation, explain
from gpu_bn.plan import DEVICES, THREADS

DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "threadpoolctl": "threadpoolctl"}
"""Modules of the extra ``demo``, and the packages that have them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; ``None`` is the process's own.

    Returns:
        The exit code: 0; 1 if a conformance case has failed, a benchmark's result is wrong, the command cannot run
        here or its results cannot be written; 2 if the arguments are wrong; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = "gpu-bn"
    commands = {
        "info": run_info, "check": run_check, "explain": run_explain, "warm-up": run_warm_up,
        "bench": run_bench, "demo": run_demo,
    }  # fmt: skip
    try:
        options = _parsed(arguments)
        options.line = shlex.join(["gpu-bn", *arguments])
        name = f"gpu-bn {options.command}"
        _check_stdout()
        values.check_environment()
        code = commands[options.command](options)
        sys.stdout.flush()
        return code
    except (CommandError, registry.BackendUnavailableError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "code", 1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of a pipe whose reader has read enough, or a full disk; what is left would fail at exit
        if not isinstance(error, BrokenPipeError):
            print(
                f"{name}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. A buffer stands for the output: argparse does not notice a full disk."""
    try:
        with redirect_stdout(StringIO()) as said:
            return parser().parse_args(arguments)
    except SystemExit:
        if said.getvalue():
            _check_stdout()
            print(said.getvalue(), end="", flush=True)
        raise


def _check_stdout() -> None:
    if sys.stdout is None:
        raise CommandError("standard output is closed")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    top = argparse.ArgumentParser(prog="gpu-bn", description="Batch normalisation, forward and backward.")
    top.add_argument("--version", action="version", version=f"gpu-bn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_info, _add_check, _add_explain, _add_warm_up, _add_bench, _add_demo):
        add(commands)
    return top


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = _add(
        commands,
        "info",
        "Print versions, devices, backends and why one is unavailable, and which versions of CUDA do not fit.",
    )
    info.add_argument("--json", type=Path, metavar="PATH", help="write it as JSON too")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = _add(
        commands,
        "check",
        "Run the conformance cases, forward and backward against a float64 oracle, on this machine's backends. "
        "Exit code 1 if one fails.",
    )
    check.add_argument("--backend", choices=registry.NAMES, help="only this one (default: all that are available)")
    check.add_argument("--quick", action="store_true", help="fewer cases, that still cover every option and dtype")
    check.add_argument(
        "--processes",
        type=values.positive,
        metavar="N",
        help="that compile for a GPU (default: one a core, up to 16)",
    )
    check.add_argument("--json", type=Path, metavar="PATH", help="write the results as JSON too")


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explain = _add(
        commands,
        "explain",
        "Print how the CUDA kernels would serve a training call, forward and backward, and why. No GPU is needed: "
        "times are a model.",
    )
    explain.add_argument(
        "--shape", type=values.shape, required=True, metavar="NxCx...", help="channels second, such as 32x64x56x56"
    )
    explain.add_argument(
        "--dtype", type=values.dtype, default="f32", metavar="NAME",
        help="f16, bf16, f32 or f64; float16 and so on too (default: f32)",
    )  # fmt: skip
    explain.add_argument(
        "--layout", type=values.layout, default="nchw", metavar="NAME",
        help="how the axes lie in memory: nchw, nhwc or nc (default: nchw)",
    )  # fmt: skip
    explain.add_argument(
        "--device", type=values.gpu, default="h100", metavar="NAME",
        help=f"one of {', '.join(DEVICES)}, or all for a table of them (default: h100)",
    )  # fmt: skip
    explain.add_argument("--residual", action="store_true", help="a tensor is added before the activation")
    explain.add_argument("--activation", metavar="NAME", help="such as relu (default: none)")


def _add_warm_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    warm = _add(
        commands,
        "warm-up",
        "Compile the kernels of common calls on a CPU into the cache, for images and CI. It is in $GPU_BN_CACHE_DIR, "
        "else in the user's cache folder; NAMES are separated by commas.",
    )
    warm.add_argument(
        "--dtype", type=values.several(values.dtype), default=["f32"], metavar="NAMES",
        help="of f16,bf16,f32,f64 (default: f32)",
    )  # fmt: skip
    warm.add_argument(
        "--activation", type=values.words, metavar="NAMES", help="such as relu,silu (default: identity,relu)"
    )


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = _add(
        commands,
        "bench",
        "Time batch norm against other libraries on this machine's GPU or CPU; print tables, write report.json "
        "and two pictures. Each result is compared with a float64 oracle before it is timed. Without a GPU, print "
        "what a model expects of five of them. Exit code 1 if ours are wrong. NAMES are separated by commas.",
    )
    bench.add_argument(
        "--shapes",
        type=values.shapes,
        metavar="NAMES",
        help="of few,resnet50-32,resnet50-256,mobilenetv2,unet2d,unet3d,mlp,tiny, and shapes such as 32x64x56x56",
    )
    bench.add_argument("--dtype", type=values.several(values.dtype), metavar="NAMES", help="of f16,bf16,f32,f64")
    bench.add_argument("--layout", type=values.several(values.layout), metavar="NAMES", help="of nchw,nhwc; nc")
    bench.add_argument(
        "--ops",
        type=values.words,
        metavar="NAMES",
        help="of forward,backward,eval, each also as in eval+relu and eval+add+relu",
    )
    bench.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    bench.add_argument(
        "--peers", type=values.words, metavar="NAMES", help="these alone, such as 'torch cuDNN,apex'; or none"
    )
    bench.add_argument(
        "--device", type=values.device, default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)"
    )
    bench.add_argument(
        "--seconds",
        type=values.not_negative,
        metavar="S",
        help="of samples for each call (default: 0.1 or on a CPU 0.3); 0: one",
    )
    bench.add_argument(
        "--threads",
        type=values.positive,
        metavar="N",
        help="of the NumPy backend and of torch on a CPU (default: one, then all)",
    )
    bench.add_argument("--tiers", choices=("all",), help="on a GPU, force every tier, and fit plan.py's thresholds")
    bench.add_argument(
        "--verify-model", action="store_true", help="on a GPU, compare times, and bytes if ncu may count, with the plan"
    )
    bench.add_argument("--train", action="store_true", help="time training steps of ResNet-18 too")
    bench.add_argument("--eager", action="store_true", help="leave torch.compile out of --train, which takes minutes")
    bench.add_argument("--out", type=Path, default=Path("bench-report"), metavar="FOLDER", help="default: %(default)s")
    bench.add_argument("--page", type=Path, metavar="PATH", help="write the report as Markdown too")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = _add(
        commands,
        "demo",
        "Train a network of two hidden layers on scikit-learn's digits without BN, with BN of fixed weight = 1 and "
        "bias = 0, and with BN's learned pair; print how loss, accuracy and the drift of what the second layer sees "
        "compare; check that BN can be the identity; draw a figure. Needs pip install -e '.[demo]'.",
    )
    demo.add_argument("--seeds", type=values.positive, default=5, metavar="N", help="runs of each network (default: 5)")
    demo.add_argument(
        "--steps", type=values.positive, default=800, metavar="N", help="training steps, in twenties (default: 800)"
    )
    demo.add_argument(
        "--rate",
        type=values.above_zero,
        default=3.0,
        metavar="R",
        help="learning rate (default: 3, which of 0.1, 0.3, 1, 3 and 10 is the best for the network without BN)",
    )
    demo.add_argument("--out", type=Path, default=Path("gpu-bn-demo.png"), metavar="PATH", help="default: %(default)s")
    demo.add_argument("--backend", choices=("numpy", "cupy"), help="default: cupy if it is available, else numpy")


def run_info(options: argparse.Namespace) -> int:
    """Run ``gpu-bn info``."""
    from gpu_bn.cli.info import as_json, facts, text

    if options.json is not None:
        values.check_file(options.json, "facts")
    found = facts()
    print(text(found))
    if options.json is not None:
        options.json.write_text(as_json(found))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Run ``gpu-bn check``."""
    from gpu_bn.cli.check import conformance

    if options.json is not None:
        values.check_file(options.json, "results")
    return 0 if conformance(options.backend, options.quick, options.processes, options.json) else 1


def run_explain(options: argparse.Namespace) -> int:
    """Run ``gpu-bn explain``."""

    def of(device: str) -> Explanation:
        return explain(
            options.shape, options.dtype, options.layout, device,
            activation=options.activation, residual=options.residual,
        )  # fmt: skip

    try:
        found = [of(name) for name in (DEVICES if options.device == "all" else [options.device])]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.device != "all":
        print(found[0])
        return 0
    sizes, times = ["grid", "vector", "shared", "moved/floor"], ["time (us)", "floor (us)"]
    header = ["device", "pass", "tier", "launches", *sizes, *times]
    rows = [_row(one, direction) for one in found for direction in ("forward", "backward")]
    print(Table(found[0].call, header, rows, MODEL, keys=2).text(terminal_width()), end="")
    return 0


def _row(explanation: Explanation, name: str) -> list[str]:
    """Return one direction's cells in a table of devices."""
    direction: Direction = getattr(explanation, name)
    plan = direction.plan
    return [
        explanation.device.name, name, direction.tier, str(plan.launches), f"{plan.grid} x {THREADS}",
        f"{plan.tiling.vector * direction.work.itemsize} bytes", f"{plan.shared_bytes}",
        f"{direction.moved_bytes / direction.floor_bytes:.2f}", microseconds(plan.seconds),
        microseconds(plan.floor_seconds),
    ]  # fmt: skip


def run_warm_up(options: argparse.Namespace) -> int:
    """Run ``gpu-bn warm-up``."""
    from gpu_bn.cli.warm_up import ACTIVATIONS, warm_up

    dtypes: dict[str, Any] = dict(DTYPES)
    if "bf16" in options.dtype:
        if find_spec("ml_dtypes") is None:
            raise CommandError("bf16 needs the package ml_dtypes: pip install ml_dtypes")
        dtypes["bf16"] = import_module("ml_dtypes").bfloat16
    try:
        print(warm_up([dtypes[name] for name in options.dtype], options.activation or ACTIVATIONS))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run ``gpu-bn bench``."""
    from gpu_bn.bench.run import Options, bench

    values.check_folder(options.out, "report")
    if options.page is not None and options.page.parent != options.out:  # which is made if it is not there
        values.check_file(options.page, "page")
    asked = Options(
        shapes=options.shapes, dtypes=options.dtype, layouts=options.layout, operations=options.ops, only=options.only,
        peers=[] if options.peers == ["none"] else options.peers, device=options.device, seconds=options.seconds,
        threads=options.threads,
        tiers=bool(options.tiers), verify=options.verify_model, train=options.train, eager=options.eager,
        out=options.out, page=options.page, command=options.line,
    )  # fmt: skip
    try:
        return 0 if bench(asked) else 1
    except ValueError as error:
        raise UsageError(str(error)) from None


def run_demo(options: argparse.Namespace) -> int:
    """Run ``gpu-bn demo``."""
    missing = [package for module, package in DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed; pip install -e '.[demo]' installs what it needs")
    values.check_picture(options.out)
    from gpu_bn.demo.run import Options, demo
    from gpu_bn.demo.training import EVERY

    if options.steps % EVERY:
        raise UsageError(f"--steps should be a multiple of {EVERY}, got {options.steps}")
    demo(Options(options.seeds, options.steps, options.rate, options.out, options.backend))
    return 0


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text)
