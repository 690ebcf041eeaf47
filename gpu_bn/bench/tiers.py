"""``--tiers all``: find the fastest tier by the size of the tensor, and fit the planner's thresholds to the times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, cast

from gpu_bn.bench.cases import Case, rows_by_tensor
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
"""The thresholds that decide between tiers, and the values tried. The others shape the launches of one tier; one time
for each tier cannot decide them."""
FITTED_BY = "gpu_bn cupy"
"""The backend whose times are fitted: it has all tiers and follows the plan exactly. The Triton backend plans with
registers instead of shared memory and has no cooperative tier; its crossovers are only printed."""
TIE = 1.03
"""The largest ratio of two times that counts as equal."""


@dataclass(frozen=True)
class TierTimes:
    """The time of each tier in seconds for a case and a backend; the fields go into the report.

    ``chosen`` is the tier that the backend takes when none is forced; empty if it is not known.
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
        """Return the time of a tier over that of the fastest; a tier that was not timed counts as the slowest."""
        return self.seconds.get(tier, max(self.seconds.values())) / self.seconds[self.fastest]


def tier_times(forced: Sequence[Result], free: Sequence[Result] = ()) -> list[TierTimes]:
    """Collect the times of forced tiers from the results whose backend took the forced tier.

    A backend may launch a tier that it chooses itself, in ``free``, differently; the faster time counts.
    """
    rows: dict[tuple[Case, str], TierTimes] = {}
    for result in forced:
        backend, _, tier = result.by.rpartition(" ")
        if result.median and result.tier == tier:
            row = rows.setdefault((result.case, backend), TierTimes(result.case, backend, {}))
            row.seconds[tier] = result.median
    for result in free:
        key, median, tier = (result.case, result.by), result.median, result.tier
        if key in rows and median and tier in TIERS:
            times = rows[key].seconds
            times[tier] = min(median, times.get(tier, median))
            rows[key] = replace(rows[key], chosen=tier)
    return list(rows.values())


def crossovers(
    free: Sequence[Result], forced: Sequence[Result], device: Device
) -> tuple[list[Table | str], dict[str, Any]]:
    """Return the tables and the JSON of the times with free and with forced tiers."""
    times = tier_times(forced, free)
    if not times:
        return ["No tier could be timed."], {}
    fitted = [row for row in times if row.by == FITTED_BY and len(row.seconds) > 1]
    best, decided = fit(fitted, device)
    by_size = ranges(times)
    content = {"tiers": times, "ranges": by_size, "thresholds": asdict(best), "decided": decided}
    return [times_table(times), ranges_table(by_size), thresholds_text(fitted, device, best, decided)], content


# --------------------------------------------------------------------------------------------------- thresholds
def fit(times: Sequence[TierTimes], device: Device) -> tuple[Thresholds, dict[str, list[float]]]:
    """Fit thresholds: start from the present ones and make the change that gains most, until no change gains.

    Return the best thresholds. Also return, for each threshold of which some value is worse, the equally good values.
    """
    best, least = THRESHOLDS, mean_slowdown(times, device, THRESHOLDS)
    while True:
        tried: dict[tuple[str, float], tuple[float, Thresholds]] = {}
        for name, values in FITTED.items():
            for value in values:
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
    """Return the mean, over the cases, of the time of the tier that the thresholds choose over the fastest time."""
    slowdowns = [row.slowdown(plan(work_of(row.case), device, None, thresholds).tier) for row in times]
    return sum(slowdowns) / len(slowdowns) if slowdowns else 1.0


def thresholds_text(
    times: Sequence[TierTimes], device: Device, best: Thresholds, decided: dict[str, list[float]]
) -> str:
    """Return all fields of ``Thresholds`` as source lines, each with its old value or why it was not fitted."""
    before, after = (mean_slowdown(times, device, thresholds) for thresholds in (THRESHOLDS, best))
    fitted = f"fitted to {FITTED_BY} in {len(times)} cases on {device.name}: mean time over the fastest tier"
    lines = [f"Thresholds for gpu_model.py, {fitted} {before:.3f} before, {after:.3f} after"]
    if not times:
        lines = [f"Thresholds for gpu_model.py, as they are: fitting takes several tiers of {FITTED_BY}, timed"]
    copy = f"a copy has {device.bandwidth * THRESHOLDS.copy_share / 1e9:.4g} GB/s here: divide by the data sheet's"
    for name, value in asdict(best).items():
        default = getattr(THRESHOLDS, name)
        if name in decided:
            why = f"was {default}" if value != default else "fitted, as it was"
            why += f"; as good: {', '.join(map(str, decided[name]))}" if decided[name] else ""
        else:
            reason = "" if name in FITTED else ": it shapes launches, not the choice"
            why = "not decided by these cases" + (f": {copy}" if name == "copy_share" else reason)
        lines.append(f"    {name}: {type(default).__name__} = {value}  # {why}")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- crossovers
def times_table(times: Sequence[TierTimes]) -> Table:
    """Return the table of the time of each tier."""

    def cells(row: TierTimes) -> list[str]:
        seconds = [microseconds(row.seconds.get(tier)) for tier in TIERS]
        slowdown = f"{row.slowdown(row.chosen):.2f}" if row.chosen else "-"
        return [f"  {row.case.operation}", row.by, *seconds, row.fastest, row.chosen or "-", slowdown]

    header = ["operation", "by", *(f"{tier} (us)" for tier in TIERS), "fastest", "chosen", "slowdown"]
    caption = "Cold. Slowdown: the time of the tier that the backend chooses, over the fastest's."
    return Table("Tiers, each forced", header, rows_by_tensor(times, cells), caption, keys=2)


@dataclass(frozen=True)
class Range:
    """A range of tensor sizes in bytes in which a tier is the fastest for backend ``by`` and cases of kind ``of``."""

    by: str
    of: str
    tier: str
    smallest: int
    largest: int


def ranges(times: Sequence[TierTimes]) -> list[Range]:
    """Return ranges in the order of their sizes; tiers cross over where one range ends and the next begins."""
    result: list[Range] = []
    ordered = sorted(times, key=lambda row: (row.by, row.case.kind, row.case.bytes))
    for (by, kind), members in groupby(ordered, lambda row: (row.by, row.case.kind)):
        last = Range(by, kind, "", 0, 0)
        for size, group in groupby(members, lambda row: row.case.bytes):
            tier = _fastest_tier(list(group), last.tier)
            last = replace(result.pop(), largest=size) if tier == last.tier else Range(by, kind, tier, size, size)
            result.append(last)
    return result


def _fastest_tier(times: Sequence[TierTimes], previous: str) -> str:
    """Return the tier with the least mean slowdown, or the ``previous`` tier if it is within :data:`TIE`."""
    total = {tier: sum(row.slowdown(tier) for row in times) for row in times for tier in row.seconds}
    fastest = min(total, key=lambda tier: total[tier])
    return previous if total.get(previous, math.inf) <= TIE * total[fastest] else fastest


def ranges_table(by_size: Sequence[Range]) -> Table:
    """Return the table of ranges."""
    caption = (
        f"By size of the tensor, on average over those of one size; times within {TIE - 1:.0%} make no crossover. How "
        "many channels share the bytes decides as much: the table above has each."
    )
    rows = [[each.by, each.of, each.tier, megabytes(each.smallest), megabytes(each.largest)] for each in by_size]
    return Table("Crossovers: the fastest tier", ["by", "of", "tier", "from (MB)", "to (MB)"], rows, caption)
