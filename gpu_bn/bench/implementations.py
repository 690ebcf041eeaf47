"""The implementations that are timed, a row each in :data:`IMPLEMENTATIONS`: our backends and their peers.

To add a peer, add a row. A row's ``build(operation, problem)`` gets a problem whose arrays are the library's own.
It returns the call to time, which returns the outputs that the operation names, in that order. Ours also take the
``tier`` that is forced and an ``on_plan``: see :data:`gpu_bn.backends.protocol.OnPlan`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpu_bn import registry
from gpu_bn.backends.protocol import OnPlan
from gpu_bn.bench import peers
from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.peers import Build
from gpu_bn.bench.timing import TimedCall
from gpu_bn.functional import batch_norm, batch_norm_backward, batch_norm_forward
from gpu_bn.testing import Problem


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        name: its name in the report.
        device: ``cpu`` or ``cuda``.
        adapter: the key of :data:`gpu_bn.testing.ADAPTERS` that makes its arrays.
        build: makes its call; see this module's text.
        modules: the modules it needs; it is left out if one is not installed. One may be ``this or that``.
        ours: whether it has to meet the oracle's tolerances, and its failure is the command's.
        refuses: returns why it does not serve a case; empty if it does.
        setting: a context in which its call is made and timed.
        default: whether it is timed unless asked for by name.
        tier: the tier that ours is forced to take.
    """

    name: str
    device: str
    adapter: str
    build: Build
    modules: tuple[str, ...] = ()
    ours: bool = False
    refuses: Callable[[Case], str] = lambda _: ""
    setting: Callable[[], Any] = nullcontext
    default: bool = True
    tier: str | None = None

    def forced(self, tier: str) -> Implementation:
        """Return the same, forced to take a tier; the name says it."""
        return replace(self, name=f"{self.name} {tier}", tier=tier)

    @property
    def missing(self) -> str:
        """The modules that are not installed, in words."""
        return ", ".join(names for names in self.modules if not any(map(_installed, names.split(" or "))))


def ours(make_backend: Callable[[str | None, OnPlan | None], Any]) -> Build:
    """Return what builds calls of a backend of this library; ``make_backend`` makes one that forces a tier."""

    def build(
        operation: Operation, problem: Problem, tier: str | None = None, on_plan: OnPlan | None = None
    ) -> TimedCall:
        backend, p = make_backend(tier, on_plan), problem
        fused: dict[str, Any] = {"residual": p.residual, "activation": "relu" if operation.relu else None}
        arguments = (p.x, p.running_mean, p.running_var, p.weight, p.bias, operation.training, p.momentum, p.eps)
        if operation.direction == "eval":
            return lambda: (batch_norm(*arguments, **fused, backend=backend),)
        if operation.direction == "forward":
            return lambda: batch_norm_forward(*arguments, **fused, backend=backend)
        _, saved = batch_norm_forward(*arguments, **fused, backend=backend)
        return lambda: batch_norm_backward(p.dy, saved, backend=backend)

    return build


def cupy_backend(tier: str | None, on_plan: OnPlan | None) -> Any:
    """Make a CuPy backend."""
    registry.load("cupy")  # raises if something is missing, and says what
    return importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier, on_plan)


def triton_backend(tier: str | None, on_plan: OnPlan | None) -> Any:
    """Make a Triton backend."""
    registry.load("triton")
    return importlib.import_module("gpu_bn.backends.triton.backend").TritonBackend(tier=tier, on_plan=on_plan)


IMPLEMENTATIONS = [
    Implementation("gpu_bn cpu", "cpu", "numpy", ours(lambda *_: registry.load("cpu")), ("numba",), ours=True),
    Implementation("gpu_bn numpy", "cpu", "numpy", ours(lambda *_: registry.load("numpy")), ours=True),
    Implementation("torch CPU", "cpu", "torch", peers.eager, ("torch",)),
    Implementation("textbook NumPy", "cpu", "numpy", peers.textbook),
    Implementation("torch.compile CPU", "cpu", "torch", peers.compiled, ("torch",), default=False),
    Implementation("gpu_bn triton", "cuda", "triton", ours(triton_backend), ("torch", "triton"), ours=True),
    Implementation("gpu_bn cupy", "cuda", "cupy", ours(cupy_backend), ("cupy",), ours=True),
    Implementation("torch cuDNN", "cuda", "triton", peers.eager, ("torch",)),
    Implementation("torch native", "cuda", "triton", peers.eager, ("torch",), setting=peers.without_cudnn),
    Implementation("torch.compile", "cuda", "triton", peers.compiled, ("torch", "triton")),
    Implementation(
        "apex", "cuda", "triton", peers.apex, ("torch", "apex.contrib.groupbn.bnp or bnp"), refuses=peers.not_apex
    ),
    Implementation("cuDNN frontend", "cuda", "triton", peers.cudnn, ("torch", "cudnn"), refuses=peers.not_cudnn),
]
"""``torch cuDNN`` is torch with its defaults: it decides by itself where it calls cuDNN."""


def by_name(name: str) -> Implementation:
    """Return an implementation."""
    return next(each for each in IMPLEMENTATIONS if each.name == name)


def choose(device: str, names: list[str] | None) -> tuple[list[Implementation], list[str]]:
    """Choose the implementations of a device: ours, and the peers of these names (``None``: the default ones).

    Returns:
        The implementations, and a line for each that is not installed.

    Raises:
        ValueError: a name is not that of a peer.
    """
    of_device = [each for each in IMPLEMENTATIONS if each.device == device]
    known = [each.name for each in of_device if not each.ours]
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown peer {name!r}, expected some of {', '.join(known)}")
    asked = [each for each in of_device if each.ours or (each.default if names is None else each.name in names)]
    left_out = [f"{each.name}: not installed: {each.missing}" for each in asked if each.missing]
    return [each for each in asked if not each.missing], left_out


PERIOD = 4_194_301
"""The period of a tensor's values: a prime, which divides no size."""
ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes, as torch's do: a vector in a register is then one line of the cache."""


def data(case: Case) -> Problem:
    """Return a case's tensors in NumPy, with a residual; the same for all operations on the tensor.

    Values repeat after :data:`PERIOD`, so that channels differ and a large tensor costs no time.
    """
    rng = np.random.default_rng(0)
    dtype = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if case.dtype == "bfloat16" else case.dtype)
    size, channels = int(np.prod(case.shape)), case.shape[1]
    param = np.float64 if case.dtype == "float64" else np.float32
    noise = rng.normal(0.5, 1.5, (3, min(size, PERIOD)))

    def tensor(row: int) -> Any:
        memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        dense = memory[start : start + size * dtype.itemsize].view(dtype)
        dense[:] = np.resize(noise[row].astype(dtype), size)
        if case.layout != "nhwc":
            return dense.reshape(case.shape)
        return np.moveaxis(dense.reshape(case.shape[0], *case.shape[2:], channels), -1, 1)

    return Problem(
        x=tensor(0),
        dy=tensor(1),
        residual=tensor(2),
        running_mean=rng.normal(0.5, 0.1, channels).astype(param),
        running_var=rng.uniform(1, 4, channels).astype(param),
        weight=rng.uniform(0.5, 2, channels).astype(param),
        bias=rng.standard_normal(channels).astype(param),
        training=True, momentum=0.1, eps=1e-5, activation=("identity", 0.0), channel_axis=1,
    )  # fmt: skip


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except Exception:  # the package around it is missing, or fails when it is imported for the search
        return False
