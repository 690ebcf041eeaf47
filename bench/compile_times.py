"""How many kernels CuPy has to compile for `gpu-bn check` and `gpu-bn bench`, and how long NVRTC takes for some.

Launches do nothing, so no GPU is needed. On a GPU, CuPy keeps compiled kernels in `~/.cupy/kernel_cache`.

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
    """Make the calls of `gpu-bn check`."""
    for case in cases:
        with np.errstate(all="ignore"):  # outputs hold any numbers, because launches do nothing
            testing.run(testing.build(case), "cupy")


def bench(cases: Iterable[Case]) -> None:
    """Make the calls of `gpu-bn bench`."""
    for case in cases:
        by_name("gpu_bn cupy").build(case.operation, Tensors(case).problem("cupy", case.operation))()


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=20, help="to compile")
    parser.add_argument("--arch", type=int, default=90, help="of the GPU")
    parser.add_argument("--quick", action="store_true", help="only count the kernels of gpu-bn check --quick")
    options = parser.parse_args()
    cupy_stand_in.install(options.arch)
    testing.ADAPTERS["cupy"] = testing.Adapter(cupy_stand_in.asarray, np.array)
    checked, needed = [*testing.cases(), *testing.extended_cases()], cupy_stand_in.KERNELS
    for command, call, cases in (
        ("gpu-bn check --quick", check, covering(checked)),
        ("gpu-bn check, more", check, checked),
        ("gpu-bn bench", bench, cases_of("cuda")),
    ):
        before = len(needed)
        call(cases)
        print(f"{command}: {len(needed) - before} kernels for sm_{options.arch}", flush=True)
        if options.quick:
            return
    from gpu_bn.backends.cupy.sources import OPTIONS

    compiler, seconds = nvrtc(), []
    flags = [f"--gpu-architecture=sm_{options.arch}", *OPTIONS, f"--include-path={cuda_headers()}"]
    for source, name in random.Random(0).sample(list(needed), min(options.kernels, len(needed))):
        start = time.perf_counter()
        compiler.compile(source, flags, {}, [name])
        seconds.append(time.perf_counter() - start)
    if seconds:
        timing = Timing.from_samples(seconds)
        spread = f"quartiles {timing.low:.2f} and {timing.high:.2f}, of {timing.samples}"
        print(f"NVRTC {'.'.join(map(str, compiler.version))}: {timing.median:.2f} s a kernel ({spread})")


if __name__ == "__main__":
    main()
