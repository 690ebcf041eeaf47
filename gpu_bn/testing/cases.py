"""Define the conformance cases: the calls that each backend must compute correctly."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np

from gpu_bn.activations import ROWS, Activation
from gpu_bn.testing.oracle import Problem

Array = Any

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = (
    "contiguous", "channels_last", "fortran", "negative_stride", "sliced", "sliced_channels", "broadcast", "read_only",
    "misaligned", "permuted", "overlapping",
)  # fmt: skip
SHARING = ("broadcast", "overlapping")
"""The layouts in which several elements share an address."""
MODES = ("train", "train_no_stats", "eval")
AFFINE = ("both", "weight", "bias", "none", "kinks")
KINKS = (0.0, -3.0, 3.0, 6.0, -0.0)
"""The values at which the gradient of some activation jumps."""
MASKS = ("random", "lengths", "samples", "first_empty", "one")


@dataclass(frozen=True)
class Case:
    """One call and its backward call. The fields determine the data: equal cases have equal numbers.

    Attributes:
        shape: the shape of x.
        dtype: the dtype of x, residual and dy.
        layout: the memory layout of x, residual and dy: one of ``LAYOUTS``.
        dy_layout: the layout of dy, if it is another.
        channel_axis: the axis of the channels.
        activation: the name of the activation.
        parameter: the parameter of the activation; ``None`` for its default.
        residual: whether a residual is added.
        affine: the parameters that are passed: one of ``AFFINE``. With ``"kinks"`` every ``z`` is one of ``KINKS``.
        mode: one of ``MODES``.
        param_dtype: the dtype of weight, bias and running statistics. ``None`` stands for float64 with float64 tensors
            and for float32 with others.
        mean: the mean of x in the first channel. The means of the others are smaller in magnitude, of either sign.
        std: the standard deviation of x.
        mask: one of ``MASKS``. Masked elements of x, dy and residual are NaN, unless the layout is one of ``SHARING``.

    ``eps``, ``momentum``, ``virtual_batch_size`` and ``renorm`` are as in :func:`gpu_bn.batch_norm`.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    dy_layout: str | None = None
    channel_axis: int = 1
    activation: str = "identity"
    parameter: float | None = None
    residual: bool = False
    affine: str = "both"
    mode: str = "train"
    param_dtype: str | None = None
    mean: float = 0.5
    std: float = 1.5
    eps: float = 1e-5
    momentum: float = 0.1
    mask: str | None = None
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.dtype, self.mode]
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name not in ("shape", "dtype", "mode") and value != field.default:
                plain = name in ("layout", "activation", "residual")
                words.append(("residual" if value is True else str(value)) if plain else f"{name}={value}")
        return " ".join(words)


def cases() -> list[Case]:
    """Return the conformance cases that can run here: a few hundred small calls with every kind of input."""
    return [case for case in dict.fromkeys(_generate()) if _can_run(case)]


def extended_cases() -> list[Case]:
    """Return the cases of masks, ghost batches and renormalisation that can run here. :func:`cases` has none."""
    return [case for case in _generate_extended() if _can_run(case)]


def unavailable_cases() -> list[Case]:
    """Return the cases that cannot run here, because bfloat16 needs the package ``ml_dtypes``."""
    return [case for case in dict.fromkeys((*_generate(), *_generate_extended())) if not _can_run(case)]


def build(case: Case) -> Problem:
    """Build the arrays of a case."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    axis = case.channel_axis % len(case.shape)
    channels = case.shape[axis]
    per_channel = [1] * len(case.shape)
    per_channel[axis] = channels
    dtype = numpy_dtype(case.dtype)
    param_dtype = numpy_dtype(case.param_dtype or ("float64" if case.dtype == "float64" else "float32"))

    noise = rng.standard_normal(case.shape)
    means = case.mean * rng.uniform(-1, 1, channels)
    means[:1] = case.mean
    limit = 65504.0 if case.dtype == "float16" else np.inf
    x = np.clip(means.reshape(per_channel) + case.std * noise, -limit, limit).astype(dtype)
    dy = (0.5 + 0.5 * noise + rng.standard_normal(case.shape)).astype(dtype)
    residual = rng.standard_normal(case.shape).astype(dtype)
    weight = rng.uniform(0.5, 2.0, channels) * rng.choice([-1, 1], channels)
    running_mean = means + case.std * rng.standard_normal(channels)
    running_var = case.std**2 * rng.uniform(0.25, 4.0, channels)
    tracked = case.mode != "train_no_stats"
    parameter = ROWS[case.activation].default.parameter if case.parameter is None else case.parameter
    mask = None if case.mask is None else _mask(case, axis, rng)
    if mask is not None:
        masked = np.broadcast_to((mask if mask.ndim == x.ndim else np.expand_dims(mask, axis)) == 0, x.shape)
        for array in (x, dy, residual) if case.layout not in SHARING else ():
            array[masked] = np.nan
    bias = rng.standard_normal(channels) if case.affine in ("both", "bias") else None
    if case.affine == "kinks":
        weight, bias = np.zeros(channels), np.resize(KINKS, channels)
    return Problem(
        x=arrange(x, case.layout, axis),
        dy=arrange(dy, case.dy_layout or case.layout, axis),
        running_mean=running_mean.astype(param_dtype) if tracked else None,
        running_var=running_var.astype(param_dtype) if tracked else None,
        weight=weight.astype(param_dtype) if case.affine in ("both", "weight", "kinks") else None,
        bias=None if bias is None else bias.astype(param_dtype),
        training=case.mode != "eval",
        momentum=case.momentum,
        eps=case.eps,
        residual=arrange(residual, case.layout, axis) if case.residual else None,
        activation=(Activation.of(case.activation).name, parameter),
        channel_axis=case.channel_axis,
        mask=mask,
        virtual_batch_size=case.virtual_batch_size,
        renorm=case.renorm,
    )


def _mask(case: Case, axis: int, rng: np.random.Generator) -> Array:
    """Build the mask of a case. The kinds differ in dtype and shape, and some have no channel axis."""
    one_channel = (*case.shape[:axis], 1, *case.shape[axis + 1 :])
    match case.mask:
        case "random":
            return (rng.random(one_channel) < 0.6).astype(np.uint8)
        case "lengths":  # each sample has a length along the last axis; no channel axis
            lengths = rng.integers(0, case.shape[-1] + 1, (case.shape[0], *[1] * (len(case.shape) - 2)))
            lengths[0] = case.shape[-1]
            return np.arange(case.shape[-1]) < lengths
        case "samples":  # one value for each sample; all other axes have size 1
            mask = rng.random((case.shape[0], *[1] * (len(case.shape) - 1))) < 0.6
            mask[:2] = True
            return mask
        case "first_empty":  # the first ghost batch has no valid position
            mask = rng.random(one_channel) < 0.6
            mask[: case.virtual_batch_size or case.shape[0]] = False
            return mask
        case "one":
            mask = np.zeros(one_channel, bool)
            mask[tuple(size // 2 for size in one_channel)] = True
            return mask
    raise ValueError(f"unknown mask {case.mask!r}, expected one of {', '.join(MASKS)}")


def arrange(array: Array, layout: str, axis: int) -> Array:
    """Copy an array to a memory layout of ``LAYOUTS``. ``axis`` is the channel axis.

    With the layouts ``broadcast`` and ``overlapping`` some values are replaced by others of the array.
    """
    match layout:
        case "contiguous":
            return np.ascontiguousarray(array)
        case "channels_last":
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, axis, -1)), -1, axis)
        case "fortran":
            return np.asfortranarray(array)
        case "negative_stride":
            reverse = (slice(None, None, -1),) * array.ndim
            return array[reverse].copy()[reverse]
        case "sliced" | "sliced_channels":
            along = axis if layout == "sliced_channels" else array.ndim - 1
            wide_shape = tuple(2 * size + 1 if a == along else size for a, size in enumerate(array.shape))
            view = np.zeros(wide_shape, array.dtype)[(slice(None),) * along + (slice(1, None, 2),)]
            view[...] = array
            return view
        case "broadcast":
            along = 0 if axis == array.ndim - 1 else array.ndim - 1
            first = array[(slice(None),) * along + (slice(0, 1),)]
            return np.broadcast_to(first.copy(), array.shape)
        case "read_only":
            copy = array.copy()
            copy.flags.writeable = False
            return copy
        case "misaligned":
            raw = np.zeros(array.nbytes + 1, np.uint8)
            view = raw[1:].view(array.dtype).reshape(array.shape)
            view[...] = array
            return view
        case "permuted":  # the last axis is outermost in memory, as in a view (N, C, T) of an array (T, N, C)
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, -1, 0)), 0, -1)
        case "overlapping":  # sliding windows over a longer axis: each starts one element after the last
            longer = np.concatenate([array[..., 0, :], array[..., 1:, -1]], -1)
            return np.lib.stride_tricks.sliding_window_view(longer, array.shape[-1], -1)
    raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name. ``bfloat16`` needs the package ``ml_dtypes``."""
    return np.dtype(import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _can_run(case: Case) -> bool:
    return "bfloat16" not in (case.dtype, case.param_dtype) or find_spec("ml_dtypes") is not None


SMALL_SHAPES = ((16, 7), (2, 3), (5, 1), (4, 6, 9), (3, 5, 4, 7), (2, 1, 1, 1), (1, 3, 2, 1), (2, 3, 2, 3, 4))
"""Shapes of every rank, with two values per channel, and with axes of size 1."""
LARGE_SHAPES = (
    (600, 33), (30, 17, 31), (2100, 3, 5), (3, 7, 1111), (16, 8, 12, 12), (2, 13, 61, 67), (1, 2, 3000, 3),
    (3, 5, 6, 10, 11), (2, 9000),
)  # fmt: skip
"""Shapes that no block size divides, with batches above 2,048, few or many channels, and long or short inner axes."""

AXES = (
    ((6, 5), 0), ((6, 5), -1), ((4, 5, 6), 2), ((4, 5, 6), -3), ((9, 3, 41), 0), ((3, 4, 5, 6), -1),
    ((12, 10, 11, 8), 3), ((12, 10, 11, 8), 2), ((9, 3, 41, 11), 0), ((2, 3, 4, 3, 2), -2),
)  # fmt: skip
"""Shapes, each with a channel axis other than the second."""


def _generate() -> Iterator[Case]:
    for shape, dtype, mode in product(SMALL_SHAPES, DTYPES, ("train", "eval")):
        yield Case(shape, dtype, mode=mode)
    for shape, mode in product(LARGE_SHAPES, ("train", "eval")):
        yield Case(shape, mode=mode, activation="relu", residual=True)
        yield Case(shape, mode=mode)
    for shape, dtype in product(LARGE_SHAPES, DTYPES[1:]):
        yield Case(shape, dtype, activation="relu", residual=True)
    yield from _activation_cases()
    yield from _layout_cases()
    yield from _option_cases()
    yield from _numeric_cases()
    for name in ROWS:
        yield Case((4, 6, 5), activation=name, affine="kinks")


def _activation_cases() -> Iterator[Case]:
    for name, residual, mode in product(ROWS, (False, True), ("train", "eval")):
        for shape in ((4, 6, 5, 7), (12, 8, 10, 11)):
            yield Case(shape, activation=name, residual=residual, mode=mode)
    for name, dtype in product(ROWS, DTYPES[1:]):
        yield Case((4, 6, 5, 7), dtype, activation=name, residual=True)
    for name, parameter in (("leaky_relu", 0.3), ("leaky_relu", 0.0), ("elu", 1.7), ("elu", 0.0)):
        yield Case((4, 6, 5, 7), activation=name, parameter=parameter)


def _layout_cases() -> Iterator[Case]:
    shapes = ((4, 6, 5, 7), (12, 8, 10, 11), (5, 4, 6), (300, 41))
    for layout, shape, dtype in product(LAYOUTS[1:], shapes, ("float32", "float16")):
        yield Case(shape, dtype, layout, activation="relu", residual=True)
    for layout, other in (("channels_last", "contiguous"), ("contiguous", "channels_last"), ("sliced", "fortran"),
                          ("contiguous", "broadcast"), ("fortran", "negative_stride")):  # fmt: skip
        for shape, activation in product(shapes[:2], ("identity", "silu")):
            yield Case(shape, layout=layout, dy_layout=other, activation=activation)
            yield Case(shape, layout=layout, dy_layout=other, activation=activation, residual=True)
    for shape, axis in AXES:
        for residual in (False, True):
            activation = "leaky_relu" if residual else "identity"
            yield Case(shape, channel_axis=axis, residual=residual, activation=activation)


def _option_cases() -> Iterator[Case]:
    for affine, mode, activation in product(AFFINE[:4], MODES, ("identity", "gelu")):
        yield Case((4, 6, 5), affine=affine, mode=mode, activation=activation)
    for dtype, param_dtype in (("float16", "float16"), ("float16", "float64"), ("bfloat16", "bfloat16"),
                               ("float32", "float16"), ("float32", "float64"), ("float64", "float32"),
                               ("float32", "bfloat16")):  # fmt: skip
        for mode in ("train", "eval"):
            yield Case((4, 6, 5), dtype, param_dtype=param_dtype, mode=mode)
    for momentum in (0.0, 0.5, 1.0):
        yield Case((4, 6, 5), momentum=momentum)
    for eps, mode in product((1e-3, 1e-12, 10.0), ("train", "eval")):
        yield Case((4, 6, 5), eps=eps, mode=mode)
    yield Case((4, 6, 5), eps=0.0, mode="eval")


def _numeric_cases() -> Iterator[Case]:
    plain = Case((4, 6, 5, 7), activation="relu")
    large = replace(plain, shape=(12, 8, 10, 11))
    for case, dtype, mode in product((plain, large), ("float32", "float64"), ("train", "eval")):
        for mean in (3.0, 1e2, 1e3, 1e4):
            yield replace(case, dtype=dtype, mode=mode, mean=mean, std=1.0)
        for scale, eps in ((1e18, 1e-5), (1e-20, 1e-50), (1e-20, 1e-5)):
            yield replace(case, dtype=dtype, mode=mode, mean=scale, std=scale, eps=eps)
    for case in (plain, large):
        yield replace(case, std=0.0)
        yield replace(case, mean=0.0, std=0.0)
        yield replace(case, std=0.0, mode="eval")
        yield replace(case, dtype="float16", mean=6e4, std=1e4, residual=True)
        yield replace(case, dtype="float16", mean=0.0, std=3e4)
        yield replace(case, dtype="float16", mean=1e-6, std=1e-6, eps=1e-14)
        yield replace(case, dtype="bfloat16", mean=1e18, std=1e18)
        yield replace(case, dtype="bfloat16", mean=1e2, std=1.0)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"mask": "random"},
    {"virtual_batch_size": 2},
    {"mask": "random", "virtual_batch_size": 2},
    {"renorm": (1.5, 0.5)},
    {"mode": "eval"},
)


def _generate_extended() -> Iterator[Case]:
    fused: dict[str, Any] = {"activation": "relu", "residual": True}
    for dtype in DTYPES:
        yield Case((4, 6, 5, 7), dtype, mask="random", activation="silu", residual=True)
        yield Case((12, 8, 10, 11), dtype, "channels_last", mask="random", virtual_batch_size=4, **fused)
    yield Case((3, 7, 1111), mask="lengths", **fused)
    yield Case((6, 5, 33), "float16", mask="lengths", mode="eval", **fused)
    yield Case((9, 3, 41, 11), "bfloat16", mask="samples", channel_axis=2, residual=True)
    yield Case((600, 33), mask="samples", activation="gelu", layout="fortran")
    yield Case((12, 8, 10, 11), mask="first_empty", virtual_batch_size=4, residual=True)
    yield Case((6, 5, 4), mask="first_empty", mode="train", **fused)
    yield Case((6, 5, 4), mask="one", **fused)
    yield Case((12, 8, 10, 11), mask="random", mean=1e4, std=1.0, activation="relu")
    yield Case((4, 6, 5, 7), mask="random", mean=1e4, std=1.0, mode="train_no_stats")
    yield Case((32, 40), "float16", virtual_batch_size=8, momentum=0.3, **fused)
    yield Case((6, 4, 33, 13), virtual_batch_size=3, affine="weight")
    yield Case((12, 8, 10, 11), virtual_batch_size=1, layout="sliced", activation="gelu")
    others = ("sliced", "negative_stride", "overlapping", "sliced_channels", "fortran")
    for layout, options in (*product(("permuted",), OPTIONS), *zip(others, OPTIONS, strict=True)):
        yield Case((4, 6, 5), layout=layout, **fused, **options)
    for renorm in ((1.0, 0.0), (1.5, 0.5), (3.0, 5.0)):
        yield Case((12, 8, 10, 11), renorm=renorm, **fused)
    yield Case((4, 6, 5), "float16", renorm=(1.2, 0.3), mask="lengths", activation="silu", affine="none")
