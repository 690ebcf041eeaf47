"""How many kernels CuPy has to compile for `gpu-bn check` and `gpu-bn bench`, and how long NVRTC takes for some.

Launches do nothing, so no GPU is needed. What CuPy has compiled it keeps in `~/.cupy/kernel_cache`.

    python bench/compile_times.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import cupy_stand_in
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from emulator.nvrtc import cuda_headers, nvrtc

from gpu_bn import testing
from gpu_bn.bench.cases import Case
from gpu_bn.bench.implementations import by_name
from gpu_bn.bench.measurement import Tensors
from gpu_bn.bench.run import cases_of
from gpu_bn.bench.timing import Timing
from gpu_bn.cli.check import covering


def check(cases: Iterable[testing.Case]) -> None:
    """Call what `gpu-bn check` calls."""
    for case in cases:
        with np.errstate(all="ignore"):  # launches that do nothing leave what was there
            testing.run(testing.build(case), "cupy")


def bench(cases: Iterable[Case]) -> None:
    """Call what `gpu-bn bench` calls."""
    for case in cases:
        by_name("gpu_bn cupy").build(case.operation, Tensors(case).of("cupy", case.operation))()


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=20, help="to compile")
    parser.add_argument("--arch", type=int, default=90, help="of the GPU")
    options = parser.parse_args()
    cupy_stand_in.install(options.arch)
    testing.ADAPTERS["cupy"] = testing.Adapter(cupy_stand_in.asarray, np.array)
    every, needed = [*testing.cases(), *testing.extended_cases()], cupy_stand_in.KERNELS
    for command, call, cases in (
        ("gpu-bn check --quick", check, covering(every)),
        ("gpu-bn check, more", check, every),
        ("gpu-bn bench", bench, cases_of("cuda")),
    ):
        before = len(needed)
        call(cases)
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


if __name__ == "__main__":
    main()
