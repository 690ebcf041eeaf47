"""The demo's figure: training curves, and what one unit sees, as in Figure 1 of Ioffe & Szegedy 2015."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpu_bn.demo.claims import Runs
from gpu_bn.demo.network import VARIANTS
from gpu_bn.demo.training import History

COLOURS = {"none": "#D55E00", "fixed": "#0072B2", "learned": "#009E73"}
"""Okabe and Ito's, told apart with any colour vision."""
STYLES = {"none": "-", "fixed": "--", "learned": "-"}
SIZE, DPI = (12.0, 8.4), 100


def draw(runs: Runs, rate: float, path: Path) -> None:
    """Write the figure; the suffix of ``path`` says the format."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 2)
    seeds = len(runs["none"])
    figure.suptitle(
        f"Sigmoid network 64-100-100-10 on scikit-learn's digits, learning rate {rate:g}; "
        f"{seeds} seed{'s' if seeds > 1 else ''}" + (" (line: mean, shade: lowest to highest)" if seeds > 1 else ""),
        fontsize=12,
    )
    curves(top[0], runs, "loss")
    top[0].set(yscale="log", ylabel="training loss (nats)", title="Training loss")
    top[0].legend(frameon=False)
    curves(top[1], runs, "accuracy")
    top[1].set(ylim=(0, 100), ylabel="test accuracy (%)", title="Test accuracy")
    for axes, variant in zip(bottom, ("none", "learned"), strict=True):
        bands(axes, runs[variant][0], variant)
    share_limits(bottom)
    for axes in (*top, *bottom):
        axes.set(xlabel="training step", xlim=(0, runs["none"][0].steps[-1]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def curves(axes: Axes, runs: Runs, what: str) -> None:
    """One quantity over the steps: mean over the seeds, and from the lowest to the highest."""
    for variant, histories in runs.items():
        values = np.array([getattr(history, what) for history in histories])
        steps, colour = histories[0].steps, COLOURS[variant]
        axes.plot(steps, values.mean(0), STYLES[variant], color=colour, linewidth=2, label=VARIANTS[variant])
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def bands(axes: Axes, history: History, variant: str) -> None:
    """Percentiles of what one sigmoid of h2 gets, over the steps."""
    values = np.array(history.bands)
    unit = typical_unit(values)
    for i, (style, text) in enumerate(((":", "15th"), ("-", "median"), (":", "85th"))):
        line = values[:, i, unit]
        axes.plot(history.steps, line, style, color=COLOURS[variant], linewidth=2 if style == "-" else 1.6)
        axes.annotate(text, (history.steps[-1], line[-1]), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.fill_between(history.steps, values[:, 0, unit], values[:, 2, unit], color=COLOURS[variant], alpha=0.15)
    axes.set(ylabel="input to the sigmoid", title=f"{VARIANTS[variant]}: percentiles of unit {unit} of h2, seed 0")


def typical_unit(bands: np.ndarray[Any, Any]) -> int:
    """The unit whose median wanders the median way of all units; ``bands`` are (T, 3, units)."""
    way = np.abs(np.diff(bands[:, 1], axis=0)).sum(0)
    return int(np.argsort(way)[len(way) // 2])


def share_limits(all_axes: Any) -> None:
    """Give the axes one range of y, so that widths compare."""
    limits = [axes.get_ylim() for axes in all_axes]
    for axes in all_axes:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
