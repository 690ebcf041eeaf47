"""The planner: snapshots of its choices, and properties that hold for all of them."""

from dataclasses import replace
from itertools import product
from math import ceil

import plan_snapshot
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_snapshot import calls

from gpu_bn import plan as planning
from gpu_bn.plan import DEVICES, STATIC_SHARED, THREADS, THRESHOLDS, TIERS, NoPlanError, Work, options, plan, plan_once

H100, A100, T4 = DEVICES["h100"], DEVICES["a100"], DEVICES["t4"]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 49, 64, 196, 1000, 1024, 3136, 100_352]) | st.integers(1, 3000)


@st.composite
def works(draw):
    itemsize = draw(st.sampled_from([2, 4, 8]))
    s = draw(st.just(1) | SIZES)
    residual, mask = draw(st.booleans()), False
    backward = draw(st.booleans())
    alignment = draw(st.sampled_from([size for size in (2, 4, 8, 16) if size >= itemsize]))
    work = Work(draw(SIZES), draw(SIZES), s, itemsize, backward, alignment, reads=1 + backward)
    if residual:
        mask = draw(st.booleans()) and planning.tile(work).vector * itemsize == 16
        reads = (3 if not mask else 2) if backward else 2
        work = replace(work, reads=reads, writes=2 if backward else 1, sign_bits=mask)
    return replace(work, staged=work.reads if backward else 1)


DEVICE = st.sampled_from(list(DEVICES.values()))


def planned(work, device):
    """Yield the plan of the best tier, and that of each tier that can be forced."""
    yield plan(work, device)
    for tier in TIERS:
        try:
            yield plan(work, device, tier)
        except NoPlanError:
            continue


def test_snapshot():
    """Plans are those of the snapshot; ``python tests/plan_snapshot.py`` writes it anew."""
    assert plan_snapshot.text().splitlines() == plan_snapshot.FILE.read_text().splitlines()


@given(works(), DEVICE)
@example(Work(33, 66, 1, 2), H100)  # 7 blocks of a cluster of 8 would have all positions
def test_blocks_cover_each_position_once(work, device):
    for found in planned(work, device):
        tiling = found.tiling
        lengths = [min(tiling.positions - rank * found.share, found.share) for rank in range(found.blocks)]
        assert min(lengths) >= 1, found
        assert sum(lengths) == tiling.positions
        assert 1 <= found.in_flight <= tiling.strips
        assert found.in_flight == tiling.strips or found.tier == "cooperative"


@given(works(), DEVICE)
def test_strips_and_vectors_cover_the_tensor(work, device):
    for found in planned(work, device):
        t = found.tiling
        assert t.n * t.c * t.s == work.n * work.c * work.s
        vector_bytes = t.vector * work.itemsize
        assert (t.c if t.columns else t.s) % t.vector == 0
        assert work.alignment % vector_bytes == 0
        assert vector_bytes <= 16
        assert t.lanes in (1, 2, 4, 8, 16, 32)
        assert t.lanes * vector_bytes <= 128
        if t.columns:
            assert (t.strips - 1) * t.channels_per_strip < t.c <= t.strips * t.channels_per_strip
            assert t.positions == t.n
        else:
            assert (t.strips, t.lanes, t.channels_per_strip) == (t.c, 1, 1)
            assert t.positions * t.vector == t.n * t.s


@given(works(), DEVICE)
@example(Work(1, 8, 75_775, 2), A100)  # 2 blocks of 148 vectors a thread exceed an SM by the driver's share only
def test_blocks_fit_the_device(work, device):
    reserved = 1024 if device.arch >= 80 else 0
    for found in planned(work, device):
        assert found.shared_bytes + STATIC_SHARED <= device.shared_per_block
        if found.tier == "split":
            assert found.shared_bytes == 0
        else:
            slots = -(-found.share // (THREADS // found.tiling.lanes)) * THREADS
            assert found.shared_bytes == slots * found.tiling.vector * work.itemsize * work.staged
        if found.tier == "cooperative":
            per_sm = 2 if work.itemsize < 8 else 1
            assert found.grid <= device.sms * per_sm
            assert per_sm * (found.shared_bytes + STATIC_SHARED + reserved) <= device.shared_per_sm
            assert found.blocks <= THRESHOLDS.max_cooperative
        if found.tier == "cluster":
            assert device.arch >= 90
            assert found.blocks in (2, 4, 8)
        assert (found.blocks == 1) >= (found.tier == "cta")


@given(works(), DEVICE)
def test_bytes_and_times(work, device):
    tensor = work.n * work.c * work.s * work.itemsize
    mask = tensor // 16 if work.sign_bits else 0
    read = work.reads * tensor + (mask if work.backward else 0)
    written = work.writes * tensor + (0 if work.backward else mask)
    speed = THRESHOLDS.copy_share * device.bandwidth
    for found in [*planned(work, device), plan_once(work, device)]:
        assert sum(found.written_bytes) == written
        times = found.times
        assert found.floor_seconds == pytest.approx(THRESHOLDS.launch + (read + written) / speed)
        assert times.memory == pytest.approx(found.dram_bytes / speed)
        assert times.launches == found.launches * THRESHOLDS.launch
        assert times.idle >= -1e-9 * times.memory
        assert (times.exchange > 0) == (found.tier in ("cluster", "cooperative"))
        assert (times.merge > 0) == (found.launches == 2 and found.blocks > 1)
        parts = (times.launches, times.memory, times.idle, times.exchange, times.merge)
        assert found.seconds == pytest.approx(sum(parts))
        assert found.seconds >= found.floor_seconds * (1 - 1e-9)
        assert getattr(times, times.limiter) == max(parts)
        assert found.launches == len(found.read_bytes) == len(found.written_bytes)
        if found.launches == 1:
            assert (found.read_bytes, found.dram_bytes) == ((read,), read + written)
        else:
            first = work.staged * tensor + (mask if work.backward else 0)
            assert found.read_bytes == (first, read)
            assert found.written_bytes[0] == ((work.writes - 1) * tensor if work.backward else 0)
            cached = min(work.reads * tensor, int(THRESHOLDS.usable_l2 * device.l2_bytes), first)
            assert found.dram_bytes == first + read + written - cached


@given(works(), DEVICE)
def test_a_mask_is_a_byte_for_each_position_in_each_pass(work, device):
    masked, size = replace(work, masked=True), work.n * work.s
    for with_mask, without in (
        (plan(masked, device), plan(work, device, "split")),
        (plan_once(masked, device), plan_once(work, device)),
    ):
        assert with_mask.read_bytes == tuple(read + size for read in without.read_bytes)
        assert with_mask.written_bytes == without.written_bytes
        speed = THRESHOLDS.copy_share * device.bandwidth
        assert with_mask.floor_seconds == pytest.approx(without.floor_seconds + size / speed)


@given(works(), DEVICE)
def test_the_choice_is_the_fastest_of_the_options(work, device):
    found = options(work, device)
    chosen = plan(work, device)
    assert repr(found[chosen.tier]) == repr(replace(chosen, reason=found[chosen.tier].reason))
    for tier, option in found.items():
        if isinstance(option, str):
            assert f"not {tier}: {option}" in chosen.reason
        elif TIERS.index(tier) < TIERS.index(chosen.tier):
            assert option.seconds > chosen.seconds
        else:
            assert option.seconds >= chosen.seconds
    assert plan(work, device, chosen.tier).tier == chosen.tier


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("work", [Work(1, 2, 3, 2), Work(32, 512, 49, 2), Work(512, 1024, 1, 2)], ids=str)
def test_no_call_is_faster_than_a_launch(work, device):
    for found in [*planned(work, device), plan_once(work, device)]:
        assert found.floor_seconds >= THRESHOLDS.launch
        assert found.seconds >= found.launches * THRESHOLDS.launch


def test_what_a_model_of_bytes_alone_does_not_see():
    """Partial waves, few bytes in flight, grid-wide barriers, and sums that the last block adds up cost time."""
    whole, more = (planning.streaming_seconds(1e9, grid, 2, 1 << 20, H100, THRESHOLDS) for grid in (264, 264 + 66))
    assert whole == (pytest.approx(1e9 / (0.88 * 3.35e12)), pytest.approx(0, abs=1e-12))
    assert more[1] == pytest.approx(0, abs=1e-12)  # a quarter of a wave has enough bytes in flight
    few, fewer = (planning.streaming_seconds(1e9, grid, 2, 1 << 12, H100, THRESHOLDS)[1] for grid in (264, 264 + 66))
    assert 0 < few < fewer
    t4 = options(Work(32, 256, 3136, 2), T4)
    assert t4["cooperative"].times.exchange > 0.2 * t4["cooperative"].times.memory
    assert plan(Work(32, 256, 3136, 2), T4).tier == "split"  # because of its exchange, though split moves more bytes
    assert t4["split"].dram_bytes > t4["cooperative"].dram_bytes
    tail = options(Work(100_352, 64, 1, 2), A100)["split"]
    assert tail.tiling.channels_per_strip == 32  # narrow strips: the last block merges half as many sums


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_streaming_launches_are_whole_waves_of_the_blocks_that_an_sm_holds(device):
    """A wave that is hardly begun takes as long as a whole one if its blocks keep too few bytes in flight."""
    for _, directions in calls():
        for work in directions:
            found = plan_once(work, device)
            resident = THRESHOLDS.column_blocks if found.tiling.columns else THRESHOLDS.row_blocks
            waves = found.grid / (resident * device.sms)
            whole = waves <= 1 or ceil(waves) <= 1.1 * waves or found.tiling.strips >= resident * device.sms
            assert whole or found.times.idle <= THRESHOLDS.blocks_gain * found.seconds


@given(works(), DEVICE, st.sampled_from(TIERS))
def test_a_forced_tier_is_honoured_or_refused_with_its_reason(work, device, tier):
    try:
        assert plan(work, device, tier).tier == tier
        return
    except NoPlanError as error:
        refusal = str(error)
    assert tier != "split"
    assert refusal.startswith(f"not {tier}: ")
    assert len(refusal) > len(f"not {tier}: ") + 10


@pytest.mark.parametrize(
    ("work", "device", "tier", "text"),
    [
        (Work(32, 64, 3136, 2), A100, "cluster", "clusters need sm_90"),
        (
            Work(32, 64, 3136, 4),
            H100,
            "cta",
            "not cta: a strip needs 401408 bytes of shared memory, a block has 224752",
        ),
        (Work(1, 64, 8, 2), H100, "cluster", "fits no cluster"),
        (Work(4096, 1, 65536, 4), H100, "cooperative", "blocks, but at most 64 may share it"),
        (Work(64, 64, 1, 2, True, reads=3, staged=3), H100, "cta", "more registers than a thread has"),
        (Work(4, 4, 4, 4), H100, "warp", "unknown tier 'warp', expected one of cta, cluster, cooperative, split"),
    ],
)
def test_refusals(work, device, tier, text):
    with pytest.raises(NoPlanError, match=text):
        plan(work, device, tier)


@given(works(), DEVICE)
@example(Work(32, 64, 128 * 128, 2), DEVICES["4090"])  # 25 blocks hold the bytes; whole vectors a thread take 26
@example(Work(64, 64, 112 * 112, 2, backward=True, reads=2, staged=2), DEVICES["a100"])
def test_blocks_share_a_strip_cooperatively_if_any_number_of_them_can_hold_it(work, device):
    t = plan_once(work, device).tiling
    try:
        plan(work, device, "cooperative")
    except NoPlanError as error:
        if "may share one" not in str(error):
            return
    else:
        return
    resident = 2 if work.itemsize < 8 else 1
    room = min(device.shared_per_sm // resident - device.reserved_shared, device.shared_per_block) - STATIC_SHARED
    for blocks in range(2, min(THRESHOLDS.max_cooperative, device.sms * resident, t.positions) + 1):
        vectors = ceil(ceil(t.positions / blocks) / (THREADS // t.lanes))
        assert vectors * THREADS * t.vector * work.itemsize * work.staged > room


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("n", "c", "s"), [(4, 3, 2**30 + 8), (2**20, 4096, 1), (2**16, 1, 2**16), (8, 2**20, 1025)])
def test_more_than_4_gib(n, c, s, backward):
    work = Work(n, c, s, 2, backward, reads=1 + backward, staged=1 + backward)
    tensor = 2 * n * c * s
    assert tensor > 2**32
    for device, tier in product(DEVICES.values(), (None, "split")):
        found = plan(work, device, tier)
        assert found.tiling.strips * found.tiling.positions * found.tiling.lanes * found.tiling.vector >= n * c * s
        assert (found.blocks - 1) * found.share < found.tiling.positions <= found.blocks * found.share
        assert found.share < 2**32
        assert found.grid < 2**31
        assert sum(found.written_bytes) == tensor
        assert sum(found.read_bytes) == found.launches * (1 + backward) * tensor


@pytest.mark.parametrize(
    ("work", "device", "change", "before", "after"),
    [
        (Work(32, 2048, 49, 2), H100, {"fill": 20.0}, ("cta", 1), ("split", 1)),
        (Work(32, 64, 3136, 2), H100, {"max_cluster": 1}, ("cluster", 2), ("split", 6)),
        (Work(32, 64, 3136, 2), H100, {"blocks_per_sm": 3}, ("cluster", 2), ("cluster", 4)),
        (Work(32, 64, 3136, 2), A100, {"usable_l2": 0.1}, ("split", 5), ("cooperative", 3)),
        (Work(32, 64, 12544, 2), A100, {"max_cooperative": 8}, ("cooperative", 13), ("split", 5)),
        (Work(512, 1024, 1, 2), A100, {"narrow_bytes": 128}, ("cta", 1), ("split", 4)),
        (Work(8192, 256, 1, 2), H100, {"narrow_vectors": 7}, ("cluster", 8), ("cluster", 8)),
        (Work(25_088, 256, 1, 2), H100, {"narrow_vectors": 25}, ("split", 33), ("cluster", 8)),
        (Work(32, 128, 3136, 2), T4, {"waves": 1}, ("split", 2), ("split", 1)),
        (Work(32, 128, 3136, 2), T4, {"blocks_gain": 0.2}, ("split", 2), ("split", 1)),
        (Work(32, 64, 3136, 2), A100, {"row_blocks": 2}, ("split", 5), ("split", 3)),
        (Work(100_352, 512, 1, 2), H100, {"column_blocks": 3}, ("split", 33), ("split", 49)),
        (Work(8192, 256, 1, 2), A100, {"vectors_per_thread": 32}, ("split", 27), ("split", 8)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_measured_threshold_changes_the_choice(work, device, change, before, after):
    found = plan(work, device), plan(work, device, None, replace(THRESHOLDS, **change))
    assert [(one.tier, one.blocks) for one in found] == [before, after]
    assert found[0] != found[1]


def test_copy_share_changes_times_alone():
    work = Work(32, 64, 3136, 2)
    slower = plan(work, H100, None, replace(THRESHOLDS, copy_share=THRESHOLDS.copy_share / 2))
    assert slower.times.memory == pytest.approx(2 * plan(work, H100).times.memory)
    assert slower.grid == plan(work, H100).grid


@given(works(), DEVICE)
def test_strips_are_narrowed_only_to_fill_sms(work, device):
    wide, found = planning.tile(work), plan(work, device)
    assert found.tiling.vector == wide.vector
    if found.tiling.lanes < wide.lanes and found.tier == "split":
        widest = plan(work, device, "split", replace(THRESHOLDS, narrow_gain=1.0))
        assert found.times.merge < widest.times.merge
        assert found.tiling.channels_per_strip * work.itemsize >= THRESHOLDS.narrow_split_bytes
    elif found.tiling.lanes < wide.lanes:
        assert found.tier in ("cta", "cluster")
        assert found.tiling.channels_per_strip * work.itemsize >= THRESHOLDS.narrow_bytes
        assert wide.strips < found.tiling.strips
