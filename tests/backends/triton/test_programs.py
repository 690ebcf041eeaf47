"""The plans of the Triton backend for the devices that torch describes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from plan_snapshot import calls

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from gpu_bn.backends.triton import programs
from gpu_bn.backends.triton.programs import device_of, one_pass_plan, training_plan
from gpu_bn.plan import DEVICES

COLUMNS = [work for name, directions in calls() if "resnet50" in name and "nhwc" in name for work in directions]
WORKS = [work for _, directions in calls() for work in directions]
CHOICES = "tier", "tiling", "blocks", "share", "launches"
BUS_BITS = {"t4": 256, "a100": 5120, "4090": 384, "h100": 5120, "b200": 8192}


def described_by_torch(monkeypatch, name, **changes):
    """Return the description of a device that torch gives, with ``changes`` to its properties."""
    device = DEVICES[name]
    properties = {
        "name": device.name, "major": device.arch // 10, "minor": device.arch % 10, "multi_processor_count": device.sms,
        "shared_memory_per_multiprocessor": device.shared_per_sm, "shared_memory_per_block": 48 << 10,
        "L2_cache_size": device.l2_bytes, "memory_clock_rate": round(4 * device.bandwidth / 1e3 / BUS_BITS[name]),
        "memory_bus_width": BUS_BITS[name], **changes,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    return device_of(torch.device("cuda", 0))


@pytest.mark.parametrize("name", DEVICES)
def test_a_real_device_has_the_documented_plans_and_times(name, monkeypatch):
    found = described_by_torch(monkeypatch, name)
    for work in WORKS:
        for chosen, documented in (
            (training_plan(work, found, None), training_plan(work, DEVICES[name], None)),
            (one_pass_plan(work, found), one_pass_plan(work, DEVICES[name])),
        ):
            assert chosen.seconds == pytest.approx(documented.seconds, rel=1e-6)
            assert [getattr(chosen, field) for field in CHOICES] == [getattr(documented, field) for field in CHOICES]


def test_without_a_known_bandwidth_a_device_has_that_of_an_a100(monkeypatch):
    found = described_by_torch(monkeypatch, "t4", memory_clock_rate=0)
    assert (found.sms, found.bandwidth) == (DEVICES["t4"].sms, DEVICES["a100"].bandwidth)


def constants(plan):
    """Return what a plan decides of the kernels' constants, for the tiles of all kernels."""
    x, shapes = (
        torch.empty(0, dtype=torch.float16),
        (programs.STREAMED, programs.SUMMED, programs.CROWDED, programs.SHORT),
    )
    tiles = [programs.streamed_block(plan, x, shape) for shape in shapes]
    chunks = [programs.chunk(plan, warps) for _, warps in tiles]
    return programs.strip_constants(plan), tiles, chunks, programs.merge_block(plan)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_programs_in_channels_last_occupy_the_sms_with_the_same_kernels(device, monkeypatch):
    short = [replace(work, n=n) for work in COLUMNS for n in (64, 300, 700, 1000, 2000)]
    plans = [(work, one_pass_plan(work, device)) for work in [*COLUMNS, *short]]
    assert all(plan.grid >= min(device.sms, 128) for _, plan in plans[: len(COLUMNS)])
    monkeypatch.setattr(programs, "_more_blocks", lambda plan, *_: plan)
    for work, plan in plans:
        before = one_pass_plan(work, device)
        assert plan.blocks == before.blocks or before.grid < min(device.sms, plan.grid)
        assert constants(plan) == constants(before)
        assert 8 * plan.partials <= work.tensor_bytes / 8
