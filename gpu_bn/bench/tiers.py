"""``--tiers all``: every tier that can serve a case, timed; where they cross over; thresholds that choose better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple

from gpu_bn.bench.cases import Case
from gpu_bn.bench.measurement import Result
from gpu_bn.bench.model import work_of
from gpu_bn.cli.console import Table
from gpu_bn.explanation import _size, _time
from gpu_bn.plan import THRESHOLDS, TIERS, Device, Thresholds, plan

FITTED: dict[str, tuple[float, ...]] = {
    "fill": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "usable_l2": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0),
    "vectors_per_thread": (1, 2, 4, 8, 16),
    "blocks_per_sm": (1, 2, 3, 4),
    "max_cooperative": (2, 4, 8, 16, 32, 64),
}
"""Thresholds that decide between tiers, and the values tried. The others shape the launches of a tier, which a time for
each tier does not tell apart."""
FITTED_BY = "gpu_bn cupy"
"""Whose times are fitted: the backend that has all tiers, and takes the plan as it is. Triton's plans are for registers
in place of shared memory, and without the cooperative tier; its crossovers are printed, and fit nothing."""

TIE = 1.03
"""Times that are no further apart do not make a crossover."""


@dataclass(frozen=True)
class Race:
    """A case, and each tier's time in seconds, of one backend.

    Attributes:
        chosen: the tier that the backend takes unless it is forced; empty if that was not seen.
    """

    case: Case
    by: str
    seconds: dict[str, float]
    chosen: str = ""

    @property
    def fastest(self) -> str:
        """The tier."""
        return min(self.seconds, key=lambda tier: self.seconds[tier])

    def lost(self, tier: str) -> float:
        """A tier's time over the fastest's; of one that was not timed, the slowest's."""
        return self.seconds.get(tier, max(self.seconds.values())) / self.seconds[self.fastest]


def races(forced: Sequence[Result], free: Sequence[Result] = ()) -> list[Race]:
    """The races among forced tiers. A backend that has taken another tier than it was told does not count.

    Where a backend takes a tier by itself, it may launch it in another shape than when it is forced; the better counts.
    """
    found: dict[tuple[str, str], Race] = {}
    for result in forced:
        backend, _, tier = result.by.rpartition(" ")
        if result.best is not None and result.tier == tier:
            race = found.setdefault((str(result.case), backend), Race(result.case, backend, {}))
            race.seconds[tier] = result.best.median
    for result in free:
        entered = found.get((str(result.case), result.by))
        if entered is not None and result.best is not None and result.tier in TIERS:
            faster = min(result.best.median, entered.seconds.get(result.tier, result.best.median))
            found[str(result.case), result.by] = replace(
                entered, seconds={**entered.seconds, result.tier: faster}, chosen=result.tier
            )
    return list(found.values())


def fit(entered: Sequence[Race], device: Device, start: Thresholds = THRESHOLDS) -> Thresholds:
    """The thresholds by whose plans less time is lost: from ``start`` always the one change that gains most."""
    best, least = start, mean_lost(entered, device, start)
    while True:
        changed = [thresholds for name in FITTED for thresholds in tried(name, best)]
        lost = [mean_lost(entered, device, thresholds) for thresholds in changed]
        if min(lost) >= least:
            return best
        least = min(lost)
        best = changed[lost.index(least)]


def tried(name: str, thresholds: Thresholds) -> list[Thresholds]:
    """Thresholds with each of the values that one of them may have."""
    changes: list[dict[str, Any]] = [{name: value} for value in FITTED.get(name, ())]
    return [replace(thresholds, **change) for change in changes]


def decided(entered: Sequence[Race], device: Device, best: Thresholds) -> dict[str, list[float]]:
    """The thresholds of which some other value loses more time, each with the other values that lose none."""
    least, found = mean_lost(entered, device, best), {}
    for name, values in FITTED.items():
        as_good = [
            value
            for value, thresholds in zip(values, tried(name, best), strict=True)
            if mean_lost(entered, device, thresholds) <= least
        ]
        if len(as_good) < len(values):
            found[name] = [value for value in as_good if value != getattr(best, name)]
    return found


def mean_lost(entered: Sequence[Race], device: Device, thresholds: Thresholds) -> float:
    """Mean time of the tiers that thresholds choose, over the fastest tier's."""
    lost = [race.lost(plan(work_of(race.case), device, None, thresholds).tier) for race in entered]
    return sum(lost) / len(lost) if lost else 1.0


def crossovers(
    free: Sequence[Result], forced: Sequence[Result], device: Device
) -> tuple[list[Table | str], dict[str, Any]]:
    """The tables of results without and with a tier forced, and what JSON keeps of them."""
    entered = races(forced, free)
    if not entered:
        return ["No tier could be timed."], {}
    fitted_to = [race for race in entered if race.by == FITTED_BY and len(race.seconds) > 1]
    best = fit(fitted_to, device)
    known = decided(fitted_to, device, best)
    kept = {
        "tiers": [{"case": str(r.case), "by": r.by, "seconds": r.seconds, "chosen": r.chosen} for r in entered],
        "ranges": [found._asdict() for found in ranges(entered)],
        "thresholds": {field.name: getattr(best, field.name) for field in fields(Thresholds)},
        "decided": known,
    }
    return [races_table(entered), ranges_table(entered), thresholds_text(fitted_to, device, best, known)], kept


def races_table(entered: Sequence[Race]) -> Table:
    """Each tier's time."""
    rows: list[list[str] | str] = []
    for tensor, group in groupby(entered, lambda race: race.case.tensor):
        rows.append(tensor)
        for race in group:
            times = [_time(race.seconds[tier]) if tier in race.seconds else "-" for tier in TIERS]
            lost = f"{race.lost(race.chosen):.2f}" if race.chosen else "-"
            rows.append([f"  {race.case.operation}", race.by, *times, race.fastest, race.chosen or "-", lost])
    header = ["operation", "by", *TIERS, "fastest", "chosen", "lost"]
    caption = "Cold. lost: the time of the tier that the backend chooses, over the fastest's."
    return Table("Tiers, each forced", header, rows, caption, keys=2)


class Range(NamedTuple):
    """Of a backend and a kind of case: a tier, and the smallest and the largest tensor, in bytes, of those in a row for
    which it is the fastest.
    """

    by: str
    of: str
    tier: str
    smallest: int
    largest: int


def ranges(entered: Sequence[Race]) -> list[Range]:
    """From small tensors to large ones: where one ends and the next begins, tiers cross over."""
    kinds: dict[tuple[str, str], list[Race]] = {}
    for race in entered:
        case = race.case
        kinds.setdefault((race.by, f"{case.short_dtype} {case.layout} {case.operation}"), []).append(race)
    found: list[Range] = []
    for (by, kind), members in sorted(kinds.items()):
        members.sort(key=lambda race: race.case.bytes)
        last = Range(by, kind, "", 0, 0)
        for size, group in groupby(members, lambda race: race.case.bytes):
            tier = fastest_of(list(group), last.tier)
            if tier == last.tier:
                found.pop()
                last = last._replace(largest=size)
            else:
                last = Range(by, kind, tier, size, size)
            found.append(last)
    return found


def fastest_of(entered: Sequence[Race], before: str) -> str:
    """Of races with tensors of one size, by what each tier loses on average; ``before`` if it loses hardly more."""
    lost = {tier: sum(race.lost(tier) for race in entered) for race in entered for tier in race.seconds}
    least = min(lost.values())
    return before if lost.get(before, math.inf) <= TIE * least else min(lost, key=lambda tier: lost[tier])


def ranges_table(entered: Sequence[Race]) -> Table:
    """Where tiers cross over."""
    caption = (
        f"By size of the tensor, on average over those of one size; times within {TIE - 1:.0%} make no crossover. How "
        "many channels share the bytes decides as much: the table above has each."
    )
    rows = [[*found[:3], _size(found.smallest), _size(found.largest)] for found in ranges(entered)]
    return Table("Crossovers: the fastest tier", ["by", "of", "tier", "from", "to"], rows, caption)


def thresholds_text(entered: Sequence[Race], device: Device, best: Thresholds, known: dict[str, list[float]]) -> str:
    """All fields of ``Thresholds``, as lines for plan.py: fitted, or why not."""
    before, after = (mean_lost(entered, device, thresholds) for thresholds in (THRESHOLDS, best))
    fitted = f"fitted to {FITTED_BY} in {len(entered)} cases on {device.name}: mean time over the fastest tier"
    head = f"Thresholds for plan.py, {fitted} {before:.3f} before, {after:.3f} after"
    if not entered:
        head = f"Thresholds for plan.py, as they are: fitting takes several tiers of {FITTED_BY}, timed"
    copy = f"a copy has {device.bandwidth * THRESHOLDS.copy_share / 1e9:.4g} GB/s here: divide by the data sheet's"
    lines = [head]
    for field in fields(Thresholds):
        name, now = field.name, getattr(best, field.name)
        was = getattr(THRESHOLDS, name)
        if name in known:
            why = f"was {was}" if now != was else "fitted, as it was"
            why += f"; as good: {', '.join(map(str, known[name]))}" if known[name] else ""
        elif name == "copy_share":
            why = f"not decided by these cases: {copy}"
        else:
            why = "not decided by these cases" + ("" if name in FITTED else ": it shapes launches, not the choice")
        lines.append(f"    {name}: {type(was).__name__} = {now}  # {why}")
    return "\n".join(lines) + "\n"
