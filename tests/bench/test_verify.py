"""Test the model of a GPU, and how ``--verify-model`` judges its predictions."""

import subprocess
from dataclasses import replace

import pytest
from support.bench_stand_ins import NUMPY, Clocked, timed

from gpu_bn import plan
from gpu_bn.bench import cases, implementations, model, timing, verify

COPY = 1e12
L2 = 1 << 20


def verdict_of(factor, tier="cta", counted=None):
    result = timed("gpu_bn cupy", 0.0, tier)
    seconds = factor * result.plan.dram_bytes / COPY
    result.timings["cold"] = timing.Timing(seconds, seconds, seconds, 1)
    return verify.Verdict(result, COPY, L2, counted)


def test_a_prediction_holds_or_is_refuted():
    assert verdict_of(1.1).refuted == ""
    assert verdict_of(3.0).refuted == "time: 3.00 times as long"
    assert verdict_of(0.5).refuted == "time: 0.50 times as long: fewer bytes, or faster than a copy"
    read, written = verdict_of(1.0).predicted_bytes.values()
    assert read == written == 32 * 256 * 14 * 14 * 4

    def counted(read, written):
        return verdict_of(1.0, counted={"read": read, "written": written}).refuted

    assert counted(read + 1000, written + 1000) == ""
    assert counted(2 * read, written) == "bytes: 2.00 times as many read"
    assert counted(read // 2, written) == "bytes: 0.50 times as many read"
    assert counted(read, 2 * written) == "bytes: 2.00 times as many written"
    assert counted(read, written - L2) == ""  # the rest is still in the cache
    assert counted(read, written // 2) == "bytes: 0.50 times as many written"
    assert counted(0, 0) == "bytes: 0.00 times as many read; bytes: 0.00 times as many written"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","stats","dram__bytes_read.sum","byte","6,422,528"
"0","7","stats","dram__bytes_write.sum","byte","1,024"
"1","7","apply","dram__bytes_read.sum","byte","1000.0"
"1","7","apply","dram__bytes_write.sum","byte","6,422,528"
==PROF== Disconnected
"""


@pytest.fixture
def ncu(monkeypatch):
    """Let ncu print something; return the commands that start it."""

    def says(stdout, stderr=""):
        commands = []

        def run(command, **_):
            commands.append(command)
            return subprocess.CompletedProcess(command, 0, stdout, stderr)

        monkeypatch.setattr(verify.subprocess, "run", run)
        return commands

    return says


def test_bytes_are_counted_by_ncu(ncu):
    commands = ncu(NCU)
    result = timed("gpu_bn cupy", 1.0)
    assert verify.count_bytes(result) == {"read": 6_423_528, "written": 6_423_552}
    assert commands[0][0] == "ncu"
    assert commands[0][-5:] == ["32x256x14x14", "f32", "nchw", "forward", "gpu_bn cupy"]
    (found,), kept = verify.verify([result], COPY, L2)
    text = " ".join(str(found).split())
    assert kept[0].counted_bytes == {"read": 6_423_528, "written": 6_423_552}
    assert kept[0].predicted_bytes == {"read": 6_422_528, "written": 6_422_528}
    assert "1 of 1 predictions are refuted" in text  # one second is far longer than predicted
    assert "DRAM bytes were counted by ncu, of all cases." in text
    assert "6.42 6.42 6.42 6.42 REFUTED, time:" in text


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (("", "==ERROR== ERR_NVGPUCTRPERM - no permission"), "the driver does not permit it"),
        (("", "==ERROR== out of luck"), "ncu counted nothing (==ERROR== out of luck)"),
        ((NCU.replace("1000.0", "n/a"), ""), "ncu counted nothing (==PROF== Disconnected)"),
        ((NCU.replace("dram__bytes_write", "other"), ""), "ncu counted nothing (==PROF== Disconnected)"),
    ],
)
def test_what_may_not_be_counted_is_said_and_not_tried_again(output, says, ncu):
    commands = ncu(*output)
    (text,), kept = verify.verify([timed("gpu_bn cupy", 1.0)] * 3, COPY, L2)
    assert says in " ".join(str(text).split())
    assert len(commands) == 1
    assert [row.counted_bytes for row in kept] == [None] * 3


def test_the_probe_makes_one_call_between_start_and_stop(monkeypatch):
    gpu = Clocked()
    monkeypatch.setattr(timing, "find_gpu", lambda: (gpu, ""))
    counting = replace(NUMPY, name="counting", build=lambda *_: lambda: gpu.done_things.append("call"))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [counting])
    gpu.profiler = lambda: [lambda name=n: gpu.done_things.append(name) for n in ("on", "off")]
    verify.main(["4x8", "f32", "nc", "forward", "counting"])
    assert gpu.done_things == ["call", "call", "flush", "on", "call", "off"]
    monkeypatch.setattr(timing, "find_gpu", lambda: (None, "no GPU here"))
    with pytest.raises(SystemExit, match="no GPU here"):
        verify.main(["4x8", "f32", "nc", "forward", "counting"])


# ------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize(
    ("operation", "torch", "cudnn"),
    [
        ("forward", 3, 2), ("forward+relu", 5, 2 + 1 / 16), ("forward+add+relu", 8, 3 + 1 / 16),
        ("backward", 5, 3), ("backward+relu", 8, 3 + 1 / 16), ("backward+add+relu", 8, 4 + 1 / 16),
    ],
)  # fmt: skip
def test_what_others_move(operation, torch, cudnn):
    case = cases.Case((32, 64, 56, 56), "float16", "nhwc", cases.OPERATIONS[operation])
    assert model.TRAFFIC["torch"].bytes(case) == torch * case.bytes
    assert model.TRAFFIC["cudnn resident"].bytes(case) == cudnn * case.bytes
    small = model.Modelled(replace(case, shape=(32, 256, 14, 14)), plan.DEVICES["h100"])
    assert small.cudnn_bytes == cudnn * small.case.bytes
    nchw = model.Modelled(replace(case, layout="nchw"), plan.DEVICES["h100"])
    assert nchw.cudnn_bytes is None


def test_the_model_is_the_plans():
    for operation in ("forward+add+relu", "backward"):
        case = cases.Case((32, 256, 14, 14), "float16", "nhwc", cases.OPERATIONS[operation])
        for device in plan.DEVICES.values():
            found = model.Modelled(case, device)
            planned = plan.plan(model.work_of(case), device)
            assert (found.tier, found.seconds, found.launches) == (planned.tier, planned.seconds, planned.launches)
            assert found.tiers[found.tier] == found.moved_bytes == planned.dram_bytes >= found.floor_bytes
            for tier, moved in found.tiers.items():
                assert moved == plan.plan(model.work_of(case), device, tier).dram_bytes


def test_the_cache_serves_others_as_it_serves_us():
    case = cases.Case((32, 64, 56, 56), "float16", operation=cases.OPERATIONS["forward"])
    device = plan.DEVICES["a100"]
    found = model.Modelled(case, device)
    launch = plan.THRESHOLDS.launch
    floor_seconds = launch + found.floor_bytes / (plan.THRESHOLDS.copy_share * device.bandwidth)
    seconds = model.seconds_of(found.torch_bytes, found.floor_bytes, device)
    assert seconds == pytest.approx(floor_seconds)  # the second read hits the cache
    assert found.torch_seconds == pytest.approx(floor_seconds + launch)  # two launches: statistics, then the output
    large = model.Modelled(replace(case, shape=(256, 64, 56, 56)), device)
    floor_seconds = plan.plan(model.work_of(large.case), device).floor_seconds
    assert model.seconds_of(large.torch_bytes, large.floor_bytes, device) > 1.3 * floor_seconds
    assert model.seconds_of(None, large.floor_bytes, device) is None


def test_evaluation_is_one_pass_and_nothing_is_known_of_others():
    case = cases.Case((32, 64, 56, 56), operation=cases.OPERATIONS["eval"])
    found = model.Modelled(case, plan.DEVICES["t4"])
    assert found.tier == "one pass"
    assert found.tiers == {"one pass": found.floor_bytes}
    assert found.torch_bytes is found.cudnn_bytes is None
