"""Provide a simulated GPU and results of timed calls for the tests of ``gpu-bn bench``."""

from gpu_bn import plan
from gpu_bn.bench import cases, implementations, measurement, model, timing

NUMPY = implementations.by_name("gpu_bn numpy")
EMULATED = plan.Device("emulated", 80, 4, 164 << 10, 163 << 10, 32 << 10, 1e9)


class VirtualGpu:
    """A simulated GPU with its own clock. Queueing a call takes ``host_cycles`` on the CPU, running it ``work_cycles``.

    ``done_things`` lists what was done.
    """

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
    """A simulated GPU on which time passes only when an event is recorded, 1000 cycles each."""

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
    """Return the result of a call that took ``seconds``, with the plan for an A100."""
    case = cases.Case((32, 256, 14, 14), operation=cases.OPERATIONS["forward"])
    a100_plan = plan.plan(model.work_of(case), plan.DEVICES["a100"], tier)
    timings = {"cold": timing.Timing(seconds, seconds, seconds, 1)}
    floor = model.work_of(case).floor_bytes
    return measurement.Result(case, by, True, 0.1, timings=timings, plan=a100_plan, floor_bytes=floor, **options)
