"""What was done to a model's layers, by their qualified names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Filled by ``convert(model, report=report)`` and ``fold(model, report=report)``; print it.

    Attributes:
        converted: the layers that became ours.
        merged: what each of these layers does besides, in a fused model.
        folded: the convolution or linear layer that each of these normalisations was folded into.
        left: why each of these layers is what it was, or does not do more.
    """

    converted: list[str] = field(default_factory=list)
    merged: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ((len(getattr(self, name)), name) for name in ("converted", "merged", "folded", "left"))
        lines = [", ".join(f"{count} {name}" for count, name in counts)]
        lines += [f"  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
