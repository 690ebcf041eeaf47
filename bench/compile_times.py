"""How many kernels CuPy has to compile for `gpu-bn check` and `gpu-bn bench`, and how long NVRTC takes for some.

Launches do nothing, so no GPU is needed. What CuPy has compiled it keeps in `~/.cupy/kernel_cache`.

    python bench/compile_times.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from emulator import Device
from emulator.compile import cuda_headers, nvrtc
from support import fake_cupy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=20, help="to compile")
    parser.add_argument("--arch", type=int, default=90, help="of the GPU")
    options = parser.parse_args()
    gpu = without_kernels(options.arch)
    sys.modules["cupy"] = gpu.module()
    sys.modules["cupy"].empty = lambda shape, dtype=np.float64: np.empty(shape, dtype).view(fake_cupy.ndarray)

    from gpu_bn import testing
    from gpu_bn.backends.cupy import device
    from gpu_bn.backends.cupy import sources as cuda_sources
    from gpu_bn.bench.run import Options
    from gpu_bn.cli.check import covering

    needed: dict[tuple[str, str], None] = {}
    make = device._module

    def noting(activation: str, name: str) -> object:
        needed[activation, name] = None
        return make(activation, name)

    device._module = noting
    testing.ADAPTERS["cupy"] = testing.Adapter(gpu.asarray, np.array)
    every = [*testing.cases(), *testing.extended_cases()]
    for command, call, cases in (
        ("gpu-bn check --quick", check, covering(every)),
        ("gpu-bn check, more", check, every),
        ("gpu-bn bench", bench, Options().cases("cuda")),
    ):
        before = len(needed)
        call(cases)
        print(f"{command}: {len(needed) - before} kernels for sm_{options.arch}", flush=True)
    compiler, seconds = nvrtc(), []
    headers = [f"--include-path={cuda_headers()}"]
    for activation, name in random.Random(0).sample(list(needed), min(options.kernels, len(needed))):
        start = time.perf_counter()
        flags = [f"--gpu-architecture=sm_{options.arch}", *cuda_sources.OPTIONS, *headers]
        compiler.compile(cuda_sources.source(activation), flags, {}, [name])
        seconds.append(time.perf_counter() - start)
    if seconds:
        low, median, high = statistics.quantiles(seconds, n=4) if seconds[1:] else seconds * 3
        spread = f"quartiles {low:.2f} and {high:.2f}, of {len(seconds)}"
        print(f"NVRTC {'.'.join(map(str, compiler.version))}: {median:.2f} s a kernel ({spread})")


def without_kernels(arch: int) -> fake_cupy.EmulatedGpu:
    """An emulated GPU whose kernels do nothing and need no compiler."""
    gpu = fake_cupy.EmulatedGpu(Device(), arch)

    def nothing(grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        pass

    nothing.max_dynamic_shared_size_bytes = 48 << 10
    nothing.kernel = types.SimpleNamespace(ptr=0)
    gpu.raw_module = lambda **_: types.SimpleNamespace(get_function=lambda _: nothing)
    gpu.launch_cooperative = lambda *_: None
    return gpu


def check(cases) -> None:
    """Call what `gpu-bn check` calls."""
    from gpu_bn import testing

    for case in cases:
        with suppress(AssertionError), np.errstate(all="ignore"):  # launches that do nothing leave what was there
            testing.run(testing.build(case), "cupy")


def bench(cases) -> None:
    """Call what `gpu-bn bench` calls."""
    from gpu_bn.bench.implementations import IMPLEMENTATIONS
    from gpu_bn.bench.measurement import Tensors

    implementation = next(implementation for implementation in IMPLEMENTATIONS if implementation.name == "gpu_bn cupy")
    for case in cases:
        problem = Tensors(case).of("cupy", case.operation)
        implementation.build(case.operation, problem)()


if __name__ == "__main__":
    main()
