"""Draw two pictures: bandwidth over bytes moved, with the bandwidth of copies; and ratios of times to the peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from gpu_bn.bench.measurement import Result
from gpu_bn.plan import TIERS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito, which people with any colour vision can tell apart; in grey, markers differ."""
MARKERS = "osD^vPX"
TIERS_SHOWN = ("-", *TIERS, "one pass")
"""The tiers in the order of their colours."""
WIDTH, DPI = 10.0, 110
MOST_ROWS = 60
"""The most rows that are legible in a picture."""
PANELS_A_ROW = 2
LABEL_DISTANCE = 0.06
"""The least distance between two labels, as a share of the panel's height."""
MOST_LABELS = 14


def draw(results: Sequence[Result], ceilings: Mapping[str, float], folder: Path, caption: str = "") -> list[Path]:
    """Write ``roofline.png`` and ``peers.png`` if there are results for them; return the written paths.

    ``ceilings`` are bandwidths of copies in bytes per second, by name.
    """
    timed = [result for result in results if result.timings]
    if not any(result.ours for result in timed):
        return []
    written = [roofline(timed, ceilings, folder / "roofline.png", caption)]
    compared = [result for result in timed if result.ratios.get(result.regime)]
    return [*written, ratios(compared, folder / "peers.png", caption)] if compared else written


# ----------------------------------------------------------------------------------------------------- roofline
def roofline(results: Sequence[Result], ceilings: Mapping[str, float], path: Path, caption: str = "") -> Path:
    """Draw bandwidth over the bytes of the floor, with a panel for each operation and a label for each tensor.

    Filled marks show our backends, with a colour for each tier; hollow marks show the peers.
    """
    operations = list(dict.fromkeys(str(result.case.operation) for result in results if result.ours))
    rows = -(-len(operations) // PANELS_A_ROW)
    figure = Figure(figsize=(WIDTH, 1.6 + 3.4 * rows), dpi=DPI, layout="constrained")
    first: Axes | None = None
    for number, operation in enumerate(operations, 1):
        columns = min(len(operations), PANELS_A_ROW)
        panel = figure.add_subplot(rows, columns, number, sharex=first, sharey=first, xscale="log", yscale="log")
        first = first or panel
        for name, members, style in _series(results):
            points = [(r.floor_bytes, r.bandwidth / 1e9) for r in members if str(r.case.operation) == operation]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, linestyle="", markersize=6, alpha=0.85, **style)
        for dashes, (name, bandwidth) in zip(("-", "--"), ceilings.items(), strict=False):
            panel.axhline(bandwidth / 1e9, color="#555555", linewidth=1.2, linestyle=dashes, label=name)
        _decorate(panel, operation)
        panel.set(xlabel="bytes that have to be moved", ylabel="GB/s")
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.xaxis.set_major_formatter(EngFormatter("B"))
        panel.yaxis.set_major_formatter("{x:g}")
    for panel, operation in zip(figure.axes, operations, strict=True):  # after all marks have set the scale
        _label_tensors(panel, [result for result in results if str(result.case.operation) == operation])
    title = f"Bandwidth over bytes moved, measured ({results[0].regime}), beneath what a copy reaches"
    return _save(figure, f"{title}\n{caption}", path)


def _backend_and_tier(result: Result) -> tuple[str, str]:
    return result.by.removesuffix(f" {result.tier}"), result.tier  # the name may end with a forced tier


def _series(results: Sequence[Result]) -> Iterator[tuple[str, list[Result], dict[str, Any]]]:
    """Yield the name, the results and the style of each series.

    Our series are the tiers of each backend: the backend decides the marker, the tier the colour. A peer is one series.
    """
    ours = sorted({_backend_and_tier(result) for result in results if result.ours})
    backends = list(dict.fromkeys(backend for backend, _ in ours))
    for backend, tier in ours:
        marker, colour = MARKERS[backends.index(backend) % len(MARKERS)], COLOURS[TIERS_SHOWN.index(tier)]
        members = [result for result in results if result.ours and _backend_and_tier(result) == (backend, tier)]
        yield backend if tier == "-" else f"{backend}: {tier}", members, {"marker": marker, "color": colour}
    for index, peer in enumerate(dict.fromkeys(result.by for result in results if not result.ours)):
        marker, colour = MARKERS[-1 - index % len(MARKERS)], COLOURS[-1 - index % len(COLOURS)]
        style = {"marker": marker, "markerfacecolor": "none", "markeredgecolor": colour}
        yield peer, [result for result in results if result.by == peer], style


def _label_tensors(panel: Axes, results: Sequence[Result]) -> None:
    """Write the name of each tensor right of the panel, with a line to our fastest mark for it."""
    fastest = sorted((result for result in results if result.ours), key=lambda result: result.bandwidth)
    best = {result.case.tensor: result for result in fastest}
    height, to_axes = 1.0, panel.transData + panel.transAxes.inverted()
    for tensor, result in sorted(best.items(), key=lambda item: -item[1].bandwidth)[:MOST_LABELS]:
        mark = (result.floor_bytes, result.bandwidth / 1e9)
        height = min(float(to_axes.transform(mark)[1]), height - LABEL_DISTANCE)
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 0, "color": "#999999", "linewidth": 0.6}
        panel.annotate(tensor, mark, (1.02, height), textcoords="axes fraction", va="center", arrowprops=line)


# -------------------------------------------------------------------------------------------------------- peers
def ratios(results: Sequence[Result], path: Path, caption: str = "") -> Path:
    """Draw our time over that of each peer, with a panel for each backend of ours and a row for each case.

    With more than :data:`MOST_ROWS` cases, a row stands for all tensors with one ``Case.kind``, a mark for each.
    """
    backends = list(dict.fromkeys(result.by for result in results))
    peers = list(dict.fromkeys(peer for result in results for peer in result.ratios[result.regime]))
    row_is_case = len({str(result.case) for result in results}) <= MOST_ROWS

    def row_of(result: Result) -> str:
        return str(result.case) if row_is_case else result.case.kind

    rows = list(dict.fromkeys(map(row_of, results)))
    height = 1.6 + (0.21 if row_is_case else 0.12 + 0.16 * len(peers)) * len(rows)
    figure = Figure(figsize=(WIDTH, max(3.0, height)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(backends), sharex=True, sharey=True, squeeze=False)[0]
    for panel, backend in zip(panels, backends, strict=True):
        for index, peer in enumerate(peers):
            compared = [r for r in results if r.by == backend and peer in r.ratios[r.regime]]
            # where a row has many marks, those of each peer get another height
            offset = 0.0 if row_is_case else 0.75 * ((index + 0.5) / len(peers) - 0.5)
            panel.plot(
                [r.ratios[r.regime][peer] for r in compared], [rows.index(row_of(r)) + offset for r in compared],
                linestyle="", label=peer, color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                markersize=5, alpha=1.0 if row_is_case else 0.6,
            )  # fmt: skip
        panel.axvline(1, color="#333333", linewidth=1.4)
        panel.annotate("equal", (1, 1), (3, -3), ("data", "axes fraction"), "offset points", va="top")
        panel.set(xscale="log", xlabel="our time / the peer's")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.tick_params(axis="x", rotation=45)
        _decorate(panel, backend)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.4, -1.1)
    title = f"Our time over the peer's, measured ({results[0].regime}); left of the line ours is faster"
    return _save(figure, f"{title}{'' if row_is_case else '; a mark for each tensor'}\n{caption}", path)


def _decorate(panel: Axes, title: str) -> None:
    panel.set_title(title)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.minorticks_off()


def _save(figure: Figure, title: str, path: Path) -> Path:
    """Write a picture with one legend for all its panels, and return its path."""
    entries = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in figure.axes)
    legend = {label: handle for panel in entries for handle, label in panel}
    location: Any = "outside lower center"
    figure.legend([*legend.values()], [*legend], frameon=False, loc=location, ncols=min(len(legend), 4))
    figure.suptitle(title.rstrip(), fontsize="medium")
    figure.savefig(path)
    return path
