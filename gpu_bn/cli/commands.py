"""The subcommands of ``gpu-bn`` and their arguments: info, check, explain, warm-up, bench, demo."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

from gpu_bn import __version__, registry
from gpu_bn.bench.cases import NETWORKS, OPERATIONS
from gpu_bn.cli import values
from gpu_bn.cli.console import Table, microseconds, terminal_width
from gpu_bn.cli.values import CommandError, UsageError
from gpu_bn.explanation import DTYPES, MODEL, Direction, Explanation, explain
from gpu_bn.plan import DEVICES, THREADS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "threadpoolctl": "threadpoolctl"}
"""The modules that ``gpu-bn demo`` needs, and the packages that contain them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; ``None`` stands for the arguments of the process.

    Returns:
        The exit code: 0; 1 if a conformance case has failed, a benchmark's result is wrong, the command cannot run
        here or its results cannot be written; 2 if the arguments are wrong; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = "gpu-bn"
    try:
        options = _parse(arguments)
        options.line = shlex.join(["gpu-bn", *arguments])
        name = f"gpu-bn {options.command}"
        _check_stdout()
        values.check_environment()
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except (CommandError, registry.BackendUnavailableError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "code", 1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a closed pipe or a full disk; writing the rest at exit would fail again
        if not isinstance(error, BrokenPipeError):
            print(
                f"{name}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Print the help through a buffer, as argparse ignores errors such as a full disk."""
    try:
        with redirect_stdout(StringIO()) as output:
            return parser().parse_args(arguments)
    except SystemExit:
        if output.getvalue():
            _check_stdout()
            print(output.getvalue(), end="", flush=True)
        raise


def _check_stdout() -> None:
    if sys.stdout is None:
        raise CommandError("standard output is closed")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    top = argparse.ArgumentParser(prog="gpu-bn", description="Batch normalisation, forward and backward.")
    top.add_argument("--version", action="version", version=f"gpu-bn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_info, _add_check, _add_explain, _add_warm_up, _add_bench, _add_demo):
        add(commands)
    return top


def _add_info(commands: Commands) -> None:
    info = _add(commands, "info", run_info)
    _value(info, "--json", Path, "PATH", "write the facts as JSON too")


def _add_check(commands: Commands) -> None:
    check = _add(commands, "check", run_check)
    check.add_argument("--backend", choices=registry.NAMES, help="check only this one (default: all available ones)")
    check.add_argument("--quick", action="store_true", help="run fewer cases, which still cover all options and dtypes")
    processes = "number of cases that run side by side on a GPU (default: one for each core, up to 16)"
    _value(check, "--processes", values.positive, "N", processes)
    _value(check, "--json", Path, "PATH", "write the results as JSON too")


def _add_explain(commands: Commands) -> None:
    explain = _add(commands, "explain", run_explain)
    shape, dtype = "channels second, such as 32x64x56x56", "f16, bf16, f32, f64 or a full name (default: f32)"
    layout = "order of the axes in memory: nchw, nhwc or nc (default: nchw)"
    device = f"one of {', '.join(DEVICES)}, or all for a table (default: h100)"
    _value(explain, "--shape", values.shape, "NxCx...", shape, required=True)
    _value(explain, "--dtype", values.dtype, "NAME", dtype, default="f32")
    _value(explain, "--layout", values.layout, "NAME", layout, default="nchw")
    _value(explain, "--device", values.gpu, "NAME", device, default="h100")
    explain.add_argument("--residual", action="store_true", help="add a tensor before the activation")
    _value(explain, "--activation", str, "NAME", "such as relu (default: none)")


def _add_warm_up(commands: Commands) -> None:
    warm = _add(commands, "warm-up", run_warm_up)
    dtypes = values.several(values.dtype)
    _value(warm, "--dtype", dtypes, "NAMES", "some of f16,bf16,f32,f64 (default: f32)", default=["f32"])
    _value(warm, "--activation", values.words, "NAMES", "such as relu,silu (default: identity,relu)")


def _add_bench(commands: Commands) -> None:
    bench = _add(commands, "bench", run_bench)
    shapes = f"some of {','.join(NETWORKS)}, and shapes such as 32x64x56x56"
    operations = "some of forward,backward,eval, each also with +relu or +add+relu, as in eval+add+relu"
    _value(bench, "--shapes", values.shapes, "NAMES", shapes)
    _value(bench, "--dtype", values.several(values.dtype), "NAMES", "some of f16,bf16,f32,f64")
    _value(bench, "--layout", values.several(values.layout), "NAMES", "some of nchw,nhwc, or nc for 2 axes")
    _value(bench, "--ops", values.several(values.one_of("operation", OPERATIONS)), "NAMES", operations)
    _value(bench, "--only", str, "TEXT", "time only cases whose name contains this", default="")
    _value(bench, "--peers", values.words, "NAMES", "compare with these only, such as 'torch cuDNN,apex', or with none")
    _value(bench, "--device", values.device, "NAME", "auto, cpu or cuda (default: auto)", default="auto")
    seconds = "seconds of samples for each call (default: 0.1, on a CPU 0.3); 0: one sample"
    _value(bench, "--seconds", values.not_negative, "S", seconds)
    threads = "number of threads of the NumPy backend and of torch on a CPU (default: one, then all)"
    _value(bench, "--threads", values.positive, "N", threads)
    tiers = "on a GPU, time every tier and fit the thresholds of the plan"
    bench.add_argument("--tiers", choices=("all",), help=tiers)
    model = "on a GPU, compare the plan with measured times, and with bytes if ncu may count them"
    bench.add_argument("--verify-model", action="store_true", help=model)
    bench.add_argument("--train", action="store_true", help="time training steps of ResNet-18 too")
    bench.add_argument("--eager", action="store_true", help="leave torch.compile, which takes minutes, out of --train")
    _value(bench, "--out", Path, "FOLDER", "default: %(default)s", default=Path("bench-report"))
    _value(bench, "--page", Path, "PATH", "write the report as Markdown too")


def _add_demo(commands: Commands) -> None:
    demo = _add(commands, "demo", run_demo)
    rate = "learning rate (default: 3, the best of 0.1, 0.3, 1, 3 and 10 for the network without BN)"
    _value(demo, "--seeds", values.positive, "N", "runs of each network (default: 5)", default=5)
    _value(demo, "--steps", values.positive, "N", "training steps, a multiple of 20 (default: 800)", default=800)
    _value(demo, "--rate", values.above_zero, "R", rate, default=3.0)
    _value(demo, "--out", Path, "PATH", "default: %(default)s", default=Path("gpu-bn-demo.png"))
    demo.add_argument("--backend", choices=("numpy", "cupy"), help="default: cupy if it is available, else numpy")


def run_info(options: argparse.Namespace) -> int:
    """Print versions, devices, backends and why one is unavailable, and which versions of CUDA do not fit."""
    from gpu_bn.cli.info import Facts

    values.check_file(options.json, "facts")
    facts = Facts()
    print(facts)
    if options.json is not None:
        options.json.write_text(facts.as_json())
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Run the conformance cases on this machine's backends and compare forward and backward with a float64 oracle. The
    exit code is 1 if a case fails.
    """
    from gpu_bn.cli.check import conformance

    values.check_file(options.json, "results")
    return 0 if conformance(options.backend, options.quick, options.processes, options.json) else 1


def run_explain(options: argparse.Namespace) -> int:
    """Print how the CUDA kernels would serve a training call, forward and backward, and why. No GPU is needed: times
    come from a model.
    """
    devices = DEVICES if options.device == "all" else [options.device]
    call = {"activation": options.activation, "residual": options.residual}
    try:
        plans = [explain(options.shape, options.dtype, options.layout, device, **call) for device in devices]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.device != "all":
        print(plans[0])
        return 0
    rows = [_columns(plan, direction) for plan in plans for direction in ("forward", "backward")]
    table = Table(plans[0].call, list(rows[0]), [list(row.values()) for row in rows], MODEL, keys=2)
    print(table.text(terminal_width()), end="")
    return 0


def _columns(explanation: Explanation, name: str) -> dict[str, str]:
    """Return the cells of a pass, ``"forward"`` or ``"backward"``, in the table of devices, by the column's name."""
    direction: Direction = getattr(explanation, name)
    plan = direction.plan
    return {
        "device": explanation.device.name, "pass": name, "tier": direction.tier, "launches": str(plan.launches),
        "grid": f"{plan.grid} x {THREADS}", "vector": f"{plan.tiling.vector * direction.work.itemsize} bytes",
        "shared": str(plan.shared_bytes), "moved/floor": f"{direction.moved_bytes / direction.floor_bytes:.2f}",
        "time (us)": microseconds(plan.seconds), "floor (us)": microseconds(plan.floor_seconds),
    }  # fmt: skip


def run_warm_up(options: argparse.Namespace) -> int:
    """Compile the kernels of common calls on a CPU into the cache, for images and CI. The cache is the folder
    $GPU_BN_CACHE_DIR, or else it is in the user's cache folder. NAMES are separated by commas.
    """
    from gpu_bn.cli.warm_up import ACTIVATIONS, warm_up
    from gpu_bn.testing.cases import numpy_dtype

    if "bf16" in options.dtype and find_spec("ml_dtypes") is None:
        raise CommandError("bf16 needs the package ml_dtypes: pip install ml_dtypes")
    try:
        dtypes = [numpy_dtype(DTYPES[name]) for name in options.dtype]
        print(warm_up(dtypes, options.activation or ACTIVATIONS))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Time batch norm against other libraries on this machine's GPU or CPU; print tables, write report.json and two
    pictures. Each result is compared with a float64 oracle before it is timed. Without a GPU, print the times that a
    model predicts for five GPUs. The exit code is 1 if a result of gpu_bn is wrong. NAMES are separated by commas.
    """
    from gpu_bn.bench.run import bench

    values.check_folder(options.out, "report")
    if options.page is not None and options.page.parent != options.out:  # the benchmark creates options.out
        values.check_file(options.page, "page")
    options.peers = [] if options.peers == ["none"] else options.peers
    try:
        return 0 if bench(options) else 1
    except ValueError as error:
        raise UsageError(str(error)) from None


def run_demo(options: argparse.Namespace) -> int:
    """Train a network of two hidden layers on scikit-learn's digits without BN, with BN of weight = 1 and bias = 0, and
    with BN of learned weight and bias; compare loss, accuracy and the drift of the second layer's input; check that BN
    can be the identity; draw a figure. Needs pip install -e '.[demo]'.
    """
    missing = [package for module, package in DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed; pip install -e '.[demo]' installs what it needs")
    values.check_picture(options.out)
    from gpu_bn.demo.run import demo
    from gpu_bn.demo.training import EVERY

    if options.steps % EVERY:
        raise UsageError(f"--steps should be a multiple of {EVERY}, got {options.steps}")
    demo(options)
    return 0


def _add(commands: Commands, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add a command. The docstring of ``run`` is its help."""
    text = " ".join((run.__doc__ or "").split())
    command = commands.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text)
    command.set_defaults(run=run)
    return command


def _value(
    command: argparse.ArgumentParser, flag: str, parse: Callable[[str], Any], metavar: str, text: str, **others: Any
) -> None:
    """Add an option that takes a value."""
    command.add_argument(flag, type=parse, metavar=metavar, help=text, **others)
