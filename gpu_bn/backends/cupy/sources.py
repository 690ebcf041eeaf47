"""Assemble the CUDA C++ sources of :mod:`gpu_bn.kernels`, and name the kernels in them. No GPU is needed."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from gpu_bn.activations import ROWS
from gpu_bn.plan import Tiling

BEFORE = ("types", "tile", "sums", "moments", "exchange", "activation")
AFTER = ("forward", "gradients", "backward")
"""The files of device code before and after the struct ``Activation``."""
SYNC = ("types", "sync")
"""The files of the kernels of SyncBatchNorm, which have no activation."""

STORAGE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
PARAMETER_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
"""The codes of the dtypes of per-channel vectors: 2 bits each, packed in the order of a kernel's arguments."""

WHOLE = "WHOLE"
"""The batch of kernels without ghost batches and without a mask."""
RAGGED = "RAGGED_ROWS"
"""The batch of such kernels for ragged rows, which begin and end inside vectors."""

OPTIONS = ("--std=c++17", "-ftz=true")
"""Options of NVRTC. CuPy always appends the second one, which flushes subnormal float32 numbers to zero. With it here,
tests without CuPy compile the same code."""
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@cache
def source(activation: str | None) -> str:
    """Return the CUDA C++ source of all kernels with an activation; for ``None``, of the kernels of SyncBatchNorm."""
    if activation is None:
        return "\n".join(map(_read, SYNC))
    return "\n".join([*map(_read, BEFORE), _activation_struct(activation), *map(_read, AFTER)])


def kernel(name: str, dtype: str, tiling: Tiling, *arguments: str | bool, batch: str = WHOLE) -> str:
    """Return the name expression of a kernel for tensors of a dtype: ``bn_stats_kernel<Layout<F16, 8, false>>``.

    ``batch`` is ``"GROUPS"`` or ``"MASKED_GROUPS"`` for a kernel with two more arguments: the mask, and the count of
    each ghost batch. For ragged rows ``batch`` is ``"WHOLE"``, and the layout has ``"RAGGED_ROWS"`` in its place.
    """
    more = [] if batch == WHOLE else ["const u8*", "double*"]
    kinds = [RAGGED] if tiling.ragged else [batch] if more else []
    layout = ", ".join([STORAGE[dtype], str(tiling.vector), _template_argument(tiling.columns), *kinds])
    return f"{name}<{', '.join([f'Layout<{layout}>', *map(_template_argument, arguments), *more])}>"


def parameter_codes(*dtypes: str | None) -> int:
    """Return the packed codes of a launch's per-channel vectors; kernels ignore the code of an absent vector."""
    return sum(PARAMETER_CODES[dtype] << 2 * slot for slot, dtype in enumerate(dtypes) if dtype is not None)


def has_sign_bits(activation: str) -> bool:
    """Tell whether one bit of ``z`` decides the activation's gradient."""
    return bool(ROWS[activation].device.drop)


def _activation_struct(name: str) -> str:
    """Return the struct ``Activation`` with an activation's expressions; numbers get the type of the arithmetic, A.

    ``LONG``: the gradient needs many registers, because it contains the normal distribution function.
    """
    code = ROWS[name].device
    dropped = f"{code.slope} * dy" if code.slope else code.dropped or "dy"
    value, gradient, drop, dropped = (
        NUMBER.sub(lambda number: f"A({number[0]})", text)
        for text in (code.value, code.gradient, code.drop or "false", dropped)
    )
    if code.drop:
        gradient = f"drop(z) ? {dropped} : dy"
    return f"""
struct Activation {{
  static constexpr bool LONG = {_template_argument("normal_cdf" in gradient)};
  template <class A> DEVICE bool drop(A z) {{ return {drop}; }}
  template <class A> DEVICE A dropped(A dy, A p) {{ return {dropped}; }}
  template <class A> DEVICE A value(A z, A p) {{ return {value}; }}
  template <class A> DEVICE A gradient(A z, A dy, A p) {{ return {gradient}; }}
}};
"""


def _read(name: str) -> str:
    return (files("gpu_bn.kernels") / "cuda" / f"{name}.cuh").read_text()


def _template_argument(argument: str | bool) -> str:
    return str(argument).lower() if isinstance(argument, bool) else argument
