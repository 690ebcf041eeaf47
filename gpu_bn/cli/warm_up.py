"""``gpu-bn warm-up``: compile the kernels of common calls on a CPU and keep them for later processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np

from gpu_bn import activations, batch_norm, batch_norm_backward, batch_norm_forward, registry
from gpu_bn.cli.console import progress

SHAPES = (4, 8, 16, 16), (64, 64)
"""A shape for each of the two memory layouts: contiguous elements of a channel, and rows of all channels."""
ACTIVATIONS = "identity", "relu"


def warm_up(dtypes: Sequence[np.dtype[Any]], names: Sequence[str]) -> str:
    """Compile the kernels of forward, backward and evaluation, with and without a residual.

    Args:
        dtypes: the dtypes of the tensors.
        names: the names of the activations.

    Returns:
        A line that says how many kernels were compiled, and where they are kept.

    Raises:
        BackendUnavailableError: Numba is not installed.
        ValueError: an activation is unknown.
    """
    registry.load("cpu")
    from gpu_bn.kernels.cpu.compiler import cache_folder

    chosen = [activations.Activation.of(name) for name in names]
    folder = cache_folder()
    before, start = _count_files(folder), time.perf_counter()
    cases = list(product(SHAPES, dtypes, chosen))
    with progress(f"Compiling for {len(cases)} kinds of calls", len(cases)) as tick:
        for shape, dtype, activation in cases:
            _call(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype), activation)
            tick(1)
        if find_spec("torch") is not None:  # torch tensors are passed to kernels by compiled functions as well
            import_module("gpu_bn.backends.cpu.doors").compile_for(SHAPES, chosen[0].name)
    files, seconds = _count_files(folder), time.perf_counter() - start
    where = f"are kept in {folder}" if files else "are not kept: no folder can be written to"
    return f"{files - before} kernels compiled in {seconds:.1f} s; they {where}"


def _call(x: Any, activation: activations.Activation) -> None:
    """Call training forward, backward and evaluation once with a residual and once without."""
    mean, bias = np.zeros((2, x.shape[1]), np.float32)
    var, weight = np.ones((2, x.shape[1]), np.float32)
    for residual in (None, x):
        options: dict[str, Any] = {"residual": residual, "activation": activation, "backend": "cpu"}
        _, saved = batch_norm_forward(x, mean, var, weight, bias, True, **options)
        batch_norm_backward(x, saved, backend="cpu")
        batch_norm(x, mean, var, weight, bias, **options)


def _count_files(folder: Any) -> int:
    """Return the number of files in the cache folder; 0 if there is none."""
    return 0 if folder is None or not folder.is_dir() else sum(1 for _ in folder.iterdir())
