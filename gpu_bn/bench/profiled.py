"""Make one call between the profiler's start and stop, for ncu.

``python -m gpu_bn.bench.profiled SHAPE DTYPE LAYOUT OPERATION IMPLEMENTATION``
"""

from __future__ import annotations

import sys

from gpu_bn.bench import gpus
from gpu_bn.bench.cases import select
from gpu_bn.bench.implementations import IMPLEMENTATIONS
from gpu_bn.bench.measurement import Tensors


def main(arguments: list[str]) -> None:
    """Make the call twice to warm up, empty the cache, and make it once more under the profiler."""
    shape, dtype, layout, operation, by = arguments
    (case,) = select([shape], [dtype], ["nchw" if layout == "nc" else layout], [operation])
    implementation = next(each for each in IMPLEMENTATIONS if each.name == by)
    gpu, why_not = gpus.find()
    if gpu is None:
        raise SystemExit(why_not)
    problem = Tensors(case).of(implementation.adapter, case.operation)
    call = implementation.build(case.operation, problem)
    start, stop = gpu.profiler()
    call(), call()
    gpu.flush()
    gpu.synchronize()
    start()
    call()
    gpu.synchronize()
    stop()


if __name__ == "__main__":
    main(sys.argv[1:])
