"""What is timed, as data: the normalisation layers of networks, and the operations on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from gpu_bn.explanation import DTYPES, ITEMSIZES

Shape = tuple[int, ...]


class Layer(NamedTuple):
    """How many layers of a network have inputs of a shape; channels are the second axis."""

    layers: int
    shape: Shape


def _batch(n: int, layers: Iterable[tuple[int, int, int]], rank: int = 2) -> tuple[Layer, ...]:
    """Return layers of ``(count, channels, side)`` for ``n`` images of ``rank`` axes."""
    return tuple(Layer(count, (n, channels, *[side] * rank)) for count, channels, side in layers)


RESNET_50 = (
    (1, 64, 112), (6, 64, 56), (4, 256, 56), (1, 128, 56), (7, 128, 28), (5, 512, 28), (1, 256, 28), (11, 256, 14),
    (7, 1024, 14), (1, 512, 14), (5, 512, 7), (4, 2048, 7),
)  # fmt: skip
"""All 53 layers, of 224 x 224 images; the stride is in the 3 x 3 convolution, as in torchvision."""
MOBILENET_V2 = (
    (2, 32, 112), (1, 16, 112), (1, 96, 112), (1, 96, 56), (2, 24, 56), (3, 144, 56), (1, 144, 28), (3, 32, 28),
    (5, 192, 28), (1, 192, 14), (4, 64, 14), (8, 384, 14), (3, 96, 14), (5, 576, 14), (1, 576, 7), (3, 160, 7),
    (6, 960, 7), (1, 320, 7), (1, 1280, 7),
)  # fmt: skip
"""All 52 layers, of 224 x 224 images."""

NETWORKS: dict[str, tuple[Layer, ...]] = {
    "few": tuple(
        Layer(1, s) for s in ((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (256, 1024), (2, 3, 4, 4))
    ),
    "resnet50-32": _batch(32, RESNET_50),
    "resnet50-256": _batch(256, RESNET_50),
    "mobilenetv2": _batch(32, MOBILENET_V2),
    "unet2d": _batch(8, ((4, 64, 256), (4, 128, 128), (4, 256, 64), (4, 512, 32), (2, 1024, 16))),
    "unet3d": _batch(2, ((4, 32, 64), (4, 64, 32), (4, 128, 16), (2, 256, 8)), rank=3),
    "mlp": (Layer(1, (256, 1024)), Layer(1, (1024, 4096)), Layer(1, (8192, 512)), Layer(1, (65536, 256))),
    "tiny": (Layer(1, (4, 8)), Layer(1, (2, 3, 4, 4)), Layer(1, (8, 16, 8, 8)), Layer(1, (16, 64, 4, 4))),
}
"""Networks by name; ``few`` chooses some layers of the others for a first look."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A ``direction`` (forward or backward in training, or eval) and what is fused with it."""

    direction: str
    residual: bool = False
    relu: bool = False

    def __str__(self) -> str:
        return self.direction + "+add" * self.residual + "+relu" * self.relu

    @property
    def training(self) -> bool:
        """Whether the batch's statistics are used."""
        return self.direction != "eval"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs, named as in the oracle, in the order in which every implementation returns them."""
        if self.direction != "backward":
            return ("y",)
        return ("dx", "dweight", "dbias", *(["dresidual"] if self.residual else []))


OPERATIONS = {
    str(operation): operation
    for direction in ("forward", "backward", "eval")
    for operation in (Operation(direction), Operation(direction, False, True), Operation(direction, True, True))
}
"""Operations by name, such as ``backward+add+relu``."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on one tensor.

    Attributes:
        shape: the tensor's shape; channels are the second axis.
        dtype: its long name.
        layout: how the axes lie in memory: ``nchw`` (for any number of axes), ``nhwc``, or ``nc`` for two.
        operation: one of ``OPERATIONS``.
    """

    shape: Shape
    dtype: str = "float32"
    layout: str = "nchw"
    operation: Operation = OPERATIONS["forward"]

    def __str__(self) -> str:
        return f"{self.tensor} {self.operation}"

    @property
    def tensor(self) -> str:
        """The tensor in words."""
        return f"{'x'.join(map(str, self.shape))} {self.short_dtype}{'' if self.layout == 'nc' else ' ' + self.layout}"

    @property
    def short_dtype(self) -> str:
        """The dtype's short name, such as f16."""
        return next(short for short, name in DTYPES.items() if name == self.dtype)

    @property
    def kind(self) -> str:
        """All but the shape: the dtype, the layout and the operation in words."""
        return f"{self.short_dtype} {self.layout} {self.operation}"

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


def shapes_of(names: Iterable[str]) -> list[Shape]:
    """Return the shapes of networks, and those written as 32x64x56x56; each once.

    Raises:
        ValueError: a name is neither a network nor a shape.
    """
    found: dict[Shape, None] = {}
    for name in names:
        found |= dict.fromkeys([layer.shape for layer in NETWORKS[name]] if name in NETWORKS else [_shape(name)])
    return list(found)


def select(
    shapes: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str], operations: Iterable[str], only: str = ""
) -> list[Case]:
    """Return all combinations whose name contains ``only``; those of one tensor follow each other.

    Args:
        shapes: as in :func:`shapes_of`.
        dtypes: short names.
        layouts: as in :class:`Case`.
        operations: keys of ``OPERATIONS``.
        only: part of a case's name.

    Raises:
        ValueError: a shape or an operation is not known, no layout fits a shape, or a shape has nothing to normalise in
            training.
    """
    chosen, found = [_operation(name) for name in operations], []
    spatial = [name for name in layouts if name != "nc"]
    for shape, dtype in product(shapes_of(shapes), dtypes):
        if len(shape) > 2 and not spatial:
            raise ValueError(f"layout 'nc' is of 2 axes, got {len(shape)}: {'x'.join(map(str, shape))}")
        if math.prod(shape) == shape[1] and any(operation.training for operation in chosen):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        for layout, operation in product(["nc"] if len(shape) == 2 else spatial, chosen):
            found.append(Case(shape, DTYPES[dtype], layout, operation))
    return [case for case in found if only in str(case)]


def _operation(name: str) -> Operation:
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation {name!r}, expected one of {', '.join(OPERATIONS)}")
    return OPERATIONS[name]


def _shape(text: str) -> Shape:
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 5 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"unknown shape {text!r}, expected such as 32x64x56x56, or one of {', '.join(NETWORKS)}")
    return tuple(map(int, sizes))
