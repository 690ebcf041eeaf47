"""Explain in words how the CUDA kernels would serve a call on a GPU. This needs no GPU and runs nothing.

>>> print(gpu_bn.explain((32, 64, 56, 56), "float16", activation="relu"))  # doctest: +SKIP
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from types import SimpleNamespace
from typing import Any

from gpu_bn.activations import Activation
from gpu_bn.backends.cupy import sources as cuda_sources
from gpu_bn.plan import (
    DEVICES,
    THREADS,
    VECTOR_BYTES,
    Device,
    LaunchPlan,
    Tiling,
    Work,
    options,
    plan,
    plan_once,
    tile,
)
from gpu_bn.spec import dtype_name

DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
"""The short names of dtypes; the long ones are accepted too."""

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
LAYOUTS = ("nchw", "nhwc", "nc")
MODEL = "Times are a model, not measured: launches, bytes over the bandwidth of a copy, idle SMs, exchange of sums."


@dataclass(frozen=True, slots=True)
class Direction:
    """The explanation of the forward or the backward pass.

    Attributes:
        work: the work that was planned.
        plan: the plan that was chosen.
        others: the other tiers, each with the reason against it; empty if the statistics are given.
    """

    work: Work
    plan: LaunchPlan
    others: dict[str, str]

    @property
    def moved_bytes(self) -> int:
        """The bytes that reach the memory, by the model of the L2 cache."""
        return self.plan.dram_bytes

    @property
    def floor_bytes(self) -> int:
        """The bytes that move if every tensor is read or written once."""
        return self.work.floor_bytes

    @property
    def efficiency(self) -> float:
        """The time of the floor divided by the time of the plan, by the model; at best 1."""
        return self.plan.floor_seconds / self.plan.seconds

    @property
    def tier(self) -> str:
        """The tier of the plan; ``one pass`` if the statistics are given."""
        return self.plan.tier if self.others else "one pass"

    def lines(self) -> list[str]:
        """Return the lines of the explanation, one for each fact."""
        plan, tiling = self.plan, self.plan.tiling
        per_strip = tiling.channels_per_strip
        strip = f"{per_strip} adjacent channels" if tiling.columns and per_strip > 1 else "one channel"
        share = "one block" if plan.blocks == 1 else f"{plan.blocks} blocks"
        turns = f", {plan.in_flight} at a time" if plan.in_flight < tiling.strips else ""
        vector_bytes = tiling.vector * self.work.itemsize
        facts = [
            ("tier", self.tier),
            ("why", plan.reason.split("; ")[0] if self.others else "the statistics are given"),
            ("launches", str(plan.launches)),
            ("grid", f"{plan.grid} blocks of {THREADS} threads"),
            ("strips", f"{tiling.strips} of {strip}, each on {share}{turns}"),
            ("vectors", f"{tiling.vector} elements, {vector_bytes} bytes{_vector_note(tiling, vector_bytes)}"),
            ("shared memory", f"{plan.shared_bytes} bytes per block" if plan.shared_bytes else "none for tensors"),
            ("bytes", f"{_in_bytes(self.moved_bytes)} moved; the floor is {_in_bytes(self.floor_bytes)}"),
            ("time (model)", f"{_time(plan.seconds)}; the floor is {_time(plan.floor_seconds)}: {self.nearness}"),
            ("parts of it", ", ".join(f"{name} {_time(value)}" for name, value in plan.times.parts().items() if value)),
        ]
        lines = [f"  {name:17}{value}" for name, value in facts]
        return lines + [f"  {'not ' + name:17}{why}" for name, why in self.others.items()]

    @property
    def nearness(self) -> str:
        """The efficiency in words."""
        return "at the floor" if self.efficiency > 0.9995 else f"{self.efficiency:.0%} of the floor's speed"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The result of :func:`explain`; ``str`` returns it as a text.

    Attributes:
        call: the call in words.
        device: the GPU.
        forward, backward: the explanations of the two directions.
    """

    call: str
    device: Device
    forward: Direction
    backward: Direction

    def __str__(self) -> str:
        device = self.device
        sheet = f"sm_{device.arch}, {device.sms} SMs, {device.bandwidth / 1e9:.0f} GB/s by its data sheet"
        lines = [f"{self.call}, on {device.name} ({sheet})", ""]
        for name, direction in (("forward", self.forward), ("backward", self.backward)):
            lines += [name, *direction.lines(), ""]
        return "\n".join([*lines, MODEL])


def explain(
    shape_or_array: Any,
    dtype: Any = None,
    layout: str = "nchw",
    device: Device | str = "h100",
    *,
    activation: Activation | str | None = None,
    residual: bool = False,
    training: bool = True,
) -> Explanation:
    """Explain how the CUDA kernels would serve a call on a GPU, and why; print the result to read it.

    This needs no GPU and runs nothing. The result names a *tier*, a way to serve a call: in ``cta`` one block of
    threads holds a channel on chip, in ``cluster`` and ``cooperative`` several blocks share it, in ``split`` one launch
    sums and a second one writes. A *strip* is what one block, or one group of blocks, normalises: a channel, or several
    adjacent ones in channels-last. The *floor* is the bytes that a call moves if each tensor is read or written once,
    and the time for that. Times are a model.

    Args:
        shape_or_array: a shape of 2 to 5 axes, or an array. As in torch, channels are the second axis, whatever the
            layout.
        dtype: a float dtype or its name; ``f16``, ``bf16``, ``f32`` and ``f64`` for short. ``None`` stands for the
            dtype of the array, or for ``float32`` with a shape.
        layout: the order of the axes in memory: ``nchw`` (channels second), ``nhwc`` (channels last), or ``nc`` for 2
            axes. For an array with strides, such as those of NumPy, CuPy and torch, the strides decide instead.
        device: a key of :data:`gpu_bn.plan.DEVICES` or a name in it, or a ``Device``.
        activation: the name of an activation, or an ``Activation``; :func:`gpu_bn.batch_norm` lists the names.
        residual: whether the call has a residual.
        training: whether the call uses the statistics of the batch.

    Returns:
        An ``Explanation`` of the forward and the backward call; ``print`` shows it.

    Raises:
        TypeError: the dtype is not one of the four, or the first argument is neither a shape nor an array.
        ValueError: the shape is empty or does not fit the layout; the layout, device or activation is unknown.

    Examples:
        >>> import gpu_bn
        >>> text = str(gpu_bn.explain((32, 64, 56, 56), "float16", activation="relu", device="h100"))
        >>> text.splitlines()[0]
        'batch norm + relu of 32x64x56x56 float16 nchw, training, on H100 (sm_90, 132 SMs, 3350 GB/s by its data sheet)'
    """
    gpu, row = device_of(device), Activation.of(activation)
    is_array = hasattr(shape_or_array, "shape")
    shape = shape_of(shape_or_array.shape if is_array else shape_or_array)
    if dtype is None:
        dtype = shape_or_array.dtype if is_array else "float32"
    name = dtype_of(dtype)
    n, c, s = geometry_of(shape, layout)
    if training and n * s == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    strides = _strides(shape_or_array) if is_array else None
    if strides is not None:
        from gpu_bn.backends.layout import Layout

        memory = Layout.from_strides(shape, strides, 1)
        n, c, s = memory.n, memory.c, memory.s
        layout = "nhwc" if s == 1 and math.prod(shape[2:]) > 1 else "nchw"
    forward, backward = works(n, c, s, ITEMSIZES[name], row, residual, training)
    steps = ["batch norm", *(["residual"] if residual else []), *([] if row.is_identity else [str(row)])]
    mode = "training" if training else "evaluation"
    order = "" if len(shape) == 2 else f" {layout}"
    call = f"{' + '.join(steps)} of {'x'.join(map(str, shape))} {name}{order}, {mode}"
    return Explanation(call, gpu, _direction(forward, gpu, training), _direction(backward, gpu, training))


def works(
    n: int, c: int, s: int, itemsize: int, activation: Activation, residual: bool, training: bool = True
) -> tuple[Work, Work]:
    """Return the work of a forward call and of its backward call with all gradients.

    In evaluation the forward call is :func:`gpu_bn.batch_norm`, which saves nothing.
    """
    forward = Work(n, c, s, itemsize, reads=1 + residual)
    needs_sign = residual and not activation.is_identity  # the backward call needs the sign of z, or the residual
    full = tile(forward).vector * itemsize == VECTOR_BYTES
    sign_bits = needs_sign and full and cuda_sources.has_sign_bits(activation.name)
    reads = 2 + (needs_sign and not sign_bits)
    writes = 1 + residual
    backward = Work(n, c, s, itemsize, True, reads=reads, staged=reads, writes=writes, sign_bits=sign_bits, ragged=True)
    return replace(forward, sign_bits=sign_bits and training, ragged=True), backward


def device_of(device: Device | str) -> Device:
    """Return the device of a name; a ``Device`` is returned unchanged."""
    if isinstance(device, Device):
        return device
    by_name = {name: known for key, known in DEVICES.items() for name in (key, known.name.lower())}
    known = by_name.get(device.lower()) if isinstance(device, str) else None
    if known is None:
        raise ValueError(f"unknown device {device!r}, expected a gpu_bn.plan.Device or one of {', '.join(DEVICES)}")
    return known


def dtype_of(dtype: Any) -> str:
    """Return the long name of a dtype, a scalar type, or a name."""
    if isinstance(dtype, str):
        name = DTYPES.get(dtype, dtype)
    elif isinstance(dtype, type):
        name = dtype.__name__
    else:
        name = dtype_name(SimpleNamespace(dtype=dtype))
    if name not in ITEMSIZES:
        raise TypeError(f"dtype should be one of {', '.join(ITEMSIZES)}, got {dtype!r}")
    return name


def shape_of(shape: Any) -> tuple[int, ...]:
    """Check a shape and return it as a tuple."""
    try:
        sizes = tuple(index(size) for size in shape)
    except (TypeError, ValueError):
        raise TypeError(f"expected an array, or a shape such as (32, 64, 56, 56), got {shape!r}") from None
    if not 2 <= len(sizes) <= 5:
        raise ValueError(f"shape should have 2 to 5 axes, got {len(sizes)}: {sizes}")
    if min(sizes) < 1:
        raise ValueError(f"shape should have no empty axis, got {sizes}")
    return sizes


def geometry_of(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Return N, C and S of a shape whose second axis is the channels, in a layout of memory."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "nc" and len(shape) != 2:
        raise ValueError(f"layout 'nc' needs a shape of 2 axes, got {len(shape)}: {shape}")
    inner = math.prod(shape[2:])
    return (shape[0] * inner, shape[1], 1) if layout == "nhwc" else (shape[0], shape[1], inner)


def _strides(array: Any) -> tuple[int, ...] | None:
    """Return the strides of an array, in its library's unit or in elements if contiguous; ``None`` if it has none."""
    if hasattr(array, "stride"):
        contiguous, strides = array.is_contiguous(), array.stride()
    elif hasattr(array, "flags"):
        contiguous, strides = array.flags.c_contiguous, array.strides
    else:
        return None
    shape = tuple(array.shape)
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))) if contiguous else tuple(strides)


def _direction(work: Work, device: Device, training: bool) -> Direction:
    if not training:
        return Direction(work, plan_once(work, device), {})
    chosen, others = plan(work, device), {}
    for name, option in options(work, device).items():
        if isinstance(option, str):
            others[name] = option
        elif name != chosen.tier:
            others[name] = f"this would take {_comparison(option, chosen)}"
    return Direction(work, chosen, others)


def _comparison(option: LaunchPlan, chosen: LaunchPlan) -> str:
    launches = "1 launch" if option.launches == 1 else f"{option.launches} launches"
    longer = option.seconds / chosen.seconds
    return f"{launches} and {'the same time' if longer < 1.0005 else f'{longer:.2f} times as long'} (model)"


def _vector_note(tiling: Tiling, vector_bytes: int) -> str:
    if tiling.ragged:
        return " (rows may begin and end within a vector)"
    return "" if vector_bytes == VECTOR_BYTES else f" (a row is no multiple of {VECTOR_BYTES} bytes)"


def _in_words(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Return a value with the first unit that it reaches, or with the last."""
    factor, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{value / factor:.4g} {unit}"


_in_bytes = partial(_in_words, units=((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))
_time = partial(_in_words, units=((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))
