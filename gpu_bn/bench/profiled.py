"""One call between the profiler's start and stop, for ncu.

``python -m gpu_bn.bench.profiled SHAPE DTYPE LAYOUT OPERATION SUBJECT``
"""

from __future__ import annotations

import sys
from typing import Any

from gpu_bn.bench import gpus
from gpu_bn.bench.cases import select
from gpu_bn.bench.correctness import problem_of
from gpu_bn.bench.implementations import SUBJECTS
from gpu_bn.bench.measurement import Tensors


def main(arguments: list[str]) -> None:
    """Make the call twice unseen, empty the cache of it, and once more."""
    shape, dtype, layout, operation, by = arguments
    (case,) = select([shape], [dtype], ["nchw" if layout == "nc" else layout], [operation])
    subject = next(subject for subject in SUBJECTS if subject.name == by)
    gpu, why_not = gpus.find()
    if gpu is None:
        raise SystemExit(why_not)
    tensors = Tensors(case)
    problem = tensors.of(subject.adapter, problem_of(case.operation, tensors.problem))
    call = subject.build(case.operation, problem, None)
    start, stop = _profiler(gpu)
    call(), call()
    gpu.flush()
    gpu.synchronize()
    start()
    call()
    gpu.synchronize()
    stop()


def _profiler(gpu: gpus.AnyGpu) -> tuple[Any, Any]:
    if isinstance(gpu, gpus.CupyGpu):
        return gpu.cupy.cuda.runtime.profilerStart, gpu.cupy.cuda.runtime.profilerStop
    runtime = gpu.torch.cuda.cudart()
    return runtime.cudaProfilerStart, runtime.cudaProfilerStop


if __name__ == "__main__":
    main(sys.argv[1:])
