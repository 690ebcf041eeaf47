"""Draw the demo's figure: training curves, the drift of h2's input, one unit's input (Fig. 1, Ioffe & Szegedy 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpu_bn.demo.checks import Capacity, Identity
from gpu_bn.demo.claims import TARGET, Runs, spread
from gpu_bn.demo.network import VARIANTS
from gpu_bn.demo.training import EVERY, History

COLOURS = {"none": "#D55E00", "fixed": "#0072B2", "learned": "#009E73"}
"""Colours by Okabe and Ito, which people with any colour vision can tell apart."""
STYLES = {"none": "-", "fixed": "--", "learned": "-"}
MARKERS = {"none": "", "fixed": "", "learned": "o"}
"""Lines and markers that differ in grey, too."""
SHORT = {"none": "no BN", "fixed": "fixed pair", "learned": "learned pair"}
SIZE, DPI = (9.2, 8.2), 130
"""The size in inches, and the dots per inch. Text of 10 points is still legible at a width of 400 pixels."""
SETTLED = 3
"""The number of first records that the axis range of the percentiles ignores, as they are extreme without BN."""
LEAST_ERROR = 0.1
"""The error in per cent that stands for zero on the logarithmic axis. It is less than the error of one test image."""


def draw(runs: Runs, identities: Sequence[Identity], capacities: Sequence[Capacity], rate: float, path: Path) -> None:
    """Write the figure to a file. The suffix of ``path`` determines the format."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 3)
    seeds = len(runs["none"])
    heading = (
        f"Sigmoid network 64-100-100-10 on scikit-learn's digits, learning rate {rate:g}\n"
        f"{seeds} seed{'s (line: mean, shade: lowest to highest)' if seeds > 1 else ''}"
    )
    curves(top[0], runs, lambda history: history.loss)
    top[0].set(title="Training loss (nats)")
    handles, labels = top[0].get_legend_handles_labels()
    place: Any = "outside upper center"
    legend = figure.legend(
        handles, labels, loc=place, ncols=3, frameon=False, fontsize=11, title=heading, title_fontsize=12
    )  # a separate heading would overlap the legend
    legend.get_title().set_multialignment("center")
    curves(top[1], runs, lambda history: np.maximum(100 - np.array(history.accuracy), LEAST_ERROR))
    top[1].set(title="Test error (%)")
    curves(top[2], runs, lambda history: history.drifts("output")[0], skip=1)
    top[2].set(title=f"Drift that h2 sees\n(SDs per {EVERY} steps)")
    unit = typical_unit(np.array(runs["none"][0].bands))
    for axes, variant in zip(bottom[:2], ("none", "learned"), strict=True):
        bands(axes, runs[variant][0], variant, unit)
        axes.set_title(f"{SHORT[variant]}:\ninput of h2's unit {unit}")
    share_limits(bottom[:2], [runs[variant][0] for variant in ("none", "learned")], unit)
    for axes in (*top, *bottom[:2]):
        axes.set(xlabel="training step", xlim=(0, runs["none"][0].steps[-1]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    numbers(bottom[2], runs, identities, capacities)
    figure.supxlabel(
        f"Drift: how far the mean of h1's outputs moves. Below: 15th, 50th and 85th percentile, seed 0.\n"
        f"Without BN, unit {unit} moves as the median unit does; the axis covers step {SETTLED * EVERY} on.",
        fontsize=10,
    )  # fmt: skip
    figure.savefig(path)


def curves(axes: Axes, runs: Runs, quantity: Any, skip: int = 0) -> None:
    """Draw the mean and the range over the seeds of ``quantity(history)`` against the steps, on a logarithmic axis.

    The first ``skip`` records have no value.
    """
    for variant, histories in runs.items():
        values = np.array([quantity(history) for history in histories])
        steps, colour = histories[0].steps[skip:], COLOURS[variant]
        axes.plot(
            steps, values.mean(0), STYLES[variant], color=colour, linewidth=2, label=VARIANTS[variant],
            marker=MARKERS[variant], markersize=5, markevery=max(len(steps) // 8, 1),
        )  # fmt: skip
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.set_yscale("log")


def bands(axes: Axes, history: History, variant: str, unit: int) -> None:
    """Draw percentiles of the input of one sigmoid of h2 against the steps."""
    values = np.array(history.bands)
    for i, (style, text) in enumerate(((":", "15th"), ("-", "median"), (":", "85th"))):
        line = values[:, i, unit]
        axes.plot(history.steps, line, style, color=COLOURS[variant], linewidth=2 if style == "-" else 1.6)
        end = (history.steps[-1], line[-1])
        axes.annotate(text, end, (-2, 3), textcoords="offset points", ha="right", va="bottom", fontsize=10)
    axes.fill_between(history.steps, values[:, 0, unit], values[:, 2, unit], color=COLOURS[variant], alpha=0.15)


def typical_unit(bands: np.ndarray[Any, Any]) -> int:
    """Return the unit whose median moves by the median distance of all units; ``bands`` has shape (T, 3, units)."""
    distance = np.abs(np.diff(bands[:, 1], axis=0)).sum(0)
    return int(np.argsort(distance)[len(distance) // 2])


def share_limits(all_axes: Any, histories: Sequence[History], unit: int) -> None:
    """Set the same y range on all axes: that of the records after the first :data:`SETTLED`, with margins of 10 %."""
    values = np.concatenate([np.array(history.bands)[SETTLED:, :, unit].ravel() for history in histories])
    values = values if values.size else np.array([history.bands[-1][:, unit] for history in histories])
    low, high = float(values.min()), float(values.max())
    margin = 0.1 * (high - low) + 1e-6
    for axes in all_axes:
        axes.set_ylim(low - margin, high + margin)


def numbers(axes: Axes, runs: Runs, identities: Sequence[Identity], capacities: Sequence[Capacity]) -> None:
    """Write the numbers behind the claims as text."""
    axes.set_axis_off()
    axes.set_title("In numbers", loc="left")
    lines = [f"steps to {TARGET:.0f} % accuracy"]
    lines += [f"  {SHORT[v]:13}{spread([h.steps_to(TARGET) for h in runs[v]], 0)}" for v in runs]
    lines += ["", "drift that h2 sees"]
    lines += [f"  {SHORT[v]:13}{spread([h.drift('output')[0] for h in runs[v]], 4)}" for v in runs]
    exact = identities[0]
    same, images = sum(c.agree for c in capacities), sum(c.images for c in capacities)
    lines += ["", "BN as the identity,", "greatest |BN(x) - x|"]
    lines += [f"  pair (1, 0)     {exact.standardised:.2g}", f"  pair (SD, mean) {exact.restored:.1g}"]
    lines += ["", "labels after insertion:", f"  {same:,} of {images:,} equal"]
    axes.text(0, 0.98, "\n".join(lines), transform=axes.transAxes, va="top", family="monospace", fontsize=10)
