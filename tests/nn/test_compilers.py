"""Test the operators with opcheck, compilers, tracers and transforms."""

import copy
from itertools import product

import numpy as np
import pytest
from support import needs_a_compiler

import gpu_bn

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.operator_cases import arguments, reference, train_some
from support.tensors import inputs, running, tensor
from torch.library import opcheck
from torch.testing import assert_close

from gpu_bn import nn
from gpu_bn.nn.operators import (
    composition,
)

pytestmark = pytest.mark.usefixtures("forget_compilations")


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
@pytest.mark.one_in(4)
def test_opcheck(name, options):
    given = arguments(name, **options)
    results = opcheck(getattr(torch.ops.gpu_bn, name).default, given)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


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
@pytest.mark.parametrize(
    ("momentum", "dynamic", "memory_format"),
    [
        (0.1, False, torch.contiguous_format),
        (0.1, True, torch.channels_last),
        (None, False, torch.channels_last),
        (None, True, torch.contiguous_format),
    ],
)
def test_inductor_training_is_bitwise_that_of_eager(momentum, dynamic, memory_format):
    """The cases cover each pair of values. Testing every combination would take more compilations."""
    model = nn.BatchNorm2d(3, momentum=momentum, activation="relu")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=dynamic)
    for size in (4, 6):
        x = tensor(size, 3, 5, 6, dtype=torch.float32, grad=False).to(memory_format=memory_format)
        for eager, other in zip(train_some(model, x), train_some(compiled, x), strict=True):
            assert torch.equal(eager, other)
            assert eager.stride() == other.stride()


@pytest.mark.parametrize("momentum", [np.float64(0.3), np.int64(1), torch.tensor(0.3)], ids=repr)
def test_compiled_training_takes_a_momentum_that_is_data(momentum):
    """A momentum can be a NumPy scalar, which Dynamo traces as an array, or a tensor."""
    model = nn.BatchNorm2d(3, momentum=momentum, activation="relu")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = tensor(4, 3, 5, 6, dtype=torch.float32, grad=False)
    for eager, other in zip(train_some(model, x), train_some(compiled, x), strict=True):
        assert_close(eager, other)


@needs_a_compiler
@pytest.mark.slow
def test_compiled_training_with_inductor():
    """The operator trains correctly between operations that inductor fuses; test_inductor.py covers a normal run."""
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


def test_compiled_training_of_stacked_models():
    model, x = nn.BatchNorm1d(3, activation="silu"), tensor(2, 4, 3, grad=False)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    results = []
    for compiler in (lambda f: f, torch.compile(backend="eager", fullgraph=True)):
        parameters, buffers = torch.func.stack_module_state([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
        results.append((compiler(torch.func.vmap(torch.func.grad(loss)))(parameters, buffers, x), buffers))
    assert_close(*results)
    assert buffers["num_batches_tracked"].tolist() == [1, 1]
