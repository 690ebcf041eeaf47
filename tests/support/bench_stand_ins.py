"""Stand in for a GPU, and for a timed call, in the tests of ``gpu-bn bench``."""

from gpu_bn import plan
from gpu_bn.bench import cases, implementations, measurement, model, timing

NUMPY = implementations.by_name("gpu_bn numpy")
EMULATED = plan.Device("emulated", 80, 4, 164 << 10, 163 << 10, 32 << 10, 1e9)


class VirtualGpu:
    """Count time by a clock of its own: queueing a call takes the CPU ``host_cycles``, running it ``work_cycles``."""

    def __init__(self, host_cycles=0, work_cycles=1000):
        self.host_cycles, self.work_cycles = host_cycles, work_cycles
        self.host = self.queue = 0
        self.done_things = []

    def call(self):
        self.host += self.host_cycles
        self.queue = max(self.queue, self.host) + self.work_cycles
        self.done_things.append("call")

    def record(self):
        self.queue = max(self.queue, self.host)
        return self.queue

    def done(self, event):
        return event <= self.host

    def elapsed(self, start, end):
        return (end - start) / 1e9

    def wait(self, cycles):
        self.queue = max(self.queue, self.host) + cycles
        self.done_things.append("wait")

    def flush(self):
        self.done_things.append("flush")

    def synchronize(self):
        self.host = max(self.host, self.queue)


class Clocked(VirtualGpu):
    """Take no time for calls: their own time on the emulator does not count."""

    library = "torch"
    device = EMULATED
    smi_id = "GPU-7"

    def record(self):
        self.queue += 1000
        return self.queue

    def free(self):
        self.done_things.append("free")

    def copy_bandwidth(self):
        return 1e9


def timed(by, seconds, tier="cta", **options):
    """Make the result of a timed call; the plan is an A100's."""
    case = cases.Case((32, 256, 14, 14), operation=cases.OPERATIONS["forward"])
    found = plan.plan(model.work_of(case), plan.DEVICES["a100"], tier)
    timings = {"cold": timing.Timing(seconds, seconds, seconds, 1)}
    floor = model.work_of(case).floor_bytes
    return measurement.Result(case, by, True, 0.1, timings=timings, plan=found, floor_bytes=floor, **options)
