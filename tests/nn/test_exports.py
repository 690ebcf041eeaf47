"""Test that exported files hold torch's own operators, load without this package, and give the same numbers."""

import collections
import copy
import os
import subprocess
import sys

import pytest
from support import rng

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.networks import MobileNet
from torch.testing import assert_close

import gpu_bn
from gpu_bn import nn

REASON = "not installed: pip install -e '.[models]'"


def images(count=2):
    return torch.from_numpy(rng(0).standard_normal((count, 3, 32, 32))).float()


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = MobileNet()
    model(2 * images(8) + 1)
    return model.eval()


WAYS = {
    "torch": copy.deepcopy,
    "converted": lambda model: nn.convert(copy.deepcopy(model)),
    "fused": lambda model: nn.convert(copy.deepcopy(model), fuse=True),
    "folded": lambda model: nn.fold(nn.convert(copy.deepcopy(model), fuse=True)),
    "own activation": lambda _: torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, activation=gpu_bn.leaky_relu(0.2))
    ).eval(),
}
WITHOUT = """
import sys, torch
sys.modules["gpu_bn"] = None  # importing it is an error
x = torch.load("x")
for name in sys.argv[1:]:
    loaded = torch.jit.load(name) if name.endswith("jit") else torch.export.load(name).module()
    torch.save(loaded(x), name + ".y")
"""


@pytest.mark.parametrize(
    "ways", [["fused"], pytest.param(["converted", "folded", "own activation"], marks=pytest.mark.slow)]
)
def test_files_load_where_gpu_bn_is_not(ways, plain, tmp_path):
    x = images()
    torch.save(x, tmp_path / "x")
    models = {way: WAYS[way](plain) for way in ways}
    for way, model in models.items():
        torch.jit.trace(model, x, check_trace=False).save(tmp_path / f"{way}.jit")
        torch.export.save(torch.export.export(model, (x,)), tmp_path / f"{way}.pt2")
    names = [f"{way}.{kind}" for way in ways for kind in ("jit", "pt2")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert_close(torch.load(tmp_path / f"{name}.y"), models[name.partition(".")[0]](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_is_recorded_as_torchs(momentum):
    model, theirs = nn.BatchNorm2d(3, momentum=momentum), torch.nn.BatchNorm2d(3, momentum=momentum)
    x = images()
    ours, other = (torch.jit.trace(copy.deepcopy(each), x, check_trace=False) for each in (model, theirs))
    assert "gpu_bn::" not in str(ours.inlined_graph)
    for _ in range(2):
        assert_close(ours(x), other(x))
    assert_close(ours.state_dict(), other.state_dict())
    if momentum is not None:
        exported = torch.export.export(model, (x,))
        assert not [node for node in exported.graph.nodes if "gpu_bn" in str(node.target)]


@pytest.mark.parametrize("options", [{"mask": torch.ones(2, 32, 32, dtype=torch.bool)}, {}])
def test_what_torch_does_not_have_cannot_be_recorded_in_training(options):
    model = nn.BatchNorm2d(3, virtual_batch_size=None if options else 1).requires_grad_(False)

    def call(x):
        return model(x, **options)

    with pytest.raises(NotImplementedError, match=r"call model.eval\(\) first, or use torch.export"):
        torch.jit.trace(call, images())
    model.eval()
    assert "gpu_bn::" not in str(torch.jit.trace(call, images(), check_trace=False).inlined_graph)


def test_tracers_read_the_mode_when_they_run():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.nn.ReLU())
    twin, x = copy.deepcopy(model), images()
    traced = torch.fx.symbolic_trace(model.train())
    for mode in (True, False, True):
        assert_close(traced.train(mode)(x), twin.train(mode)(x))
    assert_close(traced.state_dict(), twin.state_dict())
    calls = []
    traced.get_submodule("1").register_forward_hook(lambda *_: calls.append(1))
    traced(x)
    assert calls == [1]


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("way", ["converted", "fused", "folded"])
def test_onnx_has_no_more_nodes_than_of_torchs_layers(dynamo, way, plain, tmp_path):
    onnx = pytest.importorskip("onnx", reason=f"onnx is {REASON}")
    runtime = pytest.importorskip("onnxruntime", reason=f"onnxruntime is {REASON}")
    pytest.importorskip("onnxscript", reason=f"onnxscript is {REASON}")
    nodes, numbers = [], []
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    for model in (plain, WAYS[way](plain)):
        name = str(tmp_path / "model.onnx")
        torch.onnx.export(model, (images(),), name, input_names=["x"], dynamo=dynamo, verbose=False, **shapes)
        graph = onnx.load(name).graph
        assert {node.domain for node in graph.node} == {""}
        nodes.append(collections.Counter(node.op_type for node in graph.node).total())
        session = runtime.InferenceSession(name, providers=["CPUExecutionProvider"])
        numbers.append(torch.from_numpy(session.run(None, {"x": images(5).numpy()})[0]))
    assert nodes[1] <= nodes[0]
    assert_close(*numbers, rtol=1e-4, atol=1e-5)
    assert_close(numbers[1], plain(images(5)), rtol=1e-4, atol=1e-5)


def small():
    """Return a small model of torch layers: one normalisation has an activation after it, the other has none."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)]
    model = torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(2))
    model(2 * images(8) + 1)
    return model.eval()


@pytest.mark.slow
def test_ahead_of_time_compilation(tmp_path):
    plain = small()
    model = nn.convert(copy.deepcopy(plain), fuse=True)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    assert_close(compiled(images(5)), plain(images(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["torch", "converted", "fused"])
def test_quantisation_aware_training_through_fx(way, plain):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    model = WAYS[way](plain).train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("fbgemm"), (images(),))
    prepared(images(8))
    prepared.eval()
    quantised = convert_fx(prepared)
    one, both = quantised(images(1)), quantised(images(8))
    assert_close(one, both[:1], rtol=0, atol=0.05)  # the statistics of the batch are not used
    assert (one - model.eval()(images(1))).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore")  # importing torchao warns
def test_quantisation_aware_training_through_an_export():
    """A converted model is prepared like one of torch layers. Only one is quantised, which takes 30 seconds."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[zoo]'")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain, x = small().train(), images(8)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared, outputs = {}, {}
    for way in ("torch", "converted", "fused"):
        exported = torch.export.export(WAYS[way](plain).train(), (x,)).module()
        prepared[way] = prepare_qat_pt2e(exported, quantizer)
        outputs[way] = [prepared[way](x) for _ in range(2)]
        move_exported_model_to_eval(prepared[way])
        outputs[way].append(prepared[way](x))
    for way in ("converted", "fused"):
        assert_close(outputs[way], outputs["torch"])
        assert_close(prepared[way].state_dict(), prepared["torch"].state_dict())
    quantised = convert_pt2e(prepared["fused"])
    steps = [str(node.target) for node in quantised.graph.nodes if node.op == "call_function"]
    assert not [step for step in steps if "batch_norm" in step or "add_" in step]
    assert_close(quantised(x), outputs["fused"][-1], rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("within", [True, False])
def test_compiled_autograd(within):
    torch.manual_seed(0)
    own = nn.BatchNorm2d(4, activation=gpu_bn.leaky_relu(0.2), momentum=None)
    fused = nn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU()), fuse=True)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), own, fused, nn.BatchNorm2d(4))
    twin = copy.deepcopy(model)
    compiler = torch.compile(backend="eager", fullgraph=True)
    for step in range(2):  # the second step must use nothing of the first
        x = images(4) + step
        if not within:
            loss = model(x).square().mean()
        with torch._dynamo.compiled_autograd._enable(compiler):
            (model(x).square().mean() if within else loss).backward()
        twin(x).square().mean().backward()
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert_close(*([parameter.grad for parameter in each] for each in zip(*pairs, strict=True)))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ what other libraries change
@pytest.mark.parametrize("take_apart", [
    torch.nn.SyncBatchNorm.convert_sync_batchnorm,
    lambda layer: torch.nn.utils.fuse_conv_bn_eval(torch.nn.Conv2d(3, 3, 1).eval(), layer),
])  # fmt: skip
def test_libraries_that_would_lose_an_activation_raise(take_apart):
    layer = nn.BatchNorm2d(3, activation="relu").eval()
    with pytest.raises(RuntimeError, match="would lose the activation relu of this layer"):
        take_apart(layer)
    assert (layer.eps, layer.num_features) == (1e-5, 3)
    layer.activation = None
    take_apart(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_merged_activations_survive_what_libraries_do(plain):
    from torch.fx.experimental import optimization

    x = images()
    want = plain(x)
    for change in (torch.nn.SyncBatchNorm.convert_sync_batchnorm, optimization.fuse):
        assert_close(change(WAYS["fused"](plain))(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convert_sync_batchnorm", "freeze_batch_norm_2d"])
def test_timms_converters_keep_or_refuse_activations(name, plain):
    layers = pytest.importorskip("timm.layers", reason=f"timm is {REASON}")
    change, x = getattr(layers, name), images()
    for way in ("converted", "fused", "folded"):
        assert_close(change(WAYS[way](plain)).eval()(x), plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="would lose the activation"):
        change(WAYS["own activation"](plain))
    timms = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=torch.nn.SiLU)).eval()
    assert_close(change(nn.convert(copy.deepcopy(timms))).eval()(x), timms(x))  # it keeps the activation's module


@pytest.mark.parametrize("kind", ["BatchNormAct2d", "FrozenBatchNormAct2d"])
def test_timms_functions_know_converted_layers_by_their_class(kind):
    layers = pytest.importorskip("timm.layers", reason=f"timm is {REASON}")
    plain, x = layers.BatchNormAct2d(3, act_layer=torch.nn.SiLU), images()
    layer = nn.convert(layers.freeze_batch_norm_2d(plain) if kind.startswith("Frozen") else plain)
    assert repr(layer).startswith("gpu_bn.")
    other = (layers.unfreeze_batch_norm_2d if kind.startswith("Frozen") else layers.freeze_batch_norm_2d)(layer)
    assert isinstance(layer, getattr(layers, kind))
    assert type(other) is not type(layer)
    assert_close(other.eval()(x), layer.eval()(x))
    with pytest.raises(RuntimeError, match="would lose the activation"):
        torch.nn.utils.fuse_conv_bn_eval(torch.nn.Conv2d(3, 3, 1).eval(), layer)


def test_torchvisions_functions_know_converted_layers_by_their_class():
    from support.model_zoo import declare_operators

    declare_operators()
    utils = pytest.importorskip("torchvision.models.detection._utils", reason=f"torchvision is {REASON}")
    from torchvision.ops import FrozenBatchNorm2d

    plain, x = torch.nn.Sequential(FrozenBatchNorm2d(3)), images()
    ours = nn.convert(copy.deepcopy(plain))
    for model in (plain, ours):
        utils.overwrite_eps(model, 0.5)
    assert_close(ours(x), plain(x))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_opacus_takes_our_layers_for_torchs(activation):
    validators = pytest.importorskip("opacus.validators", reason=f"opacus is {REASON}")
    model = nn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3), nn.BatchNorm2d(3, activation=activation)))
    assert len(validators.ModuleValidator.validate(model.train(), strict=False)) == 2
    if activation is None:
        assert [type(layer) for layer in validators.ModuleValidator.fix(model)] == [torch.nn.GroupNorm] * 2
    else:
        with pytest.raises(RuntimeError, match="would lose the activation relu of this layer"):
            validators.ModuleValidator.fix(model)


# ------------------------------------------------------------------------------------- torch.func, and refused calls
@pytest.mark.parametrize(("scale", "shift"), [(1e20, 0.0), (1.0, 1e4), (1e-20, 0.0)])
def test_transforms_are_as_exact_as_calls(scale, shift):
    x = torch.from_numpy(rng(1).standard_normal((64, 4))).float() * scale + shift
    weight, bias = torch.rand(4) + 0.5, torch.rand(4)
    wide = [value.double() for value in (x, weight, bias)]
    var, mean = torch.var_mean(wide[0], 0, correction=0)
    exact = (wide[0] - mean) / (var + 1e-5).sqrt() * wide[1] + wide[2]

    def f(x):
        return nn.batch_norm(x, None, None, weight, bias, True)

    for y in (torch.func.vjp(f, x)[0], torch.func.jvp(f, (x,), (x,))[0], torch.func.vmap(f)(x[None])[0]):
        assert y.dtype == x.dtype
        assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    gradient = torch.func.grad(lambda x: f(x).square().sum())(x)
    assert_close(gradient, torch.autograd.grad(f(x.requires_grad_()).square().sum(), x)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_vmap_keeps_half_precision(dtype, training):
    x = torch.from_numpy(rng(1).standard_normal((2, 8, 3, 4))).to(dtype)
    mean, var = (None, None) if training else (torch.zeros(3), torch.ones(3))
    weight = torch.rand(3)
    y = torch.func.vmap(lambda x: nn.batch_norm(x, mean, var, weight, None, training))(x)
    assert y.dtype == dtype
    want = torch.stack([nn.batch_norm(each.float(), mean, var, weight, None, training) for each in x])
    assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", torch.nan), ("momentum", torch.inf), ("eps", torch.inf), ("momentum", torch.tensor(torch.nan)),
     ("eps", torch.tensor(torch.inf))],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_numbers_that_are_not_finite_are_refused(name, value, training):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=f"batch_norm {name} must be finite"):
        nn.batch_norm(torch.randn(4, 3), mean, var, training=training, **{name: value})
    assert (mean.tolist(), var.tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("alias", [lambda running: running, lambda running: running.view(-1)])
def test_one_tensor_as_both_running_statistics_is_refused(alias):
    running = torch.ones(3)
    with pytest.raises(ValueError, match="running_mean and running_var must be two tensors"):
        nn.batch_norm(torch.randn(4, 3), running, alias(running), training=True)
    assert running.tolist() == [1.0] * 3
    nn.batch_norm(torch.randn(4, 3), running, alias(running))
