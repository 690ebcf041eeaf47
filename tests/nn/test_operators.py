"""The operators and the functional form: derivatives of any order, compilers, transforms, memory formats, threads."""

import copy
import dataclasses
from itertools import product

import numpy as np
import pytest
from support import needs_a_compiler
from support.tensors import inputs, running, tensor

import gpu_bn
from gpu_bn.activations import IDENTITY, ROWS

torch = pytest.importorskip("torch")

from torch.library import opcheck
from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn import functional
from gpu_bn.nn.operators import (
    autograd,
    composition,
    cpu_calls,
    library,
)


@pytest.fixture(autouse=True)
def _forget_compilations():
    """The limit of recompilations is of a process, not of a test."""
    yield
    torch._dynamo.reset()


def reference(x, mean, var, weight, bias, training, residual=None, activation="identity"):
    """By torch's own functions."""
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training)
    z = z if residual is None else z + residual
    return composition.activate(z, ROWS[activation].default)


# ----------------------------------------------------------------------------------------------------- derivatives
@pytest.mark.parametrize("activation", list(ROWS))
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(activation, training):
    x, weight, bias, residual = inputs()
    mean, var = running()

    def call(x, weight, bias, residual):
        return nn.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, residual=residual, activation=activation
        )

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))


@pytest.mark.parametrize(("affine", "training"), list(product(["weight", "bias", "none"], [True, False])))
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_second_derivatives_without_some_arguments(affine, training, activation):
    x, weight, bias, _ = inputs((2, 3, 3, 2))
    parameters = {"weight": weight} if affine == "weight" else {"bias": bias} if affine == "bias" else {}

    def call(x, *values):
        chosen = dict(zip(parameters, values, strict=True))
        statistics = () if training else running(3)
        return nn.batch_norm(x, *statistics, **chosen, training=training, activation=activation)

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_batched_gradients(training, activation):
    def call(x, weight, bias, residual):
        return nn.batch_norm(x, *running(), weight, bias, training, residual=residual, activation=activation)

    given = inputs()
    y, many = call(*given), tensor(5, 3, 2, 4, grad=False)
    batched = torch.autograd.grad(y, given, many, is_grads_batched=True, retain_graph=True)
    for at, dy in enumerate(many):
        assert_close(
            [gradients[at] for gradients in batched], list(torch.autograd.grad(y, given, dy, retain_graph=True))
        )
    assert torch.autograd.gradcheck(call, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, given, check_batched_grad=True)


def test_third_derivatives():
    """Those of the textbook's formula; torch's own are wrong, they take the saved statistics for constants."""

    def textbook(x, weight, bias):
        var, mean = torch.var_mean(x, 0, correction=0)
        return weight * (x - mean) / (var + 1e-5).sqrt() + bias

    def third(function):
        x, weight, bias, _ = inputs((4, 2))
        y = function(x, weight, bias).sin().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
            y = (gradient**2).sum()
        return torch.autograd.grad(y, (x, weight, bias))

    ours = third(lambda x, weight, bias: nn.batch_norm(x, None, None, weight, bias, True))
    assert_close(ours, third(textbook), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("quick", [True, False])
def test_only_gradients_asked_for_are_computed(needs, activation, quick, monkeypatch):
    asked = []
    doors = pytest.importorskip("gpu_bn.backends.cpu.doors", reason="numba is not installed", exc_type=ImportError)
    find, compute = doors.backward, autograd.algorithm.backward

    def found(*arguments):
        door = find(*arguments)

        def noted(*given):
            written = zip(library.NAMES, (given[4], given[8], given[9], given[5]), strict=True)
            asked.append({name for name, one in written if one is not None})
            return door.function(*given)

        return door._replace(function=noted)

    def watched(engine, dy, saved, need):
        results = compute(engine, dy, saved, need)
        asked.append({name for name, result in zip(library.NAMES, results, strict=True) if result is not None})
        return results

    if quick:
        monkeypatch.setattr(doors, "backward", found)
    else:
        monkeypatch.setattr(cpu_calls, "forward", lambda *_: None)
        monkeypatch.setattr(autograd.algorithm, "backward", watched)
    given = [t.detach().requires_grad_(need) for t, need in zip(inputs(), needs, strict=True)]
    twin = [t.detach().clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    y = nn.batch_norm(given[0], None, None, *given[1:3], True, residual=given[3], activation=activation)
    y.backward(dy := tensor(*y.shape, seed=9, grad=False))
    reference(twin[0], None, None, *twin[1:3], True, twin[3], activation).backward(dy)
    for mine, other, need in zip(given, twin, needs, strict=True):
        assert (mine.grad is not None) == need
        if need:
            assert_close(mine.grad, other.grad)
    wanted = {name for name, need in zip(library.NAMES, needs, strict=True) if need}
    wanted -= {"dresidual"} if activation == "identity" else set()  # it is dy
    assert asked[-1:] == ([wanted] if wanted else [])


def test_parameters_keep_their_own_dtypes():
    x = tensor(4, 3, 5, dtype=torch.bfloat16)
    weight, bias = tensor(3, dtype=torch.float32, seed=1), tensor(3, dtype=torch.float64, seed=2)
    nn.batch_norm(x, None, None, weight, bias, True, activation="relu").sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------- opcheck and compilers
def arguments(name, shape=(3, 2, 4), activation="relu", dtype=torch.float32, momentum=None, optional=True):
    x, weight, bias, residual = inputs(shape, dtype)
    if not optional:
        weight = bias = residual = None
    mean, var = running(shape[1], dtype)
    options = (1e-5, activation, 0.0)
    if name == "train":
        return (x, weight, bias, residual, mean, var, torch.tensor(3), momentum, *options)
    if name == "infer":
        return (x, weight, bias, residual, mean, var, *options)
    kept = (None, torch.stack((mean, var)).double(), torch.empty(0, dtype=torch.uint8))
    need = [True, optional, optional, optional and activation != "identity"]
    dy = tensor(*shape, dtype=dtype, seed=5)
    return (dy, x, weight, bias, residual, *kept, dtype, True, *options, 1, False, need)


@pytest.mark.parametrize("name", ["train", "infer", "backward"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "identity", "momentum": 0.1},
        {"shape": (2, 3, 4, 5), "dtype": torch.float64},
        {"optional": False, "momentum": 0.1},
        {"dtype": torch.bfloat16, "shape": (5, 3)},
    ],
    ids=str,
)
def test_opcheck(name, options):
    given = arguments(name, **options)
    results = opcheck(getattr(torch.ops.gpu_bn, name).default, given)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def train_some(model, x, steps=3):
    """Outputs, gradients and state after some steps."""
    results = []
    for step in range(steps):
        leaf = (x + step).requires_grad_()
        model.zero_grad()
        y = model(leaf)
        y.backward(torch.ones_like(y) * leaf.detach().cos())
        results += [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]
    return [*results, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_is_bitwise_that_of_eager(momentum, dynamic):
    model = nn.BatchNorm2d(3, momentum=momentum, activation="relu")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = tensor(4, 3, 5, 6, dtype=torch.float32, grad=False)
    for eager, other in zip(train_some(model, x), train_some(compiled, x), strict=True):
        assert torch.equal(eager, other)
    assert model.num_batches_tracked == 3


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inductor_training_is_bitwise_that_of_eager(momentum, dynamic, memory_format):
    model = nn.BatchNorm2d(3, momentum=momentum, activation="relu")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=dynamic)
    for size in (4, 6):
        x = tensor(size, 3, 5, 6, dtype=torch.float32, grad=False).to(memory_format=memory_format)
        for eager, other in zip(train_some(model, x), train_some(compiled, x), strict=True):
            assert torch.equal(eager, other)
            assert eager.stride() == other.stride()


@pytest.mark.parametrize("momentum", [np.float64(0.3), np.int64(1), torch.tensor(0.3)], ids=repr)
def test_compiled_training_takes_a_momentum_that_is_data(momentum):
    """NumPy's numbers, which are arrays there, and tensors."""
    model = nn.BatchNorm2d(3, momentum=momentum, activation="relu")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = tensor(4, 3, 5, 6, dtype=torch.float32, grad=False)
    for eager, other in zip(train_some(model, x), train_some(compiled, x), strict=True):
        assert_close(eager, other)


@needs_a_compiler
def test_compiled_training_with_inductor():
    """One compilation for every run of the suite: the operator between operations that inductor fuses."""
    model = torch.nn.Sequential(torch.nn.Tanh(), nn.BatchNorm1d(6, activation="silu"), torch.nn.Tanh())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = tensor(8, 6, dtype=torch.float64, grad=False)
    for eager, other in zip(train_some(model.double(), x, 2), train_some(compiled.double(), x, 2), strict=True):
        assert_close(eager, other, rtol=1e-12, atol=1e-12)


def test_compiled_evaluation_is_fused_and_as_exact():
    """In evaluation the compiler sees plain operations; they keep the tolerance of every backend."""
    from gpu_bn.testing import Case, build, compare, oracle, tolerance

    for dtype, mean, activation in product(("float32", "bfloat16", "float16"), (0.5, 1e4), ("identity", "silu")):
        if mean > 1 and dtype != "float32":
            continue
        problem = build(Case((6, 5, 7), dtype, mode="eval", mean=mean, std=1.0, activation=activation, residual=True))
        tensors = [gpu_bn.testing.ADAPTERS["torch"].to_backend(getattr(problem, name)) for name in
                   ("x", "running_mean", "running_var", "weight", "bias", "residual")]  # fmt: skip
        x, mean_, var, weight, bias, residual = tensors
        y = composition.batch_norm(
            x, mean_, var, weight, bias, residual, problem.eps, gpu_bn.Activation(*problem.activation)
        )
        truth = oracle(problem)
        allowed = tolerance(problem, truth)["y"]
        assert compare(f"{dtype} {mean}", gpu_bn.testing.ADAPTERS["torch"].to_numpy(y), truth.y, allowed) <= 1
    graphs = []
    model = nn.BatchNorm1d(3, activation="relu").eval()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    x = tensor(4, 3, dtype=torch.float32)
    assert_close(compiled(x), model(x))
    assert not [node for node in graphs[0].graph.nodes if "gpu_bn" in str(node.target)]


def test_make_fx_and_export_keep_one_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.BatchNorm2d(3, momentum=None, activation="relu")
    x = tensor(2, 3, 4, 4, dtype=torch.float32, grad=False)
    mean, var = running(3, torch.float32)
    graph = make_fx(lambda x, mean, var: nn.batch_norm(x, mean, var, training=True))(x, mean.clone(), var.clone())
    assert [str(node.target) for node in graph.graph.nodes].count("gpu_bn.train.default") == 1
    assert torch.equal(graph(x, mean.clone(), var.clone()), nn.batch_norm(x, mean, var, training=True))

    batch = {"input": {0: torch.export.Dim("batch", min=2)}}
    training = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=batch).module()
    larger = tensor(5, 3, 4, 4, dtype=torch.float32, grad=False)
    assert torch.equal(training(larger), model(larger))
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(training.named_buffers())[name], buffer), name
    evaluation = torch.export.export(model.eval(), (x,), dynamic_shapes=batch)
    assert_close(evaluation.module()(larger), model(larger))
    assert not [node for node in evaluation.graph.nodes if "gpu_bn" in str(node.target)]


def test_fx_and_jit_trace_a_layer_as_one_node():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, activation="relu"))
    x = tensor(2, 3, 4, 4, dtype=torch.float32, grad=False)
    graph = torch.fx.symbolic_trace(model.eval())
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert_close(graph(x), model(x))
    assert_close(torch.jit.trace(model, x)(x), model(x))


# ------------------------------------------------------------------------------------- torch.func and forward mode
@pytest.mark.parametrize("training", [True, False])
def test_transforms_are_right(training):
    x, weight, bias, residual = inputs((4, 3, 5), grad=False)
    mean, var = running(3)

    def call(function, x, weight, bias, residual):
        statistics = (None, None) if training else (mean, var)
        if function is reference:
            return reference(x, *statistics, weight, bias, training, residual, "silu").sum()
        return nn.batch_norm(x, *statistics, weight, bias, training, residual=residual, activation="silu").sum()

    given = (x, weight, bias, residual)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        ours, theirs = (transform(lambda *a, f=f: call(f, *a))(*given) for f in (nn.batch_norm, reference))
        assert_close(ours, theirs)
    for f in (nn.batch_norm, reference):
        tangents = torch.func.jvp(lambda *a, f=f: call(f, *a), given, given)[1]
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(value, value) for value in given]
            forward = torch.autograd.forward_ad.unpack_dual(call(f, *duals)).tangent
        assert_close(tangents, forward)
        if f is nn.batch_norm:
            ours = tangents
    assert_close(ours, tangents)
    batched = torch.func.vmap(lambda x: nn.batch_norm(x, None, None, weight, bias, True))(torch.stack([x, 2 * x + 1]))
    assert_close(batched[1], nn.batch_norm(2 * x + 1, None, None, weight, bias, True))


def test_the_operator_refuses_to_lose_a_tangent():
    given = arguments("train")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given[0].detach(), torch.ones_like(given[0]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.gpu_bn.train(dual, *given[1:])


def test_vmap_over_running_statistics_that_are_not_batched_is_refused():
    (mean, var), counter = running(3), torch.tensor(0)
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input while the running_mean"):
        torch.func.vmap(lambda x: nn.batch_norm(x, mean, var, training=True, num_batches_tracked=counter))(
            tensor(2, 4, 3, grad=False)
        )
    assert torch.equal(mean, running(3)[0])
    assert counter == 0


# ------------------------------------------------------------------------------------------------------ behaviour
@pytest.mark.parametrize(
    ("shape", "memory_format"), [((4, 6, 5, 7), torch.channels_last), ((2, 6, 3, 4, 5), torch.channels_last_3d)]
)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_memory_format_of_outputs_and_gradients(shape, memory_format, activation):
    x, weight, bias, residual = (t.detach() for t in inputs(shape, torch.float32))
    x = x.to(memory_format=memory_format).requires_grad_()
    residual.requires_grad_()
    y = nn.batch_norm(x, None, None, weight, bias, True, residual=residual, activation=activation)
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.ones(shape))
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)
    assert dresidual.shape == residual.shape


@pytest.mark.parametrize("arrange", [
    lambda g: g.transpose(0, 2).contiguous().transpose(0, 2),
    lambda g: g[:1, :1, :1].expand_as(g),
    lambda g: torch.cat([g, g], 1)[:, ::2],
])  # fmt: skip
def test_gradients_of_any_strides(arrange):
    x, twin = tensor(4, 3, 5), tensor(4, 3, 5)
    dy = arrange(tensor(4, 3, 5, seed=4, grad=False))
    assert dy.shape == x.shape
    assert not dy.is_contiguous()
    nn.batch_norm(x, training=True, activation="relu").backward(dy)
    reference(twin, None, None, None, None, True, activation="relu").backward(dy)
    assert_close(x.grad, twin.grad)


def test_autocast_leaves_dtypes_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert model[1](x[:, :1].expand(-1, 4, -1, -1)).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_empty_batches_stay_in_the_graph():
    layer = nn.BatchNorm1d(3, activation="relu")
    x = torch.empty(0, 3, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert (layer.num_batches_tracked, layer.running_var.tolist()) == (1, [1.0] * 3)
    assert nn.batch_norm(torch.empty(2, 0, 3), training=True).shape == (2, 0, 3)


def test_statistics_changed_after_an_evaluation_do_not_change_its_gradient():
    layer, x = nn.BatchNorm1d(3), tensor(6, 3, dtype=torch.float32)
    expected = torch.autograd.grad(layer.eval()(x).square().sum(), x)[0]
    y = layer(x).square().sum()
    layer.train()(x + 100)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_what_is_overwritten_before_the_backward_pass_is_noticed():
    x = tensor(6, 3)
    copied = x * 1
    y = nn.batch_norm(copied, training=True)
    copied.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    mean, var = running(3)
    before = mean._version
    nn.batch_norm(x, mean, var, training=True)
    assert mean._version > before


def test_checkpointing_can_leave_statistics_alone():
    from torch.utils.checkpoint import checkpoint

    plain, twice, once = (nn.BatchNorm1d(3) for _ in range(3))
    gradients = []
    for layer, options in ((plain, None), (twice, {}), (once, {"context_fn": nn.checkpoint_contexts})):
        x = tensor(6, 3, dtype=torch.float32)
        y = layer(x) if options is None else checkpoint(layer, x, use_reentrant=False, **options)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert [layer.num_batches_tracked.item() for layer in (plain, twice, once)] == [1, 2, 1]
    assert torch.equal(plain.running_mean, once.running_mean)
    assert torch.equal(gradients[0], gradients[2])


def test_two_forwards_before_one_backward_in_ddp(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = nn.BatchNorm1d(3)
        model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
        x, other = tensor(6, 3, dtype=torch.float32), tensor(5, 3, dtype=torch.float32, seed=1)
        for module in (layer, model):
            (module(x).square().sum() + module(other).square().sum()).backward()
        assert_close(model.module.weight.grad, layer.weight.grad)
        assert torch.equal(model.module.running_mean, layer.running_mean)
    finally:
        dist.destroy_process_group()


def test_runs_under_the_deterministic_flag_and_gives_the_same_bits():
    def run():
        return train_some(nn.BatchNorm2d(16, activation="gelu"), tensor(8, 16, 20, 20, dtype=torch.float32, grad=False))

    before = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_and_saved_tensors_on_the_cpu():
    layer, x = nn.BatchNorm1d(3), tensor(6, 3, dtype=torch.float32)
    with torch.inference_mode():
        y = copy.deepcopy(layer)(x)
    assert torch.equal(y, layer(x))
    with torch.autograd.graph.save_on_cpu():
        z = layer(x).square().sum()
    z.backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------------------- on a GPU, without one
class Elsewhere:
    """A backend as one on a GPU may be: momentum is a tensor, and a mask is kept in place of the residual."""

    name = "elsewhere"
    keeps_bits = True

    def __init__(self):
        self.cpu = library.registry.load("torch")
        self.momenta, self.residuals = [], []

    def __getattr__(self, name):
        return getattr(self.cpu, name)

    def forward(self, x, spec, *arguments):
        self.momenta.append(spec.momentum)
        spec = dataclasses.replace(spec, momentum=float(spec.momentum))
        y, saved = self.cpu.forward(x, spec, *arguments)
        if spec.activation.name == "relu" and saved.has_residual:
            saved = dataclasses.replace(saved, mask=(y > 0).to(torch.uint8).flatten(), residual=None)
        return y, saved

    def backward(self, dy, saved, need):
        self.residuals.append(saved.residual)
        if saved.mask is not None:
            dy = dy * saved.mask.view(dy.shape)
            saved = dataclasses.replace(saved, mask=None, spec=dataclasses.replace(saved.spec, activation=IDENTITY))
        return self.cpu.backward(dy, saved, need)


@pytest.fixture
def elsewhere(monkeypatch):
    backend = Elsewhere()
    monkeypatch.setattr(library.registry, "serving", lambda *_: backend)
    return backend


def test_cumulative_momentum_is_computed_where_the_counter_is(monkeypatch, elsewhere):
    """A counter on a GPU is never read by the host."""
    for momentum, at in ((None, None), (None, torch.tensor(0.5, device="meta"))):
        weight = library.batch_weight(momentum, at, torch.tensor(4, device="meta"))
        assert isinstance(weight, torch.Tensor)
        assert weight.device.type == "meta"
    assert library.batch_weight(None, None, torch.tensor(4)) == 0.2
    monkeypatch.setattr(library, "batch_weight", lambda _, __, counter: (counter + 1).double().reciprocal())
    layer, plain = nn.BatchNorm1d(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None)
    for seed in range(3):
        x = tensor(6, 3, dtype=torch.float32, seed=seed)
        layer(x)
        plain(x)
    assert [m.item() for m in elsewhere.momenta] == pytest.approx([1, 1 / 2, 1 / 3])
    assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_serves_in_place_of_the_residual(elsewhere, training):
    x, weight, bias, residual = inputs()

    def call(*given):
        x, weight, bias, residual = given
        mean, var = running()
        return nn.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation="relu")

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))
    assert set(elsewhere.residuals) == {None}


def test_modes_and_subclasses_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    x = tensor(6, 3)
    with Watch():
        nn.batch_norm(x, training=True).sum().backward()
    assert {"gpu_bn.train.default", "gpu_bn.backward.default"} <= seen
    two = x.detach()
    negated = torch._neg_view(two)
    assert_close(nn.batch_norm(negated, training=True), nn.batch_norm(-two, training=True))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = nn.BatchNorm1d(3)(mode.from_tensor(x))
    assert type(fake) is torch._subclasses.FakeTensor


# ------------------------------------------------------------------------------------------------- the front door
def test_the_front_door_differentiates_tensors():
    x, weight, bias, residual = inputs((4, 5, 3), torch.float64)
    for axis in (1, -1, 0):
        size = x.shape[axis]
        vectors = [v.detach()[:1].expand(size).clone().requires_grad_() for v in (weight, bias)]
        y = gpu_bn.batch_norm(
            x, None, None, *vectors, training=True, residual=residual, activation="relu", channel_axis=axis
        )
        expected = reference(x.movedim(axis, 1), None, None, *vectors, True, residual.movedim(axis, 1), "relu")
        assert_close(y, expected.movedim(1, axis))
        for ours, theirs in zip(*(torch.autograd.grad(v.square().sum(), (x, *vectors, residual)) for v in
                                  (y, expected)), strict=True):  # fmt: skip
            assert_close(ours, theirs)
    out = torch.empty(4, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        gpu_bn.batch_norm(x, training=True, out=out)
    with torch.no_grad():
        assert gpu_bn.batch_norm(x, training=True, out=out) is out
        assert torch.equal(out, gpu_bn.batch_norm(x, training=True))
    assert_close(gpu_bn.identity_affine(x.detach())[1], x.detach().mean((0, 2)))


def test_importing_the_package_and_arrays_do_not_import_torch():
    from support.fresh import loaded_after

    assert "torch" in loaded_after("import gpu_bn.nn")
    loaded = loaded_after("import gpu_bn, numpy; gpu_bn.batch_norm(numpy.ones((4, 3)), training=True)")
    assert not {"torch", "gpu_bn.nn"} & loaded
    code = "import torch, gpu_bn; gpu_bn.batch_norm(torch.ones(4, 3), training=True)"
    assert "gpu_bn.nn.functional" in loaded_after(code)


def test_functional_is_where_layers_call():
    assert functional.batch_norm is nn.batch_norm
