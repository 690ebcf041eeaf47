"""Test how ``gpu-bn bench`` finds and describes a GPU, and how it times calls. No real time is asserted."""

import itertools
import subprocess
import sys
import types

import pytest
from support.bench_stand_ins import VirtualGpu

from gpu_bn.bench import machine, timing


class Ticking:
    """A timer that takes the values that calls return for their times."""

    regimes = ("wall",)

    def __init__(self):
        self.order = []

    def time(self, call, _):
        self.order.append(call)
        return call()


def test_samples_of_several_calls_are_taken_in_turn():
    timer, calls = Ticking(), {"a": lambda: 2.0, "b": lambda: 4.0}
    found = timing.take_samples(calls, timer, "wall", seconds=1e-9)
    assert len(found.seconds["a"]) == timing.LEAST_ROUNDS
    assert timer.order[:4] == [calls["a"], calls["b"], calls["b"], calls["a"]]
    assert found.ratio("a", "b") == 0.5
    assert timing.take_samples(calls, timer, "wall", seconds=0).seconds == {"a": [2.0], "b": [4.0]}


def test_of_three_calls_none_follows_itself():
    timer, calls = Ticking(), {name: lambda: 1.0 for name in "abc"}
    timing.take_samples(calls, timer, "wall", 1e-9, (6, 6))
    assert len(timer.order) == 18
    assert all(one is not other for one, other in itertools.pairwise(timer.order))


def test_a_call_that_fails_while_it_is_timed_leaves_the_others():
    def fail():
        raise MemoryError("no more\nof it")

    found = timing.take_samples({"a": lambda: 1.0, "b": fail}, Ticking(), "wall", seconds=0)
    assert found.seconds == {"a": [1.0]}
    assert found.errors == {"b": "MemoryError: no more"}


def test_median_and_quartiles():
    assert timing.Timing.from_samples([5.0, 1.0, 2.0, 3.0, 4.0]) == timing.Timing(3.0, 2.0, 4.0, 5)
    assert timing.Timing.from_samples([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1)


def test_the_cpu_timer_calls_for_a_while_at_least_once():
    calls = []
    assert timing.CpuTimer(batch=0, pause=0).time(lambda: calls.append(1)) > 0
    assert len(calls) == 1
    timing.CpuTimer(batch=1e-3, pause=0).time(lambda: calls.append(1))
    assert len(calls) > 3


def test_the_cache_is_flushed_before_a_cold_sample_only():
    gpu = VirtualGpu()
    timer = timing.GpuTimer(gpu)
    assert timer.time(gpu.call, "hot") == 1000 / 1e9
    assert timer.time(gpu.call, "cold") == 1000 / 1e9
    assert gpu.done_things == ["wait", "call", "flush", "wait", "call"]
    gpu.done_things.clear()
    assert timer.time(gpu.call, "wall") > 0
    assert gpu.done_things == ["call"] * timer.row


def test_time_that_the_cpu_takes_to_queue_is_not_the_devices():
    gpu = VirtualGpu(host_cycles=700_000)
    timer = timing.GpuTimer(gpu)
    assert timer.time(gpu.call, "hot") == 1000 / 1e9
    assert timer.cycles == 800_000
    assert gpu.done_things == ["wait", "call"] * 3


def test_a_call_that_waits_for_the_device_is_timed_in_the_end():
    gpu = VirtualGpu(host_cycles=10**12)
    timer = timing.GpuTimer(gpu, most_cycles=10**6)
    assert timer.time(gpu.call, "hot") > 0
    assert gpu.done_things == ["wait", "call"] * 4  # 200, 400, 800 and 1600 thousand cycles
    assert timer.cycles == timing.FIRST_CYCLES  # the next call may take less


PROPERTIES = {
    "name": "GPU X", "major": 9, "minor": 0, "multi_processor_count": 6, "shared_memory_per_multiprocessor": 228 << 10,
    "shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10, "L2_cache_size": 1 << 12,
    "uuid": "0c6d1a2e-1-2",
}  # fmt: skip


class Event:
    """An event with the methods of torch's and CuPy's. It records the clock of a virtual GPU."""

    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = self.clock.record()

    def query(self):
        return self.clock.done(self.at)

    done = property(query)

    def elapsed_time(self, end):
        return 1e3 * self.clock.elapsed(self.at, end.at)


class Tensor:
    """A stand-in for an array of torch or CuPy. Its methods advance the clock."""

    def __init__(self, clock, size):
        self.clock, self.size = clock, size

    def sum(self):
        self.clock.flush()

    def copy_(self, _):
        self.clock.call()


def fake_torch(clock):
    """Return a stand-in for the part of torch that the benchmark uses."""

    def event(enable_timing):
        assert enable_timing
        return Event(clock)

    def ones(size, device):
        assert device == "cuda"
        return Tensor(clock, size)

    cuda = types.SimpleNamespace(
        is_available=lambda: True, current_device=lambda: 0, Event=event, _sleep=clock.wait,
        get_device_properties=lambda _: types.SimpleNamespace(**PROPERTIES), synchronize=clock.synchronize,
        mem_get_info=lambda: (8 << 10, 16 << 10), empty_cache=lambda: clock.done_things.append("free"),
    )  # fmt: skip
    return types.SimpleNamespace(cuda=cuda, ones=ones)


def fake_cupy(clock):
    """Return a stand-in for the part of CuPy that the benchmark uses."""
    properties = {
        "name": b"GPU X", "major": 9, "minor": 0, "multiProcessorCount": 6, "sharedMemPerMultiprocessor": 228 << 10,
        "sharedMemPerBlockOptin": 227 << 10, "l2CacheSize": 1 << 12,
    }  # fmt: skip
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0, getDeviceProperties=lambda _: properties, deviceSynchronize=clock.synchronize,
        deviceGetPCIBusId=lambda _: "0000:07:00.0", memGetInfo=lambda: (8 << 10, 16 << 10),
    )  # fmt: skip
    cuda = types.SimpleNamespace(
        is_available=lambda: True, runtime=runtime, Event=lambda: Event(clock),
        get_elapsed_time=lambda start, end: start.elapsed_time(end),
    )  # fmt: skip
    pool = types.SimpleNamespace(free_all_blocks=lambda: clock.done_things.append("free"))
    return types.SimpleNamespace(
        cuda=cuda, ones=lambda size, _: Tensor(clock, size),
        copyto=lambda *_: clock.call(), RawKernel=lambda *_: lambda *launch: clock.wait(int(launch[2][0])),
        get_default_memory_pool=lambda: pool,
    )  # fmt: skip


def test_the_gpu_through_torch(monkeypatch):
    clock = VirtualGpu()
    monkeypatch.setitem(sys.modules, "torch", fake_torch(clock))
    gpu, why_not = timing.find_gpu()
    assert gpu.library == "torch"
    assert why_not == ""
    assert (gpu.device.arch, gpu.device.sms, gpu.device.shared_per_block) == (90, 6, 227 << 10)
    assert gpu.smi_id == "GPU-0c6d1a2e-1-2"
    assert gpu.cache.size * 4 == 2 * gpu.device.l2_bytes
    assert timing.GpuTimer(gpu).time(clock.call, "cold") == pytest.approx(1000 / 1e9)
    assert clock.done_things == ["flush", "wait", "call"]
    assert gpu.copy_bandwidth() == pytest.approx(2 * (1 << 10) / (1000 / 1e9))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(clock))
    gpu.free()
    assert clock.done_things[-2:] == ["free", "free"]  # the memory of torch, and that of CuPy


def test_the_gpu_through_cupy_where_there_is_no_torch(monkeypatch):
    clock = VirtualGpu()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(clock))
    gpu, _ = timing.find_gpu()
    assert gpu.library == "cupy"
    assert (gpu.device.name, gpu.device.arch, gpu.cache.size) == ("GPU X", 90, (1 << 13) // 4)
    assert gpu.smi_id == "0000:07:00.0"
    assert timing.GpuTimer(gpu).time(clock.call, "cold") == pytest.approx(1000 / 1e9)
    assert gpu.copy_bandwidth() == pytest.approx(2 * (1 << 10) / (1000 / 1e9))
    gpu.free()
    assert clock.done_things[-1] == "free"


def test_no_gpu_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert timing.find_gpu() == (None, "torch is not installed, cupy is not installed")


def test_a_gpu_that_cannot_be_used_is_a_reason(monkeypatch):
    """torch and CuPy see a device, but neither has kernels for it."""
    clock = VirtualGpu()
    torch, cupy = fake_torch(clock), fake_cupy(clock)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore of it")

    torch.ones = fail
    cupy.ones = fail
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found, why_not = timing.find_gpu()
    assert found is None
    assert why_not == ", ".join(
        f"{library}: RuntimeError: CUDA error: no kernel image is available" for library in ("torch", "cupy")
    )


def test_a_time_that_events_cannot_tell_from_none_is_no_zero():
    gpu = VirtualGpu(work_cycles=0)
    assert timing.GpuTimer(gpu).time(gpu.call, "hot") == timing.SHORTEST


# --------------------------------------------------------------------------------------------------- nvidia-smi
def smi_says(monkeypatch, stdout, returncode=0):
    commands = []

    def run(command, **_):
        commands.append(command)
        if isinstance(stdout, Exception):
            raise stdout
        return subprocess.CompletedProcess(command, returncode, stdout, "")

    monkeypatch.setattr(machine.subprocess, "run", run)
    return commands


def test_driver_and_clocks_of_the_gpu_that_is_timed(monkeypatch):
    commands = smi_says(monkeypatch, "580.1, 1410, 2619, 1980, 2619, 700.00, 34\n")
    found = machine.smi("GPU-7")
    assert commands[0][-1] == "--id=GPU-7"
    assert found["driver_version"] == "580.1"
    assert machine.clocks(found) == ("driver 580.1, SM clock 1410 of 1980 MHz, memory 2619 of 2619 MHz, 700.00 W, 34 C")


@pytest.mark.parametrize(
    ("stdout", "returncode", "says"),
    [
        (FileNotFoundError("nvidia-smi"), 0, "nvidia-smi cannot be run (FileNotFoundError)"),
        (subprocess.TimeoutExpired("nvidia-smi", 60), 0, "nvidia-smi cannot be run (TimeoutExpired)"),
        ("No devices were found\n", 6, "nvidia-smi: No devices were found"),
        ("", 9, "nvidia-smi: exit code 9"),
    ],
)
def test_without_nvidia_smi_the_reason_stands_in_its_place(stdout, returncode, says, monkeypatch):
    smi_says(monkeypatch, stdout, returncode)
    assert machine.smi("") == {"unknown": says}
    assert machine.clocks(machine.smi("")) == f"driver and clocks are not known: {says}"


def test_a_torch_that_is_broken_takes_no_report_away(monkeypatch):
    monkeypatch.setattr(machine, "installed", lambda name: "2.13" if name == "torch" else None)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    assert machine.machine(None, 1e9)["torch"].startswith("AttributeError")
