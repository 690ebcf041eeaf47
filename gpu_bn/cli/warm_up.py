"""``gpu-bn warm-up``: compiles the kernels of common calls on a CPU, so that the first call of a process finds them."""

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
"""A layout with runs of a channel's elements, and one with rows of channels."""
ACTIVATIONS = "identity", "relu"


def warm_up(dtypes: Sequence[np.dtype[Any]], names: Sequence[str]) -> str:
    """Call forward, backward and evaluation, with and without a residual; return a line about it.

    Args:
        dtypes: of the tensors.
        names: of activations.

    Raises:
        BackendUnavailableError: Numba is not there.
        ValueError: an unknown activation.
    """
    registry.load("cpu")
    from gpu_bn.kernels.cpu.compiler import cache_folder

    known = [activations.Activation.of(name) for name in names]
    folder = cache_folder()
    before, start = _kept(folder), time.perf_counter()
    cases = list(product(SHAPES, dtypes, known))
    with progress(f"Compiling for {len(cases)} kinds of calls", len(cases)) as tick:
        for shape, dtype, activation in cases:
            _call(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype), activation)
            tick(1)
        if find_spec("torch") is not None:  # torch's tensors reach kernels by functions of their own
            import_module("gpu_bn.backends.cpu.doors").compile_for(SHAPES, known[0].name)
    made, seconds = _kept(folder) - before, time.perf_counter() - start
    where = f"are kept in {folder}" if _kept(folder) else "are not kept: no folder can be written to"
    return f"{made} kernels compiled in {seconds:.1f} s; they {where}"


def _call(x: Any, activation: activations.Activation) -> None:
    mean, bias = np.zeros((2, x.shape[1]), np.float32)
    var, weight = np.ones((2, x.shape[1]), np.float32)
    for residual in (None, x):
        options: dict[str, Any] = {"residual": residual, "activation": activation, "backend": "cpu"}
        _, saved = batch_norm_forward(x, mean, var, weight, bias, True, **options)
        batch_norm_backward(x, saved, backend="cpu")
        batch_norm(x, mean, var, weight, bias, **options)


def _kept(folder: Any) -> int:
    return 0 if folder is None or not folder.is_dir() else sum(1 for _ in folder.iterdir())
