"""The activations of :mod:`gpu_bn.activations` as Triton functions, which kernels take as constants."""

from __future__ import annotations

import linecache
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpu_bn.activations import ROWS
from gpu_bn.kernels.triton import math as triton_math


class Functions(NamedTuple):
    """Triton functions of one activation.

    Attributes:
        value: ``value(z, p)``.
        gradient: ``gradient(z, dy, p)``.
        drop: ``drop(z)``, the bit that decides the gradient, or ``None`` if one bit does not decide it.
        masked_gradient: ``masked_gradient(keep, dy, p)``, the gradient from ``keep = not drop(z)``, or ``None``.
    """

    value: Any
    gradient: Any
    drop: Any
    masked_gradient: Any


@cache
def functions(name: str) -> Functions:
    """Return an activation's functions, always the same objects, so that kernels are compiled once."""
    code = ROWS[name].device
    gradient = code.gradient or f"where({code.drop}, {code.dropped}, dy)"
    masked = f"where(keep, dy, {code.dropped})"
    if code.slope:  # dy * where(...): where(..., dy * ..., dy) crashes Triton 3.9 (sm_75, 86, 89, 90)
        gradient, masked = f"dy * where({code.drop}, {code.slope}, 1)", f"dy * where(keep, 1, {code.slope})"
    bodies = {"value(z, p)": code.value, "gradient(z, dy, p)": gradient}
    if code.drop:
        bodies["drop(z)"] = code.drop
        bodies["masked_gradient(keep, dy, p)"] = masked
    found = _define(name, "\n\n".join(f"def {name}_{head}:\n    return {body}\n" for head, body in bodies.items()))
    made = {head.partition("(")[0]: triton.jit(found[f"{name}_{head.partition('(')[0]}"]) for head in bodies}
    return Functions(made["value"], made["gradient"], made.get("drop"), made.get("masked_gradient"))


def _define(name: str, source: str) -> dict[str, Any]:
    """Run a source text and return its names; ``linecache`` keeps the text, because Triton reads it as from a file."""
    file = f"<gpu_bn activation {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": f"{__name__}.{name}", "tl": tl}  # Triton looks up tl here
    for function in ("where", "abs", "exp", "expm1", "tanh", "sigmoid", "sigmoid_slope", "normal_cdf"):
        names[function] = getattr(triton_math, function)
    exec(compile(source, file, "exec"), names)  # the text comes from this package's own table
    return names
