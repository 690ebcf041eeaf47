"""The CUDA C++ sources of :mod:`gpu_bn.kernels`, and the names of the kernels in them. No GPU is needed here."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from gpu_bn.activations import ROWS
from gpu_bn.plan import Tiling

BEFORE = ("types", "tile", "sums", "moments", "exchange", "activation")
AFTER = ("forward", "gradients", "backward")
"""The files of device code, before and after the activation's own."""

STORAGE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
PARAMETER_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
"""How a kernel is told the dtype of a per-channel vector: 2 bits each, packed in the order of its arguments."""

WHOLE = "WHOLE"
"""What a kernel for a batch without groups or a mask is called with."""

OPTIONS = ("--std=c++17", "-ftz=true")
"""CuPy appends the second whatever it is given: float32 arithmetic knows no subnormal numbers. Here so that what is
proved without CuPy is compiled as it runs."""
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@cache
def source(activation: str) -> str:
    """All kernels, ending with an activation: CUDA C++ for NVRTC."""
    return "\n".join([*map(_text, BEFORE), _activation(activation), *map(_text, AFTER)])


def kernel(name: str, dtype: str, tiling: Tiling, *arguments: str | bool, batch: str = WHOLE) -> str:
    """The name expression of a kernel for tensors of a dtype: ``bn_stats_kernel<Layout<F16, 8, false>>``.

    ``batch`` is ``"GROUPS"`` or ``"MASKED_GROUPS"`` for a kernel with two arguments more: which positions
    count, and how many do in each group.
    """
    more = [] if batch == WHOLE else ["const u8*", "double*"]
    layout = ", ".join([STORAGE[dtype], str(tiling.vector), _text_of(tiling.columns), *([batch] if more else [])])
    return f"{name}<{', '.join([f'Layout<{layout}>', *map(_text_of, arguments), *more])}>"


def parameter_codes(*dtypes: str | None) -> int:
    """The packed codes of a launch's per-channel vectors; what an absent one says does not matter."""
    return sum(PARAMETER_CODES[dtype] << 2 * slot for slot, dtype in enumerate(dtypes) if dtype is not None)


def switched(activation: str) -> bool:
    """Whether one bit of ``z`` decides the activation's gradient."""
    return bool(ROWS[activation].device.drop)


def _activation(name: str) -> str:
    """The struct ``Activation`` of a row's expressions; numbers get the precision that is computed in."""
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
  template <class A> DEVICE bool drop(A z) {{ return {drop}; }}
  template <class A> DEVICE A dropped(A dy, A p) {{ return {dropped}; }}
  template <class A> DEVICE A value(A z, A p) {{ return {value}; }}
  template <class A> DEVICE A gradient(A z, A dy, A p) {{ return {gradient}; }}
}};
"""


def _text(name: str) -> str:
    return (files("gpu_bn.kernels") / "cuda" / f"{name}.cuh").read_text()


def _text_of(argument: str | bool) -> str:
    return str(argument).lower() if isinstance(argument, bool) else argument
