"""The plans of the Triton backend for the devices that torch describes."""

from types import SimpleNamespace

import pytest
from plan_snapshot import calls

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from gpu_bn.backends.triton.programs import device_of, one_pass_plan, training_plan
from gpu_bn.plan import DEVICES

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
