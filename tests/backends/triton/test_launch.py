"""What the Triton backend hands to Triton's launcher, with a stand-in for the device."""

import contextlib
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import RecordingBackend
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime._allocation import NullAllocator

import gpu_bn
from gpu_bn.activations import Activation
from gpu_bn.backends.triton import launch as triton_launch
from gpu_bn.backends.triton.backend import TritonBackend
from gpu_bn.backends.triton.launch import ClusterError, Specialisation, Step
from gpu_bn.kernels.triton.forward import bn_merge_moments_kernel
from gpu_bn.plan import DEVICES
from gpu_bn.testing import cases, check, extended_cases

OLD = triton.__version__.startswith("3.6")


class Compiled:
    """A compiled kernel: notes its launches. Loading it says what it spills."""

    spills, n_regs = 0, 128

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        self.n_spills = self.spills
        return lambda *args, stream: self.launches.append((grid, args, stream))


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(triton_launch, "LOADED", triton_launch.Recent(triton_launch.LOADED.most))


@pytest.fixture
def step():
    tail = (5, 7, 2, 4, 4, 1, triton.language.float32, 1, False)
    return Step(bn_merge_moments_kernel, (3, 1), tail, num_warps=2, device=1)


PARTIALS, SAVED = torch.zeros(2, 4, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
NO_TABLE = None, None, None, 0.0
"""No table, weight, bias; eps."""


@pytest.fixture
def compilations(monkeypatch):
    made = []

    def build(source, target, options):
        made.append((source, target, options, Compiled()))
        return made[-1][-1]

    active = SimpleNamespace(
        get_current_target=lambda: "target", get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "ASTSource", lambda *source: source)
    monkeypatch.setattr(triton_launch.triton, "compile", build)
    return made


@pytest.mark.parametrize("current", [1, 0])
def test_a_step_is_compiled_once_and_launched_on_its_device_and_the_current_stream(
    step, compilations, monkeypatch, current
):
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    args = (PARTIALS, SAVED, None, *NO_TABLE)
    for _ in range(2):
        triton_launch.launch(step, args)
    ((kernel, signature, constants, _), target, options, compiled) = compilations.pop()
    assert not compilations
    assert kernel is bn_merge_moments_kernel
    assert target == "target"
    assert options == {"num_warps": 2, "num_ctas": 1, "enable_fp_fusion": False}
    assert signature["partials"] == "*fp64"
    assert signature["positions"] == "i32"
    assert constants == {
        "counts": None,
        "table": None,
        "weight": None,
        "bias": None,
        "CHUNK": 4,
        "LANES": 1,
        "COMPUTE": triton.language.float32,
        "GROUPS": 1,
        "RAGGED": False,
    }
    assert compiled.launches == [((3, 1, 1), (*args, *step.tail), "stream of 1")] * 2
    assert entered == [1] + [1, 1] * (current != 1)


class Handle:
    """A kernel with Triton's own launcher in front of a function that notes what C would get."""

    function, packed_metadata = 4711, (4, 1, 512)
    launch_metadata, __getitem__ = CompiledKernel.launch_metadata, CompiledKernel.__getitem__

    def __init__(self, monkeypatch, **metadata):
        self.calls, self.name, self.src = [], "kernel", SimpleNamespace(fn=None)
        utils = SimpleNamespace(launch=lambda *args: self.calls.append(args))
        monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils), raising=False)
        sizes = {f"{kind}_scratch_{of}": 0 for kind in ("global", "profile") for of in ("size", "align")}
        plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False} | sizes | metadata
        source = SimpleNamespace(constants={}, signature={"x": "*fp32", "n": "i32", "FLAG": "constexpr"})
        for name in ("annotate_arguments", "make_kernel_signature"):  # which C would read
            monkeypatch.setattr(nvidia, name, tuple)
        self.run = nvidia.CudaLauncher(source, SimpleNamespace(**plain))

    def _init_handles(self):
        pass


@pytest.mark.skipif(OLD, reason="Triton 3.6 compiles its launcher, which needs CUDA's headers and a C compiler")
def test_a_kernel_is_launched_as_triton_launches_it_but_nothing_is_told_to_nobody(monkeypatch):
    kernel, x = Handle(monkeypatch), torch.zeros(3)
    kernel[(3, 2, 1)](x, 7, True, stream=99)
    triton_launch.starter(kernel, (3, 2, 1))(99, x, 7, True)
    theirs, ours = kernel.calls
    assert [a is b or a == b for a, b in zip(theirs[:8] + theirs[11:], ours[:8] + ours[11:], strict=True)] == [
        True
    ] * 13
    assert ours[8:11] == (None, None, None)
    assert ours[-1] == (x, 7, True)


@pytest.mark.skipif(OLD, reason="Triton 3.6 compiles its launcher, which needs CUDA's headers and a C compiler")
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_watches_launches_is_told(monkeypatch, name):
    kernel, seen = Handle(monkeypatch), []
    start, hooks = triton_launch.starter(kernel, (1, 1, 1)), getattr(triton.knobs.runtime, name)
    hooks.add(seen.append)
    try:
        start(99, torch.zeros(3), 7, True)
    finally:
        hooks.remove(seen.append)
    assert kernel.calls[0][8 + 1 + name.count("exit")] is hooks


@pytest.mark.skipif(OLD, reason="Triton 3.6 compiles its launcher, which needs CUDA's headers and a C compiler")
def test_a_kernel_that_needs_scratch_memory_is_launched_by_triton(monkeypatch):
    kernel, allocated = Handle(monkeypatch, global_scratch_size=16, global_scratch_align=8), []
    triton.set_allocator(lambda *what: allocated.append(what))
    try:
        triton_launch.starter(kernel, (3, 2, 1))(99, torch.zeros(3), 7, True)
    finally:
        triton.set_allocator(NullAllocator())
    assert allocated == [(96, 8, 99)]
    assert len(kernel.calls) == 1


def test_absent_arguments_are_constants_and_whole_numbers_widen(step):
    step.wide = True
    special = Specialisation.from_step(step, (None, SAVED, None, *NO_TABLE))
    assert special.constants["partials"] is None
    assert special.signature["partials"] == "constexpr"
    assert special.signature["positions"] == "i64"


def test_what_is_aligned_is_told_by_the_place_of_its_parameter(step, compilations, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    step.aligned = frozenset({"saved", "counts"})
    triton_launch.launch(step, (None, SAVED, None, *NO_TABLE))
    (((_, signature, _, hints), *_),) = compilations
    assert list(signature)[:3] == ["partials", "saved", "counts"]
    assert hints == {(1,): [["tt.divisibility", 16]]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_cuda_graph_replays_a_call():
    import gpu_bn

    x = torch.randn(8, 16, 32, 32, device="cuda")
    vectors = [torch.rand(16, device="cuda") for _ in range(4)]

    def call():
        y, saved = gpu_bn.batch_norm_forward(x, *vectors, training=True, activation="relu")
        return y, gpu_bn.batch_norm_backward(torch.ones_like(x), saved).dx

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    want_y, want_dx = call()
    assert torch.equal(y, want_y)
    assert torch.equal(dx, want_dx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("tier", [None, "split", "cta", "cluster"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case_on_the_gpu(case, tier):
    check(case, TritonBackend(tier=tier))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("case", extended_cases(), ids=str)
def test_masks_ghost_batches_and_renormalisation_on_the_gpu(case):
    check(case, TritonBackend())


@pytest.mark.parametrize(("registers", "warps", "more"), [(128, 8, None), (128, 4, None), (104, 8, 128), (144, 8, 255)])
def test_what_spills_is_compiled_again_with_registers_that_cost_no_block(
    step, compilations, monkeypatch, registers, warps, more
):
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(Compiled, "spills", 4)
    monkeypatch.setattr(Compiled, "n_regs", registers)
    step.num_warps = warps
    args = (PARTIALS, SAVED, None, *NO_TABLE)
    triton_launch.launch(step, args)
    *spilled, (*_, options, kept) = compilations
    assert len(kept.launches) == 1
    if more is None:
        assert not spilled
    else:
        ((*_, first, unused),) = spilled
        assert options == first | {"maxnreg": more}
        assert not unused.launches


def test_a_call_is_planned_again_without_clusters_where_they_fail():
    """Whatever Triton or the device says: too little of the GPU is ours, or the compiler does not know clusters."""
    refused, launched = [], []

    def launch(step, args):
        del args
        if step.num_ctas > 1:
            refused.append(step)
            raise ClusterError("no clusters here")
        launched.append(step)

    backend = TritonBackend(launch, DEVICES["h100"])
    backend.builder.clusters = True
    x = torch.randn(32, 64, 56, 56, dtype=torch.float16)
    for _ in range(2):
        y, saved = gpu_bn.batch_norm_forward(x, training=True, backend=backend)
        gpu_bn.batch_norm_backward(y, saved, need=["dx"], backend=backend)
    assert len(refused) == 1
    assert len(launched) == 8
    assert {step.num_ctas for step in launched} == {1}


def test_a_failed_launch_in_a_cluster_is_a_cluster_error(step, compilations, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    monkeypatch.setattr(triton_launch.triton, "compile", Mock(side_effect=ValueError("PassManager::run failed")))
    args = (PARTIALS, SAVED, None, *NO_TABLE)
    with pytest.raises(ValueError, match="PassManager"):
        triton_launch.launch(step, args)
    step.num_ctas = 2
    with pytest.raises(ClusterError, match="cluster of 2 blocks: PassManager"):
        triton_launch.launch(step, args)
    assert step.run is None
    assert not compilations


@pytest.mark.skipif(triton_launch.CLUSTERS, reason=f"Triton {triton.__version__} compiles clusters")
def test_no_plan_has_clusters_where_triton_cannot_compile_them():
    backend = RecordingBackend(DEVICES["h100"], tier="cluster")
    gpu_bn.batch_norm_forward(torch.randn(32, 64, 56, 56, dtype=torch.float16), training=True, backend=backend)
    assert [step.num_ctas for step, _ in backend.launches] == [1, 1]


def test_calls_of_many_shapes_share_kernels_and_nothing_grows_without_bound(compilations, monkeypatch):
    """64 image sizes: as many kernels as there are texts to compile."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("gpu_bn.backends.triton.backend.PREPARED", 8)
    specialisations = set()

    def launch(step, args):
        step.device = 0
        specialisations.add((step.kernel.__name__, Specialisation.from_step(step, args).key))
        triton_launch.launch(step, args)

    backend = TritonBackend(launch, DEVICES["a100"])
    for size in range(4, 68):
        x = torch.empty(2, 8, size, size)
        y, saved = gpu_bn.batch_norm_forward(x, training=True, backend=backend)
        gpu_bn.batch_norm_backward(y, saved, need=["dx"], backend=backend)
    assert len(compilations) == len(specialisations) == len(triton_launch.LOADED) < 64
    assert len(backend._prepared) == 8


def test_the_kernels_loaded_last_are_kept():
    recent = triton_launch.Recent(2)
    for key in "abac":
        recent[key] = key.upper()
    assert recent == {"b": "B", "c": "C"}
    recent.clear()
    assert not recent


@pytest.mark.parametrize("one", [1, True, np.int64(1), np.float32(1), np.array(1.0), np.array(1)], ids=repr)
def test_whole_numbers_for_fractions_make_no_other_kernel(one):
    """A kernel compiled for a whole number would be given fractions by later calls."""
    x = torch.randn(4, 8, 6, 6)
    vectors = [torch.ones(8) for _ in range(4)]
    found = []
    for number, eps in ((1.0, 1.0), (one, one if np.ndim(one) == 0 and not isinstance(one, np.ndarray) else 1)):
        backend = RecordingBackend(DEVICES["a100"], tier="split")
        activation = Activation("elu", number if not isinstance(number, np.ndarray) else 1)
        options = {"training": True, "momentum": number, "eps": eps, "activation": activation}
        y, saved = gpu_bn.batch_norm_forward(x, *vectors, **options, backend=backend)
        gpu_bn.batch_norm_backward(y, saved, backend=backend)
        found.append([special for _, special in backend.launches])
        for special in found[-1]:
            assert all(special.signature.get(name, "fp64") == "fp64" for name in triton_launch.FRACTIONS)
            assert special.constants.get("momentum_at") is None
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.float64])
def test_a_momentum_on_the_device_is_a_fraction_of_any_dtype(dtype):
    backend = RecordingBackend(DEVICES["a100"], tier="split")
    x, vectors = torch.randn(4, 8, 6, 6), [torch.ones(8) for _ in range(4)]
    for number in (torch.tensor(1.0), torch.tensor(1, dtype=dtype)):
        gpu_bn.batch_norm_forward(x, *vectors, training=True, momentum=number, backend=backend)
    first, second = (special.signature["momentum_at"] for step, special in backend.launches if "y" in special.signature)
    assert (first, second) == ("*fp32", {torch.float16: "*fp16"}.get(dtype, "*fp64"))
    assert len({step for step, _ in backend.launches}) == 4


def test_the_parameter_of_an_activation_is_a_number():
    assert type(Activation("elu", 1).parameter) is float
    with pytest.raises(TypeError, match="the parameter of elu should be a number, got str"):
        Activation("elu", "1")
