"""The GPU part of ``gpu-bn bench`` with stand-ins: an emulated GPU for CuPy, Triton's interpreter, peers, ncu."""

# ruff: noqa: ARG001, ARG002, ARG005 - stand-ins have the signatures of what they stand for
import json
import re
import subprocess
import sys
import types
from dataclasses import fields, replace

import pytest
from emulator import Checks, Device
from test_bench import NUMPY, VirtualGpu
from test_triton_interpreter import interpreted

from gpu_bn import plan
from gpu_bn.bench import cases, gpus, model, observe, peers, probe, report, subjects, tiers, timing, trial, verify
from gpu_bn.cli import main

CUPY = next(subject for subject in subjects.SUBJECTS if subject.name == "gpu_bn cupy")
EMULATED = plan.Device("emulated", 80, 4, 164 << 10, 163 << 10, 32 << 10, 1e9)


class Clocked(VirtualGpu):
    """A virtual GPU that takes no time: a call's own time on the emulator does not count."""

    device = EMULATED
    smi_id = "GPU-7"

    def record(self):
        self.queue += 1000
        return self.queue

    def free(self):
        self.done_things.append("free")

    def copy_bandwidth(self):
        return 1e9


@pytest.fixture
def emulated(make_gpu, monkeypatch):
    """The benchmark's GPU is virtual, its only subject the CuPy backend on the emulator."""
    gpu = make_gpu(80, None, Device(checks=Checks(races=False, initialised=False)))
    clock = Clocked()
    monkeypatch.setattr(gpus, "find", lambda: (clock, ""))
    monkeypatch.setattr(subjects, "SUBJECTS", [replace(CUPY, modules=()), replace(NUMPY, name="peer", ours=False,
                                                                                  device="cuda")])  # fmt: skip
    monkeypatch.setattr(timing.GpuTimer, "row", 1)
    return gpu


@pytest.mark.compile
def test_the_report_of_a_gpu(emulated, capsys, tmp_path):
    line = ["bench", "--seconds", "0", "--shapes", "4x4x64", "--dtype", "f32", "--layout", "nchw"]
    page = tmp_path / "page.md"
    line += ["--ops", "forward,backward+add+relu,eval", "--tiers", "all", "--verify-model"]
    assert main([*line, "--out", str(tmp_path), "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "cold" in out
    assert "moved / floor" in out
    assert "Model: " not in out  # nothing is imagined where there is a GPU
    found = json.loads((tmp_path / "report.json").read_text())
    ours = {row["operation"]: row for row in found["measured"] if row["ours"]}
    assert {name: row["tier"] for name, row in ours.items()} == {
        "forward": "cta", "backward+add+relu": "cta", "eval": "one pass"
    }  # fmt: skip
    for row in ours.values():
        assert list(row["seconds"]) == ["cold", "hot", "wall"]
        assert row["moved_bytes"] == row["floor_bytes"]
        assert list(row["ratios"]["cold"]) == ["peer"]
    assert found["model"] == []
    assert found["machine"]["gpu"]["name"] == "emulated"
    raced = {tier for race in found["crossovers"]["tiers"] for tier in race["seconds"]}
    assert raced == {"cta", "cooperative", "split"}
    assert set(found["crossovers"]["thresholds"]) == {field.name for field in fields(plan.Thresholds)}
    assert {row["tier"] for row in found["crossovers"]["ranges"]} <= raced
    assert all(row["chosen"] == "cta" for row in found["crossovers"]["tiers"])
    assert "Thresholds for plan.py, fitted to gpu_bn cupy in 2 cases on emulated" in out
    assert "driver and clocks are not known: nvidia-smi cannot be run" in out
    assert "driver and clocks are not known" in page.read_text()
    assert "DRAM bytes were not counted: ncu cannot be run" in out
    assert [v["refuted"] != "" for v in found["verification"]] == [True] * 3  # the clock is no clock of these kernels
    text = page.read_text()
    assert "## Measured on the GPU" in text
    assert "nobody has run" not in text
    assert emulated.launched


@pytest.mark.compile
def test_a_kernel_that_is_wrong_is_not_timed(emulated, capsys, tmp_path):
    emulated.edit_source = lambda source: source.replace("slope = rstd * weight", "slope = rstd * weight * 1.001")
    line = ["bench", "--seconds", "0", "--shapes", "4x4x64", "--dtype", "f32", "--layout", "nchw", "--ops", "forward"]
    assert main([*line, "--out", str(tmp_path)]) == 1
    assert "NOT TIMED 4x4x64 f32 nchw forward by gpu_bn cupy: wrong: y[" in capsys.readouterr().out


SMALL = [
    "bench",
    "--seconds",
    "0",
    "--shapes",
    "4x4x64,2x4x64",
    "--dtype",
    "f32",
    "--layout",
    "nchw",
    "--ops",
    "forward",
]


def test_a_gpu_that_is_lost_ends_the_run_and_leaves_a_report(emulated, monkeypatch, capsys, tmp_path):
    """As after an access out of bounds: every call fails, of whatever library, also to give memory back."""

    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Clocked, "synchronize", lambda self: fail() if "call" in self.done_things else None)
    monkeypatch.setattr(Clocked, "free", fail)
    broken = replace(NUMPY, name="gpu_bn breaks", device="cuda", build=lambda *_: fail())
    monkeypatch.setattr(subjects, "SUBJECTS", [broken])
    gpus.find()[0].done_things.append("call")
    assert main([*SMALL, "--tiers", "all", "--verify-model", "--train", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    lost = "the GPU does not answer since 4x4x64 f32 nchw forward: RuntimeError: an illegal memory access"
    assert f"FAILED {lost}" in out
    for part in ("--tiers", "--verify-model", "--train"):
        assert f"{part}: {lost}" in out
    assert "NOT TIMED 4x4x64 f32 nchw forward by gpu_bn breaks: RuntimeError: an illegal memory access" in out
    assert "2x4x64" not in out.replace("4x4x64,2x4x64", "")  # nothing more was tried
    assert len(json.loads((tmp_path / "report.json").read_text())["measured"]) == 1


@pytest.mark.compile
def test_a_part_that_fails_leaves_the_report(emulated, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gpu_bn.bench.run.crossovers", lambda *_: 1 / 0)
    monkeypatch.setattr("gpu_bn.bench.run.verify", lambda *_: {}["nothing"])
    assert main([*SMALL, "--tiers", "all", "--verify-model", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "--tiers: ZeroDivisionError: division by zero" in out
    assert "--verify-model: KeyError: 'nothing'" in out
    assert len(json.loads((tmp_path / "report.json").read_text())["measured"]) == 4


@pytest.mark.compile
def test_a_launch_that_cannot_be_seen_is_timed_all_the_same(emulated, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gpu_bn.bench.trial.observe", lambda *_: 1 / 0)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "NOT SEEN what is launched for 4x4x64 f32 nchw forward and 1 more by gpu_bn cupy: ZeroDivisionError" in out
    rows = json.loads((tmp_path / "report.json").read_text())["measured"]
    assert all(row["seconds"] for row in rows)


def test_a_gpu_that_cannot_copy_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(Clocked, "copy_bandwidth", lambda _: 1 / 0)
    monkeypatch.setattr(gpus, "find", lambda: (Clocked(), ""))
    assert main(["bench"]) == 1
    assert (
        capsys.readouterr().err
        == "gpu-bn bench: nothing can be copied on emulated: ZeroDivisionError: division by zero\n"
    )


def test_what_needs_torch_is_left_out_where_only_cupy_sees_the_gpu(emulated, monkeypatch, capsys, tmp_path):
    """A torch built without CUDA would be timed on the CPU, by the GPU's events."""
    monkeypatch.setattr(gpus, "CupyGpu", Clocked)
    torches = replace(NUMPY, name="torch native", device="cuda", ours=False, modules=("torch",))
    monkeypatch.setattr(subjects, "SUBJECTS", [replace(NUMPY, name="gpu_bn x", device="cuda"), torches])
    pytest.importorskip("torch")
    assert main([*SMALL, "--train", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch native: torch does not see the GPU\n" in out
    assert "--train: torch does not see the GPU\n" in out
    assert "torch native" not in out.partition("Measured")[2]


@pytest.mark.compile
@pytest.mark.parametrize("tier", ["cta", "split"])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_the_models_bytes_are_those_that_the_emulator_counts(tier, operation, make_gpu):
    """What tests/test_cuda_traffic.py proves of plans holds for the benchmark's model, which is made of them."""
    case = cases.Case((4, 4, 1024), operation=cases.OPERATIONS[operation])
    checks = Checks(races=False, initialised=False)
    gpu = make_gpu(80, tier, Device(checks=checks, l2_bytes=EMULATED.l2_bytes, resident_threads=256))
    tensors = trial.Tensors(case)
    problem = tensors.of("cupy", trial.problem_of(case.operation, tensors.problem))
    call = subjects.ours(lambda _: gpu.backend)(case.operation, problem, None)
    gpu.device.l2.flush()
    before = len(gpu.device.reports)
    tensors.proof.check(CUPY, case.operation, call())
    reports = gpu.device.reports[before:]
    counted = sum(r.dram_read_bytes + r.dram_write_bytes for r in reports) + gpu.device.l2.flush()
    expected = model.modelled(case, EMULATED).tiers[tier]
    assert abs(counted - expected) <= (4 << 10)  # of 128 KiB and more: vectors, partial sums, part of a cache


@pytest.mark.compile
def test_what_a_call_launches_is_seen(make_gpu):
    gpu = make_gpu(80)
    case = cases.Case((4, 4, 64), operation=cases.OPERATIONS["backward"])
    tensors = trial.Tensors(case)
    problem = tensors.of("cupy", tensors.problem)
    module = sys.modules["gpu_bn.backends.cupy_draft"]
    functions = module.plan, module.plan_once, module.compiled
    seen = observe.observe("cupy", lambda: subjects.ours(lambda _: gpu.backend)(case.operation, problem, None))
    assert (seen.plan.tier, len(seen.plans)) == ("cta", 1)  # the backward call's alone
    assert seen.registers == []  # of PTX nobody knows them
    assert functions == (module.plan, module.plan_once, module.compiled)
    assert observe.observe("numpy", pytest.fail).plan is None


@pytest.mark.parametrize(("name", "value"), [("num_regs", 40), ("n_regs", 48)])
def test_registers_are_found_where_the_libraries_have_them(name, value):
    seen, kernel = observe.Seen(), types.SimpleNamespace(_init_handles=lambda: setattr(kernel, name, value))
    observe._registers(seen, kernel)
    assert seen.registers == [value]


IN_THE_INTERPRETER = """
import gpu_bn.bench.observe as observe
from gpu_bn.bench import cases, subjects, timing, trial
subject = next(s for s in subjects.SUBJECTS if s.name == "gpu_bn triton")
found = cases.select(["4x6x5x7"], ["f16"], ["nhwc"], ["forward+add+relu", "backward+add+relu", "eval"])
for case in found:
    tensors = trial.Tensors(case)
    for tier in (None, "split"):
        for r in trial.trial(case, tensors, [trial.Entry(subject, tier)], timing.CpuTimer(0, 0), 0):
            print(r.case, "by", r.by, "tier", r.tier, "refused", r.refused or "-", r.error is not None and r.error <= 1)
"""


def test_the_triton_backend_is_proved_and_observed_in_the_interpreter():
    lines = interpreted(["-c", IN_THE_INTERPRETER]).splitlines()
    assert len(lines) == 3 * 2
    assert all(line.endswith("refused - True") for line in lines), lines
    assert {line.partition("tier ")[2].split(" refused")[0] for line in lines if "triton split" in line} == {
        "split", "one pass"
    }  # fmt: skip
    assert any("tier cta" in line for line in lines)


@pytest.mark.gpu
def test_everything_on_a_gpu(tmp_path):
    if gpus.find()[0] is None:
        pytest.skip(f"no GPU: {gpus.find()[1]}")
    line = ["bench", "--seconds", "0", "--shapes", "tiny,32x64x56x56", "--dtype", "f16,f32", "--tiers", "all"]
    assert main([*line, "--verify-model", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    ours = [row for row in found["measured"] if row["ours"] and not row["not_served"]]
    assert ours
    for row in ours:
        assert set(row["seconds"]) == {"cold", "hot", "wall"}
        assert row["moved_bytes"] >= row["floor_bytes"]
        assert row["registers"]
    assert found["crossovers"]["tiers"]
    assert found["machine"]["gpu"]["driver_version"]


# ------------------------------------------------------------------------------------------------------- peers
def prove(build, operation, dtype="f16", layout="nhwc"):
    """Build a peer's call on CPU tensors, and compare what it gives with the oracle."""
    case = cases.select(["4x6x5x7"], [dtype], [layout], [operation])[0]
    tensors = trial.Tensors(case)
    subject = replace(NUMPY, name="peer", ours=False, adapter="triton")
    problem = tensors.of("triton", trial.problem_of(case.operation, tensors.problem))
    call = build(case.operation, problem, None)
    for _ in range(2):  # a call can be repeated
        assert tensors.proof.check(subject, case.operation, call()) <= 1


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def fake_apex(torch, monkeypatch):
    """apex's layer, for tensors whose last axis is the channels."""

    class BatchNorm2d_NHWC(torch.nn.BatchNorm2d):
        def __init__(self, channels, fuse_relu=False):
            super().__init__(channels)
            self.fuse_relu = fuse_relu

        def cuda(self):
            return self

        def forward(self, x, z=None):
            assert z is None or self.fuse_relu
            assert x.is_contiguous()
            assert x.dtype == torch.float16
            y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = y if z is None else y + z
            return torch.relu(y) if self.fuse_relu else y

    module = types.ModuleType("apex.contrib.groupbn.batch_norm")
    module.BatchNorm2d_NHWC = BatchNorm2d_NHWC
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.contrib", types.ModuleType("apex.contrib"))
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn", types.ModuleType("apex.contrib.groupbn"))
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn.batch_norm", module)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_apex(operation, fake_apex):
    prove(peers.apex, operation)


def test_apex_serves_what_it_can():
    served = cases.Case((4, 6, 5, 7), "float16", "nhwc")
    assert peers.not_apex(served) == ""
    for other in ({"layout": "nchw"}, {"dtype": "float32"}, {"shape": (4, 6, 5)}):
        assert peers.not_apex(replace(served, **other)) == "serves float16, four axes, nhwc"


class Node:
    """A tensor of a graph: what it is when it is computed."""

    def __init__(self, compute, given=False):
        self.compute, self.given = compute, given

    def set_output(self, _):
        return self

    def set_data_type(self, kind):
        assert kind is not None
        return self


class FakeGraph:
    """cuDNN's graph, computed by torch."""

    def __init__(self, torch):
        self.torch, self.ready = torch, False

    def tensor_like(self, tensor):
        return Node(lambda: tensor, given=True)

    def batchnorm(self, name, input, scale, bias, in_running_mean, in_running_var, epsilon, momentum):
        x, share = (lambda: input.compute().float()), (lambda: float(momentum.compute()))
        mean = Node(lambda: x().mean((0, 2, 3), keepdim=True))
        var = Node(lambda: x().var((0, 2, 3), keepdim=True, correction=0))
        rstd = Node(lambda: (var.compute() + float(epsilon.compute())).rsqrt())
        z = Node(lambda: (x() - mean.compute()) * rstd.compute() * scale.compute() + bias.compute())
        news = [
            Node(lambda old=old, new=new: (1 - share()) * old.compute() + share() * new.compute())
            for old, new in ((in_running_mean, mean), (in_running_var, var))
        ]
        return z, mean, rstd, *news

    def batchnorm_backward(self, name, grad, input, scale, mean, inv_variance):
        axes = (0, 2, 3)
        dz = lambda: grad.compute().float()  # noqa: E731
        xhat = lambda: (input.compute().float() - mean.compute()) * inv_variance.compute()  # noqa: E731
        inner = lambda: (  # noqa: E731
            dz() - dz().mean(axes, keepdim=True) - xhat() * (dz() * xhat()).mean(axes, keepdim=True)
        )
        return (
            Node(lambda: scale.compute() * inv_variance.compute() * inner()),
            Node(lambda: (dz() * xhat()).sum(axes, keepdim=True)),
            Node(lambda: dz().sum(axes, keepdim=True)),
        )

    def add(self, name, a, b):
        return Node(lambda: a.compute() + b.compute())

    def relu(self, name, input):
        return Node(lambda: input.compute().relu())

    def cmp_gt(self, name, input, comparison):
        return Node(lambda: input.compute() > comparison.compute())

    def scale(self, name, input, scale):
        return Node(lambda: input.compute() * scale.compute())

    def build_plans(self):
        self.ready = True

    def get_workspace_size(self):
        assert self.ready
        return 16

    def execute(self, memory, workspace, handle):
        assert self.ready
        assert handle == "handle"
        results = [(tensor, node.compute()) for node, tensor in memory.items() if not node.given]
        for tensor, result in results:
            tensor.copy_(result)

    def nothing(self, *_):
        pass

    validate = build_operation_graph = create_execution_plans = check_support = nothing


@pytest.fixture
def fake_cudnn(torch, monkeypatch):
    """cuDNN's frontend."""
    module = types.ModuleType("cudnn")
    module.data_type = types.SimpleNamespace(HALF="half", BFLOAT16="bf16", FLOAT="float", BOOLEAN="bool")
    module.heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")
    module.create_handle = lambda: "handle"
    module.set_stream = lambda handle, stream: None
    module.pygraph = lambda **_: FakeGraph(torch)
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("operation", [name for name in cases.OPERATIONS if "eval" not in name])
def test_cudnn(operation, dtype, fake_cudnn):
    prove(peers.cudnn, operation, dtype)


def test_cudnn_serves_what_it_can():
    assert peers.not_cudnn(cases.Case((4, 6, 5, 7))) == ""
    assert peers.not_cudnn(cases.Case((4, 6, 5))) == "serves four axes, not float64"
    assert peers.not_cudnn(cases.Case((4, 6, 5, 7), operation=cases.OPERATIONS["eval"])) == "evaluation is not compared"


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["forward+relu", "backward+add+relu", "eval"])
def test_torch_compile(operation, torch):
    prove(peers.torch(peers.compiled), operation, "f32", "nchw")


def test_without_cudnn(torch):
    before = torch.backends.cudnn.enabled
    with peers.without_cudnn():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before


# ------------------------------------------------------------------------------------------------------- tiers
def race(shape, **seconds):
    return tiers.Race(cases.Case(shape, operation=cases.OPERATIONS["backward"]), "gpu_bn cupy", seconds)


def test_thresholds_are_fitted_to_the_fastest_tiers():
    """On a device where a block that has a channel to itself is always the fastest, less must do to choose it."""
    device = plan.DEVICES["a100"]
    raced = [race((32, channels, 14, 14), cta=1.0, split=2.0) for channels in (16, 32, 64, 128, 256)]
    best = tiers.fit(raced, device)
    assert tiers.mean_lost(raced, device, best) < tiers.mean_lost(raced, device, plan.THRESHOLDS)
    (name,) = (
        field.name for field in fields(best) if getattr(best, field.name) != getattr(plan.THRESHOLDS, field.name)
    )
    assert name in ("fill", "vectors_per_thread")  # a lower share of SMs, or more work a thread, makes blocks enough
    text = tiers.thresholds_text(raced, device, best, tiers.decided(raced, device, best))
    assert re.search(rf"\n    {name}: \w+ = {getattr(best, name)}  # was {getattr(plan.THRESHOLDS, name)}", text)
    assert "    usable_l2: float = 0.5  # not decided by these cases\n" in text  # nothing asks for another
    for field in fields(plan.Thresholds):  # the whole table is printed
        assert f"\n    {field.name}: {field.type} = " in text
    assert "    max_partials: int = 256  # not decided by these cases: it shapes launches, not the choice\n" in text
    copy = device.bandwidth * plan.THRESHOLDS.copy_share / 1e9
    assert f"    copy_share: float = 0.88  # not decided by these cases: a copy has {copy:.4g} GB/s here" in text


PLANTED = [
    ("a100", "fill", 0.25), ("h100", "fill", 1.5), ("a100", "usable_l2", 0.125), ("4090", "usable_l2", 0.75),
    ("h100", "vectors_per_thread", 1), ("h100", "vectors_per_thread", 16), ("h100", "blocks_per_sm", 1),
    ("h100", "blocks_per_sm", 4), ("t4", "max_cooperative", 8), ("a100", "max_cooperative", 16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "threshold", "value"), PLANTED)
def test_a_crossover_that_was_planted_is_found(name, threshold, value):
    """Times such that the tiers of other thresholds are the fastest: these thresholds come out."""
    device, truth = plan.DEVICES[name], replace(plan.THRESHOLDS, **{threshold: value})
    found = cases.select(
        ["resnet50-32", "resnet50-256", "mobilenetv2", "unet2d", "mlp"], ["f16", "f32"], ["nchw", "nhwc"],
        ["forward", "backward"],
    )  # fmt: skip
    raced = [planted(case, device, plan.plan(model.work_of(case), device, None, truth).tier) for case in found]
    assert tiers.mean_lost(raced, device, plan.THRESHOLDS) > 1
    best = tiers.fit(raced, device)
    assert best == truth
    assert threshold in tiers.decided(raced, device, best)
    text = tiers.thresholds_text(raced, device, best, tiers.decided(raced, device, best))
    assert f"    {threshold}: {type(getattr(plan.THRESHOLDS, threshold)).__name__} = {value}  # was " in text


def planted(case, device, fastest):
    served = []
    for tier in plan.TIERS:
        try:
            plan.plan(model.work_of(case), device, tier)
            served.append(tier)
        except plan.NoPlanError:
            continue
    return tiers.Race(case, tiers.FITTED_BY, {tier: 1.0 if tier == fastest else 2.0 for tier in served}, fastest)


def test_ranges_of_tiers_end_where_they_cross_over():
    def of(size, by="gpu_bn triton", **seconds):
        return tiers.Race(cases.Case((size, 64, 8, 8)), by, seconds)

    raced = [
        of(4, cta=1.0, split=2.0), of(2, cta=1.0, split=3.0), of(8, cta=1.02, split=1.0), of(16, cta=1.5, split=1.0),
        of(32, cta=2.0, split=1.0), of(4, by="gpu_bn cupy", cta=1.0),
    ]  # fmt: skip
    size = 64 * 8 * 8 * 4
    assert tiers.ranges(raced) == [
        ("gpu_bn cupy", "f32 nchw forward", "cta", 4 * size, 4 * size),
        ("gpu_bn triton", "f32 nchw forward", "cta", 2 * size, 8 * size),  # 2 % are no crossover
        ("gpu_bn triton", "f32 nchw forward", "split", 16 * size, 32 * size),
    ]
    rows = str(tiers.ranges_table(raced)).splitlines()
    assert rows[0] == "Crossovers: the fastest tier"
    assert rows[4].split() == ["gpu_bn", "triton", "f32", "nchw", "forward", "cta", "32.77", "kB", "131.1", "kB"]


def test_a_tier_that_is_better_unforced_counts_as_it_is_launched():
    forced = [timed("gpu_bn cupy cta", 3.0), timed("gpu_bn cupy split", 2.0, "split")]
    (found,) = tiers.races(forced, [timed("gpu_bn cupy", 1.0), timed("gpu_bn triton", 0.1)])
    assert found.seconds == {"cta": 1.0, "split": 2.0}
    assert (found.chosen, found.fastest, found.lost(found.chosen)) == ("cta", "cta", 1.0)


def test_thresholds_that_choose_the_fastest_stay():
    raced = [race((32, 256, 14, 14), cta=1.0, split=2.0), race((256, 64, 112, 112), split=1.0)]
    assert tiers.fit(raced, plan.DEVICES["a100"]) == plan.THRESHOLDS
    assert raced[0].lost("cooperative") == 2.0  # not timed: as bad as the worst


def timed(by, seconds, tier="cta", **options):
    case = cases.Case((32, 256, 14, 14), operation=cases.OPERATIONS["forward"])
    found = plan.plan(model.work_of(case), plan.DEVICES["a100"], tier)
    timings = {"cold": timing.Timing(seconds, seconds, seconds, 1)}
    floor = model.floor_bytes(model.work_of(case))
    return trial.Result(case, by, True, 0.1, timings=timings, plan=found, floor_bytes=floor, **options)


def test_a_backend_that_took_another_tier_is_in_no_race():
    results = [timed("gpu_bn triton cta", 1.0), timed("gpu_bn triton cooperative", 0.5, "split")]
    (found,) = tiers.races(results)
    assert found.seconds == {"cta": 1.0}
    (*_, text), kept = tiers.crossovers([], results, plan.DEVICES["a100"])
    assert "Thresholds for plan.py, as they are: fitting takes several tiers of gpu_bn cupy, timed\n" in text
    assert text.count("# not decided by these cases") == len(fields(plan.Thresholds))
    assert kept["tiers"][0]["by"] == "gpu_bn triton"
    assert kept["decided"] == {}
    assert tiers.crossovers([], [], plan.DEVICES["a100"]) == (["No tier could be timed."], {})


def test_forced_tiers_are_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from gpu_bn.bench import figures

    plain = timed("gpu_bn cupy", 1e-3)
    forced = [timed(f"gpu_bn cupy {tier}", 1e-3, tier) for tier in ("cta", "split")]
    assert {figures._group(result) for result in [plain, *forced]} == {("gpu_bn cupy", "cta"), ("gpu_bn cupy", "split")}
    assert set(plan.TIERS) < set(figures.TIERS_SHOWN)
    assert len(figures.TIERS_SHOWN) <= len(figures.COLOURS)
    plain.ratios["cold"] = {}
    assert figures.draw([plain], 1e9, tmp_path, forced) == [tmp_path / "roofline.png"]  # there is no peer
    assert figures.draw([], 1e9, tmp_path) == []


@pytest.mark.parametrize("shapes", [["tiny"], ["resnet50-32", "few"]], ids=["a row a case", "a row an operation"])
def test_the_peers_picture_stays_readable(shapes, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from gpu_bn.bench import figures

    found = cases.select(shapes, ["f16"], ["nchw", "nhwc"], cases.OPERATIONS)
    results = [
        trial.Result(case, by, True, timings={"cold": timing.Timing(1e-3, 1e-3, 1e-3, 3)},
                     ratios={"cold": {"torch cuDNN": 0.5, "apex": 1.5}})
        for case in found for by in ("gpu_bn triton", "gpu_bn cupy")
    ]  # fmt: skip
    height, width, _ = imread(figures.ratios(results, tmp_path / "peers.png")).shape
    assert width == figures.WIDTH * figures.DPI
    assert height < 2.2 * width


# ------------------------------------------------------------------------------------------------------ verify
COPY = 1e12


L2 = 1 << 20


def verdict_of(factor, tier="cta", counted=None):
    result = timed("gpu_bn cupy", 0.0, tier)
    seconds = factor * result.plan.dram_bytes / COPY
    result.timings["cold"] = timing.Timing(seconds, seconds, seconds, 1)
    return verify.verdict(result, COPY, L2, counted)


def test_a_prediction_holds_or_is_refuted():
    assert verdict_of(1.1).refuted == ""
    assert verdict_of(3.0).refuted == "time: 3.00 times as long"
    assert verdict_of(0.5).refuted == "time: 0.50 times as long: fewer bytes, or faster than a copy"
    read, written = verdict_of(1.0).bytes
    assert read == written == 32 * 256 * 14 * 14 * 4

    def counted(read, written):
        return verdict_of(1.0, counted=verify.Bytes(read, written)).refuted

    assert counted(read + 1000, written + 1000) == ""
    assert counted(2 * read, written) == "bytes: 2.00 times as many read"
    assert counted(read // 2, written) == "bytes: 0.50 times as many read"
    assert counted(read, 2 * written) == "bytes: 2.00 times as many written"
    assert counted(read, written - L2) == ""  # the cache still holds it
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


def ncu(stdout, stderr=""):
    commands = []

    def run(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout, stderr)

    return commands, run


def test_bytes_are_counted_by_ncu():
    commands, run = ncu(NCU)
    result = timed("gpu_bn cupy", 1.0)
    assert verify.count(result, run) == verify.Bytes(6_423_528, 6_423_552)
    assert commands[0][0] == "ncu"
    assert commands[0][-5:] == ["32x256x14x14", "f32", "nchw", "forward", "gpu_bn cupy"]
    found, kept = verify.verify([result], COPY, L2, run)
    text = " ".join(str(found).split())
    assert kept[0]["counted_bytes"] == {"read": 6_423_528, "written": 6_423_552}
    assert kept[0]["predicted_bytes"] == {"read": 6_422_528, "written": 6_422_528}
    assert "1 of 1 predictions are refuted" in text  # a second is far too long
    assert "DRAM bytes were counted by ncu, of all cases." in text
    assert "6.423 MB 6.424 MB 6.423 MB 6.424 MB REFUTED, time:" in text


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (("", "==ERROR== ERR_NVGPUCTRPERM - no permission"), "the driver does not permit it"),
        (("", "==ERROR== out of luck"), "ncu counted nothing (==ERROR== out of luck)"),
        ((NCU.replace("1000.0", "n/a"), ""), "ncu counted nothing (==PROF== Disconnected)"),
        ((NCU.replace("dram__bytes_write", "other"), ""), "ncu counted nothing (==PROF== Disconnected)"),
    ],
)
def test_what_may_not_be_counted_is_said_and_not_tried_again(output, says):
    commands, run = ncu(*output)
    text, kept = verify.verify([timed("gpu_bn cupy", 1.0)] * 3, COPY, L2, run)
    assert says in " ".join(str(text).split())
    assert len(commands) == 1
    assert [row["counted_bytes"] for row in kept] == [None] * 3


def test_the_probe_makes_one_call_between_start_and_stop(monkeypatch):
    gpu = Clocked()
    monkeypatch.setattr(gpus, "find", lambda: (gpu, ""))
    counting = replace(NUMPY, name="counting", build=lambda *_: lambda: gpu.done_things.append("call"))
    monkeypatch.setattr(probe, "SUBJECTS", [counting])
    monkeypatch.setattr(
        probe, "_profiler", lambda _: [lambda name=n: gpu.done_things.append(name) for n in ("on", "off")]
    )
    probe.main(["4x8", "f32", "nc", "forward", "counting"])
    assert gpu.done_things == ["call", "call", "flush", "on", "call", "off"]
    monkeypatch.setattr(gpus, "find", lambda: (None, "no GPU here"))
    with pytest.raises(SystemExit, match="no GPU here"):
        probe.main(["4x8", "f32", "nc", "forward", "counting"])


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
    small = model.modelled(replace(case, shape=(32, 256, 14, 14)), plan.DEVICES["h100"])
    assert small.cudnn_bytes == cudnn * small.case.bytes
    nchw = model.modelled(replace(case, layout="nchw"), plan.DEVICES["h100"])
    assert nchw.cudnn_bytes is None


def test_the_model_is_the_plans():
    for operation in ("forward+add+relu", "backward"):
        case = cases.Case((32, 256, 14, 14), "float16", "nhwc", cases.OPERATIONS[operation])
        for device in plan.DEVICES.values():
            found = model.modelled(case, device)
            assert found.plan == plan.plan(model.work_of(case), device)
            assert found.tiers[found.tier] == found.plan.dram_bytes >= found.floor_bytes
            assert found.as_json()["seconds"] == found.plan.seconds
            for tier, moved in found.tiers.items():
                assert moved == plan.plan(model.work_of(case), device, tier).dram_bytes


def test_the_cache_serves_others_as_it_serves_us():
    case = cases.Case((32, 64, 56, 56), "float16", operation=cases.OPERATIONS["forward"])
    device = plan.DEVICES["a100"]
    found = model.modelled(case, device)
    floor_seconds = found.floor_bytes / (plan.THRESHOLDS.copy_share * device.bandwidth)
    assert found.seconds(found.torch_bytes) == pytest.approx(floor_seconds)  # the second read hits
    large = model.modelled(replace(case, shape=(256, 64, 56, 56)), device)
    assert large.seconds(large.torch_bytes) > 1.3 * large.plan.floor_seconds
    assert found.seconds(None) is None


def test_evaluation_is_one_pass_and_nothing_is_known_of_others():
    case = cases.Case((32, 64, 56, 56), operation=cases.OPERATIONS["eval"])
    found = model.modelled(case, plan.DEVICES["t4"])
    assert found.tier == "one pass"
    assert found.tiers == {"one pass": found.floor_bytes}
    assert found.torch_bytes is found.cudnn_bytes is None


def test_layers_are_summed_as_often_as_the_network_has_them():
    results = [
        trial.Result(cases.Case(shape), "x", True, timings={"wall": timing.Timing(1e-3, 0, 0, 1)})
        for shape in cases.shapes_of(["resnet50-32", "tiny"])
    ]
    lines = str(report.layers_table(results)[0]).splitlines()
    assert [line.split() for line in lines[3:-1]] == [["resnet50-32", "53", "f32", "nchw", "forward", "x", "53", "ms"]]
    assert report.layers_table(results[1:]) == []  # one is missing


def test_json_has_no_numbers_that_are_none(tmp_path):
    found = report.Report("gpu-bn bench", {}, [timed("x", 1.0)])
    found.results[0].error = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        found.write(tmp_path / "report.json")
