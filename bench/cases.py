"""What is timed: shapes as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One tensor: its shape as torch gives it (channels second), its memory format and dtype."""

    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        text = "x".join(map(str, self.shape))
        if self.channels_last:
            text += " channels-last"
        return text if self.dtype == "float32" else f"{text} {self.dtype}"


CPU = (
    Case((32, 64, 56, 56)),
    Case((8, 64, 112, 112)),
    Case((2, 32, 32, 64, 64)),
    Case((32, 256, 14, 14)),
    Case((32, 512, 7, 7)),
    Case((16, 128, 1024)),
    Case((32, 64, 56, 56), channels_last=True),
    Case((256, 1024)),
    Case((4, 8)),
    Case((2, 3, 4, 4)),
    Case((32, 64, 56, 56), dtype="float64"),
    Case((32, 256, 14, 14), dtype="float64"),
    Case((32, 256, 14, 14), dtype="float16"),
    Case((32, 256, 14, 14), dtype="bfloat16"),
)
