"""How many kernels CuPy has to compile for `gpu-bn check` and `gpu-bn bench`, and how long NVRTC takes for some.

Launches do nothing, so no GPU is needed. What CuPy has compiled it keeps in `~/.cupy/kernel_cache`.

    python bench/compile_times.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cupy_stand_in
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from emulator.compile import cuda_headers, nvrtc

from gpu_bn import testing
from gpu_bn.bench.cases import Case
from gpu_bn.bench.implementations import by_name
from gpu_bn.bench.measurement import Tensors
from gpu_bn.bench.run import Options
from gpu_bn.bench.timing import Timing
from gpu_bn.cli.check import covering


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=20, help="to compile")
    parser.add_argument("--arch", type=int, default=90, help="of the GPU")
    options = parser.parse_args()
    cupy_stand_in.install(options.arch)
    testing.ADAPTERS["cupy"] = testing.Adapter(cupy_stand_in.asarray, np.array)
    every = [*testing.cases(), *testing.extended_cases()]
    commands: dict[str, Callable[[], None]] = {
        "gpu-bn check --quick": lambda: check(covering(every)),
        "gpu-bn check, more": lambda: check(every),
        "gpu-bn bench": lambda: bench(Options().cases("cuda")),
    }
    needed = cupy_stand_in.KERNELS
    for command, call in commands.items():
        before = len(needed)
        call()
        print(f"{command}: {len(needed) - before} kernels for sm_{options.arch}", flush=True)
    from gpu_bn.backends.cupy.sources import OPTIONS

    compiler, seconds = nvrtc(), []
    flags = [f"--gpu-architecture=sm_{options.arch}", *OPTIONS, f"--include-path={cuda_headers()}"]
    for source, name in random.Random(0).sample(list(needed), min(options.kernels, len(needed))):
        start = time.perf_counter()
        compiler.compile(source, flags, {}, [name])
        seconds.append(time.perf_counter() - start)
    if seconds:
        taken = Timing.of(seconds)
        spread = f"quartiles {taken.low:.2f} and {taken.high:.2f}, of {taken.samples}"
        print(f"NVRTC {'.'.join(map(str, compiler.version))}: {taken.median:.2f} s a kernel ({spread})")


def check(cases: Iterable[testing.Case]) -> None:
    """Call what `gpu-bn check` calls."""
    for case in cases:
        with np.errstate(all="ignore"):  # launches that do nothing leave what was there
            testing.run(testing.build(case), "cupy")


def bench(cases: Iterable[Case]) -> None:
    """Call what `gpu-bn bench` calls."""
    implementation = by_name("gpu_bn cupy")
    for case in cases:
        implementation.build(case.operation, Tensors(case).of("cupy", case.operation))()


if __name__ == "__main__":
    main()
