"""``--tiers all``: time every tier that can serve a case; find where they cross over; fit the planner's thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, cast

from gpu_bn.bench.cases import Case, by_tensor
from gpu_bn.bench.measurement import Result
from gpu_bn.bench.model import work_of
from gpu_bn.cli.console import Table, megabytes, microseconds
from gpu_bn.plan import THRESHOLDS, TIERS, Device, Thresholds, plan

FITTED: dict[str, tuple[float, ...]] = {
    "fill": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "usable_l2": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0),
    "vectors_per_thread": (1, 2, 4, 8, 16),
    "blocks_per_sm": (1, 2, 3, 4),
    "max_cooperative": (2, 4, 8, 16, 32, 64),
}
"""Thresholds that decide between tiers, and the values tried. The others shape a tier's launches; one time for each
tier cannot decide on them."""
FITTED_BY = "gpu_bn cupy"
"""The backend whose times are fitted: it has all tiers and takes the plan as it is. Triton plans with registers in
place of shared memory and has no cooperative tier; its crossovers are printed only."""
TIE = 1.03
"""The largest ratio of two times that does not make a crossover."""


@dataclass(frozen=True)
class TierTimes:
    """The time of each tier, in seconds, for a case and a backend, as the report keeps it.

    ``chosen`` is the tier that the backend takes unless it is forced; empty if it is not known.
    """

    case: Case
    by: str
    seconds: dict[str, float]
    chosen: str = ""

    @property
    def fastest(self) -> str:
        """The fastest tier."""
        return min(self.seconds, key=lambda tier: self.seconds[tier])

    def slowdown(self, tier: str) -> float:
        """Return a tier's time over the fastest's; one that was not timed counts as the slowest."""
        return self.seconds.get(tier, max(self.seconds.values())) / self.seconds[self.fastest]


def tier_times(forced: Sequence[Result], free: Sequence[Result] = ()) -> list[TierTimes]:
    """Collect the times of forced tiers. A result counts only if the backend took the tier that it was told to take.

    A backend that takes a tier by itself may launch it in another shape than when it is forced; the faster counts.
    """
    found: dict[tuple[Case, str], TierTimes] = {}
    for result in forced:
        backend, _, tier = result.by.rpartition(" ")
        if result.median and result.tier == tier:
            row = found.setdefault((result.case, backend), TierTimes(result.case, backend, {}))
            row.seconds[tier] = result.median
    for result in free:
        key, median, tier = (result.case, result.by), result.median, result.tier
        if key in found and median and tier in TIERS:
            times = found[key].seconds
            times[tier] = min(median, times.get(tier, median))
            found[key] = replace(found[key], chosen=tier)
    return list(found.values())


def crossovers(
    free: Sequence[Result], forced: Sequence[Result], device: Device
) -> tuple[list[Table | str], dict[str, Any]]:
    """Return the tables of results without and with a forced tier, and what goes into the JSON."""
    times = tier_times(forced, free)
    if not times:
        return ["No tier could be timed."], {}
    fitted = [row for row in times if row.by == FITTED_BY and len(row.seconds) > 1]
    best, decided = fit(fitted, device)
    found = ranges(times)
    kept = {"tiers": times, "ranges": found, "thresholds": asdict(best), "decided": decided}
    return [times_table(times), ranges_table(found), thresholds_text(fitted, device, best, decided)], kept


# --------------------------------------------------------------------------------------------------- thresholds
def fit(times: Sequence[TierTimes], device: Device) -> tuple[Thresholds, dict[str, list[float]]]:
    """Fit thresholds: start from the present ones and make the change that gains most, until none gains.

    Return the best; and of each threshold for which some value is worse, the other values that are as good.
    """
    best, least = THRESHOLDS, mean_slowdown(times, device, THRESHOLDS)
    while True:
        tried: dict[tuple[str, float], tuple[float, Thresholds]] = {}
        for name, value in ((name, value) for name, values in FITTED.items() for value in values):
            changed = replace(best, **{name: cast(Any, value)})
            tried[name, value] = mean_slowdown(times, device, changed), changed
        gained, changed = min(tried.values(), key=lambda pair: pair[0])
        if gained >= least:
            break
        least, best = gained, changed
    worse = dict.fromkeys(name for (name, _), (slowdown, _) in tried.items() if slowdown > least)
    as_good = [key for key, (slowdown, changed) in tried.items() if slowdown <= least and changed != best]
    return best, {name: [value for other, value in as_good if other == name] for name in worse}


def mean_slowdown(times: Sequence[TierTimes], device: Device, thresholds: Thresholds) -> float:
    """Return the mean time of the tiers that thresholds choose, over the fastest tier's."""
    slowdowns = [row.slowdown(plan(work_of(row.case), device, None, thresholds).tier) for row in times]
    return sum(slowdowns) / len(slowdowns) if slowdowns else 1.0


def thresholds_text(times: Sequence[TierTimes], device: Device, best: Thresholds, known: dict[str, list[float]]) -> str:
    """Return all fields of ``Thresholds`` as lines for plan.py, each with its old value or why it was not fitted."""
    before, after = (mean_slowdown(times, device, thresholds) for thresholds in (THRESHOLDS, best))
    fitted = f"fitted to {FITTED_BY} in {len(times)} cases on {device.name}: mean time over the fastest tier"
    lines = [f"Thresholds for plan.py, {fitted} {before:.3f} before, {after:.3f} after"]
    if not times:
        lines = [f"Thresholds for plan.py, as they are: fitting takes several tiers of {FITTED_BY}, timed"]
    copy = f"a copy has {device.bandwidth * THRESHOLDS.copy_share / 1e9:.4g} GB/s here: divide by the data sheet's"
    for name, value in asdict(best).items():
        default = getattr(THRESHOLDS, name)
        if name in known:
            why = f"was {default}" if value != default else "fitted, as it was"
            why += f"; as good: {', '.join(map(str, known[name]))}" if known[name] else ""
        else:
            reason = "" if name in FITTED else ": it shapes launches, not the choice"
            why = "not decided by these cases" + (f": {copy}" if name == "copy_share" else reason)
        lines.append(f"    {name}: {type(default).__name__} = {value}  # {why}")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- crossovers
def times_table(times: Sequence[TierTimes]) -> Table:
    """Return the table of each tier's time."""

    def cells(row: TierTimes) -> list[str]:
        seconds = [microseconds(row.seconds.get(tier)) for tier in TIERS]
        slowdown = f"{row.slowdown(row.chosen):.2f}" if row.chosen else "-"
        return [f"  {row.case.operation}", row.by, *seconds, row.fastest, row.chosen or "-", slowdown]

    header = ["operation", "by", *(f"{tier} (us)" for tier in TIERS), "fastest", "chosen", "slowdown"]
    caption = "Cold. Slowdown: the time of the tier that the backend chooses, over the fastest's."
    return Table("Tiers, each forced", header, by_tensor(times, cells), caption, keys=2)


@dataclass(frozen=True)
class Range:
    """A range of tensor sizes, in bytes, in which a tier is the fastest for a backend and a kind of case."""

    by: str
    of: str
    tier: str
    smallest: int
    largest: int


def ranges(times: Sequence[TierTimes]) -> list[Range]:
    """Return ranges from small tensors to large ones: tiers cross over where one ends and the next begins."""
    found: list[Range] = []
    ordered = sorted(times, key=lambda row: (row.by, row.case.kind, row.case.bytes))
    for (by, kind), members in groupby(ordered, lambda row: (row.by, row.case.kind)):
        last = Range(by, kind, "", 0, 0)
        for size, group in groupby(members, lambda row: row.case.bytes):
            tier = _fastest_of(list(group), last.tier)
            last = replace(found.pop(), largest=size) if tier == last.tier else Range(by, kind, tier, size, size)
            found.append(last)
    return found


def _fastest_of(times: Sequence[TierTimes], before: str) -> str:
    """Return the fastest tier for tensors of one size, on average; ``before`` if that is hardly slower."""
    total = {tier: sum(row.slowdown(tier) for row in times) for row in times for tier in row.seconds}
    fastest = min(total, key=lambda tier: total[tier])
    return before if total.get(before, math.inf) <= TIE * total[fastest] else fastest


def ranges_table(found: Sequence[Range]) -> Table:
    """Return the table of where tiers cross over."""
    caption = (
        f"By size of the tensor, on average over those of one size; times within {TIE - 1:.0%} make no crossover. How "
        "many channels share the bytes decides as much: the table above has each."
    )
    rows = [[each.by, each.of, each.tier, megabytes(each.smallest), megabytes(each.largest)] for each in found]
    return Table("Crossovers: the fastest tier", ["by", "of", "tier", "from (MB)", "to (MB)"], rows, caption)
