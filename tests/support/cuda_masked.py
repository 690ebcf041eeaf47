"""Check masks and ghost batches in the CUDA kernels on emulated GPUs against the oracle for each group.

Masked elements of the input, the residual and the gradient are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from gpu_bn.activations import Activation
from gpu_bn.backends.layout import Layout
from gpu_bn.call import Call
from gpu_bn.plan import Work
from gpu_bn.spec import BatchNormSpec
from gpu_bn.testing import Case, Problem, build
from gpu_bn.testing.check import ADAPTERS, compare
from gpu_bn.testing.oracle import WIDE, oracle, wide
from gpu_bn.testing.tolerance import ROUNDOFF, tolerance
from support import rng

TENSORS = ("y", "dx", "dresidual")
EVERYTHING = frozenset({"dx", "dweight", "dbias", "dresidual"})
ROWS, COLUMNS = (6, 5, 4, 8), (60, 24)


@dataclass(frozen=True)
class Masked:
    """A conformance case with a kind of :func:`mask` and a number of ghost batches."""

    case: Case
    mask: str = "half"
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.case} {self.mask}{f' in {self.groups} groups' if self.groups > 1 else ''}".replace(" ", "-")


def mask(kind: str, shape: tuple[int, ...], axis: int, groups: int) -> np.ndarray | None:
    """Return a mask of a kind, with size 1 along the channel axis; ``None`` for ``"unmasked"``."""
    shape = tuple(1 if a == axis else size for a, size in enumerate(shape))
    valid = np.zeros(shape, bool)
    match kind:
        case "all":
            valid[...] = True
        case "half":
            valid = rng(3).random(shape) < 0.5
        case "few":
            valid = rng(3).random(shape) < 0.02
        case "last":  # the padding comes first, so that the start of a share tells nothing about the mean
            valid[len(valid) // 2 :] = True
        case "a group is empty":
            valid = rng(3).random(shape) < 0.7
            valid[len(valid) // groups : 2 * len(valid) // groups] = False
        case "none":
            pass
        case "one":
            valid.reshape(-1)[valid.size * 2 // 3] = True
        case "unmasked":
            return None
    return valid


def problem_of(masked: Masked) -> tuple[Problem, np.ndarray | None]:
    """Return the problem with NaN for masked elements, and the mask."""
    problem = build(masked.case)
    valid = mask(masked.mask, problem.x.shape, problem.channel_axis % problem.x.ndim, masked.groups)
    if valid is None:
        return problem, None
    poisoned = {}
    for name in ("x", "dy", "residual"):
        if (array := getattr(problem, name)) is not None:
            poisoned[name] = array.copy("K")
            poisoned[name][np.broadcast_to(~valid, array.shape)] = np.nan
    return replace(problem, **poisoned), valid


def parts(problem: Problem, valid: np.ndarray | None, groups: int) -> Iterator[tuple[np.ndarray, Problem]]:
    """Yield for each group its valid positions with the channels last, and a problem with only these positions."""
    axis = problem.channel_axis
    everywhere = np.ones([1 if a == axis % problem.x.ndim else size for a, size in enumerate(problem.x.shape)], bool)
    positions = np.moveaxis(everywhere if valid is None else valid, axis, -1)[..., 0]
    for group in range(groups):
        chosen = np.zeros_like(positions)
        size = len(chosen) // groups
        part = slice(group * size, (group + 1) * size)
        chosen[part] = positions[part]
        tensors = {
            name: None if (array := getattr(problem, name)) is None else np.moveaxis(array, axis, -1)[chosen]
            for name in ("x", "dy", "residual")
        }
        running = {"running_mean": None, "running_var": None} if problem.training else {}
        yield chosen, replace(problem, channel_axis=1, **tensors, **running)


def truth_of(problem: Problem, valid: np.ndarray | None, groups: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the exact results of a call by name, and the error allowed in each."""
    axis, u, momentum = problem.channel_axis, WIDE(ROUNDOFF[str(problem.x.dtype)]), WIDE(problem.momentum)
    groups = groups if problem.training else 1
    tensors = {name: np.zeros((2, *np.moveaxis(problem.x, axis, -1).shape), WIDE) for name in TENSORS}
    channels = problem.x.shape[axis]
    sums = {name: np.zeros((2, channels), WIDE) for name in ("dweight", "dbias")}
    statistics = {name: [np.zeros((2, channels), WIDE)] * groups for name in ("mean", "rstd")}
    tracked = {}
    if problem.running_mean is not None:
        old = {"mean": wide(problem.running_mean), "var": wide(problem.running_var)}
        tracked = {name: np.stack([value, 2 * u * np.abs(value)]) for name, value in old.items()}
    for group, (chosen, part) in enumerate(parts(problem, valid, groups)):
        if not len(part.x):
            statistics["rstd"][group] = np.stack([np.full(channels, 1 / np.sqrt(WIDE(problem.eps)))] * 2)
            continue
        truth = oracle(part)
        allowed = tolerance(part, truth)
        for name in TENSORS:
            if getattr(truth, name) is not None:
                error = np.broadcast_to(allowed[name], part.x.shape)
                tensors[name][:, chosen] = np.stack([getattr(truth, name), error])
        for name, total in sums.items():
            if getattr(truth, name) is not None:
                total += np.stack([getattr(truth, name), allowed[name]])
        for name, each in statistics.items():
            each[group] = np.stack([getattr(truth, name), allowed[name]])
        if problem.training and tracked:
            n = len(part.x)
            var = truth.var * n / max(n - 1, 1), 2 * (allowed["rstd"] / truth.rstd + u) * truth.var * 2
            mean = truth.mean, allowed["mean"] + 2 * u * np.abs(truth.mean)
            for name, new in (("mean", mean), ("var", var)):
                tracked[name] = (1 - momentum) * tracked[name] + momentum * np.stack(new)
    results = {name: np.moveaxis(value, -1, axis % problem.x.ndim + 1) for name, value in tensors.items()}
    results |= sums | {name: np.concatenate(each, axis=-1) for name, each in statistics.items()}
    results |= {f"running_{name}": value for name, value in tracked.items()}
    return {name: (value[0], value[1]) for name, value in results.items()}


def work_of(shape: tuple[int, ...], itemsize: int, **options) -> Work:
    layout = Layout.from_array(np.empty(shape, np.uint8), 1)
    return Work(layout.n, layout.c, layout.s, itemsize, **options)


def spec_of(problem: Problem, groups: int = 1) -> BatchNormSpec:
    axis = problem.channel_axis % problem.x.ndim
    return BatchNormSpec(axis, problem.training, problem.momentum, problem.eps, Activation(*problem.activation), groups)


def run(gpu, problem: Problem, valid: np.ndarray | None, groups: int = 1) -> dict[str, np.ndarray]:
    """Return the results of the fused calls of the backend by name."""
    send, receive = ADAPTERS["cupy"]
    names = ("running_mean", "running_var", "weight", "bias", "residual")
    sent = [None if (a := getattr(problem, name)) is None else send(a.copy("K")) for name in names]
    call = Call(
        send(problem.x),
        valid=send(valid) if type(valid) is np.ndarray else valid,
        **dict(zip(names, sent, strict=True)),
    )
    y, saved = gpu.backend.forward(call, spec_of(problem, groups))
    need = EVERYTHING - {f"d{name}" for name, array in zip(names, sent, strict=True) if array is None}
    grads = gpu.backend.backward(send(problem.dy), saved, need)
    results = {"y": y, "mean": saved.mean, "rstd": saved.rstd}
    results |= dict(zip(("dx", "dweight", "dbias", "dresidual"), grads, strict=True))
    results |= dict(zip(names[:2], sent[:2], strict=True))
    if valid is not None and problem.training:
        assert saved.moments.count.dtype == np.float64
        expected = [len(part.x) for _, part in parts(problem, valid != 0, groups)]
        counts = receive(saved.moments.count).tolist()
        assert counts == expected, f"counts of groups: {counts}, expected {expected}"
    return {name: receive(array) for name, array in results.items() if array is not None}


def check_masked(gpu, masked: Masked) -> dict[str, np.ndarray]:
    """Compare all results of a call with the oracle. Masked elements must be 0."""
    problem, valid = problem_of(masked)
    results = run(gpu, problem, valid, masked.groups)
    truth = truth_of(problem, valid, masked.groups)
    assert {"y", "mean", "rstd", "dx"} <= results.keys()
    for name, got in results.items():
        compare(f"{masked}: {name}", got, *truth[name])
        if name in TENSORS:
            assert got.dtype == problem.x.dtype
            assert valid is None or not got[np.broadcast_to(~valid, got.shape)].any()
    return results
