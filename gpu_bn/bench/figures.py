"""The two pictures: how near to a copy, by size of the tensor; and ratios to the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from gpu_bn._explain import _size
from gpu_bn.bench.trial import Result
from gpu_bn.plan import TIERS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart with any colour vision."""
MARKERS = "osD^vPX"
TIERS_SHOWN = ("-", *TIERS, "one pass")
"""A colour each."""
WIDTH, DPI = 10.0, 110
MOST_ROWS = 60
"""That can be read in a picture."""


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
            aside = 1.06 ** (TIERS_SHOWN.index(tier) - 2.5)  # tiers side by side, where tensors have one size
            sizes = [r.case.bytes * aside for r in points]
            shares = [100 * (r.bandwidth or 0.0) / copy_bandwidth for r in points]
            label = backend if tier == "-" else f"{backend}: {tier}"
            marker = MARKERS[backends.index(backend) % len(MARKERS)]
            colour = COLOURS[TIERS_SHOWN.index(tier)]
            panel.plot(sizes, shares, marker, color=colour, markersize=5, alpha=0.75, label=label)
        panel.axhline(100, color="#555555", linewidth=1, linestyle="--")
        _plain(panel, direction)
        panel.set(xscale="log", xlabel="size of the tensor")
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.tick_params(axis="x", labelsize=8)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(int(size))))
    most = max((r.bandwidth or 0.0) for r in results) / copy_bandwidth
    panels[0].set(ylabel="bandwidth achieved (% of a copy)", ylim=(-3, max(108, 105 * most)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(labels), 5))
    figure.suptitle(
        f"Bytes that have to be moved over time, measured ({_regime(results[0])}); a copy has "
        f"{copy_bandwidth / 1e9:.4g} GB/s, a tensor in the cache may have more", fontsize=11,
    )  # fmt: skip
    figure.savefig(path)
    return path


def ratios(results: Sequence[Result], path: Path) -> Path:
    """Our time over each peer's; left of the line at 1, ours is the faster. A panel is a backend, a row a case; of more
    than :data:`MOST_ROWS` cases a row is an operation, with a mark for each tensor.
    """
    backends = list(dict.fromkeys(result.by for result in results))
    rows = list(dict.fromkeys(str(result.case) for result in results))
    one_by_one = len(rows) <= MOST_ROWS
    rows = rows if one_by_one else list(dict.fromkeys(_kind(result) for result in results))
    peers = list(dict.fromkeys(peer for result in results for peer in result.ratios[_regime(result)]))
    height = 1.6 + (0.21 if one_by_one else 0.12 + 0.16 * len(peers)) * len(rows)
    figure = Figure(figsize=(WIDTH, max(3.0, height)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(backends), sharex=True, sharey=True, squeeze=False)[0]
    everything = [ratio for result in results for ratio in result.ratios[_regime(result)].values()]
    for panel, backend in zip(panels, backends, strict=True):
        mine = [result for result in results if result.by == backend]
        for index, peer in enumerate(peers):
            found = [r for r in mine if peer in r.ratios[_regime(r)]]
            places = [rows.index(str(r.case) if one_by_one else _kind(r)) for r in found]
            offset = 0.0 if one_by_one else 0.75 * ((index + 0.5) / len(peers) - 0.5)  # side by side in a row
            panel.plot(
                [r.ratios[_regime(r)][peer] for r in found], [place + offset for place in places], linestyle="",
                label=peer, color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                markersize=5, alpha=1.0 if one_by_one else 0.6,
            )  # fmt: skip
        panel.axvline(1, color="#555555", linewidth=1, linestyle="--")
        _plain(panel, backend)
        panel.set(xscale="log", xlabel="our time / the peer's")
        if not one_by_one:
            panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=7 if one_by_one else 8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for line in [] if one_by_one else range(1, len(rows)):
        for panel in panels:
            panel.axhline(line - 0.5, color="#dddddd", linewidth=0.8)
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if _near(tick, everything)]
    for panel in panels:
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(peers), 5))
    figure.suptitle(
        f"Time over the peer's, measured ({_regime(results[0])}); left of 1 ours is the faster"
        + ("" if one_by_one else "; a mark for each tensor"), fontsize=11,
    )  # fmt: skip
    figure.savefig(path)
    return path


def _kind(result: Result) -> str:
    case = result.case
    return f"{case.short_dtype} {case.layout} {case.operation}"


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
