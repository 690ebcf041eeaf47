"""The two pictures: bandwidth over the bytes moved, beneath the ceilings of a copy; and ratios to the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from gpu_bn.bench.measurement import Result
from gpu_bn.explanation import _size
from gpu_bn.plan import TIERS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart with any colour vision."""
MARKERS = "osD^vPX"
TIERS_SHOWN = ("-", *TIERS, "one pass")
"""A colour each."""
WIDTH, DPI = 10.0, 110
MOST_ROWS = 60
"""That can be read in a picture."""
PANELS_A_ROW = 3
APART = 0.06
"""Between two labels of a panel, as a share of its height."""
MOST_LABELS = 14


class Ceiling(NamedTuple):
    """What a copy reaches: a line in the picture, in bytes per second."""

    name: str
    bandwidth: float


def draw(
    results: Sequence[Result],
    ceilings: Sequence[Ceiling],
    folder: Path,
    raced: Sequence[Result] = (),
    caption: str = "",
) -> list[Path]:
    """Write ``roofline.png`` and ``peers.png`` of what was measured; those that have anything to show.

    Args:
        results: of all implementations.
        ceilings: of the memory, and of the cache.
        folder: where the pictures go.
        raced: results that were forced to take a tier; the first picture shows them too.
        caption: the machine and the threads.
    """
    timed = [result for result in results if result.timings]
    ours = [result for result in timed if result.ours]
    if not ours:
        return []
    forced = [result for result in raced if result.timings]
    written = [roofline([*timed, *forced], ceilings, folder / "roofline.png", caption)]
    if any(result.ratios[_regime(result)] for result in ours):
        written.append(ratios(ours, folder / "peers.png", caption))
    return written


def roofline(results: Sequence[Result], ceilings: Sequence[Ceiling], path: Path, caption: str = "") -> Path:
    """Bandwidth over the bytes that have to be moved. A panel is an operation, a label a tensor.

    Filled marks are ours, a colour a tier; hollow ones are the peers.
    """
    operations = list(dict.fromkeys(str(result.case.operation) for result in results if result.ours))
    columns = min(len(operations), PANELS_A_ROW)
    rows = -(-len(operations) // columns)
    figure = Figure(figsize=(WIDTH, 1.6 + 3.4 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    ours = sorted({_group(result) for result in results if result.ours})
    backends = sorted({backend for backend, _ in ours})
    peers = list(dict.fromkeys(result.by for result in results if not result.ours))
    for panel, operation in zip(panels, operations, strict=False):
        shown = [result for result in results if str(result.case.operation) == operation]
        for backend, tier in ours:
            label = backend if tier == "-" else f"{backend}: {tier}"
            marker, colour = MARKERS[backends.index(backend) % len(MARKERS)], COLOURS[TIERS_SHOWN.index(tier)]
            _points(panel, [r for r in shown if r.ours and _group(r) == (backend, tier)], label, marker, colour, colour)
        for index, peer in enumerate(peers):
            colour = COLOURS[-1 - index % len(COLOURS)]
            found = [r for r in shown if not r.ours and r.by == peer]
            _points(panel, found, peer, MARKERS[-1 - index % len(MARKERS)], "none", colour)
        panel.set(xscale="log", yscale="log")
        for style, ceiling in zip(("-", "--"), ceilings, strict=False):
            panel.axhline(ceiling.bandwidth / 1e9, color="#555555", linewidth=1.2, linestyle=style, label=ceiling.name)
        _plain(panel, operation)
    _name_ticks(panels[0], results, ceilings)
    kinds = {(result.case.short_dtype, result.case.layout == "nhwc") for result in results}
    for panel, operation in zip(panels, operations, strict=False):
        _label(panel, [r for r in results if str(r.case.operation) == operation], whole=len(kinds) > 1)
    for panel in panels[len(operations) :]:
        panel.set_axis_off()
    for panel in grid[:, 0]:
        panel.set_ylabel("GB/s")
    for panel in panels[max(len(operations) - columns, 0) : len(operations)]:
        panel.set_xlabel("bytes that have to be moved")
        panel.tick_params(labelbottom=True)
    named = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    title = f"Bandwidth over bytes moved, measured ({_regime(results[0])}), beneath what a copy reaches"
    figure.suptitle(f"{title}\n{caption}".rstrip(), fontsize=11)
    figure.savefig(path)
    return path


def _points(panel: Axes, results: Sequence[Result], label: str, marker: str, face: str, edge: str) -> None:
    if results:
        panel.plot(
            [r.floor_bytes for r in results], [(r.bandwidth or 0.0) / 1e9 for r in results], marker, label=label,
            markerfacecolor=face, markeredgecolor=edge, markersize=6, alpha=0.85,
        )  # fmt: skip


def _name_ticks(panel: Axes, results: Sequence[Result], ceilings: Sequence[Ceiling]) -> None:
    """Decades, in bytes and in GB/s; room on the right for the labels."""
    sizes = [result.floor_bytes for result in results]
    speeds = [*((r.bandwidth or 0.0) / 1e9 for r in results), *(ceiling.bandwidth / 1e9 for ceiling in ceilings)]
    panel.set_xlim(min(sizes) / 2, max(sizes) * (max(sizes) / min(sizes)) ** 0.7 * 2)
    panel.set_ylim(min(speed for speed in speeds if speed) / 1.6, max(speeds) * 1.6)
    panel.xaxis.set_major_locator(LogLocator(numticks=5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(int(size)) if size < 2 * max(sizes) else ""))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:g}"))
    panel.minorticks_off()


def _label(panel: Axes, results: Sequence[Result], whole: bool) -> None:
    """Name each tensor once, ``whole`` or by its shape: on the right, with a line to its fastest mark of ours."""
    best: dict[str, Result] = {}
    for result in results:
        if result.ours:
            key = result.case.tensor
            best[key] = max((result, best.get(key, result)), key=lambda one: one.bandwidth or 0.0)
    height, to_axes = 1.0, panel.transData + panel.transAxes.inverted()
    for tensor, result in sorted(best.items(), key=lambda item: -(item[1].bandwidth or 0.0))[:MOST_LABELS]:
        place = (result.floor_bytes, (result.bandwidth or 0.0) / 1e9)
        height = min(float(to_axes.transform(place)[1]), height - APART)
        panel.annotate(
            tensor if whole else tensor.split()[0], place, (0.6, height), xycoords="data",
            textcoords="axes fraction", va="center", fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6}, annotation_clip=False,
        ).set_in_layout(False)  # fmt: skip


def ratios(results: Sequence[Result], path: Path, caption: str = "") -> Path:
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
        panel.axvline(1, color="#333333", linewidth=1.4)
        panel.annotate("equal", (1, 1), (3, -3), ("data", "axes fraction"), "offset points", va="top", fontsize=8)
        _plain(panel, backend)
        panel.set(xscale="log", xlabel="our time / the peer's")
        if not one_by_one:
            panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for line in [] if one_by_one else range(1, len(rows)):
        for panel in panels:
            panel.axhline(line - 0.5, color="#dddddd", linewidth=0.8)
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if _near(tick, everything)]
    for panel in panels:
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
        panel.tick_params(axis="x", rotation=45 if len(ticks) * len(panels) > 16 else 0)
        panel.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(peers), 5))
    figure.suptitle(
        (f"Our time over the peer's, measured ({_regime(results[0])}); left of the line ours is the faster"
        + ("" if one_by_one else "; a mark for each tensor") + f"\n{caption}").rstrip(), fontsize=11,
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
