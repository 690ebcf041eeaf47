"""Explain in words how the CUDA kernels would serve a call on a GPU. No GPU is needed, and nothing is run.

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
    TIERS,
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
"""Short names; the long ones are understood too."""

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
LAYOUTS = ("nchw", "nhwc", "nc")
MODEL = "Times are a model, not measured: launches, bytes over the bandwidth of a copy, idle SMs, exchange of sums."


@dataclass(frozen=True, slots=True)
class Direction:
    """Hold what :func:`explain` has found for the forward or the backward pass.

    Attributes:
        work: what the planner was asked.
        plan: what it has chosen.
        others: the other tiers, each with the reason; empty if statistics are not exchanged.
    """

    work: Work
    plan: LaunchPlan
    others: dict[str, str]

    @property
    def moved_bytes(self) -> int:
        """Bytes that reach the memory, by the model of the L2 cache."""
        return self.plan.dram_bytes

    @property
    def floor_bytes(self) -> int:
        """Bytes if every tensor were read and written once."""
        return self.work.floor_bytes

    @property
    def efficiency(self) -> float:
        """The floor's time as a share of the plan's, by the model: 1 is the best."""
        return self.plan.floor_seconds / self.plan.seconds

    @property
    def tier(self) -> str:
        """The plan's tier; ``one pass`` where statistics are given."""
        return self.plan.tier if self.others else "one pass"

    def lines(self) -> list[str]:
        """Return the facts, one in a line."""
        plan, tiling = self.plan, self.plan.tiling
        per_strip = tiling.channels_per_strip
        strip = f"{per_strip} channels side by side" if tiling.columns and per_strip > 1 else "one channel"
        share = "its own block" if plan.blocks == 1 else f"{plan.blocks} blocks"
        turns = f", {plan.in_flight} at a time" if plan.in_flight < tiling.strips else ""
        vector_bytes = tiling.vector * self.work.itemsize
        facts = [
            ("tier", self.tier),
            ("why", plan.reason.split("; ")[0] if self.others else "the statistics are given"),
            ("launches", str(plan.launches)),
            ("grid", f"{plan.grid} blocks of {THREADS} threads"),
            ("strips", f"{tiling.strips} of {strip}, each on {share}{turns}"),
            ("vectors", f"{tiling.vector} elements, {vector_bytes} bytes{_at_the_ends(tiling, vector_bytes)}"),
            ("shared memory", f"{plan.shared_bytes} bytes a block" if plan.shared_bytes else "none for tensors"),
            ("bytes", f"{_in_bytes(self.moved_bytes)} moved, {_in_bytes(self.floor_bytes)} is the floor"),
            ("time (model)", f"{_time(plan.seconds)}, {_time(plan.floor_seconds)} is the floor: {self.nearness}"),
            ("of that", ", ".join(f"{name} {_time(value)}" for name, value in plan.times.parts().items() if value)),
        ]
        lines = [f"  {name:17}{value}" for name, value in facts]
        return lines + [f"  {'not ' + name:17}{why}" for name, why in self.others.items()]

    @property
    def nearness(self) -> str:
        """The efficiency in words."""
        return "at the floor" if self.efficiency > 0.9995 else f"{self.efficiency:.0%} of the floor's speed"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Hold the result of :func:`explain`; ``str`` makes a text of it.

    Attributes:
        call: the call in words.
        device: the GPU.
        forward, backward: the two directions.
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
    """Say how the CUDA kernels would serve a call on a GPU, and why; print the result to read it.

    No GPU is needed, and nothing is run. The result speaks of *tiers*, the ways to serve a call: in ``cta`` one block
    of threads holds a channel on chip, in ``cluster`` and ``cooperative`` several blocks share it, in ``split`` one
    launch sums and a second one writes. A *strip* is what one block, or one group of blocks, normalises: a channel, or
    several adjacent ones in channels-last. The *floor* is the bytes that a call moves if each tensor is read and
    written once, and the time that takes. Times are a model.

    Args:
        shape_or_array: a shape of 2 to 5 axes, or an array. Channels are the second axis in both, whatever the layout,
            as in torch.
        dtype: a float dtype or its name; ``f16``, ``bf16``, ``f32`` and ``f64`` for short. ``None`` stands for the
            array's dtype, or for ``float32`` with a shape.
        layout: how the axes lie in memory: ``nchw``, channels second, ``nhwc``, channels last, or ``nc`` for 2 axes.
            An array that has strides, as those of NumPy, CuPy and torch have, is asked for its own instead.
        device: a key of :data:`gpu_bn.plan.DEVICES` or a name in it, or a ``Device``.
        activation: as in :func:`gpu_bn.batch_norm`.
        residual: whether the call has a residual.
        training: as in :func:`gpu_bn.batch_norm`.

    Returns:
        An ``Explanation`` of the forward and the backward call; ``print`` shows it.

    Raises:
        TypeError: a dtype that is not one of the four, or no shape and no array.
        ValueError: an empty shape, or one that does not fit the layout; an unknown layout, device or activation.

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

        seen = Layout.from_strides(shape, strides, 1)
        n, c, s = seen.n, seen.c, seen.s
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
    """Return what a forward call and its backward call have to do, with all gradients.

    In evaluation the forward call is :func:`gpu_bn.batch_norm`, which keeps nothing.
    """
    forward = Work(n, c, s, itemsize, reads=1 + residual)
    both = residual and not activation.is_identity  # the backward call needs the sign of their sum
    full = tile(forward).vector * itemsize == VECTOR_BYTES
    sign_bits = both and full and cuda_sources.has_sign_bits(activation.name)
    reads = 2 + (both and not sign_bits)
    writes = 1 + residual
    backward = Work(n, c, s, itemsize, True, reads=reads, staged=reads, writes=writes, sign_bits=sign_bits, ragged=True)
    return replace(forward, sign_bits=sign_bits and training, ragged=True), backward


def device_of(device: Device | str) -> Device:
    """Return a device, or the one that a name stands for."""
    if isinstance(device, Device):
        return device
    names = {name: found for key, found in DEVICES.items() for name in (key, found.name.lower())}
    found = names.get(device.lower()) if isinstance(device, str) else None
    if found is None:
        raise ValueError(f"unknown device {device!r}, expected a gpu_bn.plan.Device or one of {', '.join(DEVICES)}")
    return found


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
        found = tuple(index(size) for size in shape)
    except (TypeError, ValueError):
        raise TypeError(f"expected an array, or a shape such as (32, 64, 56, 56), got {shape!r}") from None
    if not 2 <= len(found) <= 5:
        raise ValueError(f"shape should have 2 to 5 axes, got {len(found)}: {found}")
    if min(found) < 1:
        raise ValueError(f"shape should have no empty axis, got {found}")
    return found


def geometry_of(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Return N, C and S of a shape with channels second, in a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "nc" and len(shape) != 2:
        raise ValueError(f"layout 'nc' is of 2 axes, got {len(shape)}: {shape}")
    inner = math.prod(shape[2:])
    return (shape[0] * inner, shape[1], 1) if layout == "nhwc" else (shape[0], shape[1], inner)


def _strides(array: Any) -> tuple[int, ...] | None:
    """Return an array's strides in its library's unit. For memory without gaps they follow from the shape."""
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
    chosen, others, found = plan(work, device), {}, options(work, device)
    for name in TIERS:
        option = found[name]
        if isinstance(option, str):
            others[name] = option
        elif name != chosen.tier:
            others[name] = f"this would be {_compared(option, chosen)}"
    return Direction(work, chosen, others)


def _compared(option: LaunchPlan, chosen: LaunchPlan) -> str:
    launches = "1 launch" if option.launches == 1 else f"{option.launches} launches"
    longer = option.seconds / chosen.seconds
    return f"{launches} and {'the same time' if longer < 1.0005 else f'{longer:.2f} times the time'} (model)"


def _at_the_ends(tiling: Tiling, vector_bytes: int) -> str:
    if tiling.ragged:
        return " (rows begin and end within them)"
    return "" if vector_bytes == VECTOR_BYTES else f" ({VECTOR_BYTES} does not divide a row)"


def _in_words(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Put a value into words, in the first unit that it reaches, or the last."""
    factor, unit = next((each for each in units if value >= each[0]), units[-1])
    return f"{value / factor:.4g} {unit}"


_in_bytes = partial(_in_words, units=((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))
_time = partial(_in_words, units=((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))
