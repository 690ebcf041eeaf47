"""Who is timed: our backends and their peers, a row each in :data:`SUBJECTS`. To add a peer, add a row.

A row's ``build(operation, problem, tier)`` gets a problem whose arrays are the library's own, and returns the call to
time; what that returns are the outputs that the operation names, in that order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpu_bn import registry
from gpu_bn.bench import peers
from gpu_bn.bench.cases import Case, Operation
from gpu_bn.bench.timing import Call
from gpu_bn.functional import batch_norm, batch_norm_backward, batch_norm_forward
from gpu_bn.testing import Problem

Build = Callable[[Operation, Problem, "str | None"], Call]


def always(case: Case) -> str:
    """For a subject that serves every case."""
    del case
    return ""


@contextmanager
def unchanged() -> Iterator[None]:
    """For a subject that needs no setting."""
    yield


@dataclass(frozen=True)
class Subject:
    """One implementation.

    Attributes:
        name: in the report.
        device: ``cpu`` or ``cuda``.
        adapter: which of :data:`gpu_bn.testing.ADAPTERS` makes its arrays.
        build: see this module's text.
        modules: what it is made of; it is left out if one is not installed. One may be ``this or that``.
        ours: whether it has to meet the oracle's tolerances, and its failure is the command's.
        refuses: why it does not serve a case; empty if it does.
        setting: what is set while its call is made; also while it is timed.
        default: whether it is timed unless asked for by name.
    """

    name: str
    device: str
    adapter: str
    build: Build
    modules: tuple[str, ...] = ()
    ours: bool = False
    refuses: Callable[[Case], str] = always
    setting: Callable[[], Any] = unchanged
    default: bool = True

    @property
    def missing(self) -> str:
        """The modules that are not installed, in words."""
        return ", ".join(names for names in self.modules if not any(map(_installed, names.split(" or "))))


def ours(backend: Callable[[str | None], Any]) -> Build:
    """A backend of this library; ``backend`` makes one that forces a tier."""

    def build(operation: Operation, problem: Problem, tier: str | None) -> Call:
        engine = backend(tier)
        p = problem
        fused: dict[str, Any] = {"residual": p.residual, "activation": "relu" if operation.relu else None}
        arguments = (p.x, p.running_mean, p.running_var, p.weight, p.bias, operation.training, p.momentum, p.eps)
        if operation.direction == "eval":
            return lambda: (batch_norm(*arguments, **fused, backend=engine),)
        if operation.direction == "forward":
            return lambda: batch_norm_forward(*arguments, **fused, backend=engine)
        _, saved = batch_norm_forward(*arguments, **fused, backend=engine)
        return lambda: batch_norm_backward(p.dy, saved, backend=engine)

    return build


def numpy_backend(tier: str | None) -> Any:
    """The NumPy backend, which has no tiers."""
    del tier
    return registry.load("numpy")


def cpu_backend(tier: str | None) -> Any:
    """The compiled backend of a CPU, which has no tiers."""
    del tier
    return registry.load("cpu")


def cupy_backend(tier: str | None) -> Any:
    """The CuPy backend."""
    registry.load("cupy")  # says what is missing
    return importlib.import_module("gpu_bn.backends.cupy.backend").CupyBackend(tier)


def triton_backend(tier: str | None) -> Any:
    """The Triton backend."""
    registry.load("triton")
    return importlib.import_module("gpu_bn.backends.triton.backend").TritonBackend(tier=tier)


SUBJECTS = [
    Subject("gpu_bn cpu", "cpu", "numpy", ours(cpu_backend), ("numba",), ours=True),
    Subject("gpu_bn numpy", "cpu", "numpy", ours(numpy_backend), ours=True),
    Subject("torch CPU", "cpu", "torch", peers.torch(), ("torch",)),
    Subject("textbook NumPy", "cpu", "numpy", peers.textbook),
    Subject("torch.compile CPU", "cpu", "torch", peers.torch(peers.compiled), ("torch",), default=False),
    Subject("gpu_bn triton", "cuda", "triton", ours(triton_backend), ("torch", "triton"), ours=True),
    Subject("gpu_bn cupy", "cuda", "cupy", ours(cupy_backend), ("cupy",), ours=True),
    Subject("torch cuDNN", "cuda", "triton", peers.torch(), ("torch",)),
    Subject("torch native", "cuda", "triton", peers.torch(), ("torch",), setting=peers.without_cudnn),
    Subject("torch.compile", "cuda", "triton", peers.torch(peers.compiled), ("torch", "triton")),
    Subject("apex", "cuda", "triton", peers.apex, ("torch", "apex.contrib.groupbn.bnp or bnp"), refuses=peers.not_apex),
    Subject("cuDNN frontend", "cuda", "triton", peers.cudnn, ("torch", "cudnn"), refuses=peers.not_cudnn),
]
"""``torch cuDNN`` is torch as it comes: it decides by itself where it calls cuDNN."""


def chosen(device: str, names: list[str] | None, table: list[Subject] | None = None) -> tuple[list[Subject], list[str]]:
    """The subjects of a device: ours, and the peers of these names (``None``: the default); and who is left out, why.

    Raises:
        ValueError: no peer of a name.
    """
    table = SUBJECTS if table is None else table
    here = [subject for subject in table if subject.device == device]
    peers_here = [subject.name for subject in here if not subject.ours]
    for name in names or []:
        if name not in peers_here:
            raise ValueError(f"unknown peer {name!r}, expected some of {', '.join(peers_here)}")
    found, left_out = [], []
    for subject in here:
        if not (subject.ours or (subject.default if names is None else subject.name in names)):
            continue
        if subject.missing:
            left_out.append(f"{subject.name}: not installed: {subject.missing}")
        else:
            found.append(subject)
    return found, left_out


def data(case: Case) -> Problem:
    """A case's tensors in NumPy, with a residual; the same for all operations on the tensor.

    Values repeat with a period that divides no size, so that channels differ and a large tensor costs no time.
    """
    rng = np.random.default_rng(0)
    dtype = _dtype(case.dtype)
    size, channels = int(np.prod(case.shape)), case.shape[1]
    param = np.float64 if case.dtype == "float64" else np.float32
    noise = rng.normal(0.5, 1.5, (3, min(size, PERIOD)))

    def tensor(row: int) -> Any:
        dense = np.resize(noise[row].astype(dtype), size)
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


PERIOD = 4_194_301
"""Prime."""


def _dtype(name: str) -> Any:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except Exception:  # its package is not there, or is imported for this and fails as it likes
        return False
