"""A report on the layers that were converted, merged or folded, by their qualified names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Collect by qualified name what ``convert(model, report=report)`` and ``fold(model, report=report)`` did.

    Attributes:
        converted: the layers that were converted to ours.
        merged: for each layer that also computes a sum or an activation: a description of it.
        folded: for each normalisation that was folded: the convolution or linear layer that includes it.
        left: for each layer that was not converted, merged or folded: the reason.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> report = nn.Report()
        >>> model = nn.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4)), report=report)
        >>> print(report)
        1 converted, 0 merged, 0 folded, 0 left
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
