"""The two pictures: how near to a copy, by size of the tensor; and ratios to the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpu_bn.bench.trial import Result
from gpu_bn.plan import TIERS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart with any colour vision."""
MARKERS = "osD^vPX"
TIERS_SHOWN = ("-", *TIERS, "one pass")
"""A colour each."""
WIDTH, DPI = 10.0, 110


def draw(results: Sequence[Result], copy_bandwidth: float, folder: Path, raced: Sequence[Result] = ()) -> list[Path]:
    """Write ``roofline.png`` and ``peers.png`` of what was measured; those that have anything to show.

    The first also shows what was forced to take a tier, in ``raced``.
    """
    timed = [result for result in results if result.ours and result.timings]
    if not timed:
        return []
    forced = [result for result in raced if result.timings]
    written = [roofline([*timed, *forced], copy_bandwidth, folder / "roofline.png")]
    if any(result.ratios[_regime(result)] for result in timed):
        written.append(ratios(timed, folder / "peers.png"))
    return written


def roofline(results: Sequence[Result], copy_bandwidth: float, path: Path) -> Path:
    """Achieved share of a copy's bandwidth over the size of the tensor.

    A panel is a direction, a colour a tier, a marker a backend.
    """
    directions = list(dict.fromkeys(result.case.operation.direction for result in results))
    figure = Figure(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    groups = sorted({_group(result) for result in results})
    backends = sorted({backend for backend, _ in groups})
    for panel, direction in zip(panels, directions, strict=True):
        for backend, tier in groups:
            points = [r for r in results if r.case.operation.direction == direction and _group(r) == (backend, tier)]
            sizes = [r.case.bytes for r in points]
            shares = [100 * (r.bandwidth or 0.0) / copy_bandwidth for r in points]
            label = backend if tier == "-" else f"{backend}: {tier}"
            marker = MARKERS[backends.index(backend) % len(MARKERS)]
            colour = COLOURS[TIERS_SHOWN.index(tier)]
            panel.plot(sizes, shares, marker, color=colour, markersize=5, alpha=0.75, label=label)
        panel.axhline(100, color="#555555", linewidth=1, linestyle="--")
        _plain(panel, direction)
        panel.set(xscale="log", xlabel="bytes of the tensor")
    panels[0].set(ylabel="bandwidth achieved (% of a copy)", ylim=(0, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(labels), 5))
    figure.suptitle(f"Bytes of the floor over time, measured; a copy has {copy_bandwidth / 1e9:.4g} GB/s", fontsize=11)
    figure.savefig(path)
    return path


def ratios(results: Sequence[Result], path: Path) -> Path:
    """Our time over each peer's, a row a case; left of the line at 1, ours is the faster."""
    several = len({result.by for result in results}) > 1
    labels = [f"{result.case}{', ' + result.by if several else ''}" for result in results]
    peers = list(dict.fromkeys(peer for result in results for peer in result.ratios[_regime(result)]))
    figure = Figure(figsize=(WIDTH, max(3.0, 1.4 + 0.21 * len(labels))), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    everything = []
    for index, peer in enumerate(peers):
        found = [(row, r.ratios[_regime(r)][peer]) for row, r in enumerate(results) if peer in r.ratios[_regime(r)]]
        everything += [ratio for _, ratio in found]
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        panel.plot([ratio for _, ratio in found], [row for row, _ in found], linestyle="", label=peer, **style)
    panel.axvline(1, color="#555555", linewidth=1, linestyle="--")
    _plain(panel, "")
    panel.set(xscale="log", xlabel="our time / the peer's (left of 1: ours is the faster)")
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
    panel.invert_yaxis()
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if _near(tick, everything)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.legend(
        framealpha=1, edgecolor="none", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=len(peers)
    )
    panel.set_ylim(len(labels) - 0.4, -1.6)
    figure.suptitle(f"Ratio to peers, measured ({_regime(results[0])})", fontsize=11)
    figure.savefig(path)
    return path


def _near(tick: float, values: list[float]) -> bool:
    return math.log(min(values)) - 1 <= math.log(tick) <= math.log(max(values)) + 1 or tick == 1


def _regime(result: Result) -> str:
    return next(iter(result.timings))


def _group(result: Result) -> tuple[str, str]:
    return result.by.removesuffix(f" {result.tier}"), result.tier  # a forced tier is part of the name


def _plain(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
