"""Test the peers that ``gpu-bn bench`` compares with, some of them as stand-ins, and the figure that shows them."""

# ruff: noqa: ARG001, ARG002, ARG005 - stand-ins have the signatures of the originals
import sys
import types
from dataclasses import replace

import pytest
from support.bench_stand_ins import NUMPY

from gpu_bn.bench import cases, implementations, measurement, timing


def prove(build, operation, dtype="f16", layout="nhwc", shape="4x6x5x7"):
    """Build a peer's call on CPU tensors, and require that its results agree with the oracle."""
    case = cases.select([shape], [dtype], [layout], [operation])[0]
    tensors = measurement.Tensors(case)
    implementation = replace(NUMPY, name="peer", ours=False, adapter="triton")
    problem = tensors.problem("triton", case.operation)
    call = build(case.operation, problem)
    for _ in range(2):  # a call can be repeated
        assert tensors.check(implementation, case.operation, call()) <= 1


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def fake_apex(torch, monkeypatch):
    """Install a stand-in for the layer of apex, which takes tensors whose last axis is the channels."""

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
    prove(implementations.apex, operation)


def test_apex_serves_what_it_can():
    served = cases.Case((4, 6, 5, 7), "float16", "nhwc")
    assert implementations.apex_refuses(served) == ""
    for other in ({"layout": "nchw"}, {"dtype": "float32"}, {"shape": (4, 6, 5)}):
        assert implementations.apex_refuses(replace(served, **other)) == "serves float16, four axes, nhwc"


class Node:
    """A tensor of a graph, with the function that computes it."""

    def __init__(self, compute, given=False):
        self.compute, self.given = compute, given

    def set_output(self, _):
        return self

    def set_data_type(self, kind):
        assert kind is not None
        return self


class FakeGraph:
    """A graph as in cuDNN's frontend, which torch computes."""

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

    def build(self, modes):
        assert modes
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


@pytest.fixture
def fake_cudnn(torch, monkeypatch):
    """Install a stand-in for cuDNN's frontend."""
    module = types.ModuleType("cudnn")
    module.data_type = types.SimpleNamespace(FLOAT="float")
    module.heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")
    module.create_handle = lambda: "handle"
    module.set_stream = lambda handle, stream: None
    module.pygraph = lambda **_: FakeGraph(torch)
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("operation", [name for name in cases.OPERATIONS if "eval" not in name])
def test_cudnn(operation, dtype, fake_cudnn):
    prove(implementations.cudnn, operation, dtype)


def test_cudnn_serves_what_it_can():
    assert implementations.cudnn_refuses(cases.Case((4, 6, 5, 7))) == ""
    assert implementations.cudnn_refuses(cases.Case((4, 6, 5))) == "serves four axes, not float64"
    assert (
        implementations.cudnn_refuses(cases.Case((4, 6, 5, 7), operation=cases.OPERATIONS["eval"]))
        == "evaluation is not compared"
    )


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["forward+relu", "backward+add+relu", "eval"])
def test_torch_compile(operation, torch):
    prove(implementations.compiled, operation, "f32", "nchw")


def test_a_peer_that_rounds_its_sum_before_relu_is_right(torch):
    """In float16 rounding moves elements across ReLU's kink, which changes the float32 gradients of weight and bias."""
    prove(implementations.eager, "backward+add+relu", "f16", "nchw", "32x256x14x14")


def test_without_cudnn(torch):
    before, seen = torch.backends.cudnn.enabled, []

    def build(*_):
        seen.append(torch.backends.cudnn.enabled)
        return lambda: seen.append(torch.backends.cudnn.enabled)

    call = implementations.without_cudnn(build)(cases.OPERATIONS["forward"], None)
    assert torch.backends.cudnn.enabled == before
    call(), call()
    assert seen == [False] * 3
    assert torch.backends.cudnn.enabled == before


@pytest.mark.parametrize("shapes", [["tiny"], ["resnet50-32", "few"]], ids=["a row a case", "a row an operation"])
def test_the_peers_picture_stays_readable(shapes, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from gpu_bn.bench import figures

    found = cases.select(shapes, ["f16"], ["nchw", "nhwc"], cases.OPERATIONS)
    results = [
        measurement.Result(case, by, True, timings={"cold": timing.Timing(1e-3, 1e-3, 1e-3, 3)},
                     ratios={"cold": {"torch cuDNN": 0.5, "apex": 1.5}})
        for case in found for by in ("gpu_bn triton", "gpu_bn cupy")
    ]  # fmt: skip
    height, width, _ = imread(figures.ratios(results, tmp_path / "peers.png")).shape
    assert width == figures.WIDTH * figures.DPI
    assert height < 2.2 * width


def test_the_roofline_names_each_tensor_and_draws_the_ceilings(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from gpu_bn.bench import figures

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: drawn.append(self))
    found = cases.select(["4x8x6x6", "256x1024"], ["f16"], ["nchw"], ["forward", "backward"])
    results = [
        measurement.Result(case, by, by == "ours", timings={"wall": timing.Timing(1e-3, 1e-3, 1e-3, 3)},
                           floor_bytes=1000)
        for case in found for by in ("ours", "peer")
    ]  # fmt: skip
    ceilings = {"a copy": 2e6, "in the cache": 8e6}
    figures.roofline(results, ceilings, tmp_path / "roofline.png", "a machine, 1 thread")
    (figure,) = drawn
    assert figure.get_suptitle().endswith("a machine, 1 thread")
    assert len(figure.axes) == 2
    for panel in figure.axes:
        assert sorted(text.get_text() for text in panel.texts) == ["256x1024 f16", "4x8x6x6 f16 nchw"]
        heights = {line.get_label(): line.get_ydata()[0] for line in panel.lines}
        assert heights == pytest.approx({"ours": 1e-3, "peer": 1e-3, "a copy": 2e-3, "in the cache": 8e-3})
        hollow = {line.get_label(): line.get_markerfacecolor() == "none" for line in panel.lines}
        assert (hollow["ours"], hollow["peer"]) == (False, True)
