"""``--tiers all``: every tier that can serve a case, timed; where they cross over; thresholds that choose better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_bn._console import table
from gpu_bn._explain import _time
from gpu_bn.bench.cases import Case
from gpu_bn.bench.model import work_of
from gpu_bn.bench.trial import Result
from gpu_bn.plan import THRESHOLDS, TIERS, Device, Thresholds, plan

FITTED: dict[str, tuple[float, ...]] = {
    "fill": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "usable_l2": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0),
    "vectors_per_thread": (1, 2, 4, 8, 16),
    "blocks_per_sm": (1, 2, 3, 4),
}
"""Thresholds that decide between tiers, and the values tried."""
FITTED_BY = "gpu_bn cupy"
"""Whose times are fitted: the backend that has all tiers, and takes the plan as it is."""


@dataclass(frozen=True)
class Race:
    """A case, and each tier's time in seconds, of one backend."""

    case: Case
    by: str
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The tier."""
        return min(self.seconds, key=lambda tier: self.seconds[tier])

    def lost(self, tier: str) -> float:
        """A tier's time over the fastest's; of one that was not timed, the slowest's."""
        return self.seconds.get(tier, max(self.seconds.values())) / self.seconds[self.fastest]


def races(results: Sequence[Result]) -> list[Race]:
    """The races among forced tiers. A backend that has taken another tier than it was told does not count."""
    found: dict[tuple[str, str], Race] = {}
    for result in results:
        backend, _, tier = result.by.rpartition(" ")
        if result.best is not None and result.tier == tier:
            race = found.setdefault((str(result.case), backend), Race(result.case, backend, {}))
            race.seconds[tier] = result.best.median
    return list(found.values())


def fit(entered: Sequence[Race], device: Device, start: Thresholds = THRESHOLDS) -> Thresholds:
    """The thresholds by whose plans least time is lost, one after another, twice; ties leave them as they are."""
    best = start
    for name, values in [*FITTED.items()] * 2:
        tried: list[Thresholds] = [best]
        for value in values:
            changed: dict[str, Any] = {name: value}
            tried.append(replace(best, **changed))
        best = min(tried, key=lambda thresholds: mean_lost(entered, device, thresholds))
    return best


def mean_lost(entered: Sequence[Race], device: Device, thresholds: Thresholds) -> float:
    """Mean time of the tiers that thresholds choose, over the fastest tier's."""
    lost = [race.lost(plan(work_of(race.case), device, None, thresholds).tier) for race in entered]
    return sum(lost) / len(lost)


def crossovers(results: Sequence[Result], device: Device) -> tuple[str, dict[str, Any]]:
    """The tables, and what JSON keeps of them."""
    entered = races(results)
    if not entered:
        return "No tier could be timed.", {}
    fitted_to = [race for race in entered if race.by == FITTED_BY and len(race.seconds) > 1]
    rows, kept = [], []
    for race in entered:
        chosen = plan(work_of(race.case), device).tier
        times = [_time(race.seconds[tier]) if tier in race.seconds else "-" for tier in TIERS]
        rows.append([str(race.case), race.by, *times, race.fastest, chosen, f"{race.lost(chosen):.2f}"])
        kept.append({"case": str(race.case), "by": race.by, "seconds": race.seconds, "plan": chosen})
    header = ["case", "by", *TIERS, "fastest", "plan.py", "lost"]
    caption = "Cold. lost: the time of the tier that plan.py chooses, over the fastest's."
    text = table("Tiers, each forced", header, rows, caption)
    if not fitted_to:
        return f"{text}\nThresholds were not fitted: that takes several tiers of {FITTED_BY}.", {"tiers": kept}
    best = fit(fitted_to, device)
    return f"{text}\n{thresholds_table(fitted_to, device, best)}", {
        "tiers": kept, "thresholds": {name: getattr(best, name) for name in FITTED}
    }  # fmt: skip


def thresholds_table(entered: Sequence[Race], device: Device, best: Thresholds) -> str:
    """The fitted thresholds, as lines for plan.py."""
    before, after = (mean_lost(entered, device, thresholds) for thresholds in (THRESHOLDS, best))
    lines = [f"Thresholds for plan.py, fitted to {len(entered)} cases on {device.name}: "
             f"mean time over the fastest tier {before:.3f} before, {after:.3f} after"]  # fmt: skip
    for name in FITTED:
        was, now = getattr(THRESHOLDS, name), getattr(best, name)
        lines.append(f"    {name}: {type(was).__name__} = {now}" + (f"  # was {was}" if now != was else ""))
    return "\n".join(lines) + "\n"
