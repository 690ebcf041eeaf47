"""The timed cases as data: the normalisation layers of networks, and the operations on them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from gpu_bn.explanation import DTYPES, ITEMSIZES

Shape = tuple[int, ...]
Layers = dict[Shape, int]
"""The number of layers of a network by the shape of their input; channels are the second axis."""


def _images(n: int, layers: Iterable[tuple[int, int, int]], rank: int = 2) -> Layers:
    """Return layers of ``(count, channels, side)`` for ``n`` images of ``rank`` spatial axes."""
    return {(n, channels, *[side] * rank): count for count, channels, side in layers}


RESNET_50 = (
    (1, 64, 112), (6, 64, 56), (4, 256, 56), (1, 128, 56), (7, 128, 28), (5, 512, 28), (1, 256, 28), (11, 256, 14),
    (7, 1024, 14), (1, 512, 14), (5, 512, 7), (4, 2048, 7),
)  # fmt: skip
"""All 53 layers for images of 224 x 224; the stride is in the 3 x 3 convolution, as in torchvision."""
MOBILENET_V2 = (
    (2, 32, 112), (1, 16, 112), (1, 96, 112), (1, 96, 56), (2, 24, 56), (3, 144, 56), (1, 144, 28), (3, 32, 28),
    (5, 192, 28), (1, 192, 14), (4, 64, 14), (8, 384, 14), (3, 96, 14), (5, 576, 14), (1, 576, 7), (3, 160, 7),
    (6, 960, 7), (1, 320, 7), (1, 1280, 7),
)  # fmt: skip
"""All 52 layers for images of 224 x 224."""

NETWORKS: dict[str, Layers] = {
    "few": dict.fromkeys([(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (256, 1024), (2, 3, 4, 4)], 1),
    "resnet50-32": _images(32, RESNET_50),
    "resnet50-256": _images(256, RESNET_50),
    "mobilenetv2": _images(32, MOBILENET_V2),
    "unet2d": _images(8, ((4, 64, 256), (4, 128, 128), (4, 256, 64), (4, 512, 32), (2, 1024, 16))),
    "unet3d": _images(2, ((4, 32, 64), (4, 64, 32), (4, 128, 16), (2, 256, 8)), rank=3),
    "mlp": dict.fromkeys([(256, 1024), (1024, 4096), (8192, 512), (65536, 256)], 1),
    "tiny": dict.fromkeys([(4, 8), (2, 3, 4, 4), (8, 16, 8, 8), (16, 64, 4, 4)], 1),
}
"""Networks by name; ``few`` chooses some layers of the others for a first look."""


@dataclass(frozen=True)
class Operation:
    """A ``direction`` (forward or backward in training, or eval) and the steps that are fused with it."""

    direction: str
    residual: bool = False
    relu: bool = False

    def __str__(self) -> str:
        return self.direction + "+add" * self.residual + "+relu" * self.relu

    @property
    def training(self) -> bool:
        """Whether the statistics of the batch are used."""
        return self.direction != "eval"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The oracle's names of the outputs, in the order in which every implementation returns them."""
        if self.direction != "backward":
            return ("y",)
        return ("dx", "dweight", "dbias", *(["dresidual"] if self.residual else []))


OPERATIONS = {
    str(operation): operation
    for direction in ("forward", "backward", "eval")
    for operation in (Operation(direction), Operation(direction, False, True), Operation(direction, True, True))
}
"""Operations by name, such as ``backward+add+relu``."""


@dataclass(frozen=True)
class Case:
    """One operation on one tensor.

    ``dtype`` is a long name. ``layout`` is the order of the axes in memory: ``nchw`` and ``nhwc``, for any number of
    axes above two, or ``nc`` for two. In ``shape``, channels are always the second axis.
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
        """The short name of the dtype, such as f16."""
        return next(short for short, name in DTYPES.items() if name == self.dtype)

    @property
    def kind(self) -> str:
        """The dtype, the layout and the operation in words."""
        return f"{self.short_dtype} {self.layout} {self.operation}"

    @property
    def bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


def shapes_of(names: Iterable[str]) -> list[Shape]:
    """Return each shape of networks and shapes such as 32x64x56x56 once; raise ``ValueError`` for other names."""
    layers: Layers = {}
    for name in names:
        if name not in NETWORKS and not re.fullmatch(r"0*[1-9][0-9]*(x0*[1-9][0-9]*){1,4}", name):
            raise ValueError(f"unknown shape {name!r}, expected such as 32x64x56x56, or one of {', '.join(NETWORKS)}")
        layers |= NETWORKS[name] if name in NETWORKS else {tuple(map(int, name.split("x"))): 1}
    return list(layers)


def select(
    shapes: Iterable[str], dtypes: Sequence[str], layouts: Iterable[str], operations: Iterable[str], only: str = ""
) -> list[Case]:
    """Return all combinations whose name contains ``only``; the cases of one tensor follow each other.

    ``shapes`` are names for :func:`shapes_of`, ``dtypes`` short names, ``operations`` keys of :data:`OPERATIONS`. Raise
    ``ValueError`` if a shape is unknown, no layout fits it, or training would have a single value per channel.
    """
    chosen, cases = [OPERATIONS[name] for name in operations], []
    spatial = [name for name in layouts if name != "nc"]
    for shape, dtype in product(shapes_of(shapes), dtypes):
        if len(shape) > 2 and not spatial:
            raise ValueError(f"layout 'nc' has 2 axes, got {len(shape)}: {'x'.join(map(str, shape))}")
        if math.prod(shape) == shape[1] and any(operation.training for operation in chosen):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        for layout, operation in product(["nc"] if len(shape) == 2 else spatial, chosen):
            cases.append(Case(shape, DTYPES[dtype], layout, operation))
    return [case for case in cases if only in str(case)]


def rows_by_tensor(items: Iterable[Any], cells: Callable[[Any], list[str]]) -> list[list[str] | str]:
    """Return rows of a table: a heading for each tensor, then the cells of each item whose ``case`` has that tensor."""
    rows: list[list[str] | str] = []
    for tensor, group in groupby(items, lambda item: item.case.tensor):
        rows += [tensor, *map(cells, group)]
    return rows
