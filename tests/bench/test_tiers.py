"""Test where the fastest tier changes with the size, and the thresholds that are fitted to measured times."""

import re
from dataclasses import fields, replace

import pytest
from support.bench_stand_ins import timed

from gpu_bn import plan
from gpu_bn.bench import cases, model, tiers


def times_of(shape, **seconds):
    return tiers.TierTimes(cases.Case(shape, operation=cases.OPERATIONS["backward"]), "gpu_bn cupy", seconds)


def test_thresholds_are_fitted_to_the_fastest_tiers():
    """On a device whose fastest tier is always ``cta``, the fitted thresholds choose it more easily."""
    device = plan.DEVICES["a100"]
    times = [times_of((32, channels, 14, 14), cta=1.0, split=2.0) for channels in (16, 32, 64, 128, 256)]
    best, decided = tiers.fit(times, device)
    assert tiers.mean_slowdown(times, device, best) < tiers.mean_slowdown(times, device, plan.THRESHOLDS)
    (name,) = (
        field.name for field in fields(best) if getattr(best, field.name) != getattr(plan.THRESHOLDS, field.name)
    )
    assert name in ("fill", "vectors_per_thread")  # fewer busy SMs, or more work for a thread, suffice
    text = tiers.thresholds_text(times, device, best, decided)
    assert re.search(rf"\n    {name}: \w+ = {getattr(best, name)}  # was {getattr(plan.THRESHOLDS, name)}", text)
    assert "    usable_l2: float = 0.5  # not decided by these cases\n" in text  # no case depends on it
    for field in fields(plan.Thresholds):  # the whole table is printed
        assert f"\n    {field.name}: {field.type} = " in text
    assert "    waves: int = 4  # not decided by these cases: it shapes launches, not the choice\n" in text
    copy = device.bandwidth * plan.THRESHOLDS.copy_share / 1e9
    assert f"    copy_share: float = 0.88  # not decided by these cases: a copy has {copy:.4g} GB/s here" in text


PLANTED = [
    ("a100", "fill", 0.25), ("h100", "fill", 1.5), ("a100", "usable_l2", 0.125), ("4090", "usable_l2", 0.75),
    ("h100", "vectors_per_thread", 1), ("h100", "vectors_per_thread", 16), ("h100", "blocks_per_sm", 1),
    ("h100", "blocks_per_sm", 4), ("t4", "max_cooperative", 2), ("a100", "max_cooperative", 16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "threshold", "value"),
    [
        pytest.param(*planted, marks=[] if not i else pytest.mark.exhaustive if i % 3 else pytest.mark.slow)
        for i, planted in enumerate(PLANTED)
    ],
)
def test_a_crossover_that_was_planted_is_found(name, threshold, value):
    """If the tiers that other thresholds choose are the fastest, the fit finds these thresholds."""
    device, truth = plan.DEVICES[name], replace(plan.THRESHOLDS, **{threshold: value})
    found = cases.select(
        ["resnet50-32", "mobilenetv2", "unet2d", "mlp"], ["f16", "f32"], ["nchw", "nhwc"],
        ["forward", "backward"],
    )  # fmt: skip
    times = [planted_times(case, device, plan.plan(model.work_of(case), device, None, truth).tier) for case in found]
    assert tiers.mean_slowdown(times, device, plan.THRESHOLDS) > 1
    best, decided = tiers.fit(times, device)
    assert best == truth
    assert threshold in decided
    text = tiers.thresholds_text(times, device, best, decided)
    assert f"    {threshold}: {type(getattr(plan.THRESHOLDS, threshold)).__name__} = {value}  # was " in text


def planted_times(case, device, fastest):
    served = []
    for tier in plan.TIERS:
        try:
            plan.plan(model.work_of(case), device, tier)
            served.append(tier)
        except plan.NoPlanError:
            continue
    return tiers.TierTimes(case, tiers.FITTED_BY, {tier: 1.0 if tier == fastest else 2.0 for tier in served}, fastest)


def test_ranges_of_tiers_end_where_they_cross_over():
    def times_of_batch(size, by="gpu_bn triton", **seconds):
        return tiers.TierTimes(cases.Case((size, 64, 8, 8)), by, seconds)

    times = [
        times_of_batch(4, cta=1.0, split=2.0), times_of_batch(2, cta=1.0, split=3.0),
        times_of_batch(8, cta=1.02, split=1.0), times_of_batch(16, cta=1.5, split=1.0),
        times_of_batch(32, cta=2.0, split=1.0), times_of_batch(4, by="gpu_bn cupy", cta=1.0),
    ]  # fmt: skip
    size = 64 * 8 * 8 * 4
    assert tiers.ranges(times) == [
        tiers.Range("gpu_bn cupy", "f32 nchw forward", "cta", 4 * size, 4 * size),
        tiers.Range("gpu_bn triton", "f32 nchw forward", "cta", 2 * size, 8 * size),  # 2 % slower is still as fast
        tiers.Range("gpu_bn triton", "f32 nchw forward", "split", 16 * size, 32 * size),
    ]
    rows = str(tiers.ranges_table(tiers.ranges(times))).splitlines()
    assert rows[0] == "Crossovers: the fastest tier"
    assert rows[4].split() == ["gpu_bn", "triton", "f32", "nchw", "forward", "cta", "0.0328", "0.131"]


def test_a_tier_that_is_better_unforced_counts_as_it_is_launched():
    forced = [timed("gpu_bn cupy cta", 3.0), timed("gpu_bn cupy split", 2.0, "split")]
    (found,) = tiers.tier_times(forced, [timed("gpu_bn cupy", 1.0), timed("gpu_bn triton", 0.1)])
    assert found.seconds == {"cta": 1.0, "split": 2.0}
    assert (found.chosen, found.fastest, found.slowdown(found.chosen)) == ("cta", "cta", 1.0)


def test_thresholds_that_choose_the_fastest_stay():
    times = [times_of((32, 256, 14, 14), cta=1.0, split=2.0), times_of((256, 64, 112, 112), split=1.0)]
    assert tiers.fit(times, plan.DEVICES["a100"])[0] == plan.THRESHOLDS
    assert times[0].slowdown("cooperative") == 2.0  # a tier without a time counts as the slowest


def test_a_backend_that_took_another_tier_does_not_count():
    results = [timed("gpu_bn triton cta", 1.0), timed("gpu_bn triton cooperative", 0.5, "split")]
    (found,) = tiers.tier_times(results)
    assert found.seconds == {"cta": 1.0}
    (*_, text), kept = tiers.crossovers([], results, plan.DEVICES["a100"])
    assert "Thresholds for gpu_model.py, as they are: fitting takes several tiers of gpu_bn cupy, timed\n" in text
    assert text.count("# not decided by these cases") == len(fields(plan.Thresholds))
    assert kept["tiers"][0].by == "gpu_bn triton"
    assert kept["decided"] == {}
    assert tiers.crossovers([], [], plan.DEVICES["a100"]) == (["No tier could be timed."], {})


def test_forced_tiers_are_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from gpu_bn.bench import figures

    plain = timed("gpu_bn cupy", 1e-3)
    forced = [timed(f"gpu_bn cupy {tier}", 1e-3, tier) for tier in ("cta", "split")]
    assert {figures._backend_and_tier(result) for result in [plain, *forced]} == {
        ("gpu_bn cupy", "cta"),
        ("gpu_bn cupy", "split"),
    }
    assert set(plan.TIERS) < set(figures.TIERS_SHOWN)
    assert len(figures.TIERS_SHOWN) <= len(figures.COLOURS)
    plain.ratios["cold"] = {}
    assert figures.draw([plain, *forced], {"a copy": 1e9}, tmp_path) == [tmp_path / "roofline.png"]  # there is no peer
    assert figures.draw([], {}, tmp_path) == []
